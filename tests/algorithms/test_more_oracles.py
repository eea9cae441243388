"""More of the zoo against NumPy oracles over three tasks: plasticity, packing, merging, exemplars, statistics."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cl_zoo import (
    Batch,
    Component,
    TaskInfo,
    continual_backprop,
    ema,
    fisher_merging,
    gdumb,
    icarl,
    packnet,
    redo,
    replay,
    reset_optimiser,
    shrink_and_perturb,
    slda,
    weight_interpolation,
    wise_ft,
)
from cl_zoo.estimators.alignment import permute
from cl_zoo.models import mlp
from cl_zoo.shuffle import shuffled_index
from cl_zoo.types import Context
from tests.algorithms.test_oracles import (
    ACTIVE,
    INPUTS,
    OPTIMISERS,
    OUTPUTS,
    ROWS,
    STEPS,
    _hook_key,
    agree,
    ids_of,
    make_tasks,
    rows_seen,
    run_ours,
)
from tests.oracles import continual_backprop as cbp_oracle
from tests.oracles import ewc as ewc_oracle
from tests.oracles import gdumb as gdumb_oracle
from tests.oracles import icarl as icarl_oracle
from tests.oracles import packnet as packnet_oracle
from tests.oracles import redo as redo_oracle
from tests.oracles import replay as replay_oracle
from tests.oracles import shrink_and_perturb as shrink_oracle
from tests.oracles import slda as slda_oracle
from tests.oracles import weight_interpolation as merging_oracle
from tests.oracles.mlp import forward, tree_add

MODEL = mlp((INPUTS,), OUTPUTS, hidden=(5, 4))
PAIRS = [("task", "adam"), ("domain", "sgd"), ("class", "adam")]
TEST = np.random.default_rng(11).normal(size=(20, INPUTS))


def rate_of(optimiser: str) -> float:
    return OPTIMISERS[optimiser][1]


def context(scenario: str, model: Any = MODEL) -> Context:
    """For hooks called by hand."""
    return Context(model, None, TaskInfo(jnp.arange(3), jnp.asarray(ACTIVE[scenario])), lambda *_: jnp.zeros(()))


def answers(component: Any, scenario: str, state: Any, task: int, model: Any = MODEL) -> np.ndarray:
    """What a component with `predict` says to the test rows, which carry their task if the scenario tells it."""
    told = jnp.full(len(TEST), task, jnp.int32) if scenario == "task" else None
    part = state.parts[component.name]
    x = jnp.asarray(TEST, jnp.float32)
    return np.asarray(component.predict(context(scenario, model), state, part, x, told))


def exact(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def fresh(before: Any, hook: str, name: str) -> Any:
    """The network that this hook's key makes at this step."""
    return exact(MODEL.init(_hook_key(before, hook, name), jnp.zeros((1, INPUTS)))[0])


def agree_on_losses(metrics: list[dict[str, float]], losses: list[float]) -> None:
    np.testing.assert_allclose([m["loss"] for m in metrics], losses, rtol=1e-3, atol=1e-6)


def per_step(states: list[Any], last: Any, count: Any) -> np.ndarray:
    """By how much a counter rose at each update."""
    return np.diff(np.array([count(state) for state in [*states, last]]), axis=0)


# Plasticity


