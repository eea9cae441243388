"""Continual backprop, shrink and perturb, ReDo: their accounts and their equations."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_zoo import Batch, Component, TaskInfo, compose, continual_backprop, redo, replay, shrink_and_perturb, supervised
from cl_zoo._learner import _key
from cl_zoo.models import cnn, mlp
from tests.oracles import units as oracle
from tests.tiny import close, same_bytes

ROWS, STEPS = 8, 14
MODEL = mlp((6,), 3, hidden=(5, 4))


def batches(n: int = STEPS, absent: bool = True) -> Batch:
    """`[n, ROWS]`; some rows are padding."""
    keys = jax.random.split(jax.random.key(2), 3)
    weight = (jax.random.uniform(keys[2], (n, ROWS)) > 0.2 * absent).astype(jnp.float32)
    return Batch(jax.random.normal(keys[0], (n, ROWS, 6)), jax.random.randint(keys[1], (n, ROWS), 0, 3), None, weight)


def at(tree: Any, i: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[i], tree)


def learner(*components: Component, model: Any = MODEL, optimiser: Any = None) -> Any:
    return compose(model, optimiser or optax.sgd(0.1, momentum=0.9), supervised(), *components)


def exact(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


@pytest.mark.parametrize("utility", ["paper", "released"])
def test_accounts_equal_the_oracle(utility: str) -> None:
    settings = {"maturity": 3, "decay": 0.8, "utility": utility}
    ours, naive = learner(continual_backprop(0.15, **settings)), learner()
    data, update, plain = batches(), jax.jit(ours.update), jax.jit(naive.update)
    state = ours.init(jax.random.key(0), at(data, 0))
    groups = [{"u": [0.0] * n, "m": [0.0] * n, "a": [0] * n, "c": 0.0} for n in (5, 4)]
    total = np.zeros(2, int)
    for i in range(STEPS):
        batch = at(data, i)
        stepped = plain(state._replace(parts={}), batch)[0]
        before = exact(state.params)
        state = update(state, batch)[0]
        chosen = oracle.account(
            groups, before, exact(stepped.params), *exact((batch.x, batch.weight)), rate=0.15, **settings
        )
        part = state.parts["continual_backprop"]
        total += [len(units) for units in chosen]
        assert [int(n) for n in part.replaced] == total.tolist()
        for g, theirs in enumerate(groups):
            np.testing.assert_array_equal(part.age[g], theirs["a"])
            np.testing.assert_allclose(part.utility[g], theirs["u"], rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(part.activation[g], theirs["m"], rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(part.due[g], theirs["c"], rtol=1e-4, atol=1e-5)
        # But for the units replaced, it is the naive learner's step.
        fresh = MODEL.init(_key(state.key, i, "observe", "continual_backprop"), batch.x)[0]
        wanted = jax.tree.map(np.array, stepped.params)
        for g, layer in enumerate(("hidden_0", "hidden_1")):
            wanted[layer]["kernel"][:, chosen[g]] = fresh[layer]["kernel"][:, chosen[g]]
            wanted[layer]["bias"][chosen[g]] = 0
        for g, reader in enumerate(("hidden_1", "output")):
            wanted[reader]["kernel"][chosen[g]] = 0
        close(state.params, wanted, rtol=1e-5, atol=1e-6)
    assert total.min() > 2


def test_as_many_are_replaced_as_the_rate_says() -> None:
    """rate * eligible units, summed over steps, give or take one."""
    rate, maturity, steps = 0.013, 20, 400
    ours = learner(continual_backprop(rate, maturity=maturity), model=mlp((6,), 3, hidden=(30, 7)))
    data = batches(steps)
    start = ours.init(jax.random.key(0), at(data, 0))

    def step(state: Any, batch: Batch) -> Any:
        state = ours.update(state, batch)[0]
        part = state.parts["continual_backprop"]
        return state, (part.age, part.replaced)

    last, (ages, replaced) = jax.jit(lambda state: jax.lax.scan(step, state, data))(start)
    for age, count in zip(ages, replaced, strict=True):
        before = np.concatenate([np.zeros((1, age.shape[1]), int), np.asarray(age)[:-1]])
        expected = rate * (before + 1 > maturity).sum()
        assert expected > 5
        assert abs(int(count[-1]) - expected) <= 1
        # Ages fall to 0 exactly where a unit was replaced.
        assert (np.asarray(age) == 0).sum() == int(count[-1])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(last.params))


def test_every_unit_at_once_and_in_feature_maps() -> None:
    model = cnn((4, 4), 3, channels=(2, 3), hidden=4)
    ours = learner(continual_backprop(1.0, maturity=0, utility="released"), model=model, optimiser=optax.adam(0.01))
    batch = Batch(jax.random.normal(jax.random.key(1), (5, 4, 4)), jnp.arange(5) % 3, None, jnp.ones(5))
    state = jax.jit(ours.update)(ours.init(jax.random.key(0), batch), batch)[0]
    assert [int(n) for n in state.parts["continual_backprop"].replaced] == [2, 3, 4]
    assert not np.any(state.params["output"]["kernel"]) and not np.any(state.params["hidden"]["kernel"])
    assert np.all(state.params["conv_0"]["kernel"] != 0)
    assert not np.any(state.opt_state[0].mu["conv_0"]["kernel"]) and np.all(state.opt_state[0].mu["output"]["bias"])


def test_replayed_rows_count_as_the_loss_has_them() -> None:
    """The means are over the joined batch; and where only replayed rows have weight, nothing moves."""
    ours = learner(replay(20, batch_size=6), continual_backprop(0.0, decay=0.0))
    data, update = batches(3), jax.jit(ours.update)
    state = update(ours.init(jax.random.key(0), at(data, 0)), at(data, 0))[0]
    batch = at(data, 1)
    joined, _ = replay(20, batch_size=6).prepare(
        None, state, state.parts["replay"], batch, _key(state.key, 1, "prepare", "replay")
    )
    h = oracle.hidden(exact(state.params), exact(joined.x))[0]
    state = update(state, batch)[0]
    wanted = np.average(h, axis=0, weights=joined.weight)
    assert joined.weight[ROWS:].sum() == 6
    np.testing.assert_allclose(state.parts["continual_backprop"].activation[0], wanted, rtol=1e-4, atol=1e-6)
    empty = at(data, 2)._replace(weight=jnp.zeros(ROWS))
    same_bytes(update(state, empty)[0]._replace(step=state.step), state)


@pytest.mark.parametrize("source", ["normal", "init"])
def test_shrink_and_perturb_is_its_equation(source: str) -> None:
    ours, naive = learner(shrink_and_perturb(0.1, 0.5, source=source)), learner()
    batch = at(batches(), 0)
    state = ours.init(jax.random.key(0), batch)
    moved, plain = (jax.jit(one.update)(state, batch)[0] for one in (ours, naive))
    xi = jax.tree.map(lambda new, old: (new - 0.9 * old) / 0.5, moved.params, plain.params)
    if source == "init":
        close(xi, MODEL.init(_key(state.key, 0, "observe", "shrink_and_perturb"), batch.x)[0], rtol=1e-4, atol=1e-5)
    close(moved.opt_state, plain.opt_state)


def test_noise_is_normal_and_each_number_has_its_own() -> None:
    model = mlp((60,), 50, hidden=(50,))
    ours, naive = learner(shrink_and_perturb(0.0, 2.0), model=model), learner(model=model)
    batch = Batch(jnp.ones((2, 60)), jnp.zeros(2, int), None, jnp.ones(2))
    state = ours.init(jax.random.key(0), batch)
    moved, plain = (jax.jit(one.update)(state, batch)[0] for one in (ours, naive))
    xi = np.concatenate(
        [np.ravel(a - b) / 2 for a, b in zip(*map(jax.tree.leaves, (moved.params, plain.params)), strict=True)]
    )
    assert len(np.unique(xi)) > 0.99 * len(xi)
    np.testing.assert_allclose([xi.mean(), xi.std(), (xi**4).mean()], [0, 1, 3], atol=0.2)
    again = jax.jit(ours.update)(moved, batch)[0], jax.jit(naive.update)(moved, batch)[0]
    second = np.ravel(again[0].params["hidden_0"]["kernel"] - again[1].params["hidden_0"]["kernel"]) / 2
    first = np.ravel(moved.params["hidden_0"]["kernel"] - plain.params["hidden_0"]["kernel"]) / 2
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.1


@pytest.mark.parametrize("source", ["normal", "init"])
def test_at_boundaries_it_spares_the_first_task(source: str) -> None:
    component = shrink_and_perturb(0.5, 0.1, source=source, when="task")
    assert component.needs == ({"boundaries", "begin_sample"} if source == "init" else {"boundaries"})
    ours, naive = learner(component), learner()
    data = batches(2)
    begin, update = jax.jit(ours.begin_task), jax.jit(ours.update)
    task = TaskInfo(jnp.int32(0), jnp.ones(3, bool))
    state = ours.init(jax.random.key(0), at(data, 0))
    first = begin(state, task, data)
    same_bytes(first, state)
    trained = update(first, at(data, 0))[0]
    close(trained.params, jax.jit(naive.update)(first, at(data, 0))[0].params)
    second = begin(trained, task._replace(index=jnp.int32(1)), data)
    xi = jax.tree.map(lambda new, old: (new - 0.5 * old) / 0.1, second.params, trained.params)
    if source == "init":
        x = data.x[0]
        close(xi, MODEL.init(_key(state.key, 1, "begin_task", "shrink_and_perturb"), x)[0], rtol=1e-4, atol=1e-5)
    else:
        assert 0.5 < np.std(xi["hidden_0"]["kernel"]) < 1.5


def test_redo_recycles_the_dormant_when_it_looks() -> None:
    every = 3
    ours, naive = learner(redo(0.3, every)), learner()
    data, update, plain = batches(2 * every), jax.jit(ours.update), jax.jit(naive.update)
    state = ours.init(jax.random.key(0), at(data, 0))
    params = jax.tree.map(lambda leaf: leaf, state.params)
    params["hidden_0"]["bias"] = params["hidden_0"]["bias"].at[1].set(-50.0)  # dead
    params["hidden_1"]["kernel"] = params["hidden_1"]["kernel"].at[:, 2].multiply(0.01)  # hardly alive
    state = state._replace(params=params)
    total = np.zeros(2, int)
    for i in range(2 * every):
        batch = at(data, i)
        layers = oracle.hidden(exact(state.params), exact(batch.x))
        stepped = plain(state._replace(parts={}), batch)[0].params
        state = update(state, batch)[0]
        dormant = []
        for h in layers:
            activity = [sum(w * abs(v) for w, v in zip(batch.weight, column)) for column in h.T]
            dormant.append(np.array([a / np.mean(activity) <= 0.3 for a in activity]) & ((i + 1) % every == 0))
        if i == every - 1:
            assert dormant[0][1] and dormant[1][2]
        total += [mask.sum() for mask in dormant]
        np.testing.assert_array_equal(state.parts["redo"].recycled, total)
        np.testing.assert_allclose(
            state.params["output"]["kernel"], np.where(dormant[1][:, None], 0, stepped["output"]["kernel"]), rtol=1e-5
        )
        kept = ~dormant[0]
        np.testing.assert_allclose(
            state.params["hidden_0"]["kernel"][:, kept], stepped["hidden_0"]["kernel"][:, kept], rtol=1e-5
        )
        assert np.all(state.params["hidden_0"]["bias"][~kept] == 0)
    assert total.min() >= 1 and total.max() < 9


def test_a_silent_layer_is_recycled_whole() -> None:
    ours = learner(redo(0.0, 1))
    batch = at(batches(), 0)
    state = ours.init(jax.random.key(0), batch)
    state.params["hidden_1"]["bias"] = jnp.full(4, -50.0)
    state = jax.jit(ours.update)(state, batch)[0]
    assert int(state.parts["redo"].recycled[1]) == 4
    assert not np.any(state.params["hidden_1"]["bias"])


def test_components_refuse_models_that_they_cannot_reset() -> None:
    batch = at(batches(), 0)
    for component, said in ((continual_backprop(0.1), "continual_backprop"), (redo(0.1), "redo")):
        ours = learner(component, model=dataclasses.replace(MODEL, units=()))
        with pytest.raises(ValueError, match=f"{said}: the model has no units"):
            ours.init(jax.random.key(0), batch)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: continual_backprop(-0.1), r"replacement_rate is -0.1, but it must be in \[0, 1\]"),
        (lambda: continual_backprop(0.1, decay=1.0), "decay is 1"),
        (lambda: continual_backprop(0.1, maturity=-1), "maturity is -1"),
        (
            lambda: continual_backprop(0.1, utility="best"),
            "utility is 'best', but it must be one of 'paper', 'released'",
        ),
        (lambda: shrink_and_perturb(1.5, 0.1), "shrink is 1.5"),
        (lambda: shrink_and_perturb(0.5, -1), "noise is -1"),
        (lambda: shrink_and_perturb(0.5, 1, source="uniform"), "source is 'uniform'"),
        (lambda: shrink_and_perturb(0.5, 1, when="epoch"), "when is 'epoch'"),
        (lambda: redo(-1), "threshold is -1"),
        (lambda: redo(0.1, 0), "every is 0"),
    ],
)
def test_impossible_values_are_refused(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()
