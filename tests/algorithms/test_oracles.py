"""Each algorithm equals its NumPy oracle over three tasks (a stale anchor or teacher shows at the third)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_zoo import (
    Batch,
    Component,
    TaskInfo,
    agem,
    compose,
    der,
    ewc,
    l2_init,
    lwf,
    mas,
    replay,
    reset_optimiser,
    supervised,
    synaptic_intelligence,
)
from cl_zoo.buffers import reservoir_sample
from cl_zoo.models import mlp
from tests.oracles import agem as agem_oracle
from tests.oracles import der as der_oracle
from tests.oracles import ewc as ewc_oracle
from tests.oracles import l2_init as l2_init_oracle
from tests.oracles import lwf as lwf_oracle
from tests.oracles import mas as mas_oracle
from tests.oracles import replay as replay_oracle
from tests.oracles import synaptic_intelligence as si_oracle

INPUTS, OUTPUTS, ROWS, STEPS = 6, 6, 8, 5
OPTIMISERS = {"sgd": (optax.sgd, 0.05), "adam": (optax.adam, 0.01)}
ACTIVE = {
    "task": np.repeat(np.eye(3, dtype=bool), 2, axis=1),
    "domain": np.array([[True, True, False, False, False, False]] * 3),
    "class": np.arange(6)[None] < np.array([[2], [4], [6]]),
}


def make_tasks(scenario: str) -> list[dict[str, Any]]:
    """Three tasks of five batches; some rows are padding."""
    random = np.random.default_rng(7)
    tasks = []
    for t in range(3):
        first = 0 if scenario == "domain" else 2 * t

        def draw(n: int, first: int = first) -> tuple[np.ndarray, np.ndarray]:
            return random.normal(size=(n, INPUTS)), first + random.integers(0, 2, n)

        batches = [(*draw(ROWS), (random.random(ROWS) > 0.2).astype(float)) for _ in range(STEPS)]
        tasks.append({"batches": batches, "sample": draw(12), "active": ACTIVE[scenario][t]})
    return tasks


def run_ours(
    scenario: str,
    tasks: list[dict[str, Any]],
    optimiser: str,
    *components: Component,
    own_loss: bool = False,
    hidden: tuple[int, int] = (5, 4),
) -> tuple[Any, list[dict[str, float]], Any, list[Any]]:
    """Initial parameters, metrics of every update, final state, and the state before every update.

    The components stand beside `supervised`, unless one brings a loss of its own.
    """
    make, rate = OPTIMISERS[optimiser]
    table = TaskInfo(jnp.arange(3), jnp.asarray(ACTIVE[scenario]))
    components = components if own_loss else (supervised(), *components)
    learner = compose(mlp((INPUTS,), OUTPUTS, hidden=hidden), make(rate), *components, tasks=table)
    update, begin, end = jax.jit(learner.update), jax.jit(learner.begin_task), jax.jit(learner.end_task)

    def batch(x: Any, y: Any, w: Any, t: int) -> Batch:
        told = jnp.full(len(y), t, jnp.int32) if scenario == "task" else None
        return Batch(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32), told, jnp.asarray(w, jnp.float32))

    state = learner.init(jax.random.key(5), batch(*tasks[0]["batches"][0], 0))
    first, metrics, states = state.params, [], []
    infos = [jax.tree.map(lambda leaf, t=t: leaf[t], table) for t in range(3)]
    for t, task in enumerate(tasks):
        sample = jax.tree.map(lambda leaf: leaf.reshape(3, 4, *leaf.shape[1:]), batch(*task["sample"], np.ones(12), t))
        state = begin(state, infos[t], sample)
        for rows in task["batches"]:
            states.append(state)
            state, values = update(state, batch(*rows, t))
            metrics.append({name: float(value) for name, value in values.items()})
        state = end(state, sample)
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), first), metrics, state, states


def agree(ours: Any, theirs: Any, atol: float = 2e-5) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=atol), ours, theirs)


def rows_seen(tasks: list[dict[str, Any]]) -> np.ndarray:
    """Inputs of all rows of positive weight, in the order of the stream: a row's place is its id."""
    return np.concatenate([x[w > 0] for task in tasks for x, _, w in task["batches"]]).astype(np.float32)


def ids_of(seen: np.ndarray, rows: Any, weight: Any) -> list[int]:
    return [
        int(np.flatnonzero((seen == row).all(1))[0])
        for row, w in zip(np.asarray(rows), np.asarray(weight), strict=True)
        if w > 0
    ]


def agree_on_penalties(metrics: list[dict[str, float]], name: str, history: list[tuple[float, float]]) -> None:
    np.testing.assert_allclose([m["loss"] for m in metrics], [loss for loss, _ in history], rtol=1e-4)
    np.testing.assert_allclose([m[name] for m in metrics], [extra for _, extra in history], rtol=1e-3, atol=1e-7)
    assert history[-1][1] > 1e-4


