"""The oracles of meta-learning against closed forms and against one another."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from tests.oracles import la_maml, maml, reptile
from tests.oracles.mlp import adam_step, forward, gradient, init_state, tree_add, tree_map, tree_sum, tree_zeros

Tree = dict[str, Any]


def network(*sizes: int, seed: int = 0) -> Tree:
    draw = np.random.default_rng(seed)
    names = [f"hidden_{i}" for i in range(len(sizes) - 2)] + ["output"]
    return {
        name: {"kernel": draw.normal(size=(a, b)) / np.sqrt(a), "bias": 0.3 * draw.normal(size=b)}
        for name, a, b in zip(names, sizes, sizes[1:])
    }


def rates_like(params: Tree, seed: int = 5) -> Tree:
    draw = np.random.default_rng(seed)
    return tree_map(lambda a: draw.uniform(0.02, 0.2, size=np.shape(a)), params)


def rows(n: int, inputs: int, classes: int | None = None, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    y = draw.normal(size=n) if classes is None else draw.integers(classes, size=n)
    return draw.normal(size=(n, inputs)), y


def episodes_of(inputs: int, classes: int | None = None, n: int = 2, support: int = 6) -> list:
    return [(rows(support, inputs, classes, 10 + i), rows(7, inputs, classes, 20 + i)) for i in range(n)]


def linear_loss(params: Tree, x: np.ndarray, y: np.ndarray) -> tuple[float, Tree]:
    """Mean over the rows of y * f(x): its gradient at the outputs depends on no parameter."""
    outputs, _ = forward(params, x)
    return float(np.mean(y[:, None] * outputs)), gradient(params, x, y[:, None] / len(y))


def inner_product(a: Tree, b: Tree) -> float:
    return tree_sum(tree_map(lambda p, q: p * q, a, b))


def flat(tree: Any) -> np.ndarray:
    if isinstance(tree, dict):
        return np.concatenate([flat(tree[key]) for key in sorted(tree)])
    return np.ravel(tree)


def distance(a: Any, b: Any) -> float:
    """||a - b|| / ||b||."""
    return float(np.linalg.norm(flat(a) - flat(b)) / np.linalg.norm(flat(b)))


NET, HEADS = network(2, 5, 4, 1, seed=2), network(3, 6, 4)  # every unit fires for some row
WITH_ACTIVE = partial(maml.mean_cross_entropy, active=np.array([True, False, True, True]))


@pytest.mark.parametrize("case", ["mse", "cross_entropy", "active", "linear"])
def test_gradients_of_the_losses(case: str) -> None:
    losses = {**maml.LOSSES, "active": WITH_ACTIVE, "linear": linear_loss}
    params, (x, y) = (HEADS, rows(9, 3, 4)) if case in ("cross_entropy", "active") else (NET, rows(9, 2))
    if case == "active":
        x, y = x[y != 1], y[y != 1]
    _, found = losses[case](params, x, y)
    assert distance(found, maml.central_difference(lambda p: losses[case](p, x, y)[0], params)) < 1e-8


def test_values_of_the_losses() -> None:
    x, y = rows(9, 2)
    np.testing.assert_allclose(maml.squared_error(NET, x, y)[0], np.mean((forward(NET, x)[0][:, 0] - y) ** 2))
    assert maml.squared_error(NET, x, y)[0] == maml.squared_error(NET, x, y[:, None])[0]
    x, y = rows(9, 3, 4)
    p = np.exp(forward(HEADS, x)[0])
    wanted = -np.log(p[np.arange(9), y] / p.sum(axis=1)).mean()
    np.testing.assert_allclose(maml.mean_cross_entropy(HEADS, x, y)[0], wanted)


@pytest.mark.parametrize(
    "f",
    [
        abs,
        lambda a: float(a > 0),
        lambda a: max(a - 4e-7, 0.0),
        lambda a: 3.0 * (a > -4e-7),
        lambda a: 1e-3 * max(a - 4e-7, 0.0),
    ],
    ids=range(5),
)
def test_finite_differences_refuse_corners_and_jumps(f: Any) -> None:
    with pytest.raises(ValueError, match="no slope"):
        maml.central_difference(f, 0.0)
    assert abs(maml.central_difference(lambda a: np.sin(a), 0.3) - np.cos(0.3)) < 1e-9


# The exact gradient


@pytest.mark.parametrize("steps", [1, 3])
def test_closed_form_of_linear_regression(steps: int) -> None:
    """theta' = theta - rate H (theta - ...): the exact gradient is (I - rate H)^steps times the query's."""
    params, rate, episodes = network(3, 1), 0.1, episodes_of(3)
    wanted = np.zeros(4)
    for (sx, sy), (qx, qy) in episodes:
        sx, qx = np.c_[sx, np.ones(len(sx))], np.c_[qx, np.ones(len(qx))]
        shrink = np.eye(4) - rate * 2.0 * sx.T @ sx / len(sx)
        theta = np.append(params["output"]["kernel"][:, 0], params["output"]["bias"])
        for _ in range(steps):
            theta = shrink @ theta + rate * 2.0 * sx.T @ sy / len(sx)
        of_query = 2.0 * qx.T @ (qx @ theta - qy) / len(qx)
        wanted += np.linalg.matrix_power(shrink, steps) @ of_query / len(episodes)
    found, _ = maml.meta_gradient(params, episodes, rate, steps)
    found = np.append(found["output"]["kernel"][:, 0], found["output"]["bias"])
    assert distance(found, wanted) < 1e-8
    first, _ = maml.first_order_gradient(params, episodes, rate, steps)
    assert distance(np.append(first["output"]["kernel"][:, 0], first["output"]["bias"]), wanted) > 0.05


def by_hessians(params: Tree, episodes: list, rate: Any, steps: int, loss: Any, **options: Any) -> tuple[Tree, Tree]:
    """The exact gradients of theta and of the rates by the chain rule, with Hessian-vector products.

    From the last step down:  rates: -g_i * v;  v <- v - H_i (rate * moves * v) + weight_i * q_i.
    """
    only, block, weights = options.get("only"), options.get("rows"), options.get("weights")
    weights = [0.0] * (steps - 1) + [1.0] if weights is None else weights
    inner, query_loss = maml.pair_of_losses(loss)
    moves = {name: tree_map(lambda a, n=name: float(only is None or n in only), params[name]) for name in params}
    rates = rate if isinstance(rate, dict) else tree_map(lambda a: rate, params)
    of_theta, of_rates = tree_zeros(params), tree_zeros(params)
    for (sx, sy), query in episodes:
        phi, walk = params, []
        for i in range(steps):
            now = slice(None) if block is None else slice(i * block, (i + 1) * block)
            g = tree_map(lambda m, a: m * a, moves, inner(phi, sx[now], sy[now])[1])
            walk.append((phi, now, g))
            phi = tree_map(lambda p, r, a: p - r * a, phi, rates, g)
        ends = [place for place, _, _ in walk[1:]] + [phi]
        v = tree_zeros(params)
        for (place, now, g), end, weight in reversed(list(zip(walk, ends, weights))):
            v = tree_add(v, query_loss(end, *query)[1], weight)
            of_rates = tree_add(of_rates, tree_map(lambda a, b: a * b, g, v), -1.0 / len(episodes))
            u = tree_map(lambda r, m, a: r * m * a, rates, moves, v)
            up, down = (inner(tree_add(place, u, by), sx[now], sy[now])[1] for by in (1e-6, -1e-6))
            v = tree_add(v, tree_add(up, down, -1.0), -1.0 / 2e-6)
        of_theta = tree_add(of_theta, v, 1.0 / len(episodes))
    return of_theta, of_rates


WAYS = {
    "maml": {"rate": 0.1, "steps": 1},
    "five steps": {"rate": 0.1, "steps": 5},
    "meta-sgd": {"rate": "tree", "steps": 2},
    "anil": {"rate": 0.1, "steps": 3, "only": {"output"}},
    "oml": {"rate": 0.1, "steps": 6, "only": {"output"}, "rows": 1},
    "minibatches": {"rate": "tree", "steps": 3, "only": {"hidden_0", "output"}, "rows": 2},
    "multi-step": {"rate": 0.1, "steps": 3, "weights": [0.5, 0.2, 0.3]},
}


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("way", WAYS)
def test_exact_gradient_by_the_chain_rule(way: str, loss: str) -> None:
    params, episodes = (NET, episodes_of(2)) if loss == "mse" else (HEADS, episodes_of(3, 4))
    options = {**WAYS[way], "loss": loss}
    if options["rate"] == "tree":
        options["rate"] = rates_like(params)
    found, of_rate = maml.meta_gradient(params, episodes, **options)
    wanted, of_rates = by_hessians(params, episodes, **options)
    assert distance(found, wanted) < 1e-6
    assert distance(of_rate, of_rates if isinstance(options["rate"], dict) else tree_sum(of_rates)) < 1e-6
    first, _ = maml.first_order_gradient(params, episodes, **options)
    assert distance(first, wanted) > 1e-2


# First order


@pytest.mark.parametrize("weights", [None, [0.5, 0.2, 0.3]])
def test_first_order_is_exact_where_the_inner_loss_is_linear(weights: list | None) -> None:
    loss = (linear_loss, "mse")
    for rate in (0.1, rates_like(network(3, 1))):
        found = maml.first_order_gradient(network(3, 1), episodes_of(3), rate, 3, loss, weights=weights)
        wanted = maml.meta_gradient(network(3, 1), episodes_of(3), rate, 3, loss=loss, weights=weights)
        assert distance(found[0], wanted[0]) < 1e-8
        assert distance(found[1], wanted[1]) < 1e-8
    found = maml.first_order_gradient(NET, episodes_of(2), 0.1, 3, loss, weights=weights)
    wanted = maml.meta_gradient(NET, episodes_of(2), 0.1, 3, loss=loss, weights=weights)
    assert distance(found[0], wanted[0]) > 1e-2


def test_gradient_of_the_rates() -> None:
    """After one step it is -g * q and exact at first order; after two it is not."""
    rate, episodes = rates_like(NET), episodes_of(2, n=1)
    (sx, sy), query = episodes[0]
    _, g = maml.squared_error(NET, sx, sy)
    phi = tree_map(lambda p, r, a: p - r * a, NET, rate, g)
    wanted = tree_map(lambda a, b: -a * b, g, maml.squared_error(phi, *query)[1])
    assert distance(maml.first_order_gradient(NET, episodes, rate, 1)[1], wanted) < 1e-12
    assert distance(maml.meta_gradient(NET, episodes, rate, 1)[1], wanted) < 1e-7
    two = maml.first_order_gradient(NET, episodes, rate, 2)[1], maml.meta_gradient(NET, episodes, rate, 2)[1]
    assert distance(*two) > 1e-2


def test_one_rate_is_a_tree_of_equal_rates() -> None:
    tree = tree_map(lambda a: np.full(np.shape(a), 0.1), NET)
    for of_both in (maml.first_order_gradient, maml.meta_gradient):
        one, many = of_both(NET, episodes_of(2), 0.1, 2), of_both(NET, episodes_of(2), tree, 2)
        assert distance(one[0], many[0]) < 1e-9
        assert abs(one[1] - tree_sum(many[1])) < 1e-7
        assert abs(one[1]) > 1e-2


# The inner loop


def test_only_the_head_moves() -> None:
    (sx, sy), _ = episodes_of(2)[0]
    phi = maml.adapted(NET, sx, sy, 0.1, 3, only={"output"})
    for name in ("hidden_0", "hidden_1"):
        np.testing.assert_array_equal(phi[name]["kernel"], NET[name]["kernel"])
        np.testing.assert_array_equal(phi[name]["bias"], NET[name]["bias"])
    assert np.abs(phi["output"]["kernel"] - NET["output"]["kernel"]).min() > 0
    with pytest.raises(ValueError, match="layers"):
        maml.adapted(NET, sx, sy, 0.1, 3, only={"head"})


def test_online_steps_take_the_rows_in_order() -> None:
    (sx, sy), _ = episodes_of(2)[0]
    phi = NET
    for x, y in zip(sx[:4], sy[:4]):
        phi = tree_add(phi, maml.squared_error(phi, x[None], y[None])[1], -0.1)
    found = maml.adapted(NET, sx, sy, 0.1, 4, rows=1)
    assert distance(found, phi) < 1e-14
    assert distance(maml.adapted(NET, sx[:4][::-1], sy[:4][::-1], 0.1, 4, rows=1), phi) > 1e-3
    assert distance(maml.adapted(NET, sx, sy, 0.1, 4), phi) > 1e-3
    with pytest.raises(ValueError, match="too few"):
        maml.adapted(NET, sx, sy, 0.1, 7, rows=1)


def test_multi_step_loss_is_the_weighted_sum() -> None:
    after = [maml.meta_loss(NET, episodes_of(2), 0.1, steps) for steps in range(4)]
    assert len({round(value, 6) for value in after}) == 4
    found = maml.meta_loss(NET, episodes_of(2), 0.1, 3, weights=[0.5, 0.2, 0.3])
    np.testing.assert_allclose(found, 0.5 * after[1] + 0.2 * after[2] + 0.3 * after[3], rtol=1e-13)
    with pytest.raises(ValueError, match="weight"):
        maml.meta_loss(NET, episodes_of(2), 0.1, 3, weights=[1.0])


# Runs


@pytest.mark.parametrize("exact", [True, False])
def test_outer_steps(exact: bool) -> None:
    of_both = maml.meta_gradient if exact else maml.first_order_gradient
    episodes, rate = episodes_of(2), rates_like(NET)
    g, of_rate = of_both(NET, episodes, rate, 2)
    history, params, rates = maml.sgd_run(NET, [episodes], rate, 2, 0.1, exact=exact, learn_rate=True)
    assert history == [maml.meta_loss(NET, episodes, rate, 2)]
    assert distance(params, tree_add(NET, g, -0.1)) < 1e-12
    assert distance(rates, tree_add(rate, of_rate, -0.1)) < 1e-12
    _, params, rates = maml.adam_run(NET, [episodes], rate, 2, 0.01, exact=exact)
    assert distance(params, adam_step(NET, g, init_state(NET), 0.01)[0]) < 1e-6
    assert distance(rates, rate) == 0
    history, _, _ = maml.adam_run(NET, [episodes] * 4, 0.1, 2, 0.01, exact=exact)
    assert all(a > b for a, b in zip(history, history[1:]))


def test_first_and_second_order_runs_part() -> None:
    runs = [maml.sgd_run(NET, [episodes_of(2)] * 3, 0.1, 2, 0.1, exact=exact)[1] for exact in (True, False)]
    assert distance(*runs) > 1e-3


# Reptile


def test_reptile_of_one_step_is_a_gradient_step() -> None:
    batches = [rows(5, 2, seed=i) for i in range(3)]
    x, y = np.concatenate([x for x, _ in batches]), np.concatenate([y for _, y in batches])
    wanted = tree_add(NET, maml.squared_error(NET, x, y)[1], -0.3 * 0.1)
    assert distance(reptile.run(NET, [[[batch] for batch in batches]], 0.3, 0.1), wanted) < 1e-14
    two = reptile.run(NET, [[[batch, batch] for batch in batches]], 0.15, 0.1)
    assert distance(two, wanted) > 1e-4


def test_reptile_walks_the_minibatches_in_order() -> None:
    a, b = rows(5, 2, seed=1), rows(5, 2, seed=2)
    first = maml.squared_error(NET, *a)[1]
    second = maml.squared_error(tree_add(NET, first, -0.1), *b)[1]
    towards, _ = reptile.direction(NET, [[a, b]], 0.1)
    assert distance(towards, tree_map(lambda p, q: -0.1 * (p + q), first, second)) < 1e-12
    assert distance(reptile.direction(NET, [[b, a]], 0.1)[0], towards) > 1e-2


def test_reptile_with_adam_inside() -> None:
    """The first step of Adam is lr * g / (|g| + 1e-8); a state carried on makes the second episode's another."""
    a, b = rows(5, 2, seed=1), rows(5, 2, seed=2)
    sign = lambda g: -0.1 * g / (np.abs(g) + 1e-8)  # noqa: E731
    steps = [tree_map(sign, maml.squared_error(NET, *batch)[1]) for batch in (a, b)]
    wanted = tree_map(lambda p, q: (p + q) / 2, *steps)
    assert distance(reptile.direction(NET, [[a], [b]], 0.1, inner="adam")[0], wanted) < 1e-12
    assert distance(reptile.direction(NET, [[a], [b]], 0.1, inner="adam", carry=True)[0], wanted) > 1e-2
    later = [reptile.adapted(NET, [a, b], 0.1, inner="adam", b1=b1)[0] for b1 in (0.0, 0.9)]
    assert distance(*later) > 1e-2


