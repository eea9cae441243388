"""A first user of each hook that no algorithm of the catalogue has, and what compose makes of wrong ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_zoo import Batch, Component, compose, fit, run_stream, supervised
from cl_zoo.models import mlp
from tests.tiny import close, same_bytes, tiny_learner, tiny_stream

KEY = jax.random.key(2)


def eligibility_trace(decay: float) -> Component:
    """e <- decay e + g;  the optimiser gets e in the place of g."""

    def init(context: Any, state: Any, batch: Any, key: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, state.params)

    def transform(context: Any, state: Any, part: Any, record: Any, grads: Any, key: Any) -> Any:
        trace = jax.tree.map(lambda e, g: decay * e + g, part, grads)
        return trace, trace

    return Component("trace", init=init, transform=transform)


def only_hidden_units(mask: Any) -> Component:
    """Columns of the first kernel that the mask leaves out stay, and so do their moments."""

    def constrain(
        context: Any, state: Any, part: Any, record: Any, params: Any, opt_state: Any, key: Any
    ) -> tuple[Any, Any, Any]:
        def put_back(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda a, b: jnp.where(mask, a, b) if a.shape[-1:] == mask.shape else a, new, old)

        return (
            put_back(params, record.old_params),
            put_back(opt_state, record.old_opt_state),
            part + jnp.sum(mask, dtype=jnp.int32),
        )

    return Component("rows", init=lambda context, state, batch, key: jnp.zeros((), jnp.int32), constrain=constrain)


def each_batch_twice() -> Component:
    """Every second batch is left out: the one before it comes again."""

    def init(context: Any, state: Any, batch: Batch, key: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, batch)

    def prepare(context: Any, state: Any, part: Any, batch: Batch, key: Any) -> tuple[Batch, Any]:
        kept = jax.lax.cond(state.step % 2 == 0, lambda: batch, lambda: part)
        return kept, kept

    return Component("twice", init=init, prepare=prepare)


MASK = jnp.arange(5) < 2
USERS = {
    "transform": lambda: eligibility_trace(0.9),
    "constrain": lambda: only_hidden_units(MASK),
    "prepare": each_batch_twice,
}


@pytest.mark.parametrize("hook", USERS)
def test_laws_over_the_new_hooks(hook: str, tiny_images: Any, tmp_path: Any) -> None:
    """Padding changes nothing of their parts; whatever stands in absent examples changes nothing; fit is run_stream."""
    stream = tiny_stream(tiny_images)
    learner = tiny_learner(stream, supervised(), USERS[hook]())
    whole = run_stream(learner, stream, KEY)
    host = fit(learner, stream, KEY, tmp_path, progress=False, checkpoint_every=4, checkpoint_seconds=0)
    close(host.state, whole.state, rtol=1e-4, atol=1e-5)
    state, update = whole.state, jax.jit(learner.update)
    batch, _ = stream.next(stream.init(KEY))
    rows = jnp.arange(8) < 5
    absent = batch._replace(weight=rows.astype(jnp.float32))
    spoilt = absent._replace(x=jnp.where(rows[:, None, None], batch.x, 255), y=jnp.where(rows, batch.y, 77))
    same_bytes(update(state, absent), update(state, spoilt))
    padding = batch._replace(weight=jnp.zeros(8))
    after, _ = update(state, padding)
    same_bytes(after._replace(step=state.step), state)
    moved, _ = update(state, batch)
    name = next(iter(state.parts))
    assert any(
        (a != b).any() for a, b in zip(*map(jax.tree.leaves, (moved.parts[name], state.parts[name])), strict=True)
    )


def test_an_eligibility_trace_equals_a_loop() -> None:
    model = mlp((3,), 2, hidden=())
    learner = compose(model, optax.sgd(0.1), supervised(), eligibility_trace(0.5))
    plain = compose(model, optax.sgd(0.1), supervised())
    batch = Batch(jax.random.normal(KEY, (4, 3)), jnp.array([0, 1, 1, 0]), None, jnp.ones(4))
    state, start = learner.init(KEY, batch), plain.init(KEY, batch)
    params, trace = start.params, jax.tree.map(jnp.zeros_like, start.params)
    for _ in range(4):
        state, _ = learner.update(state, batch)
        after, _ = plain.update(start._replace(params=params), batch)
        gradient = jax.tree.map(lambda new, old: (old - new) / 0.1, after.params, params)
        trace = jax.tree.map(lambda e, g: 0.5 * e + g, trace, gradient)
        params = jax.tree.map(lambda p, e: p - 0.1 * e, params, trace)
    close(state.params, params, rtol=1e-4, atol=1e-6)


def test_a_masked_row_does_not_move_under_adam(tiny_images: Any) -> None:
    """Adam moves on a gradient of 0; `constrain` puts weights and moments back, to the bit."""
    stream = tiny_stream(tiny_images)
    learner = tiny_learner(stream, supervised(), only_hidden_units(MASK))
    state = run_stream(learner, stream, KEY).state
    batch, _ = stream.next(stream.init(KEY))
    first = learner.init(jax.random.split(KEY)[0], batch)
    kernels = [np.asarray(each.params["hidden_0"]["kernel"]) for each in (first, state)]
    np.testing.assert_array_equal(kernels[0][:, 2:], kernels[1][:, 2:])
    assert np.abs(kernels[0][:, :2] - kernels[1][:, :2]).max() > 1e-3
    moments = np.asarray(state.opt_state[0].nu["hidden_0"]["kernel"])
    assert (moments[:, 2:] == 0).all() and (moments[:, :2] > 0).any()
    assert int(state.parts["rows"]) == 2 * int(state.step)


def test_a_batch_used_for_two_epochs_equals_a_loop(tiny_images: Any) -> None:
    stream = tiny_stream(tiny_images, "domain")
    learner, plain = (tiny_learner(stream, supervised(), *more) for more in ((each_batch_twice(),), ()))
    batches, cursor = [], stream.init(KEY)
    for _ in range(4):
        batch, cursor = stream.next(cursor)
        batches.append(batch)
    state, wanted = learner.init(KEY, batches[0]), plain.init(KEY, batches[0])
    for i, batch in enumerate(batches):
        state, _ = learner.update(state, batch)
        wanted, _ = plain.update(wanted, batches[i - i % 2])
    close(state.params, wanted.params)


def wrong_order(context: Any, state: Any, part: Any, grads: Any, record: Any, key: Any) -> Any:
    return grads, part


def too_few(context: Any, state: Any, part: Any) -> Any:
    return jnp.zeros(())


@pytest.mark.parametrize(
    ("hook", "given", "wanted"),
    [
        ("transform", wrong_order, "context, state, part, record, grads, key"),
        ("penalty", too_few, "context, state, part, params"),
        ("observe", lambda *, state: state, "context, state, part, record, key"),
    ],
)
def test_a_hook_with_other_arguments_is_refused(hook: str, given: Any, wanted: str) -> None:
    message = rf"the hook {hook} of 'mine' takes other arguments than \({wanted}\)"
    with pytest.raises(ValueError, match=message):
        compose(mlp((3,), 2), optax.sgd(0.1), supervised(), Component("mine", **{hook: given}))


SWAPPED = """
from cl_zoo.types import Component, Context, Key, PyTree, Record, TrainState


