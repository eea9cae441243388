"""Permutation alignment: what is claimed exactly holds exactly, and a scrambled network is put back in order."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from cl_zoo import Batch, Model
from cl_zoo.estimators.alignment import (
    assign,
    match_activations,
    match_weights,
    permute,
    unit_correlations,
)
from cl_zoo.models import cnn, mlp
from tests.tiny import close, same_bytes

KEY = jax.random.key(4)
NETS = {
    "mlp": lambda: mlp((6, 6), 4, hidden=(9, 7), initialiser="fan_in_uniform"),
    "cnn": lambda: cnn((8, 6), 4, channels=(3, 4), hidden=5),
}
SHAPES = {"mlp": (6, 6), "cnn": (8, 6)}


@pytest.fixture(scope="module", params=list(NETS))
def made(request: pytest.FixtureRequest) -> tuple[Model, Any, Any, Batch]:
    """A net with biases, and 60 rows in batches, some of them padding."""
    model = NETS[request.param]()
    x = jax.random.normal(KEY, (4, 15, *SHAPES[request.param]))
    params, model_state = model.init(KEY, x[0])
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(KEY, leaf.shape), params)
    weight = jnp.ones((4, 15)).at[3, 4:].set(0)
    return model, params, model_state, Batch(x, None, None, weight)


def draw(model: Model, params: Any, seed: int = 0) -> tuple[Any, ...]:
    """A random permutation for each group, none of them the identity."""
    random = np.random.default_rng(seed)
    found = []
    for (path, axis, _), *_ in model.units:
        n = params[path[0]][path[1]].shape[axis]
        order = np.arange(n)
        while (order == np.arange(n)).all():
            order = random.permutation(n)
        found.append(jnp.asarray(order, jnp.int32))
    return tuple(found)


def inverse(permutations: Any) -> list[list[int]]:
    return [np.argsort(order).tolist() for order in permutations]


def test_permuting_leaves_the_function_unchanged(made: Any) -> None:
    model, params, model_state, batches = made
    scrambled = permute(params, model.units, draw(model, params))
    assert any(not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (scrambled, params)), strict=True))
    answers = [model.apply(p, model_state, batches.x[0])[0] for p in (params, scrambled)]
    np.testing.assert_allclose(answers[1], answers[0], rtol=1e-4, atol=1e-5)


def test_permuting_there_and_back_changes_no_byte(made: Any) -> None:
    model, params, _, _ = made
    there = draw(model, params)
    back = tuple(jnp.argsort(order) for order in there)
    same_bytes(permute(permute(params, model.units, there), model.units, back), params)


@pytest.mark.parametrize("kind", ["activations", "weights", "weights in random order"])
def test_a_scrambled_network_is_put_back_in_order(made: Any, kind: str) -> None:
    model, params, model_state, batches = made
    scrambling = draw(model, params)
    scrambled = permute(params, model.units, scrambling)
    if kind == "activations":
        found = jax.jit(lambda a, b: match_activations(model, (a, model_state), (b, model_state), batches))(
            params, scrambled
        )
    else:
        key = KEY if kind.endswith("random order") else None
        found = jax.jit(lambda a, b: match_weights(model.units, a, b, key=key))(params, scrambled)
    assert [order.tolist() for order in found] == inverse(scrambling)
    same_bytes(permute(scrambled, model.units, found), params)


def test_matching_weights_never_ends_further_away_than_it_began(made: Any) -> None:
    model, params, _, batches = made
    other, _ = model.init(jax.random.key(9), batches.x[0])

    def distance(old: Any) -> float:
        return float(sum(jnp.sum(jnp.square(a - b)) for a, b in zip(*map(jax.tree.leaves, (params, old)), strict=True)))

    sweeps = [permute(other, model.units, match_weights(model.units, params, other, sweeps=n)) for n in (1, 20)]
    assert distance(other) > distance(sweeps[0]) >= distance(sweeps[1]) - 1e-4


def activations_by_hand(model: Model, params: Any, model_state: Any, batches: Batch) -> list[tuple[Any, Any]]:
    """Per group, `[rows, units]` and the weight of each row, in doubles: every position of a map is a row."""
    found: list[tuple[list[Any], list[Any]]] = [([], []) for _ in model.units]
    for x, weight in zip(batches.x, batches.weight, strict=True):
        _, _, taps = model.apply(params, model_state, x)
        for (rows, weights), group in zip(found, model.units, strict=True):
            into = np.asarray(taps[group[-1][0][0]][0], np.float64)
            n = params[group[0][0][0]][group[0][0][1]].shape[group[0][1]]
            for row, w in zip(into, weight, strict=True):
                positions = row.reshape(-1, n)
                rows.extend(positions)
                weights.extend([float(w)] * len(positions))
    return [(np.array(rows), np.array(weights)) for rows, weights in found]


def test_correlations_are_those_of_numpy(made: Any) -> None:
    """Over all rows at once, positions too, which the paper's code divides by the wrong number."""
    model, params, model_state, batches = made
    other, _ = model.init(jax.random.key(9), batches.x[0])
    ours = unit_correlations(model, (params, model_state), (other, model_state), batches)
    first = activations_by_hand(model, params, model_state, batches)
    second = activations_by_hand(model, other, model_state, batches)
    for r, (a, weight), (b, _) in zip(ours, first, second, strict=True):
        a, b = a[weight > 0], b[weight > 0]
        n = a.shape[1]
        with np.errstate(invalid="ignore", divide="ignore"):
            theirs = np.nan_to_num(np.corrcoef(a.T, b.T)[:n, n:])
        np.testing.assert_allclose(r, theirs, atol=2e-5)
        assert np.abs(theirs).max() > 0.1


