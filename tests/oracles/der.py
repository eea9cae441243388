"""Dark experience replay: the logits of the day a row was seen are held on to, its label too (++)."""

import numpy as np

from .mlp import OPTIMIZERS, cross_entropy, forward, gradient, init_state, tree_add, tree_copy, tree_zeros


def recall(seen, ids, active, mask="now"):
    """The rows with these ids: x [M, ...], y [M], active [M, C].

    seen is the list of (x row, y, active mask of its own task).  mask 'now': the present task's
    active outputs for every row; 'own': those of the task the row came from.
    """
    if mask not in ("now", "own"):
        raise ValueError("mask must be 'now' or 'own'")
    for row_id in ids:
        if not 0 <= row_id < len(seen):
            raise ValueError("a replayed row must have been seen")
    x = np.array([seen[i][0] for i in ids], dtype=np.float64)
    y = np.array([seen[i][1] for i in ids])
    masks = [seen[i][2] if mask == "own" else np.asarray(active, dtype=bool) for i in ids]
    return x, y, np.array(masks)


def logit_distance(params, x, stored):
    """D = mean over rows and ALL outputs of (f(x) - z)^2, and dD/dparams.

    At the logits: 2 (f - z) / (rows * outputs).
    """
    logits, _ = forward(params, x)
    difference = logits - np.asarray(stored, dtype=np.float64)
    return float(np.mean(difference**2)), gradient(params, x, 2.0 * difference / difference.size)


def extra_terms(params, seen, logits, drawn, active, alpha, beta, mask="now"):
    """(alpha * D, beta * CE), and the gradient of their sum; a term over no row is 0.

    drawn = (ids for D, ids for CE); logits is the list of the stored logits by id.
    """
    for_logits, for_labels = drawn
    distance, replayed, grads = 0.0, 0.0, tree_zeros(params)
    if len(for_logits):
        x, _, _ = recall(seen, for_logits, active, mask)
        distance, g = logit_distance(params, x, [logits[i] for i in for_logits])
        grads = tree_add(grads, g, alpha)
    if len(for_labels):
        x, y, masks = recall(seen, for_labels, active, mask)
        replayed, g = cross_entropy(params, x, y, np.ones(len(y)), masks)
        grads = tree_add(grads, g, beta)
    return alpha * distance, beta * replayed, grads


def run(params, tasks, alpha, beta, drawn, lr, mask="now", optimizer="sgd", reset_optimizer=False):
    """Train on the tasks in turn; a step descends

    CE(batch) + alpha * mean_{rows, outputs} (f(x') - z')^2 + beta * CE(x'', y'').

    tasks: list of {'batches': list of (x, y, w), 'active': bool [C]}.
    drawn: for each step (counted over all the tasks) a pair (ids for x', ids for x''), each
    possibly empty; an id is the place of a row among all rows of positive weight, in the order
    of the stream.  Rows of a batch may be replayed from the next step on.  z' are the logits,
    not masked, of the parameters before the step in which the row arrived.
    Returns ([(task loss, the two terms together) before each step], params, stored logits [ids, C]).
    """
    params, state = tree_copy(params), init_state(params)
    seen, logits, history = [], [], []
    for task in tasks:
        if reset_optimizer:
            state = init_state(params)
        active = np.asarray(task["active"], dtype=bool)
        for x, y, w in task["batches"]:
            loss, grads = cross_entropy(params, x, y, w, active)
            ids = drawn[len(history)]
            distance, replayed, extra_grads = extra_terms(params, seen, logits, ids, active, alpha, beta, mask)
            history.append((loss, distance + replayed))
            outputs, _ = forward(params, x)
            for b in range(len(x)):
                if w[b] > 0:
                    seen.append((x[b], y[b], active))
                    logits.append(outputs[b])
            params, state = OPTIMIZERS[optimizer](params, tree_add(grads, extra_grads), state, lr)
    return history, params, np.array(logits)
