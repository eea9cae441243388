"""MAML and its kin: first-order MAML, Meta-SGD (a tree of rates), ANIL (only the head moves), OML (online steps).

episode = ((support x, support y), (query x, query y)).
loss: a name of LOSSES, a function (params, x, y) -> (loss, dloss/dparams), or a pair of these, (inner, query).
rate: a number, or a tree like params (one rate for each parameter).
only: names of the layers that the inner loop moves (default: all).
rows: None: every inner step takes all support rows; m: step i = 0, 1, ... takes the rows [i m, (i + 1) m).
weights: None: the query loss after the last step counts alone; else the weight of that after step 1, 2, ...
"""

from functools import partial

import numpy as np

from .mlp import (
    OPTIMIZERS,
    cross_entropy,
    forward,
    gradient,
    init_state,
    tree_add,
    tree_copy,
    tree_map,
    tree_sum,
    tree_zeros,
)


def squared_error(params, x, y):
    """L = mean over rows and outputs of (f(x) - y)^2; at the outputs: 2 (f - y) / (rows * outputs)."""
    outputs, _ = forward(params, x)
    difference = outputs - np.reshape(np.asarray(y, dtype=np.float64), outputs.shape)
    return float(np.mean(difference**2)), gradient(params, x, 2.0 * difference / difference.size)


def mean_cross_entropy(params, x, y, active=True):
    """L = mean over rows of -log p(y | x), the softmax over the active outputs; active is bool [C] or True."""
    return cross_entropy(params, x, y, np.ones(len(y)), active)


LOSSES = {"mse": squared_error, "cross_entropy": mean_cross_entropy}


def pair_of_losses(loss):
    """(inner loss, query loss) as functions."""
    pair = loss if isinstance(loss, tuple) else (loss, loss)
    return tuple(LOSSES[one] if isinstance(one, str) else one for one in pair)


def scaled(rate, tree):
    """rate * tree, for a number or a tree of rates."""
    rate = tree_copy(rate)
    if isinstance(rate, dict):
        return tree_map(lambda r, a: r * a, rate, tree)
    return tree_map(lambda a: rate * a, tree)


def central_difference(f, tree, h=1e-6):
    """df/dtree by (f(a + h) - f(a - h)) / 2h, one number of the tree at a time; tree may be a number.

    Refused where f has a corner or a jump within h: there half the step gives another slope, or the slopes of
    the two sides differ.
    """
    if not isinstance(tree, dict):
        return central_difference(lambda t: f(t["only"]), {"only": tree}, h)["only"]
    tree = tree_copy(tree)
    middle = f(tree)

    def slopes(branch):
        if isinstance(branch, dict):
            return {key: slopes(below) for key, below in branch.items()}
        slope = np.zeros(np.shape(branch))
        for place in np.ndindex(branch.shape):
            here = float(branch[place])

            def moved(by, place=place, here=here):
                branch[place] = here + by
                value = f(tree)
                branch[place] = here
                return value

            up, down = moved(h), moved(-h)
            slope[place] = (up - down) / (2.0 * h)
            half = (moved(h / 2) - moved(-h / 2)) / h
            size = 1.0 + abs(slope[place]) + abs(middle)
            if abs(half - slope[place]) > 1e-6 * size or abs(up - 2.0 * middle + down) / h > 1e-2 * size:
                raise ValueError("no slope: a corner or a jump lies within the step of the finite difference")
        return slope if slope.ndim else float(slope)

    return slopes(tree)


def trajectory(params, support_x, support_y, rate, steps, loss="mse", only=None, rows=None):
    """phi_0 = theta;  g_i = dL(phi_i; rows of step i)/dphi, 0 in a layer that stays;  phi_{i+1} = phi_i - rate * g_i.

    Returns ([phi_0, ..., phi_steps], [g_0, ..., g_{steps-1}]).
    """
    inner, _ = pair_of_losses(loss)
    if only is not None and not set(only) <= set(params):
        raise ValueError("only must name layers")
    if rows is not None and steps * rows > len(support_x):
        raise ValueError("too few support rows for so many steps")
    phis, grads = [tree_copy(params)], []
    for i in range(steps):
        now = slice(None) if rows is None else slice(i * rows, (i + 1) * rows)
        _, g = inner(phis[-1], support_x[now], support_y[now])
        g = {name: g[name] if only is None or name in only else tree_zeros(g[name]) for name in params}
        grads.append(g)
        phis.append(tree_add(phis[-1], scaled(rate, g), -1.0))
    return phis, grads


