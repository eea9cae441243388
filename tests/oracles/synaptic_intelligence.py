"""Synaptic intelligence: a quadratic penalty weighted by how much each parameter lowered the loss."""

import numpy as np

from .mlp import OPTIMIZERS, cross_entropy, init_state, tree_add, tree_copy, tree_map, tree_sum, tree_zeros


def contribution(w, grads, old, new):
    """w <- w - g * (new - old): what the loss fell by along the path, parameter by parameter."""
    return tree_map(lambda w, g, p, q: w - g * (q - p), w, grads, old, new)


def consolidate(omega, w, params, start, damping, clamp=True):
    """Omega <- Omega + w / ((params - start)^2 + damping), then max(Omega, 0) with clamp."""
    omega = tree_map(lambda o, w, p, s: o + w / ((p - s) ** 2 + damping), omega, w, params, start)
    return tree_map(lambda o: np.maximum(o, 0.0), omega) if clamp else omega


def penalty(params, omega, anchor, strength):
    """strength * sum Omega (p - a)^2, and its gradient 2 strength Omega (p - a)."""
    value = strength * tree_sum(tree_map(lambda o, p, a: o * (p - a) ** 2, omega, params, anchor))
    return value, tree_map(lambda o, p, a: 2.0 * strength * o * (p - a), omega, params, anchor)


def run(
    params,
    tasks,
    strength,
    lr,
    damping=0.1,
    gradient="task",
    clamp=True,
    optimizer="sgd",
    reset_optimizer=False,
):
    """Train on the tasks in turn; each step descends cross-entropy + penalty.

    gradient 'task':   the contributions use the gradient of the cross-entropy alone;
    gradient 'total':  that of the cross-entropy and the penalty.
    tasks: list of {'batches': list of (x, y, w), 'active': bool [C]}.
    Returns ([(task loss, penalty) before each step], params).
    """
    if gradient not in ("task", "total"):
        raise ValueError("gradient must be 'task' or 'total'")
    params, state = tree_copy(params), init_state(params)
    omega, anchor = tree_zeros(params), tree_copy(params)
    history = []
    for task in tasks:
        if reset_optimizer:
            state = init_state(params)
        start, w_path = tree_copy(params), tree_zeros(params)
        for x, y, w in task["batches"]:
            loss, task_grads = cross_entropy(params, x, y, w, task["active"])
            extra, extra_grads = penalty(params, omega, anchor, strength)
            history.append((loss, extra))
            total = tree_add(task_grads, extra_grads)
            new, state = OPTIMIZERS[optimizer](params, total, state, lr)
            w_path = contribution(w_path, task_grads if gradient == "task" else total, params, new)
            params = new
        omega = consolidate(omega, w_path, params, start, damping, clamp)
        anchor = tree_copy(params)
    return history, params