def test_reptile_outer_steps() -> None:
    batches = [[[rows(5, 2, seed=1)]], [[rows(5, 2, seed=2)]]]
    once = reptile.run(NET, batches[:1], 0.3, 0.1)
    assert distance(reptile.run(NET, batches, [0.3, 0.0], 0.1), once) == 0
    assert (
        distance(
            reptile.run(NET, batches, 1.0, 0.1, outer="sgd"),
            reptile.adapted(reptile.adapted(NET, batches[0][0], 0.1)[0], batches[1][0], 0.1)[0],
        )
        < 1e-14
    )
    towards, _ = reptile.direction(NET, batches[0], 0.1)
    moved = tree_add(reptile.run(NET, batches[:1], 0.01, 0.1, outer="adam"), NET, -1.0)
    assert distance(moved, tree_map(lambda d: 0.01 * d / (np.abs(d) + 1e-8), towards)) < 1e-9


# La-MAML

INCOMING = rows(4, 3, 4, seed=30)
META = tuple(np.concatenate(parts) for parts in zip(INCOMING, rows(3, 3, 4, seed=31)))


def test_la_maml_is_a_multi_step_maml_online() -> None:
    alpha, options = rates_like(HEADS), {"loss": "cross_entropy", "rows": 1, "weights": [0.25] * 4}
    episodes = [(INCOMING, META)]
    value = la_maml.meta_loss(HEADS, alpha, INCOMING, META)
    np.testing.assert_allclose(value, maml.meta_loss(HEADS, episodes, alpha, 4, **options), rtol=1e-14)
    found = la_maml.first_order_gradients(HEADS, alpha, INCOMING, META)
    wanted = maml.first_order_gradient(HEADS, episodes, alpha, 4, **options)
    exact = la_maml.exact_gradients(HEADS, alpha, INCOMING, META)
    by_chain = by_hessians(HEADS, episodes, alpha, 4, **options)
    for i in range(2):
        assert distance(found[i], wanted[i]) < 1e-13
        assert distance(exact[i], by_chain[i]) < 1e-6
        assert distance(found[i], exact[i]) > 1e-2


