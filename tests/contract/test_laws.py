"""The laws that every algorithm of the catalogue keeps. To be registered is to be tested."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from cl_zoo import (
    Batch,
    Component,
    catalogue,
    continual_backprop,
    ewc,
    fit,
    replay,
    stream_program,
    supervised,
    sweep,
    weight_interpolation,
)
from cl_zoo._catalogue import Entry, Null
from cl_zoo.streams import permuted_mnist
from cl_zoo.training import _run_stream, loop
from cl_zoo.training._fit import _programs
from cl_zoo.training.checkpoint import Checkpoints
from cl_zoo.training.loop import stream_functions
from tests.conftest import forget_programs
from tests.tiny import (
    BATCH,
    STEPS,
    close,
    entry_components,
    entry_learner,
    naive_component,
    raw,
    same_bytes,
    tiny_learner,
    tiny_stream,
)

KEY = jax.random.key(3)
CONSTANT = {"l2_init", "context_distillation", "offline_distillation"}  # what they keep are the first parameters
OPTIMISERS = {False: optax.adam(1e-2), True: optax.sgd(0.1)}


def together(rows: int, replacement_rate: Any, alpha: Any, strength: Any) -> list[Component]:
    """One component for each way of keeping."""
    return [
        replay(20, batch_size=rows),
        continual_backprop(replacement_rate, maturity=2),
        weight_interpolation(alpha),
        ewc(strength),
    ]


# What is composed of many keeps the laws of what is one.
SUBJECTS: dict[str, Entry] = dict(catalogue()) | {
    "together": catalogue()["supervised"]._replace(
        name="together",
        factory=together,  # type: ignore[arg-type]
        arguments={"rows": 8, "replacement_rate": 0.0625, "alpha": 0.5, "strength": 1e2},
        numbers=("replacement_rate", "alpha", "strength"),
        null=Null({"rows": 0, "replacement_rate": 0.0, "alpha": 0.0, "strength": 0.0}, True, "all of theirs"),
        own_loss=False,
    )
}


@pytest.fixture(scope="module", params=list(SUBJECTS))
def subject(request: pytest.FixtureRequest, tiny_images: Any) -> Iterator[SimpleNamespace]:
    """One entry, its learner, and the pieces of a run that its laws share, each compiled once."""
    entry = SUBJECTS[request.param]
    stream = tiny_stream(tiny_images, entry.scenarios[0])
    learner = entry_learner(stream, entry)
    update = jax.jit(learner.update)
    programs = _programs(learner, stream_functions(stream), "test")
    state, cursor = programs["start"](stream.data, KEY)
    next_batch = jax.jit(lambda data, cursor: stream.next(data, cursor, lambda x: None))

    def train_task(state: Any, cursor: Any, t: int) -> tuple[Any, Any, list[dict[str, Any]]]:
        """One task, step by step: what the scanned program must equal."""
        state, _ = programs["begin"](stream.tasks, stream.data, KEY, (copy(state), copy(cursor)), jnp.int32(t))
        history = []
        for _ in range(STEPS):
            batch, cursor = next_batch(stream.data, cursor)
            state, metrics = update(state, batch)
            history.append(metrics)
        return programs["finish"](stream.data, KEY, (state, copy(cursor)), jnp.int32(t))[0], cursor, history

    states, metrics = [state], []
    for t in range(stream.n_tasks):
        state, cursor, history = train_task(state, cursor, t)
        states.append(state)
        metrics += history
    batch, _ = next_batch(stream.data, cursor)
    yield SimpleNamespace(
        entry=entry, stream=stream, learner=learner, update=update, states=states, metrics=metrics, batch=batch
    )
    forget_programs()


def copy(tree: Any) -> Any:
    """For programs that take their argument's memory."""
    return jax.tree.map(lambda leaf: leaf.copy(), tree)


@pytest.fixture(scope="module")
def naive(tiny_images: Any) -> Callable[..., Any]:
    """What the naive learner makes of the same run in a scenario, under Adam or under SGD, with the entry's network."""

    @functools.cache
    def run(scenario: str, sgd: bool, net: Callable[..., Any]) -> Any:
        stream = tiny_stream(tiny_images, scenario)
        learner = tiny_learner(stream, naive_component(scenario), optimiser=OPTIMISERS[sgd], net=net)
        return stream_program(learner, stream)(stream.tasks, stream.data, KEY)

    return run


@pytest.fixture(scope="module")
def whole(subject: SimpleNamespace) -> Any:
    """The same run as one compiled program."""
    return stream_program(subject.learner, subject.stream)(subject.stream.tasks, subject.stream.data, KEY)


