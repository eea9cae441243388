"""Memory aware synapses: a quadratic penalty weighted by how much the outputs react to each parameter."""

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


def importance(params, x, active, w=None):
    """Omega = sum_b w_b | d ( sum_{active c} f_c(x_b)^2 ) / d params | / sum_b w_b.

    The absolute value is taken for each example apart; f are the outputs before any mask; at
    the outputs the gradient is 2 f_c for active c and 0 for the others.
    active is bool [C] or [B, C]; rows of weight 0 are absent (default: every row weighs 1).
    """
    w = np.ones(len(x)) if w is None else np.asarray(w, dtype=np.float64)
    active = np.asarray(active, dtype=bool)
    omega = tree_zeros(params)
    for b in range(len(x)):
        if w[b] == 0:
            continue
        row = np.asarray(x[b], dtype=np.float64)[None]
        outputs, _ = forward(params, row)
        counts = active[b] if active.ndim == 2 else active
        g = gradient(params, row, np.where(counts, 2.0 * outputs, 0.0))
        omega = tree_add(omega, tree_map(np.abs, g), w[b] / np.sum(w))
    return omega


def accumulate(old, new, decay=None, first=False):
    """old + new, or decay * old + (1 - decay) * new; with first, new alone."""
    if first:
        return tree_copy(new)
    if decay is None:
        return tree_add(old, new)
    return tree_map(lambda o, n: decay * o + (1.0 - decay) * n, old, new)


def penalty(params, omega, anchor, strength):
    """strength * sum Omega (p - a)^2, and its gradient 2 strength Omega (p - a)."""
    value = strength * tree_sum(tree_map(lambda o, p, a: o * (p - a) ** 2, omega, params, anchor))
    return value, tree_map(lambda o, p, a: 2.0 * strength * o * (p - a), omega, params, anchor)


def run(
    params,
    tasks,
    strength,
    lr,
    decay=None,
    first_whole=False,
    optimizer="sgd",
    reset_optimizer=False,
):
    """Train on the tasks in turn; each step descends cross-entropy + penalty.

    decay None: importances are summed; else decay * old + (1 - decay) * new, where the old ones
    are 0 at the end of the first task (first_whole: there the new ones are taken whole).
    tasks: list of {'batches': list of (x, y, w), 'sample': (x, y) or (x, y, w), 'active': bool [C]}.
    Returns ([(task loss, penalty) before each step], params).
    """
    params, state = tree_copy(params), init_state(params)
    omega, anchor = tree_zeros(params), tree_copy(params)
    history = []
    for t, task in enumerate(tasks):
        if reset_optimizer:
            state = init_state(params)
        for x, y, w in task["batches"]:
            loss, grads = cross_entropy(params, x, y, w, task["active"])
            extra, extra_grads = penalty(params, omega, anchor, strength)
            history.append((loss, extra))
            params, state = OPTIMIZERS[optimizer](params, tree_add(grads, extra_grads), state, lr)
        x, _, *weight = task["sample"]
        new = importance(params, x, task["active"], *weight)
        omega = accumulate(omega, new, decay, first=first_whole and t == 0)
        anchor = tree_copy(params)
    return history, params