def test_la_maml_first_order_is_exact_where_the_inner_loss_is_linear() -> None:
    params = network(3, 1)
    alpha = tree_map(lambda a: a - 0.1, rates_like(params))
    assert flat(alpha).min() < 0 < flat(alpha).max()
    data = (params, alpha, rows(4, 3, seed=30), rows(7, 3, seed=31), (linear_loss, "mse"))
    found, wanted = la_maml.first_order_gradients(*data), la_maml.exact_gradients(*data)
    assert distance(found[0], wanted[0]) < 1e-8
    assert distance(found[1], wanted[1]) < 1e-8


def test_sign_of_the_gradient_of_alpha() -> None:
    """One row, one rate: -<inner gradient, meta gradient>; the rate falls where the two oppose."""
    x, y = INCOMING[0][:1], np.array([1])
    for label, falls in ((1, False), (2, True)):
        _, g = maml.mean_cross_entropy(HEADS, x, y)
        phi = tree_add(HEADS, g, -0.05)
        product = inner_product(g, maml.mean_cross_entropy(phi, x, np.array([label]))[1])
        found = la_maml.first_order_gradients(HEADS, 0.05, (x, y), (x, np.array([label])))[1]
        exact = la_maml.exact_gradients(HEADS, 0.05, (x, y), (x, np.array([label])))[1]
        np.testing.assert_allclose(found, -product, rtol=1e-12)
        np.testing.assert_allclose(exact, -product, rtol=1e-6)
        assert (product < 0) == falls
        _, alpha, _ = la_maml.step(HEADS, 0.05, (x, y), (x, np.array([label])), eta=0.01)
        assert (alpha < 0.05) == falls