def transform(
    context: Context, state: TrainState, part: None, grads: PyTree, record: Record, key: Key
) -> tuple[PyTree, None]:
    return grads, part


def right(
    context: Context, state: TrainState, part: None, record: Record, grads: PyTree, key: Key
) -> tuple[PyTree, None]:
    return grads, part


Component("right", transform=right)
Component("swapped", transform=transform)
"""


def test_a_type_checker_finds_swapped_arguments(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    file = tmp_path / "component.py"
    file.write_text(SWAPPED)
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "mypy", "--config-file", "", "--ignore-missing-imports", str(file)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    errors = [line for line in result.stdout.splitlines() if "error:" in line and "component.py" in line]
    swapped = 1 + SWAPPED.splitlines().index('Component("swapped", transform=transform)')
    assert len(errors) == 1 and f"component.py:{swapped}:" in errors[0] and "TransformHook" in errors[0], result.stdout


def test_no_hook_is_typed_by_an_ellipsis() -> None:
    text = (Path(__file__).parents[1] / "cl_zoo" / "types.py").read_text()
    component = text[text.index("class Component(") :]
    assert "Callable[" not in component


def test_every_hook_draws_from_a_key_of_its_own_at_every_step(tiny_images: Any) -> None:
    """No two hooks, components or steps share one; another component beside changes none of them."""
    drawn: dict[tuple[str, str], bytes] = {}

    def telling(name: str) -> Component:
        def told(hook: str, key: Any) -> None:
            jax.debug.callback(lambda data: drawn.__setitem__((name, hook), bytes(data)), jax.random.key_data(key))

        def prepare(context: Any, state: Any, part: Any, batch: Any, key: Any) -> Any:
            told("prepare", key)
            return batch, part

        def loss(context: Any, state: Any, part: Any, params: Any, forward: Any, batch: Any, key: Any) -> Any:
            told("loss", key)
            return jnp.zeros(()), {}

        def transform(context: Any, state: Any, part: Any, record: Any, grads: Any, key: Any) -> Any:
            told("transform", key)
            return grads, part

        def observe(context: Any, state: Any, part: Any, record: Any, key: Any) -> Any:
            told("observe", key)
            return state, part

        return Component(name, prepare=prepare, loss=loss, transform=transform, observe=observe)

    def keys_of(*names: str) -> list[dict[tuple[str, str], bytes]]:
        """At two steps."""
        stream = tiny_stream(tiny_images)
        learner = tiny_learner(stream, supervised(), *(telling(name) for name in names))
        batch, _ = stream.next(stream.init(KEY))
        state, found = learner.init(KEY, batch), []
        for _ in range(2):
            drawn.clear()
            state, _ = jax.jit(learner.update)(state, batch)
            jax.effects_barrier()
            found.append(dict(drawn))
        return found

    one, two = keys_of("a", "b")
    assert len({*one.values(), *two.values()}) == len(one) + len(two) == 16
    alone, _ = keys_of("a")
    assert len(alone) == 4 and all(one[place] == key for place, key in alone.items())


def test_actions_are_drawn_from_predict_or_are_its_likeliest() -> None:
    learner = compose(mlp((3,), 4, hidden=()), optax.sgd(0.1), supervised())
    batch = Batch(jax.random.normal(KEY, (5, 3)), jnp.zeros(5, jnp.int32), None, jnp.ones(5))
    state = learner.init(KEY, batch)
    log_p = jax.nn.log_softmax(learner.predict(state, batch.x))
    action, info = learner.act(state, batch.x, KEY, greedy=True)
    np.testing.assert_array_equal(action, jnp.argmax(log_p, axis=-1))
    np.testing.assert_allclose(info["log_probability"], jnp.max(log_p, axis=-1), rtol=1e-6)
    drawn, _ = jax.vmap(lambda key: learner.act(state, batch.x, key))(jax.random.split(KEY, 4000))
    found = jax.nn.one_hot(drawn, 4).mean(0)
    np.testing.assert_allclose(found, jnp.exp(log_p), atol=0.04)


def test_a_component_with_act_chooses(tiny_images: Any) -> None:
    def act(context: Any, state: Any, part: Any, x: Any, key: Any) -> tuple[Any, Any]:
        return part + jnp.arange(x.shape[0]), {"kept": part}

    chooser = Component("chooser", init=lambda context, state, batch, key: jnp.asarray(7), act=act)
    learner = compose(mlp((3,), 4), optax.sgd(0.1), supervised(), chooser)
    batch = Batch(jnp.ones((2, 3)), jnp.zeros(2, jnp.int32), None, jnp.ones(2))
    action, info = learner.act(learner.init(KEY, batch), batch.x, KEY)
    assert action.tolist() == [7, 8] and int(info["kept"]) == 7
    with pytest.raises(ValueError, match="only one component may have the hook act, but these do: chooser, other"):
        compose(mlp((3,), 4), optax.sgd(0.1), supervised(), chooser, chooser._replace(name="other"))