def kinds(tree: Any) -> Any:
    """Structure, and shape, dtype and weak type of every leaf."""
    return jax.tree.structure(tree), [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in jax.tree.leaves(tree)]


def test_every_transition_keeps_the_kind_of_the_state(subject: SimpleNamespace) -> None:
    learner, stream, batch = subject.learner, subject.stream, subject.batch
    state = jax.eval_shape(lambda: subject.states[0])
    wanted = kinds(jax.eval_shape(lambda s: s, subject.states[0]))
    sample = jax.eval_shape(lambda: stream.sample(stream.data, 0, KEY))
    task = jax.eval_shape(lambda: jax.tree.map(lambda leaf: leaf[0], stream.tasks))
    assert kinds(jax.eval_shape(learner.begin_task, state, task, sample)) == wanted
    assert kinds(jax.eval_shape(learner.update, state, batch)[0]) == wanted
    assert kinds(jax.eval_shape(learner.end_task, state, sample)) == wanted
    assert kinds(jax.eval_shape(learner.adapt, state, batch)[0]) == wanted


def test_second_update_does_not_retrace(subject: SimpleNamespace) -> None:
    assert subject.update._cache_size() == 1


def test_jit_equals_eager(subject: SimpleNamespace) -> None:
    state = subject.states[1]
    close(subject.learner.update(state, subject.batch), subject.update(state, subject.batch), rtol=1e-4, atol=1e-5)


def test_scan_equals_loop(subject: SimpleNamespace, whole: Any) -> None:
    close(whole.state, subject.states[-1], rtol=1e-4, atol=1e-5)
    for name in whole.metrics:
        looped = jnp.stack([metrics[name] for metrics in subject.metrics])
        np.testing.assert_allclose(np.ravel(whole.metrics[name]), looped, rtol=1e-3, atol=1e-5, err_msg=name)


def test_numbers_and_seeds_are_one_nested_vmap_that_new_numbers_do_not_retrace(
    subject: SimpleNamespace, whole: Any
) -> None:
    entry = subject.entry

    def make(settings: Any) -> Any:
        return entry_learner(subject.stream, entry, **{name: settings[name] for name in entry.numbers})

    def run(factor: float) -> Any:
        values = {name: factor * jnp.array([0.5, 1.0]) * entry.arguments[name] for name in entry.numbers}
        values = values or {"nothing": jnp.zeros(2)}
        return sweep(make, values, subject.stream, jnp.stack([jax.random.key(8), KEY]), batch_size=4, keep_states=True)

    result = run(1.0)
    assert result.accuracy.shape == (2, 2, 4, 3)
    np.testing.assert_allclose(result.metrics["loss"][1, 1], whole.metrics["loss"], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(result.accuracy[1, 1], whole.accuracy, atol=0.02)
    # Two seeds differ in what is learnt within tasks, or in what is kept where nothing is.
    told = [raw(leaf).astype(float) for leaf in jax.tree.leaves((result.metrics, result.state.parts))]
    assert max(np.abs(leaf[0, 0] - leaf[0, 1]).max() for leaf in told) > 1e-3
    assert np.isfinite(run(0.5).accuracy).all()
    program = _run_stream._sweep_program(make, stream_functions(subject.stream), (2, 2), 4, False, True, ())
    assert program._cache_size() == 1


def test_eight_devices_equal_one(subject: SimpleNamespace) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    state = jax.device_put(subject.states[1], everywhere)
    batch = jax.tree.map(lambda leaf: jax.device_put(leaf, rows), subject.batch)
    assert BATCH % 8 == 0
    close(jax.jit(subject.learner.update)(state, batch), subject.update(subject.states[1], subject.batch), 1e-4, 1e-5)


def spoil(batch: Batch, rows: Any) -> Batch:
    """Rows of weight 0, full of what must not matter."""

    def put(tree: Any, value: int) -> Any:
        return jax.tree.map(
            lambda leaf: jnp.where(rows.reshape((-1,) + (1,) * (leaf.ndim - 1)), jnp.array(value, leaf.dtype), leaf),
            tree,
        )

    return Batch(put(batch.x, 255), put(batch.y, 77), put(batch.task, 99), put(batch.weight, 0))


def test_rows_of_weight_zero_change_nothing(subject: SimpleNamespace) -> None:
    rows = jnp.arange(BATCH) >= 5
    absent = subject.batch._replace(weight=jnp.where(rows, 0.0, 1.0))
    one, other = (subject.update(subject.states[1], batch) for batch in (spoil(subject.batch, rows), absent))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(one[1]))
    same_bytes(one, other)