def test_rates_below_zero_stand_still() -> None:
    alpha = rates_like(HEADS)
    alpha["hidden_0"] = tree_map(lambda a: -a, alpha["hidden_0"])
    phis, _ = la_maml.inner_pass(HEADS, alpha, INCOMING)
    np.testing.assert_array_equal(phis[-1]["hidden_0"]["kernel"], HEADS["hidden_0"]["kernel"])
    assert distance(phis[-1]["output"], HEADS["output"]) > 1e-3
    for of_both in (la_maml.first_order_gradients, la_maml.exact_gradients):
        of_theta, of_alpha = of_both(HEADS, alpha, INCOMING, META)
        assert not flat(of_alpha["hidden_0"]).any() and flat(of_alpha["output"]).all()
        assert flat(of_theta["hidden_0"]).any()
        assert of_both(HEADS, -0.1, INCOMING, META)[1] == 0


def test_clipping() -> None:
    tree = {"a": np.array([3.0, 0.0]), "b": {"c": np.array([4.0])}}
    clipped = la_maml.clip(tree, 2.0)
    np.testing.assert_allclose(flat(clipped), [1.2, 0.0, 1.6])
    for bound in (5.0, 6.0, None):
        np.testing.assert_array_equal(flat(la_maml.clip(tree, bound)), flat(tree))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("bound", [0.1, 0.3, None])