@pytest.mark.parametrize("utility", ["paper", "released"])
@pytest.mark.parametrize(("scenario", "optimiser"), [*PAIRS, ("class", "sgd")])
def test_continual_backprop(scenario: str, optimiser: str, utility: str) -> None:
    """Activations are those of the pass before the step, weights those after it."""
    tasks = make_tasks(scenario)
    settings = {"maturity": 2, "decay": 0.9, "utility": utility}
    first, metrics, state, states = run_ours(scenario, tasks, optimiser, continual_backprop(0.25, **settings))
    replacements = [fresh(before, "observe", "continual_backprop") for before in states]
    history, final, theirs = cbp_oracle.run(
        first, tasks, rate_of(optimiser), replacements, rate=0.25, optimizer=optimiser, between="zero", **settings
    )
    agree_on_losses(metrics, [loss for loss, _ in history])
    replaced = per_step(states, state, lambda s: [int(n) for n in s.parts["continual_backprop"].replaced])
    wanted = np.zeros((len(states), 2), int)
    for step, layer, _ in theirs["replaced"]:
        wanted[step, layer] += 1
    np.testing.assert_array_equal(replaced, wanted)
    assert (wanted > 0).all(1).any() and wanted.sum(0).min() > 3, "no two layers at once, or hardly a unit"
    part = state.parts["continual_backprop"]
    for ours, other in zip(part[:-1], ("utility", "mean", "age", "accumulator"), strict=True):
        agree(list(ours), theirs[other])
    agree(state.params, final)
    if optimiser == "adam":
        agree(state.opt_state[0].mu, theirs["state"]["m"])
        np.testing.assert_allclose(
            state.opt_state[0].nu["hidden_1"]["kernel"], theirs["state"]["v"]["hidden_1"]["kernel"], rtol=1e-3
        )


@pytest.mark.parametrize("threshold", [0.0, 0.7])
@pytest.mark.parametrize(("scenario", "optimiser"), PAIRS)
def test_redo(scenario: str, optimiser: str, threshold: float) -> None:
    tasks = make_tasks(scenario)
    first, metrics, state, states = run_ours(scenario, tasks, optimiser, redo(threshold, 2))
    replacements = [fresh(before, "observe", "redo") for before in states]
    history, final, masks = redo_oracle.run(
        first, tasks, rate_of(optimiser), replacements, threshold, period=2, optimizer=optimiser, between="zero"
    )
    agree_on_losses(metrics, [loss for loss, _ in history])
    recycled = per_step(states, state, lambda s: s.parts["redo"].recycled)
    wanted = np.array([[0, 0] if mask is None else [layer.sum() for layer in mask] for mask in masks])
    np.testing.assert_array_equal(recycled, wanted)
    if threshold > 0:
        assert (wanted > 0).all(1).any() and wanted.sum(0).max() < 30, "no two layers at once, or all units"
    agree(state.params, final)


@pytest.mark.parametrize("source", ["normal", "init"])
@pytest.mark.parametrize("when", ["step", "task"])
@pytest.mark.parametrize(("scenario", "optimiser"), [("task", "sgd"), ("class", "adam")])
def test_shrink_and_perturb(scenario: str, optimiser: str, when: str, source: str) -> None:
    """The noise that our key drew goes through the oracle's arithmetic."""
    tasks = make_tasks(scenario)
    component = shrink_and_perturb(0.1, 0.05, source=source, when=when)
    first, metrics, state, states = run_ours(scenario, tasks, optimiser, component)

    def noise(before: Any) -> Any:
        hook = "observe" if when == "step" else "begin_task"
        if source == "init":
            return fresh(before, hook, "shrink_and_perturb")
        leaves, structure = jax.tree.flatten(before.params)
        key = _hook_key(before, hook, "shrink_and_perturb")
        draws = [jax.random.normal(jax.random.fold_in(key, i), leaf.shape) for i, leaf in enumerate(leaves)]
        return exact(jax.tree.unflatten(structure, draws))

    noises = [noise(before) for before in (states if when == "step" else states[STEPS::STEPS])]
    history, final = shrink_oracle.run(
        first, tasks, 0.9, 0.05, noises, rate_of(optimiser), when=when, optimizer=optimiser
    )
    agree_on_losses(metrics, [loss for loss, _ in history])
    agree(state.params, final)


# Packing