@pytest.mark.parametrize("scenario", list(ACTIVE))
@pytest.mark.parametrize(("optimiser", "gradient", "clamp"), [("adam", "task", True), ("sgd", "total", False)])
def test_synaptic_intelligence(scenario: str, optimiser: str, gradient: str, clamp: bool) -> None:
    tasks = make_tasks(scenario)
    component = synaptic_intelligence(10.0, damping=0.05, gradient=gradient, clamp=clamp)
    first, metrics, state, _ = run_ours(scenario, tasks, optimiser, component)
    history, final = si_oracle.run(
        first, tasks, 10.0, OPTIMISERS[optimiser][1], 0.05, gradient, clamp, optimizer=optimiser
    )
    agree_on_penalties(metrics, "synaptic_intelligence/penalty", history)
    agree(state.params, final)


@pytest.mark.parametrize("scenario", list(ACTIVE))
@pytest.mark.parametrize("average", [{}, {"decay": 0.4}, {"decay": 0.4, "whole": True}], ids=str)
@pytest.mark.parametrize("optimiser", list(OPTIMISERS))
def test_mas(scenario: str, average: dict, optimiser: str) -> None:
    tasks = make_tasks(scenario)
    decay, whole = average.get("decay"), "whole" in average
    first, metrics, state, _ = run_ours(scenario, tasks, optimiser, mas(0.5, decay=decay, whole_first=whole))
    settings = {"decay": decay, "first_whole": whole, "optimizer": optimiser}
    history, final = mas_oracle.run(first, tasks, 0.5, OPTIMISERS[optimiser][1], **settings)
    agree_on_penalties(metrics, "mas/penalty", history)
    agree(state.params, final)


@pytest.mark.parametrize("optimiser", list(OPTIMISERS))
def test_l2_init(optimiser: str) -> None:
    tasks = make_tasks("class")
    first, metrics, state, _ = run_ours("class", tasks, optimiser, l2_init(0.3))
    history, final = l2_init_oracle.run(first, tasks, 0.3, OPTIMISERS[optimiser][1], optimizer=optimiser)
    agree_on_penalties(metrics, "l2_init/penalty", history)
    agree(state.params, final)


@pytest.mark.parametrize("scenario", list(ACTIVE))
@pytest.mark.parametrize("beta", [None, 0.8])
def test_der(scenario: str, beta: float | None) -> None:
    """The rows that our memory drew, read back from its states, go through the oracle's arithmetic."""
    tasks = make_tasks(scenario)
    component = der(20, alpha=0.6, beta=beta, batch_size=6)
    first, metrics, state, states = run_ours(scenario, tasks, "adam", component)
    seen, drawn = rows_seen(tasks), []
    for before in states:
        ids: list[list[int]] = [[], []]
        for i, key in enumerate(jax.random.split(_hook_key(before, "loss", "der"), 1 if beta is None else 2)):
            ((x, _, _), _), weight = reservoir_sample(before.parts["der"], 6, key)
            ids[i] = ids_of(seen, x, weight)
        drawn.append(tuple(ids))
    mask = "own" if scenario == "task" else "now"
    history, final, stored = der_oracle.run(first, tasks, 0.6, beta or 0.0, drawn, 0.01, mask=mask, optimizer="adam")
    np.testing.assert_allclose([m["supervised/loss"] for m in metrics], [loss for loss, _ in history], rtol=1e-3)
    np.testing.assert_allclose([m["der/loss"] for m in metrics], [extra for _, extra in history], rtol=1e-3, atol=1e-5)
    agree(state.params, final)
    (x, _, _), outputs = state.parts["der"].rows
    agree(outputs, np.asarray(stored)[ids_of(seen, x, np.ones(20))])


@pytest.mark.parametrize("scenario", list(ACTIVE))
def test_agem(scenario: str) -> None:
    """As `test_der`; samples are rows of the stream, so that they have ids."""
    tasks = make_tasks(scenario)
    for task in tasks:
        x, y, w = (np.concatenate(parts) for parts in zip(*task["batches"], strict=True))
        task["sample"] = (x[w > 0][:12], y[w > 0][:12])
    first, metrics, state, states = run_ours(scenario, tasks, "sgd", agem(20, batch_size=6))
    seen, drawn = rows_seen(tasks), []
    for before in states:
        (x, _, _), weight = reservoir_sample(before.parts["agem"], 6, _hook_key(before, "transform", "agem"))
        drawn.append(ids_of(seen, x, weight))
    mask = "own" if scenario == "task" else "now"
    history, final, dots = agem_oracle.run(first, tasks, drawn, 0.05, mask=mask)
    np.testing.assert_allclose([m["loss"] for m in metrics], [loss for loss, _ in history], rtol=1e-3)
    agree(state.params, final)
    dots = np.array(dots)[STEPS:]
    assert (dots[:, 0] < 0).any() and (dots[:, 1] > -1e-9).all()


