"""Weight interpolation and its kin: what each claims of itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from cl_zoo import (
    Batch,
    Component,
    TaskInfo,
    compose,
    der,
    ema,
    ewc,
    fisher_merging,
    replay,
    reset_optimiser,
    supervised,
    weight_interpolation,
    wise_ft,
)
from cl_zoo.estimators.alignment import match_activations, permute, unit_correlations
from cl_zoo.estimators.averaging import recompute_statistics
from cl_zoo.estimators.fisher import fisher_diagonal
from cl_zoo.models import from_nnx, mlp
from tests.tiny import close, same_bytes

KEY = jax.random.key(6)
INPUTS, CLASSES, ROWS, STEPS = 5, 3, 8, 4
TASKS = TaskInfo(jnp.arange(3), jnp.ones((3, CLASSES), bool))


def net() -> Any:
    return mlp((INPUTS,), CLASSES, hidden=(6, 4), initialiser="fan_in_uniform")


def draw(seed: int, *shape: int) -> Batch:
    key = jax.random.key(seed)
    x = jax.random.normal(key, (*shape, INPUTS)) + 0.1 * jnp.arange(INPUTS) * (seed % 7)
    return Batch(x, jax.random.randint(key, shape, 0, CLASSES), None, jnp.ones(shape))


def run(
    *components: Component, model: Any = None, optimiser: Any = None, tasks: int = 3
) -> tuple[list[Any], list[Any]]:
    """The states just before and just after the end of each task."""
    learner = compose(model or net(), optimiser or optax.sgd(0.1), supervised(), *components, tasks=TASKS)
    update, begin, end = jax.jit(learner.update), jax.jit(learner.begin_task), jax.jit(learner.end_task)
    state = learner.init(KEY, draw(0, ROWS))
    before, after = [], []
    for t in range(tasks):
        sample = draw(100 + t, 2, 10)
        state = begin(state, jax.tree.map(lambda leaf, t=t: leaf[t], TASKS), sample)
        for step in range(STEPS):
            state, _ = update(state, draw(10 * t + step, ROWS))
        before.append(state)
        state = end(state, sample)
        after.append(state)
    return before, after


def mean(a: Any, b: Any, alpha: float) -> Any:
    return jax.tree.map(lambda x, y: (1 - alpha) * x + alpha * y, a, b)


@pytest.mark.parametrize("alignment", ["activations", "weights", None])
def test_alpha_0_is_naive_with_the_optimiser_reset(alignment: str | None) -> None:
    ours = run(weight_interpolation(0.0, alignment=alignment), optimiser=optax.adam(0.01))[1]
    theirs = run(reset_optimiser(), optimiser=optax.adam(0.01))[0]
    same_bytes(ours[-1].params, theirs[-1].params)


def test_without_alignment_it_is_the_plain_mean_and_the_first_task_is_left_alone() -> None:
    before, after = run(weight_interpolation(0.3, alignment=None))
    same_bytes(after[0].params, before[0].params)
    for t in (1, 2):
        close(after[t].params, mean(before[t].params, after[t - 1].params, 0.3))
    part = after[2].parts["weight_interpolation"]
    same_bytes(part.params, after[2].params)
    assert int(part.finished) == 3 and float(part.moved) == 0
    difference = optax.tree.sub(before[2].params, after[1].params)
    np.testing.assert_allclose(part.distance, optax.tree.norm(difference), rtol=1e-5)


def test_with_alignment_the_old_weights_are_permuted_first() -> None:
    before, after = run(weight_interpolation(0.3))
    model = net()
    for t in (1, 2):
        new, old = (before[t].params, {}), (after[t - 1].params, {})
        order = match_activations(model, new, old, draw(100 + t, 2, 10))
        close(after[t].params, mean(new[0], permute(old[0], model.units, order), 0.3))


def old_is_a_scrambled_copy(alignment: str | None, **options: Any) -> tuple[Any, Any, Any, Any]:
    """Learner, and its state when a task ends whose weights are those of the last one in another order."""
    model = net()
    components = supervised(), replay(20, batch_size=8), weight_interpolation(0.4, alignment=alignment, **options)
    learner = compose(model, optax.sgd(0.1), *components, tasks=TASKS)
    state = learner.init(KEY, draw(0, ROWS))
    state, _ = learner.update(learner.end_task(state, draw(100, 2, 10)), draw(1, ROWS))
    state, _ = learner.update(state, draw(2, ROWS))
    # No unit may be silent on all rows: activations could not tell it from another such one.
    awake = {name: {**layer, "bias": layer["bias"] + 1} for name, layer in state.params.items()}
    state = state._replace(params=awake)
    rows = jax.tree.map(lambda leaf: leaf[:1], draw(101, 2, 10))
    for r in unit_correlations(model, (awake, {}), (awake, {}), rows):
        np.testing.assert_allclose(jnp.diag(r), 1, rtol=1e-5)
    part = state.parts["weight_interpolation"]
    order = (jnp.array([5, 3, 0, 1, 2, 4]), jnp.array([2, 0, 3, 1]))
    part = part._replace(params=permute(state.params, model.units, order))
    state = state._replace(parts={**state.parts, "weight_interpolation": part})
    return learner, state, jax.jit(learner.end_task)(state, draw(101, 2, 10)), draw(50, ROWS)


@pytest.mark.parametrize("options", [{}, {"sample": "replay"}, {"sample": "replay", "micro_batch": 7}])
@pytest.mark.parametrize("alignment", ["activations", "weights"])
def test_two_permuted_copies_of_one_net_average_to_the_same_function(alignment: str, options: Any) -> None:
    learner, before, after, batch = old_is_a_scrambled_copy(alignment, **options)
    close(after.params, before.params)
    close(learner.predict(after, batch.x), learner.predict(before, batch.x))
    part = after.parts["weight_interpolation"]
    assert float(part.moved) == 1 and float(part.distance) < 1e-6


def test_without_alignment_they_do_not() -> None:
    learner, before, after, batch = old_is_a_scrambled_copy(None)
    assert np.abs(learner.predict(after, batch.x) - learner.predict(before, batch.x)).max() > 0.05


def test_the_memory_of_a_named_component_is_what_is_aligned_on() -> None:
    """Replay keeps 20 rows; alignment on just those, whatever the task's own sample."""
    model = net()
    before, after = run(replay(20, batch_size=4), weight_interpolation(0.3, sample="replay", micro_batch=8))
    (x, y, task), seen = before[2].parts["replay"]
    assert int(seen) >= 20
    rows = Batch(x[None], y[None], task, jnp.ones((1, 20)))
    order = match_activations(model, (before[2].params, {}), (after[1].params, {}), rows)
    close(after[2].params, mean(before[2].params, permute(after[1].params, model.units, order), 0.3))
    # A memory that keeps answers beside its rows serves as well.
    states = run(der(20, batch_size=4, alpha=0.1), weight_interpolation(0.3, sample="der"))[1]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(states[-1].params))


