"""Continual learning by weight interpolation, and its kin: Fisher merging, WiSE-FT, moving averages."""

import numpy as np
from scipy.optimize import linear_sum_assignment

from .mlp import OPTIMIZERS, cross_entropy, forward, init_state, layer_names, tree_add, tree_copy, tree_map, tree_zeros


def correlation(a, b):
    """Pearson correlation [units of a, units of b] over the rows; 0 where a unit never changes."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    matrix = np.zeros((a.shape[1], b.shape[1]))
    for i in range(a.shape[1]):
        for j in range(b.shape[1]):
            p, q = a[:, i] - a[:, i].mean(), b[:, j] - b[:, j].mean()
            size = np.sqrt(np.sum(p**2) * np.sum(q**2))
            matrix[i, j] = np.sum(p * q) / size if size > 0 else 0.0
    return matrix


def match(new, old, x):
    """For each hidden layer the permutation: unit perm[i] of old belongs at the place of unit i of new.

    It makes the sum of the correlations of the paired units (after the ReLU, over the rows x) largest.
    """
    _, of_new = forward(new, x)
    _, of_old = forward(old, x)
    permutations = []
    for a, b in zip(of_new[1:], of_old[1:]):
        _, columns = linear_sum_assignment(correlation(a, b), maximize=True)
        permutations.append(columns)
    return permutations


def permute(params, permutations):
    """The same function with the hidden units in another order: unit perm[i] goes to place i."""
    params = tree_copy(params)
    names = layer_names(params)
    for layer, perm in enumerate(permutations):
        here, above = params[names[layer]], params[names[layer + 1]]
        here["kernel"], here["bias"] = here["kernel"][:, perm], here["bias"][perm]
        above["kernel"] = above["kernel"][perm, :]
    return params


def interpolate(new, old, alpha):
    """(1 - alpha) new + alpha old: alpha weighs the OLD network."""
    return tree_map(lambda n, o: (1.0 - alpha) * n + alpha * o, new, old)


def run(
    params, tasks, alpha, lr, rows=None, align=True, optimizer="sgd", reset_optimizer="interpolated", scramble=None
):
    """Train on the tasks in turn; at the end of each but the first, with old the result of the last end,

    theta <- (1 - alpha) theta + alpha permute(old, match(theta, old)).
    tasks: list of {'batches': list of (x, y, w), 'sample': (x, ...), 'active': bool [C]}.
    rows: for each task the inputs that the units are matched on (default: the task's sample).
    align False: no permutation.
    scramble: permutations of the hidden layers of theta, applied before each end.
    reset_optimizer 'interpolated': at the ends where theta changed; 'every': at every end; 'never'.
    Returns ([(task loss, 0.0) before each step], params).
    """
    if reset_optimizer not in ("interpolated", "every", "never"):
        raise ValueError("reset_optimizer must be 'interpolated', 'every' or 'never'")
    params, state = tree_copy(params), init_state(params)
    old, history = None, []
    for t, task in enumerate(tasks):
        for x, y, w in task["batches"]:
            loss, grads = cross_entropy(params, x, y, w, task["active"])
            history.append((loss, 0.0))
            params, state = OPTIMIZERS[optimizer](params, grads, state, lr)
        if scramble is not None:
            params = permute(params, scramble)
        if old is not None:
            if align:
                old = permute(old, match(params, old, task["sample"][0] if rows is None else rows[t]))
            params = interpolate(params, old, alpha)
        if reset_optimizer == "every" or (reset_optimizer == "interpolated" and old is not None):
            state = init_state(params)
        old = tree_copy(params)
    return history, params


def run_ends(params, tasks, end, lr, optimizer="sgd"):
    """Train on the tasks in turn; when task t ends, the parameters become end(t, parameters).

    The optimiser keeps its state.  tasks: list of {'batches': list of (x, y, w), 'active': bool [C]}.
    Returns ([(task loss, 0.0) before each step], params).
    """
    params, state = tree_copy(params), init_state(params)
    history = []
    for t, task in enumerate(tasks):
        for x, y, w in task["batches"]:
            loss, grads = cross_entropy(params, x, y, w, task["active"])
            history.append((loss, 0.0))
            params, state = OPTIMIZERS[optimizer](params, grads, state, lr)
        params = end(t, params)
    return history, params


def fisher_merge(networks, fishers, weights=None, floor=0.0):
    """theta = sum_k a_k (F_k + floor) theta_k / sum_k a_k (F_k + floor), parameter by parameter.

    weights: a_k (default: all 1).
    """
    weights = [1.0] * len(networks) if weights is None else weights
    top, bottom = tree_zeros(networks[0]), tree_zeros(networks[0])
    for a, f, theta in zip(weights, fishers, networks):
        top = tree_add(top, tree_map(lambda f, p: (f + floor) * p, f, theta), a)
        bottom = tree_add(bottom, tree_map(lambda f: f + floor, f), a)
    return tree_map(lambda n, d: n / d, top, bottom)


def wise_ft(before, tuned, alpha):
    """(1 - alpha) before + alpha tuned: alpha weighs the TUNED network."""
    return tree_map(lambda b, p: (1.0 - alpha) * b + alpha * p, before, tuned)


def ema(average, params, decay):
    """decay * average + (1 - decay) * params."""
    return tree_map(lambda a, p: decay * a + (1.0 - decay) * p, average, params)


def run_ema(params, tasks, decay, lr, warm_up=False, optimizer="sgd", reset_optimizer=False):
    """Train on the tasks in turn, with a moving average of the parameters after each step.

    It begins at the first params.  warm_up: at step n = 0, 1, ... decay is min(decay, 1 - 1 / (n + 1)).
    tasks: list of {'batches': list of (x, y, w), 'active': bool [C]}.
    Returns ([(task loss, 0.0) before each step], params, average).
    """
    params, state = tree_copy(params), init_state(params)
    average, history = tree_copy(params), []
    for task in tasks:
        if reset_optimizer:
            state = init_state(params)
        for x, y, w in task["batches"]:
            loss, grads = cross_entropy(params, x, y, w, task["active"])
            now = min(decay, 1.0 - 1.0 / (len(history) + 1)) if warm_up else decay
            history.append((loss, 0.0))
            params, state = OPTIMIZERS[optimizer](params, grads, state, lr)
            average = ema(average, params, now)
    return history, params, average
