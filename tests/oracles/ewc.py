"""Elastic weight consolidation: a quadratic penalty weighted by the diagonal Fisher."""

import numpy as np

from .mlp import (
    OPTIMIZERS,
    cross_entropy,
    forward,
    gradient,
    init_state,
    masked_softmax,
    tree_add,
    tree_copy,
    tree_map,
    tree_sum,
    tree_zeros,
)


def log_likelihood_gradient(params, x_row, c, active):
    """g_c = d log p(c | x) / d params for one example; at the logits: onehot(c) - p."""
    x = np.asarray(x_row)[None]
    dlogits = -masked_softmax(forward(params, x)[0][0], active)
    dlogits[c] += 1.0
    return gradient(params, x, dlogits[None])


def fisher(params, x, y, active, labels="expected", batch_square=False):
    """Diagonal Fisher: the mean over the examples of the squared PER-EXAMPLE gradient.

    labels = 'expected':        F = mean_b sum_{active c} p(c | x_b) g_{b,c}^2
    labels = 'observed':        F = mean_b g_{b, y_b}^2
    labels = array of classes:  F = mean_b g_{b, labels_b}^2  (the labels drawn: 'sampled')
    active is bool [C] or [B, C].
    batch_square: see batch_square_fisher; x and y (and drawn labels) are lists of batches.
    """
    if batch_square:
        return batch_square_fisher(params, x, y, active, labels)
    total = tree_zeros(params)
    for b in range(len(x)):
        row = np.asarray(active, dtype=bool)
        row = row[b] if row.ndim == 2 else row
        if isinstance(labels, str) and labels == "expected":
            p = masked_softmax(forward(params, np.asarray(x[b])[None])[0][0], row)
            terms = [(p[c], c) for c in range(len(row)) if row[c]]
        elif isinstance(labels, str) and labels == "observed":
            terms = [(1.0, y[b])]
        else:
            terms = [(1.0, labels[b])]
        for weight, c in terms:
            g = log_likelihood_gradient(params, x[b], c, row)
            total = tree_add(total, tree_map(np.square, g), weight)
    return tree_map(lambda f: f / len(x), total)


def batch_square_fisher(params, xs, ys, active, labels="observed"):
    """F = mean over batches of ( mean_{b in batch} g_{b, y_b} )^2; active is bool [C].

    (With 'expected' the inner mean would be of sum_c p_c g_c, which is zero: not allowed.)
    """
    if isinstance(labels, str):
        if labels != "observed":
            raise ValueError("batch_square needs one label for each example")
        labels = ys
    total = tree_zeros(params)
    for x, label in zip(xs, labels):
        mean = tree_zeros(params)
        for b in range(len(x)):
            g = log_likelihood_gradient(params, x[b], label[b], np.asarray(active, dtype=bool))
            mean = tree_add(mean, g, 1.0 / len(x))
        total = tree_add(total, tree_map(np.square, mean))
    return tree_map(lambda f: f / len(xs), total)


def penalty(params, memory, strength):
    """strength/2 * sum_k sum F_k (p - a_k)^2, and its gradient strength * sum_k F_k (p - a_k).

    memory is the list of the pairs (F_k, a_k).
    """
    value, grads = 0.0, tree_zeros(params)
    for f_k, a_k in memory:
        value += 0.5 * strength * tree_sum(tree_map(lambda f, a, p: f * (p - a) ** 2, f_k, a_k, params))
        grads = tree_add(grads, tree_map(lambda f, a, p: f * (p - a), f_k, a_k, params), strength)
    return value, grads


def consolidate(memory, new_fisher, params, form="separate", decay=1.0):
    """separate: one more pair (F_new, params) in the memory.

    online: a single pair, F~ = decay * F~_old + F_new, anchored at the newest params.
    """
    if form == "separate":
        return memory + [(new_fisher, tree_copy(params))]
    if memory:
        new_fisher = tree_add(new_fisher, memory[0][0], decay)
    return [(new_fisher, tree_copy(params))]


def run(
    params,
    tasks,
    strength,
    lr,
    form="separate",
    decay=1.0,
    optimizer="sgd",
    labels="expected",
    batch_square=False,
    reset_optimizer=False,
):
    """Train on the tasks in turn; each step descends cross-entropy + penalty.

    tasks: list of {'batches': list of (x, y, w), 'sample': (x, y), 'active': bool [C]}; with
    batch_square, sample = (list of x, list of y).  labels: 'expected', 'observed', or a list
    with each task's drawn labels.  Returns ([(task loss, penalty) before each step], params).
    """
    params, state = tree_copy(params), init_state(params)
    memory, history = [], []
    for t, task in enumerate(tasks):
        if reset_optimizer:
            state = init_state(params)
        for x, y, w in task["batches"]:
            loss, grads = cross_entropy(params, x, y, w, task["active"])
            extra, extra_grads = penalty(params, memory, strength)
            history.append((loss, extra))
            grads = tree_add(grads, extra_grads)
            params, state = OPTIMIZERS[optimizer](params, grads, state, lr)
        x, y = task["sample"]
        drawn = labels if isinstance(labels, str) else labels[t]
        new = fisher(params, x, y, task["active"], drawn, batch_square)
        memory = consolidate(memory, new, params, form, decay)
    return history, params