def test_not_even_nan_in_rows_of_weight_zero(tiny_images: Any) -> None:
    stream = tiny_stream(tiny_images)
    learner = tiny_learner(stream, supervised())
    batch = Batch(jnp.full((BATCH, 4, 4), jnp.nan).at[:3].set(0.5), jnp.zeros(BATCH, int), jnp.zeros(BATCH, int),
                  (jnp.arange(BATCH) < 3).astype(jnp.float32))  # fmt: skip
    state = learner.init(KEY, batch)
    state, metrics = jax.jit(learner.update)(state, batch)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state.params, state.opt_state, metrics)))


def test_batch_of_padding_leaves_all_but_step(subject: SimpleNamespace) -> None:
    state = subject.states[2]
    after, metrics = subject.update(state, spoil(subject.batch, jnp.full(BATCH, True)))
    same_bytes(after._replace(step=state.step), state)
    assert int(after.step) == int(state.step) + 1
    assert all(np.isfinite(value) for value in metrics.values())


def test_killed_and_resumed_run_ends_in_the_same_bytes(
    subject: SimpleNamespace, whole: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str) -> Any:
        return fit(subject.learner, subject.stream, KEY, tmp_path / name, checkpoint_every=3, progress=False)

    once = run("once")
    with monkeypatch.context() as patch:
        # A kill in the middle of the second task, after metrics were written and before the checkpoint was.
        save = Checkpoints.save

        def die(self: Any, step: int, tree: Any) -> None:
            if step == STEPS + 3:
                raise SystemExit("killed")
            save(self, step, tree)

        patch.setattr(Checkpoints, "save", die)
        with pytest.raises(SystemExit):
            run("stopped")
    resumed = run("stopped")
    same_bytes(resumed, once)
    for file in ("metrics.csv", "accuracy.npy"):
        assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "once" / file).read_bytes()
    close(once.state, whole.state, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(once.accuracy, whole.accuracy, atol=1e-6)


def network(state: Any) -> Any:
    """The parameters of the network itself, without learned rates."""
    return state.params.get("params", state.params)


def layer(state: Any, name: str) -> Any:
    """A layer's kernel; of a decoder, its embedding."""
    params = network(state)
    return params["embedding"] if "embedding" in params else params[name]["kernel"]


def test_null_setting_equals_naive(subject: SimpleNamespace, naive: Callable[..., Any]) -> None:
    null = subject.entry.null
    if null is None:
        pytest.skip("it has no null setting")
    nulled = entry_learner(subject.stream, subject.entry, OPTIMISERS[null.sgd], **null.arguments)
    result = stream_program(nulled, subject.stream)(subject.stream.tasks, subject.stream.data, KEY)
    wanted = naive(subject.entry.scenarios[0], null.sgd, subject.entry.net)
    close(network(result.state), network(wanted.state), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(result.accuracy, wanted.accuracy, atol=1e-6)


def hooks(component: Component) -> list[str]:
    """Names of those that it has."""
    return [field for field, hook in component._asdict().items() if callable(hook)]


def at_test_time(entry: Entry) -> list[Component]:
    """Those of an entry's components that learn from test batches, whatever else they do."""
    return [component for component in entry_components(entry) if component.adapt and component.init]


def test_what_learns_at_test_time_moves_then_and_not_by_padding(subject: SimpleNamespace) -> None:
    """It learns without labels; from rows of weight 0 it learns nothing."""
    if not at_test_time(subject.entry):
        pytest.skip("it keeps nothing of test batches")
    state, rows, adapt = subject.states[2], jnp.arange(BATCH) >= 5, jax.jit(subject.learner.adapt)
    after, answers = adapt(state, subject.batch)
    for name in (component.name for component in at_test_time(subject.entry)):
        pairs = zip(jax.tree.leaves(state.parts[name]), jax.tree.leaves(after.parts[name]), strict=True)
        assert any(not np.array_equal(a, b) for a, b in pairs)
    moved = zip(jax.tree.leaves(state.params), jax.tree.leaves(after.params), strict=True)
    assert max(np.abs(a - b).max() for a, b in moved) > 1e-4
    plain = subject.learner.predict(state, subject.batch.x, subject.batch.task)
    assert answers.shape == plain.shape and np.abs(answers - plain).max() > 1e-4
    same_bytes(adapt(state, subject.batch._replace(y=0 * subject.batch.y)), (after, answers))

    absent = subject.batch._replace(weight=jnp.where(rows, 0.0, 1.0))
    found, wanted = (adapt(state, batch) for batch in (spoil(subject.batch, rows), absent))
    same_bytes((found[0], found[1][:5]), (wanted[0], wanted[1][:5]))
    same_bytes(adapt(state, spoil(subject.batch, jnp.full(BATCH, True)))[0], state)


def test_it_moves_what_it_should(subject: SimpleNamespace) -> None:
    first, *_, last = subject.states
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((last.params, last.parts, last.opt_state)))
    kernels = [layer(state, "output") for state in (first, last)]
    assert np.allclose(*kernels) != subject.entry.trains
    kept = first.parts.keys() - CONSTANT - {component.name for component in at_test_time(subject.entry)}
    for name, t in itertools.product(kept, range(subject.stream.n_tasks)):
        before, after = (jax.tree.leaves(state.parts[name]) for state in subject.states[t : t + 2])
        changed = [not np.array_equal(a, b) for a, b in zip(before, after, strict=True)]
        assert any(changed), f"{name} kept nothing of task {t}"
    for metric in ("ewc/penalty", "synaptic_intelligence/penalty", "mas/penalty", "lwf/loss"):
        if metric in subject.metrics[0]:
            values = [float(metrics[metric]) for metrics in subject.metrics]
            assert max(values[:STEPS]) == 0, f"{metric} on the first task"
            assert max(values[STEPS : 2 * STEPS]) > 0, f"{metric} on the second task"


def test_it_is_not_naive(subject: SimpleNamespace, naive: Callable[..., Any]) -> None:
    """Beyond its null setting, it changes what is learnt, or what is answered."""
    if subject.entry.name == "supervised":
        pytest.skip("it is the naive learner")
    wanted = naive(subject.entry.scenarios[0], False, subject.entry.net).state
    batch, components = subject.batch, entry_components(subject.entry)
    added = [component for component in components if component.name != "supervised"]
    if all(set(hooks(component)) <= {"init", "adapt"} for component in added):
        answers = subject.learner.adapt(wanted._replace(parts=subject.states[-1].parts), batch)[1]
        assert np.abs(answers - subject.learner.predict(wanted, batch.x, batch.task)).max() > 1e-4
        return
    if any(component.predict for component in components):
        other = tiny_learner(subject.stream, naive_component(subject.entry.scenarios[0]), net=subject.entry.net)
        answers = [each.predict(state, batch.x, batch.task) for each, state in (
            (subject.learner, subject.states[-1]), (other, wanted))]  # fmt: skip
        assert np.abs(answers[0] - answers[1]).max() > 1e-4
        return
    kernels = [layer(state, "hidden_0") for state in (wanted, subject.states[-1])]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-4


def test_metrics_are_scalars_with_fixed_names(subject: SimpleNamespace) -> None:
    names = {frozenset(metrics) for metrics in subject.metrics}
    assert len(names) == 1
    assert all(value.shape == () and value.dtype == jnp.float32 for value in subject.metrics[0].values())


@pytest.mark.parametrize("scenario", ["domain", "class"])
def test_it_runs_in_its_other_scenarios(subject: SimpleNamespace, tiny_images: Any, scenario: str) -> None:
    if scenario not in subject.entry.scenarios[1:]:
        pytest.skip("not one of its other scenarios")
    stream = tiny_stream(tiny_images, scenario)
    learner = entry_learner(stream, subject.entry)
    result = stream_program(learner, stream)(stream.tasks, stream.data, KEY)
    assert result.accuracy.shape == (4, 3)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((result.metrics, result.state.params)))


def test_rows_of_weight_zero_in_a_sample_change_nothing(subject: SimpleNamespace) -> None:
    sample = subject.stream.sample(subject.stream.data, 0, KEY)
    rows = jnp.arange(sample.weight.shape[1]) >= 15
    absent = sample._replace(weight=jnp.where(rows, 0.0, sample.weight))
    spoilt = jax.vmap(lambda batch: spoil(batch, rows))(sample)._replace(weight=absent.weight)
    end = jax.jit(subject.learner.end_task)
    same_bytes(end(subject.states[1], spoilt), end(subject.states[1], absent))


def test_state_does_not_grow_with_tasks(subject: SimpleNamespace, tiny_images: Any) -> None:
    if subject.entry.scenarios == ("skills",):
        pytest.skip("its network reads no images; what it keeps is a copy of the parameters")

    def size(n_tasks: int) -> int:
        stream = permuted_mnist(n_tasks, images=tiny_images, batch_size=BATCH, steps=STEPS)
        learner = entry_learner(stream, subject.entry)
        state, _ = jax.eval_shape(partial(loop.start, learner, stream), stream.data, KEY)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.parts))

    assert size(2) == size(7)
