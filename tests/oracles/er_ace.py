"""ER-ACE: cross-entropy of incoming examples among the classes of their batch, of replayed ones among all seen."""

import numpy as np

from .mlp import OPTIMIZERS, cross_entropy, init_state, tree_add, tree_copy, tree_zeros


def run(params, tasks, replays, lr, incoming="present", replayed="seen", mask="now", optimizer="sgd"):
    """Train on the tasks in turn; step s descends CE(batch among P) + CE(replayed among S), means with weights w.

    tasks, replays: as in the oracle of replay. P: the classes of positive weight in the batch; with "unseen" also every
    class from the largest seen one up. S: every class of positive weight so far, the batch's among them; with "all"
    every open one. An example of a stream that tells tasks (mask "own") competes among its own task's outputs alone.
    Returns ([(first term, second term) before each step], params).
    """
    params, state = tree_copy(params), init_state(params)
    known, seen, history = [], set(), []
    for task in tasks:
        active = np.asarray(task["active"], dtype=bool)
        n = active.shape[-1]
        for x, y, w in task["batches"]:
            here = {int(label) for label, weight in zip(y, w) if weight > 0}
            seen = seen | here
            now = np.array([c in here or (incoming == "unseen" and c >= max(seen)) for c in range(n)])
            ever = np.array([replayed == "all" or c in seen for c in range(n)])
            first, grads = cross_entropy(params, x, y, w, np.array([now & active] * len(y)))
            ids, weights = replays[len(history)]
            second, more = 0.0, tree_zeros(params)
            if len(ids):
                rows = np.array([known[i][0] for i in ids])
                labels = np.array([known[i][1] for i in ids])
                masks = np.array([ever & (known[i][2] if mask == "own" else active) for i in ids])
                second, more = cross_entropy(params, rows, labels, np.asarray(weights, float), masks)
            history.append((first, second))
            params, state = OPTIMIZERS[optimizer](params, tree_add(grads, more), state, lr)
            known = known + [(a, b, active) for a, b, weight in zip(x, y, w) if weight > 0]
    return history, params