@pytest.mark.parametrize(
    ("optimiser", "share", "packed", "reset"),
    [("sgd", 0.5, True, False), ("adam", 0.37, True, False), ("adam", 0.5, True, True), ("adam", 0.5, False, False)],
)
def test_packnet(optimiser: str, share: float, packed: bool, reset: bool) -> None:
    """Of 15 free weights a half is 8, the even one of 7 and 8: sizes are such that this case occurs."""
    tasks, component = make_tasks("task"), packnet(share, 4, pack_outputs=packed)
    others = [reset_optimiser()] if reset else []
    first, metrics, state, _ = run_ours("task", tasks, optimiser, *others, component)
    retraining = []
    for task in tasks:
        x, y = (rows.reshape(3, 4, *rows.shape[1:]) for rows in task["sample"])
        retraining.append([(x[i % 3], y[i % 3], np.ones(4)) for i in range(4)])
    history, final, owners = packnet_oracle.run(
        first,
        tasks,
        share,
        rate_of(optimiser),
        retraining,
        mask_gradients=True,
        optimizer=optimiser,
        reset_optimizer=reset,
        reset_for_retraining="apart",
        rounding="nearest",
        own_outputs=not packed,
    )
    steps = [loss for i, (loss, _) in enumerate(history) if i % (STEPS + 4) < STEPS]
    agree_on_losses(metrics, steps)
    agree(state.params, final)
    owner = state.parts["packnet"].owner
    for name, theirs in owners.items():
        np.testing.assert_array_equal(np.where(owner[name]["kernel"] == 32767, -1, owner[name]["kernel"]), theirs)
        assert set(np.unique(theirs)) == {-1, 0, 1, 2}
    if not packed:
        np.testing.assert_array_equal(owner["output"]["kernel"], np.tile([0, 0, 1, 1, 2, 2], (4, 1)))
    for t in range(3):
        active = ACTIVE["task"][t]
        wanted = packnet_oracle.predict(final, owners, t, TEST)
        agree(answers(component, "task", state, t)[:, active], wanted[:, active])


# Merging


@pytest.mark.parametrize("alignment", ["activations", None])
@pytest.mark.parametrize(("scenario", "optimiser"), PAIRS)
def test_weight_interpolation(scenario: str, optimiser: str, alignment: str | None) -> None:
    """Five steps move no unit far from what it was, so all units change places when a task ends."""
    tasks, order = make_tasks(scenario), ([2, 0, 1, 4, 3], [1, 2, 3, 0])

    def scramble(context: Context, state: Any, part: None, sample: Batch, key: Any) -> tuple[Any, None]:
        return state._replace(params=permute(state.params, MODEL.units, tuple(map(jnp.array, order)))), None

    components = Component("scramble", end_task=scramble), weight_interpolation(0.4, alignment=alignment)
    first, metrics, state, states = run_ours(scenario, tasks, optimiser, *components)
    history, final = merging_oracle.run(
        first,
        tasks,
        0.4,
        rate_of(optimiser),
        align=bool(alignment),
        optimizer=optimiser,
        reset_optimizer="every",
        scramble=order,
    )
    agree_on_losses(metrics, [loss for loss, _ in history])
    agree(state.params, final)
    moved = [float(end.parts["weight_interpolation"].moved) for end in (states[2 * STEPS], state)]
    assert (min(moved) > 0.7) == (alignment is not None)


@pytest.mark.parametrize(
    ("labels", "balance", "decay", "epsilon"), [("expected", 0.5, 1.0, 1e-8), ("observed", 0.3, 0.6, 1e-3)]
)
@pytest.mark.parametrize(("scenario", "optimiser"), PAIRS)
def test_fisher_merging(
    scenario: str, optimiser: str, labels: str, balance: float, decay: float, epsilon: float
) -> None:
    tasks = make_tasks(scenario)
    component = fisher_merging(balance, decay=decay, epsilon=epsilon, labels=labels)
    first, metrics, state, _ = run_ours(scenario, tasks, optimiser, component)
    merged, fishers = [], []

    def end(t: int, params: Any) -> Any:
        fisher = ewc_oracle.fisher(params, *tasks[t]["sample"], tasks[t]["active"], labels)
        if t > 0:
            weights = [1 - balance, balance]
            params = merging_oracle.fisher_merge([merged[-1], params], [fishers[-1], fisher], weights, epsilon)
            fisher = tree_add(fisher, fishers[-1], decay)
        merged.append(params)
        fishers.append(fisher)
        return params

    history, final = merging_oracle.run_ends(first, tasks, end, rate_of(optimiser), optimiser)
    agree_on_losses(metrics, [loss for loss, _ in history])
    agree(state.params, final)
    agree(state.parts["fisher_merging"].fisher, fishers[-1])