class Normed(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(INPUTS, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, momentum=0.9, rngs=rngs)
        self.output = nnx.Linear(6, CLASSES, rngs=rngs)

    def __call__(self, x: Any, *, tap: Any) -> Any:
        return tap("output", self.output, nnx.relu(self.norm(tap("hidden", self.hidden, x))))


NORMED_UNITS = (
    (
        (("hidden", "kernel"), 1, "out"),
        (("hidden", "bias"), 0, "out"),
        (("norm", "scale"), 0, "out"),
        (("norm", "bias"), 0, "out"),
        (("output", "kernel"), 0, "in"),
    ),
)


def test_statistics_are_those_of_the_averaged_network() -> None:
    model = from_nnx(Normed, units=NORMED_UNITS)
    before, after = run(weight_interpolation(0.5), model=model)
    wanted = recompute_statistics(model, after[1].params, before[1].model_state, draw(101, 2, 10), KEY)
    close(after[1].model_state, wanted, rtol=1e-4)
    hidden = draw(101, 2, 10).x @ after[1].params["hidden"]["kernel"] + after[1].params["hidden"]["bias"]
    np.testing.assert_allclose(after[1].model_state["norm"]["mean"], hidden.mean((0, 1)), rtol=1e-3, atol=1e-4)
    same_bytes(after[0].model_state, before[0].model_state)
    assert not np.allclose(after[1].model_state["norm"]["mean"], before[1].model_state["norm"]["mean"], atol=1e-2)


def test_what_cannot_be_is_refused() -> None:
    for options, message in (
        ({"old_weight": 1.5}, "old_weight is 1.5, but it must be in"),
        ({"old_weight": 0.5, "alignment": "features"}, "alignment is 'features'"),
        ({"old_weight": 0.5, "micro_batch": 0}, "micro_batch is 0"),
        ({"old_weight": 0.5, "sweeps": 0}, "sweeps is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            weight_interpolation(**options)

    def start(model: Any, *components: Component) -> Any:
        learner = compose(model, optax.sgd(0.1), supervised(), *components, tasks=TASKS)
        return learner, learner.init(KEY, draw(0, ROWS))

    model = net()
    with pytest.raises(ValueError, match="alignment is 'weights', but the model names no hidden units"):
        start(dataclasses.replace(model, units=()), weight_interpolation(0.5, alignment="weights"))
    untapped = dataclasses.replace(model, apply_function=lambda *a, **k: (*model.apply(*a, **k)[:2], {}))
    with pytest.raises(ValueError, match="no taps .* it must be 'weights' or None"):
        start(untapped, weight_interpolation(0.5))
    start(untapped, weight_interpolation(0.5, alignment="weights"))
    learner, state = start(model, replay(20, batch_size=8), ewc(1.0), weight_interpolation(0.5, sample="memory"))
    with pytest.raises(ValueError, match="sample is 'memory', but it must be 'task' or .* \\('replay'\\)"):
        learner.end_task(state, draw(1, 1, 4))
    learner, state = start(model, weight_interpolation(0.5))
    with pytest.raises(ValueError, match="was given no sample"):
        learner.end_task(state, None)
    for make, message in (
        (lambda: wise_ft(-0.1), "old_weight is -0.1"),
        (lambda: wise_ft(0.5, anchor="best"), "anchor is 'best'"),
        (lambda: fisher_merging(2.0), "balance is 2"),
        (lambda: fisher_merging(0.5, decay=-1.0), "decay is -1"),
        (lambda: fisher_merging(0.5, epsilon=0.0), "epsilon is 0"),
        (lambda: fisher_merging(0.5, labels="true"), "labels is 'true'"),
        (lambda: ema(1.1), "decay is 1.1"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_it_asks_for_what_it_needs() -> None:
    assert weight_interpolation(0.5).needs == {"boundaries", "end_sample"}
    assert weight_interpolation(0.5, sample="replay").needs == {"boundaries"}
    assert weight_interpolation(0.5, alignment="weights").needs == {"boundaries"}


# Kin


def test_wise_ft_weighs_the_new_model_where_weight_interpolation_weighs_the_old() -> None:
    ours, theirs = run(wise_ft(0.3))[1], run(weight_interpolation(0.3, alignment=None))[1]
    close(ours[-1].params, theirs[-1].params)


def test_wise_ft_relative_to_the_first_model() -> None:
    before, after = run(wise_ft(0.3, anchor="first"))
    same_bytes(after[0].params, before[0].params)
    for t in (1, 2):
        close(after[t].params, mean(before[t].params, after[0].params, 0.3))


@pytest.mark.parametrize("anchor", ["last", "first"])
def test_wise_ft_of_a_pretrained_network_keeps_it_from_the_first_task_on(anchor: str) -> None:
    before, after = run(wise_ft(0.3, anchor=anchor, pretrained=True))
    learner = compose(net(), optax.sgd(0.1), supervised(), tasks=TASKS)
    initial = learner.init(KEY, draw(0, ROWS)).params
    close(after[0].params, mean(before[0].params, initial, 0.3))
    anchors = [initial, *(state.params for state in after)]
    close(after[2].params, mean(before[2].params, anchors[2] if anchor == "last" else initial, 0.3))


def test_fisher_merging_is_the_fisher_weighted_mean_of_all_models() -> None:
    model = net()
    before, after = run(fisher_merging(0.5, epsilon=1e-12))
    same_bytes(after[0].params, before[0].params)
    fishers = [
        fisher_diagonal(lambda p, b, e: model.apply(p, {}, b.x, perturb=e)[::2], before[t].params, draw(100 + t, 2, 10))
        for t in range(3)
    ]
    top = jax.tree.map(lambda *leaves: sum(f * p for f, p in zip(leaves[:3], leaves[3:], strict=True)),
                       *fishers, *(state.params for state in before))  # fmt: skip
    total = jax.tree.map(lambda *leaves: sum(leaves), *fishers)
    close(after[2].parts["fisher_merging"].fisher, total)
    needed = 0
    for ours, number, f in zip(*map(jax.tree.leaves, (after[2].params, top, total)), strict=True):
        told = np.asarray(f) > 1e-7
        needed += told.sum()
        np.testing.assert_allclose(np.asarray(ours)[told], np.asarray(number / f)[told], rtol=1e-3, atol=1e-5)
    assert needed > 30


def test_fisher_merging_with_a_large_epsilon_is_the_plain_mean() -> None:
    ours, theirs = run(fisher_merging(0.7, epsilon=1e6))[1], run(wise_ft(0.3))[1]
    close(ours[-1].params, theirs[-1].params, rtol=1e-4)


def test_fisher_merging_forgets_old_fishers_with_decay_0() -> None:
    before, after = run(fisher_merging(0.5, decay=0.0))
    model = net()
    fisher = fisher_diagonal(
        lambda p, b, e: model.apply(p, {}, b.x, perturb=e)[::2], before[2].params, draw(102, 2, 10)
    )
    close(after[2].parts["fisher_merging"].fisher, fisher)


@pytest.mark.parametrize("warm_up", [False, True])
def test_the_average_is_what_it_says_and_it_answers(warm_up: bool) -> None:
    learner = compose(net(), optax.sgd(0.1), supervised(), ema(0.6, warm_up=warm_up), tasks=TASKS)
    state = learner.init(KEY, draw(0, ROWS))
    plain = compose(net(), optax.sgd(0.1), supervised(), tasks=TASKS)
    alone, average = plain.init(KEY, draw(0, ROWS)), state.params
    for step in range(4):
        state, _ = learner.update(state, draw(step, ROWS))
        alone, _ = plain.update(alone, draw(step, ROWS))
        d = min(0.6, step / (step + 1)) if warm_up else 0.6
        average = mean(alone.params, average, d)
    same_bytes(state.params, alone.params)
    close(state.parts["ema"].params, average)
    x = draw(9, ROWS).x
    close(learner.predict(state, x), net().apply(average, {}, x)[0])
    assert np.abs(learner.predict(state, x) - plain.predict(alone, x)).max() > 1e-3


def test_only_one_component_may_answer() -> None:
    with pytest.raises(ValueError, match="only one component may have the hook predict, but these do: ema, slow"):
        compose(net(), optax.sgd(0.1), supervised(), ema(0.5), ema(0.9, name="slow"))