@pytest.mark.parametrize("scenario", list(ACTIVE))
@pytest.mark.parametrize("form", ["separate", "online"])
@pytest.mark.parametrize(("optimiser", "labels"), [("sgd", "expected"), ("adam", "expected"), ("sgd", "observed")])
def test_ewc(scenario: str, form: str, optimiser: str, labels: str) -> None:
    tasks = make_tasks(scenario)
    strength, decay = 20.0, 0.7
    component = ewc(strength, decay=None if form == "separate" else decay, labels=labels)
    first, metrics, state, _ = run_ours(scenario, tasks, optimiser, component)
    history, final = ewc_oracle.run(
        first, tasks, strength, OPTIMISERS[optimiser][1], form=form, decay=decay, optimizer=optimiser, labels=labels
    )
    np.testing.assert_allclose([m["loss"] for m in metrics], [loss for loss, _ in history], rtol=1e-4)
    np.testing.assert_allclose([m["ewc/penalty"] for m in metrics], [p for _, p in history], rtol=1e-3, atol=1e-7)
    assert history[-1][1] > 1e-4
    agree(state.params, final)


def test_ewc_with_the_square_of_batch_means() -> None:
    tasks = make_tasks("domain")
    first, _, state, _ = run_ours("domain", tasks, "sgd", ewc(50.0, labels="observed", batch_square=True))
    for task in tasks:
        x, y = task["sample"]
        task["sample"] = (list(x.reshape(3, 4, INPUTS)), list(y.reshape(3, 4)))
    _, final = ewc_oracle.run(first, tasks, 50.0, 0.05, labels="observed", batch_square=True)
    agree(state.params, final)


@pytest.mark.parametrize("scenario", list(ACTIVE))
@pytest.mark.parametrize(("weighting", "squared"), [("constant", False), ("tasks", True)])
@pytest.mark.parametrize("optimiser", list(OPTIMISERS))
def test_lwf(scenario: str, weighting: str, squared: bool, optimiser: str) -> None:
    tasks = make_tasks(scenario)
    component = lwf(0.7, temperature=3.0, weighting=weighting, temperature_squared=squared)
    first, metrics, state, _ = run_ours(scenario, tasks, optimiser, component)
    history, final = lwf_oracle.run(
        first,
        tasks,
        0.7,
        OPTIMISERS[optimiser][1],
        temperature=3.0,
        form="heads" if scenario == "task" else "outputs",
        weighting="tasks" if weighting == "tasks" else "none",
        scale_by_temperature=squared,
        optimizer=optimiser,
    )
    np.testing.assert_allclose([m["supervised/loss"] for m in metrics], [loss for loss, _ in history], rtol=1e-3)
    np.testing.assert_allclose([m["lwf/loss"] for m in metrics], [d for _, d in history], rtol=1e-3, atol=1e-5)
    agree(state.params, final)


@pytest.mark.parametrize("scenario", list(ACTIVE))
@pytest.mark.parametrize("weighting", ["examples", "tasks"])
def test_replay(scenario: str, weighting: str) -> None:
    """The rows that our memory drew, read back from its states, go through the oracle's arithmetic."""
    tasks = make_tasks(scenario)
    component = replay(20, batch_size=6, weighting=weighting)
    first, metrics, state, states = run_ours(scenario, tasks, "adam", component)
    seen = rows_seen(tasks)
    drawn = []
    for step, before in enumerate(states):
        t, (_, _, w) = step // STEPS, tasks[step // STEPS]["batches"][step % STEPS]
        told = jnp.zeros(1, jnp.int32) if scenario == "task" else None
        empty = Batch(jnp.zeros((1, INPUTS)), jnp.zeros(1, jnp.int32), told, jnp.full(1, w.sum()))
        key = _hook_key(before, "prepare", "replay")
        joined, _ = component.prepare(None, before, before.parts["replay"], empty, key)
        weight = np.asarray(joined.weight[1:], np.float64)
        ids = ids_of(seen, joined.x[1:], weight)
        assert len(set(ids)) == len(ids)
        drawn.append((ids, weight[weight > 0]))
        if weighting == "tasks":
            np.testing.assert_allclose(weight.sum(), t * w.sum(), rtol=1e-5)
    mask = "own" if scenario == "task" else "now"
    history, final = replay_oracle.run(first, tasks, drawn, 0.01, mask=mask, optimizer="adam")
    np.testing.assert_allclose([m["loss"] for m in metrics], history, rtol=1e-3)
    agree(state.params, final)


def _hook_key(state: Any, hook: str, name: str) -> Any:
    from cl_zoo._learner import _key

    return _key(state.key, state.step, hook, name)


@pytest.mark.parametrize("optimiser", list(OPTIMISERS))
def test_reset_optimiser(optimiser: str) -> None:
    tasks = make_tasks("class")
    first, _, state, _ = run_ours("class", tasks, optimiser, reset_optimiser())
    _, final = ewc_oracle.run(first, tasks, 0.0, OPTIMISERS[optimiser][1], optimizer=optimiser, reset_optimizer=True)
    agree(state.params, final)