@pytest.mark.parametrize(("anchor", "pretrained"), [("last", False), ("first", False), ("last", True), ("first", True)])
@pytest.mark.parametrize(("scenario", "optimiser"), [("domain", "sgd"), ("class", "adam")])
def test_wise_ft(scenario: str, optimiser: str, anchor: str, pretrained: bool) -> None:
    tasks = make_tasks(scenario)
    first, metrics, state, _ = run_ours(scenario, tasks, optimiser, wise_ft(0.7, anchor=anchor, pretrained=pretrained))
    left = [first] if pretrained else []

    def end(t: int, params: Any) -> Any:
        before = left[-1 if anchor == "last" else 0] if left else params
        left.append(merging_oracle.wise_ft(before, params, 0.3))
        return left[-1]

    history, final = merging_oracle.run_ends(first, tasks, end, rate_of(optimiser), optimiser)
    agree_on_losses(metrics, [loss for loss, _ in history])
    agree(state.params, final)


@pytest.mark.parametrize("warm_up", [False, True])
@pytest.mark.parametrize(("scenario", "optimiser"), PAIRS)
def test_ema(scenario: str, optimiser: str, warm_up: bool) -> None:
    tasks, component = make_tasks(scenario), ema(0.8, warm_up=warm_up)
    first, metrics, state, _ = run_ours(scenario, tasks, optimiser, component)
    history, final, average = merging_oracle.run_ema(
        first, tasks, 0.8, rate_of(optimiser), warm_up=warm_up, optimizer=optimiser
    )
    agree_on_losses(metrics, [loss for loss, _ in history])
    agree(state.params, final)
    agree(state.parts["ema"].params, average)
    active = ACTIVE[scenario][2]
    agree(answers(component, scenario, state, 2)[:, active], forward(average, TEST)[0][:, active])


# Memories


@pytest.mark.parametrize("memory", ["ring", "class_balanced"])
def test_replay_from_a_memory_by_class(memory: str) -> None:
    """As `test_replay`, the rows that were drawn read back."""
    tasks = make_tasks("class")
    component = replay(18, batch_size=6, memory=memory, n_classes=OUTPUTS)
    first, metrics, state, states = run_ours("class", tasks, "adam", component)
    seen, drawn = rows_seen(tasks), []
    for before in states:
        nothing = Batch(jnp.zeros((1, INPUTS)), jnp.zeros(1, jnp.int32), None, jnp.zeros(1))
        key = _hook_key(before, "prepare", "replay")
        joined, _ = component.prepare(None, before, before.parts["replay"], nothing, key)
        ids = ids_of(seen, joined.x[1:], joined.weight[1:])
        assert len(set(ids)) == len(ids) == min(6, int(before.parts["replay"].rows[0].any(1).sum()))
        drawn.append((ids, np.ones(len(ids))))
    history, final = replay_oracle.run(first, tasks, drawn, rate_of("adam"), optimizer="adam")
    agree_on_losses(metrics, history)
    agree(state.params, final)


