"""Replay: each batch is extended by rows seen before, and is then an ordinary batch."""

import numpy as np

from .mlp import OPTIMIZERS, cross_entropy, init_state, tree_copy


def extend(batch, active, replay, seen, mask="now"):
    """Put the replayed rows below the batch; returns x, y, w, active [B + M, C].

    replay = (ids, weights); seen is the list of (x row, y, active mask of its own task).
    mask 'now': replayed rows are classified among the present task's active outputs;
    mask 'own': among those of the task they came from.
    """
    x, y, w = (list(part) for part in batch)
    masks = [np.asarray(active, dtype=bool) for _ in x]
    ids, weights = replay
    for row_id, weight in zip(ids, weights):
        if not 0 <= row_id < len(seen):
            raise ValueError("a replayed row must have been seen")
        x_row, y_row, own = seen[row_id]
        x.append(x_row)
        y.append(y_row)
        w.append(weight)
        masks.append(own if mask == "own" else np.asarray(active, dtype=bool))
    x, w = np.array(x, dtype=np.float64), np.array(w, dtype=np.float64)
    return x, np.array(y), w, np.array(masks)


def run(params, tasks, replays, lr, mask="now", optimizer="sgd", reset_optimizer=False, include_present=False):
    """Train on the tasks in turn; step s descends the weighted cross-entropy of the extended batch

    L = (sum_batch w_b l_b + sum_replayed v_m l_m) / max(sum_batch w_b + sum_replayed v_m, 1e-12).

    tasks: list of {'batches': list of (x, y, w), 'active': bool [C]}.
    replays: for each step (counted over all the tasks) (ids, weights); an id is the place of a
    row among all rows of positive weight, in the order of the stream.  Rows of a batch may be
    replayed from the next step on; with include_present, in its own step already.
    Returns ([L before each step], params).
    """
    params, state = tree_copy(params), init_state(params)
    seen, history = [], []
    for task in tasks:
        if reset_optimizer:
            state = init_state(params)
        active = np.asarray(task["active"], dtype=bool)
        for batch in task["batches"]:
            present = [(x, y, active) for x, y, w in zip(*batch) if w > 0]
            replay = replays[len(history)]
            known = seen + present if include_present else seen
            loss, grads = cross_entropy(params, *extend(batch, active, replay, known, mask))
            history.append(loss)
            params, state = OPTIMIZERS[optimizer](params, grads, state, lr)
            seen = seen + present
    return history, params
