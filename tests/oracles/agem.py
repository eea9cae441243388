"""A-GEM: a step may not go against the mean gradient on rows of the tasks before."""

import numpy as np

from .der import recall
from .mlp import OPTIMIZERS, cross_entropy, init_state, tree_add, tree_copy, tree_map, tree_sum


def dot(a, b) -> float:
    """Inner product of two nested dicts taken as one vector each."""
    return tree_sum(tree_map(lambda p, q: p * q, a, b))


def project(grads, reference):
    """g where g . r >= 0, else g - (g . r) / (r . r) r."""
    along = dot(grads, reference)
    if along >= 0:
        return grads
    return tree_add(grads, reference, -along / dot(reference, reference))


def run(params, tasks, drawn, lr, mask="now", optimizer="sgd", reset_optimizer=False):
    """Train on the tasks in turn; the optimizer gets the projected gradient of the cross-entropy.

    tasks: list of {'batches': list of (x, y, w), 'active': bool [C]}.
    drawn: for each step (counted over all the tasks) the ids of the rows of the reference
    gradient; an id is the place of a row among all rows of positive weight, in the order of the
    stream, and its task must be finished.  Without ids nothing is projected.
    mask: see der.recall.
    Returns ([(task loss, loss on the reference rows or 0) before each step], params,
    [(g . r before, g . r after the projection) of each step, nan without ids]).
    """
    params, state = tree_copy(params), init_state(params)
    seen, history, dots = [], [], []
    for task in tasks:
        if reset_optimizer:
            state = init_state(params)
        active = np.asarray(task["active"], dtype=bool)
        finished = list(seen)
        for x, y, w in task["batches"]:
            loss, grads = cross_entropy(params, x, y, w, active)
            ids = drawn[len(history)]
            reference_loss, pair = 0.0, (float("nan"), float("nan"))
            if len(ids):
                x_old, y_old, masks = recall(finished, ids, active, mask)
                reference_loss, reference = cross_entropy(params, x_old, y_old, np.ones(len(y_old)), masks)
                before = dot(grads, reference)
                grads = project(grads, reference)
                pair = (before, dot(grads, reference))
            history.append((loss, reference_loss))
            dots.append(pair)
            params, state = OPTIMIZERS[optimizer](params, grads, state, lr)
            seen += [(x[b], y[b], active) for b in range(len(x)) if w[b] > 0]
    return history, params, dots