@pytest.mark.parametrize(
    ("optimiser", "settings"),
    [("sgd", {}), ("adam", {}), ("adam", {"temperature": 2.0, "task_size": 30.0}), ("sgd", {"per_class": 2})],
)
def test_icarl(optimiser: str, settings: dict[str, Any]) -> None:
    """The exemplars that our memory drew go through the oracle's arithmetic, and it herds and answers by itself.

    The last layer reads so many units that no two rows have the same few awake: herding knows no ties then.
    """
    tasks = make_tasks("class")
    component = icarl(14, OUTPUTS, batch_size=5, **settings)
    hidden = (8, 20)
    first, metrics, state, states = run_ours("class", tasks, optimiser, component, own_loss=True, hidden=hidden)
    x, y = (np.concatenate([task["sample"][part] for task in tasks]) for part in range(2))
    rows = x.astype(np.float32)
    replays = []
    for step, before in enumerate(states):
        w = tasks[step // STEPS]["batches"][step % STEPS][2]
        empty = Batch(jnp.zeros((1, INPUTS)), jnp.zeros(1, jnp.int32), None, jnp.full(1, w.sum()))
        key = _hook_key(before, "prepare", "icarl")
        joined, _ = component.prepare(None, before, before.parts["icarl"], empty, key)
        ids, held = ids_of(rows, joined.x[1:], joined.weight[1:]), int(before.parts["icarl"].held.sum())
        assert len(set(ids)) == len(ids) == min(5, held) and (len(ids) > 0) == (step >= STEPS)
        # |P| exemplars count |P| / |X| times as much as the rows of the batch.
        each = w.sum() * held / settings.get("task_size", 12) / max(len(ids), 1)
        replays.append((x[ids], y[ids], np.full(len(ids), each)))
    lists: dict[int, list[int]] = {}
    # The gradient of an old class is 0 while teacher and network are one: what Adam then makes of rounding is a step.
    atol = 1e-3 if optimiser == "adam" else 2e-5
    for t, after in enumerate([*states[STEPS::STEPS], state]):
        history, params = icarl_oracle.run(
            first,
            tasks[: t + 1],
            rate_of(optimiser),
            replays,
            optimizer=optimiser,
            temperature=settings.get("temperature", 1.0),
        )
        agree(after.params, params, atol)
        m = settings.get("per_class", 14 // (2 * t + 2))
        lists = {c: exemplars[:m] for c, exemplars in lists.items()}
        for c in (2 * t, 2 * t + 1):
            own = [i for i in range(12 * t, 12 * t + 12) if y[i] == c]
            picked = icarl_oracle.herding(icarl_oracle.features(params, x[own]), m, renormalise=True)
            lists[c] = [own[i] for i in picked]
        part = after.parts["icarl"]
        assert part.held.tolist() == [len(lists.get(c, [])) for c in range(OUTPUTS)]
        slots = np.arange(int(part.held.sum()))
        ids = ids_of(rows, part.rows[0][slots], np.ones(len(slots)))
        for c, exemplars in lists.items():
            mine = slots[np.asarray(part.labels)[slots] == c]
            mine = mine[np.argsort(np.asarray(part.ranks)[mine])]
            assert [ids[slot] for slot in mine] == exemplars
        kept = [icarl_oracle.features(params, x[lists[c]]) for c in sorted(lists)]
        wanted = icarl_oracle.nearest_mean(icarl_oracle.features(params, TEST), kept)
        found = answers(component, "class", after, t, mlp((INPUTS,), OUTPUTS, hidden=hidden))
        agree(found[:, : len(kept)], -wanted, atol)
        assert (found[:, len(kept) :] < -1e30).all()
    agree_on_losses(metrics, [loss for loss, _ in history])


@functools.partial(jax.jit, static_argnums=1)
def first_drawn(keys: Any, capacity: int) -> Any:
    """The slots that each key draws one after another, as priorities: the earlier, the higher."""

    def one(key: Any) -> Any:
        draw = lambda n: jax.random.randint(jax.random.fold_in(key, n), (), 0, capacity)  # noqa: E731
        slots = jax.vmap(draw)(jnp.arange(500))
        return -jnp.argmax(slots[None] == jnp.arange(capacity)[:, None], axis=1)

    return jax.vmap(one)(keys)


@pytest.mark.parametrize(("scenario", "optimiser"), [*PAIRS, ("class", "sgd")])
def test_gdumb(scenario: str, optimiser: str) -> None:
    """The priorities, orders and first parameters that our keys drew go through the oracle's arithmetic."""
    capacity, size, epochs = 20, 8, 3
    tasks = make_tasks(scenario)
    component = gdumb(capacity, OUTPUTS, epochs=epochs, batch_size=size)
    _, metrics, state, states = run_ours(scenario, tasks, optimiser, component, own_loss=True)
    agree_on_losses(metrics, [0.0] * len(metrics))
    x, y, w = (np.concatenate([batch[part] for task in tasks for batch in task["batches"]]) for part in range(3))
    priorities: list[Any] = []
    for before in states:
        keys = jax.random.split(_hook_key(before, "observe", "gdumb"), ROWS)
        priorities += list(np.asarray(first_drawn(keys, capacity)))
    swapped = 0
    for t, after in enumerate([*states[STEPS::STEPS], state]):
        n = ROWS * STEPS * (t + 1)
        slots = gdumb_oracle.balance_by_largest(capacity, y[:n], priorities, w > 0)
        part, held = after.parts["gdumb"], len(slots)
        assert ids_of(x.astype(np.float32), part.rows[0][:held], np.ones(held)) == slots
        counts = gdumb_oracle.class_counts(capacity, y[:n], w > 0)[-1]
        assert part.held.tolist() == np.bincount(y[slots], minlength=OUTPUTS).tolist()
        assert sorted(part.held.tolist())[-len(counts) :] == sorted(counts.values()), "not the balance of the paper"
        swapped += max(slots) >= capacity
        init_key, order_key, _ = jax.random.split(_hook_key(after, "end_task", "gdumb"), 3)
        first = exact(MODEL.init(init_key, jnp.zeros((1, INPUTS)))[0])
        batches = []
        for epoch in range(epochs):
            order = np.asarray(shuffled_index(order_key, jnp.arange(held), held, epoch)).tolist()
            assert sorted(order) == list(range(held))
            batches += [order[i : i + size] for i in range(0, held, size)]
        # A row that carries its task competes among that task's outputs.
        active = ACTIVE["task"][np.asarray(slots) // (ROWS * STEPS)] if scenario == "task" else tasks[t]["active"]
        _, params = gdumb_oracle.fit(first, x[slots], y[slots], active, batches, rate_of(optimiser), optimiser)
        agree(after.params, params)
    assert swapped == 3, "no row made room"


@pytest.mark.parametrize("counter", ["total", "class"])
@pytest.mark.parametrize(
    ("scenario", "features"),
    [("task", "input"), ("domain", "penultimate"), ("class", "penultimate"), ("class", "input")],
)
def test_slda(scenario: str, features: str, counter: str) -> None:
    tasks = make_tasks(scenario)
    component = slda(shrinkage=0.02, features=features, counter=counter)
    first, metrics, state, states = run_ours(scenario, tasks, "adam", component, own_loss=True)
    agree_on_losses(metrics, [0.0] * len(metrics))
    agree(state.params, first)
    for t, after in enumerate([*states[STEPS::STEPS], state]):
        theirs, scores = slda_oracle.run(
            first, tasks[: t + 1], 0.02, x_test=TEST, counter=counter, raw=features == "input"
        )
        part = after.parts["slda"]
        np.testing.assert_array_equal(part.counts, theirs["count"])
        agree((part.means, part.covariance), (theirs["mu"], theirs["sigma"]))
        # `after` may be a state in which the next task has begun: its mask is not this one's.
        after = after._replace(task=jnp.int32(t))
        found, seen = answers(component, scenario, after, t), ACTIVE[scenario][t] & (theirs["count"] > 0)
        np.testing.assert_allclose(found[:, seen], scores[:, seen], rtol=1e-3, atol=1e-3)
        assert (found[:, ~seen] < -1e30).all() and seen.sum() >= 2