def adapted(params, support_x, support_y, rate, steps, loss="mse", only=None, rows=None):
    """phi_steps, the parameters after the inner loop."""
    return trajectory(params, support_x, support_y, rate, steps, loss, only, rows)[0][-1]


def step_weights(steps, weights):
    """[weight of the query loss at phi_0, phi_1, ..., phi_steps]; the one at phi_0 is 0 unless steps is 0."""
    if weights is None:
        return [0.0] * steps + [1.0]
    if len(weights) != steps:
        raise ValueError("one weight for each inner step")
    return [0.0, *weights]


def meta_loss(params, episodes, rate, steps, loss="mse", only=None, rows=None, weights=None):
    """Mean over the episodes of L_query(phi_steps), or of sum_i weights_i L_query(phi_{i+1})."""
    _, query_loss = pair_of_losses(loss)
    total = 0.0
    for support, query in episodes:
        phis, _ = trajectory(params, *support, rate, steps, loss, only, rows)
        for weight, phi in zip(step_weights(steps, weights), phis):
            if weight != 0:
                total += weight * query_loss(phi, *query)[0] / len(episodes)
    return total


def meta_gradient(params, episodes, rate, steps, of_rate=True, h=1e-6, **options):
    """(d meta_loss / d params, d meta_loss / d rate), through the inner loop, by finite differences.

    of_rate False: None in the place of the second.
    """
    g = central_difference(lambda p: meta_loss(p, episodes, rate, steps, **options), params, h)
    if not of_rate:
        return g, None
    return g, central_difference(lambda r: meta_loss(params, episodes, r, steps, **options), rate, h)


def first_order_gradient(params, episodes, rate, steps, loss="mse", only=None, rows=None, weights=None):
    """The same two with the inner gradients held constant: phi_i = theta - rate * sum_{j < i} g_j.

    With q_i = dL_query(phi_i)/dphi:  of theta, the mean over the episodes of sum_i weights_i q_i;  of the rates,
    of -sum_i weights_i (sum_{j < i} g_j) * q_i, summed over all parameters if the rate is one number.
    """
    _, query_loss = pair_of_losses(loss)
    of_params, of_rate = tree_zeros(params), tree_zeros(params)
    for support, query in episodes:
        phis, grads = trajectory(params, *support, rate, steps, loss, only, rows)
        for i, weight in enumerate(step_weights(steps, weights)):
            if weight == 0:
                continue
            _, q = query_loss(phis[i], *query)
            of_params = tree_add(of_params, q, weight / len(episodes))
            for g in grads[:i]:
                of_rate = tree_add(of_rate, tree_map(lambda a, b: a * b, g, q), -weight / len(episodes))
    return of_params, of_rate if isinstance(rate, dict) else tree_sum(of_rate)


def run(params, batches, rate, steps, lr, optimizer="adam", exact=True, learn_rate=False, **options):
    """One outer step for each batch (a list of episodes), on theta, and with learn_rate on the rates too.

    exact: the gradient through the inner loop, else the first-order one.
    Returns ([meta_loss before each step], params, rate).
    """
    params, rate = tree_copy(params), tree_copy(rate)
    state, rate_state, history = init_state(params), init_state(rate), []
    for episodes in batches:
        history.append(meta_loss(params, episodes, rate, steps, **options))
        if exact:
            of_params, of_rate = meta_gradient(params, episodes, rate, steps, of_rate=learn_rate, **options)
        else:
            of_params, of_rate = first_order_gradient(params, episodes, rate, steps, **options)
        params, state = OPTIMIZERS[optimizer](params, of_params, state, lr)
        if learn_rate:
            rate, rate_state = OPTIMIZERS[optimizer](rate, of_rate, rate_state, lr)
    return history, params, rate


adam_run = partial(run, optimizer="adam")
sgd_run = partial(run, optimizer="sgd")