def layer() -> Model:
    """A network whose hidden activations are its inputs: one group, read by `output`."""

    def apply(params: Any, model_state: Any, x: Any, **_: Any) -> Any:
        hidden = x @ params["hidden"]["kernel"]
        z = hidden @ params["output"]["kernel"]
        return z, model_state, {"output": (hidden, z)}

    return Model(lambda key, x: ({}, {}), apply, (((("hidden", "kernel"), 1, "out"), (("output", "kernel"), 0, "in")),))


def test_correlations_worked_out_by_hand() -> None:
    """Units 1, 2, 3 against -(1, 2, 3) and 1, 3, 2: correlations -1 and 1/2; the third unit never changes.

    The last row has weight 0, the others come in two batches, far from zero where sums of squares would cancel.
    """
    model = layer()
    x = jnp.array([[[1.0, 1.0, 7.0], [2.0, 3.0, 7.0]], [[3.0, 2.0, 7.0], [99.0, -99.0, 3.0]]])
    x = x.at[:, :, :2].add(1000.0)
    params = {"hidden": {"kernel": jnp.eye(3)}, "output": {"kernel": jnp.ones((3, 1))}}
    old = {"hidden": {"kernel": jnp.diag(jnp.array([-1.0, 1.0, 1.0]))}, "output": {"kernel": jnp.ones((3, 1))}}
    batches = Batch(x, None, None, jnp.array([[1.0, 1.0], [1.0, 0.0]]))
    (r,) = unit_correlations(model, (params, {}), (old, {}), batches)
    np.testing.assert_allclose(r, [[-1, 0.5, 0], [-0.5, 1, 0], [0, 0, 0]], atol=1e-5)
    # As they stand -1 + 1, the first two swapped 0.5 - 0.5, the first and the constant one swapped 0 + 1.
    assert match_activations(model, (params, {}), (old, {}), batches)[0].tolist() == [2, 1, 0]


def test_weights_of_rows_count_as_so_many_rows() -> None:
    model = layer()
    x = jax.random.normal(KEY, (1, 3, 2))
    params = {"hidden": {"kernel": jnp.eye(2)}, "output": {"kernel": jnp.ones((2, 1))}}
    other = {"hidden": {"kernel": jnp.array([[1.0, 0.5], [-2.0, 1.0]])}, "output": {"kernel": jnp.ones((2, 1))}}
    repeated = Batch(x[:, jnp.array([0, 1, 1, 2, 2, 2])], None, None, jnp.ones((1, 6)))
    weighted = Batch(x, None, None, jnp.array([[1.0, 2.0, 3.0]]))
    close(*(unit_correlations(model, (params, {}), (other, {}), rows) for rows in (repeated, weighted)))


def test_silent_units_give_no_nan_and_keep_their_places(made: Any) -> None:
    model, params, model_state, batches = made
    name = model.units[0][0][0][0]
    silent = jnp.array([0, 2])
    dead = {**params[name], "bias": params[name]["bias"].at[silent].set(-1e4)}
    network = ({**params, name: dead}, model_state)
    r = unit_correlations(model, network, network, batches)[0]
    assert np.isfinite(r).all() and np.abs(r[silent]).max() == 0
    found = match_activations(model, network, network, batches)
    assert found[0].tolist() == list(range(len(found[0])))


def test_no_rows_at_all_leave_the_order_as_it_is(made: Any) -> None:
    model, params, model_state, batches = made
    other, _ = model.init(jax.random.key(9), batches.x[0])
    empty = batches._replace(weight=jnp.zeros_like(batches.weight))
    for order in match_activations(model, (params, model_state), (other, model_state), empty):
        assert order.tolist() == list(range(len(order)))


@pytest.mark.parametrize("n", [1, 2, 7, 30])
def test_assignments_are_as_good_as_those_of_scipy(n: int) -> None:
    random = np.random.default_rng(n)
    found = jax.jit(assign)
    for scores in (random.normal(size=(n, n)), random.uniform(-1, 1, (n, n)) ** 3, np.round(random.random((n, n)), 1)):
        order = np.asarray(found(jnp.asarray(scores, jnp.float32)))
        assert sorted(order) == list(range(n))
        best = scores[linear_sum_assignment(scores, maximize=True)].sum()
        np.testing.assert_allclose(scores[np.arange(n), order].sum(), best, atol=2e-6 * n)


def test_scores_that_are_no_numbers_end_the_search() -> None:
    assert sorted(assign(jnp.full((4, 4), jnp.nan)).tolist()) == [0, 1, 2, 3]
    assert assign(jnp.array([[jnp.inf, 1.0], [2.0, jnp.nan]])).tolist() == [1, 0]


def test_what_cannot_be_aligned_is_refused(made: Any) -> None:
    model, params, model_state, batches = made
    network = (params, model_state)
    untapped = dataclasses.replace(model, apply_function=lambda *a, **k: (*model.apply(*a, **k)[:2], {}))
    with pytest.raises(ValueError, match="no taps of the layers that read the units of"):
        unit_correlations(untapped, network, network, batches)
    with pytest.raises(ValueError, match="'nowhere/kernel', which it does not have"):
        permute(params, (((("nowhere", "kernel"), 1, "out"),),), (jnp.arange(3),))
    with pytest.raises(ValueError, match="must be a multiple of the 11 units"):
        permute(params, model.units[-1:], (jnp.arange(11),))
    with pytest.raises(ValueError, match="sweeps is 0"):
        match_weights(model.units, params, params, sweeps=0)