def test_la_maml_steps(bound: float | None, exact: bool) -> None:
    eta, beta, alpha = 0.1, 0.2, tree_map(lambda a: a - 0.04, rates_like(HEADS))
    assert flat(alpha).min() < 0
    of_both = la_maml.exact_gradients if exact else la_maml.first_order_gradients
    of_theta, of_alpha = of_both(HEADS, alpha, INCOMING, META)
    norms = [float(np.linalg.norm(flat(g))) for g in (of_theta, of_alpha)]
    shares = [1.0 if bound is None else min(1.0, bound / norm) for norm in norms]
    assert [share < 1 for share in shares] == {0.1: [True, True], 0.3: [True, False], None: [False, False]}[bound]
    new = tree_add(alpha, of_alpha, -eta * shares[1])
    options: dict[str, Any] = {"exact": exact, "bound": bound}
    by_new = tree_map(lambda p, a, g: p - shares[0] * np.maximum(a, 0.0) * g, HEADS, new, of_theta)
    by_old = tree_map(lambda p, a, g: p - shares[0] * np.maximum(a, 0.0) * g, HEADS, alpha, of_theta)
    theta, rates, before = la_maml.step(HEADS, alpha, INCOMING, META, eta, **options)
    assert before == la_maml.meta_loss(HEADS, alpha, INCOMING, META)
    assert distance(rates, new) < 1e-13 and distance(rates, alpha) > 1e-3
    assert distance(theta, by_new) < 1e-13 and distance(theta, by_old) > 1e-6
    theta, rates, _ = la_maml.step(HEADS, alpha, INCOMING, META, eta, beta, "sync", **options)
    assert distance(rates, new) < 1e-13
    assert distance(theta, tree_add(HEADS, of_theta, -beta * shares[0])) < 1e-13
    g, _ = of_both(HEADS, 0.05, INCOMING, META)
    share = 1.0 if bound is None else min(1.0, bound / float(np.linalg.norm(flat(g))))
    theta, rate, _ = la_maml.step(HEADS, 0.05, INCOMING, META, eta, beta, "c_maml", **options)
    assert rate == 0.05
    assert distance(theta, tree_add(HEADS, g, -beta * share)) < 1e-13


