"""iCaRL: exemplars by herding, answers by the nearest mean of exemplars, one sigmoid for each class."""

import numpy as np

from .mlp import OPTIMIZERS, forward, gradient, init_state, tree_copy


def normalise(features):
    """Each row divided by its Euclidean length (a row of zeros stays)."""
    rows = []
    for row in np.asarray(features, dtype=np.float64):
        length = np.sqrt(np.sum(row**2))
        rows.append(row / length if length > 0 else row)
    return np.array(rows)


def herding(features, m, renormalise=False) -> list[int]:
    """m rows whose means, one after another, stay nearest to the mean of all rows [n, F].

    Rows are normalised first and mu is their mean; the k-th choice is the row phi, not chosen
    yet, that makes || mu - (sum of the chosen + phi) / k || smallest (ties: the lowest index).
    With fewer than m rows, all of them.  renormalise: mu is normalised again.
    """
    phi = normalise(features)
    mu = phi.mean(axis=0)
    if renormalise:
        mu = normalise(mu[None])[0]
    chosen: list[int] = []
    total = np.zeros(phi.shape[1])
    for k in range(1, min(m, len(phi)) + 1):
        best, best_distance = -1, np.inf
        for i in range(len(phi)):
            if i in chosen:
                continue
            distance = np.sqrt(np.sum((mu - (total + phi[i]) / k) ** 2))
            if distance < best_distance:
                best, best_distance = i, distance
        chosen.append(best)
        total = total + phi[best]
    return chosen


def nearest_mean(features, exemplars, renormalise=True):
    """Squared distances [B, classes] of each normalised row to the mean of each class.

    exemplars: list with each class's exemplar features [n, F]; they are normalised, averaged,
    and the mean is normalised again with renormalise.  A class without exemplars is infinitely far.
    """
    rows = normalise(features)
    distances = np.full((len(rows), len(exemplars)), np.inf)
    for c, of_class in enumerate(exemplars):
        if len(of_class) == 0:
            continue
        mean = normalise(of_class).mean(axis=0)
        if renormalise:
            mean = normalise(mean[None])[0]
        for b in range(len(rows)):
            distances[b, c] = np.sum((rows[b] - mean) ** 2)
    return distances


def features(params, x):
    """What the last layer reads."""
    return forward(params, x)[1][-1]


def sigmoid(z):
    return np.exp(-np.logaddexp(0.0, -z))


def loss(params, teacher, x, y, w, active, old, temperature=1.0):
    """L = sum_b w_b sum_{active c} BCE(t_bc, sigmoid(f_bc)) / max(sum_b w_b, 1e-12), and dL/dparams.

    t_bc = sigmoid(teacher's f_bc / temperature) for old c, and [c = y_b] for the others.
    BCE = log(1 + exp(f)) - t f;  at the logits: sigmoid(f) - t.
    active and old are bool [C]; teacher may be None when no class is old.
    """
    active, old = np.asarray(active, dtype=bool), np.asarray(old, dtype=bool)
    if teacher is None and old.any():
        raise ValueError("old classes need a teacher")
    logits, _ = forward(params, x)
    told = None if teacher is None else sigmoid(forward(teacher, x)[0] / temperature)
    total = max(float(np.sum(w)), 1e-12)
    value, dlogits = 0.0, np.zeros_like(logits)
    for b in range(len(logits)):
        if w[b] == 0:
            continue
        for c in range(logits.shape[1]):
            if not active[c]:
                continue
            target = told[b, c] if old[c] else float(c == y[b])
            f = logits[b, c]
            value += w[b] / total * (np.logaddexp(0.0, f) - target * f)
            dlogits[b, c] = w[b] / total * (sigmoid(f) - target)
    return value, gradient(params, x, dlogits)


def run(params, tasks, lr, replays=None, optimizer="sgd", reset_optimizer=False, temperature=1.0):
    """Train on the tasks in turn with the loss above; the teacher is the network of the end of the last task.

    Old classes are those active in any task before.
    tasks: list of {'batches': list of (x, y, w), 'active': bool [C]}.
    replays: for each step (counted over all the tasks) exemplars (x, y, w) that are put below
    the batch, or None; rows of both weigh alike.
    Returns ([(L, 0.0) before each step], params).
    """
    params, state = tree_copy(params), init_state(params)
    teacher, history = None, []
    old = np.zeros(len(tasks[0]["active"]), dtype=bool)
    for task in tasks:
        if reset_optimizer:
            state = init_state(params)
        active = np.asarray(task["active"], dtype=bool)
        for x, y, w in task["batches"]:
            replay = None if replays is None else replays[len(history)]
            if replay is not None and len(replay[1]):
                x, y, w = (np.concatenate([now, before]) for now, before in zip((x, y, w), replay))
            value, grads = loss(params, teacher, x, y, w, active, old, temperature)
            history.append((value, 0.0))
            params, state = OPTIMIZERS[optimizer](params, grads, state, lr)
        teacher, old = tree_copy(params), old | active
    return history, params