def test_both_gradients_are_clipped_to_norm_two_each() -> None:
    def steep(params: Tree, x: np.ndarray, y: np.ndarray) -> tuple[float, Tree]:
        value, g = maml.mean_cross_entropy(params, x, y)
        return 100.0 * value, tree_map(lambda a: 100.0 * a, g)

    alpha, loss = rates_like(HEADS), ("cross_entropy", steep)
    theta, rates, _ = la_maml.step(HEADS, alpha, INCOMING, META, 0.1, 0.3, "sync", loss=loss)
    np.testing.assert_allclose(np.linalg.norm(flat(theta) - flat(HEADS)), 0.3 * 2.0)
    np.testing.assert_allclose(np.linalg.norm(flat(rates) - flat(alpha)), 0.1 * 2.0)


def test_la_maml_run_goes_on_from_the_new_rates() -> None:
    alpha = rates_like(HEADS)
    theta, rates, first = la_maml.step(HEADS, alpha, INCOMING, META, 0.3)
    theta, rates, second = la_maml.step(theta, rates, INCOMING, META, 0.3)
    found = la_maml.run(HEADS, alpha, [(INCOMING, META)] * 2, 0.3)
    assert found[0] == [first, second] and second < first
    assert distance(found[1], theta) == 0 and distance(found[2], rates) == 0
