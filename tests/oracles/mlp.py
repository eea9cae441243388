"""A ReLU multilayer perceptron with hand-derived gradients, in float64.

params = {'hidden_0': {'kernel': [in, out], 'bias': [out]}, 'hidden_1': ..., 'output': ...}
"""

import numpy as np


def tree_map(f, tree, *others):
    """Apply f to every array of one or more nested dicts of the same shape."""
    if isinstance(tree, dict):
        return {key: tree_map(f, tree[key], *[other[key] for other in others]) for key in tree}
    return f(tree, *others)


def tree_sum(tree) -> float:
    """Sum of all numbers in all arrays of a nested dict."""
    if isinstance(tree, dict):
        return sum(tree_sum(branch) for branch in tree.values())
    return float(np.sum(tree))


def tree_zeros(tree):
    return tree_map(lambda a: np.zeros(np.shape(a), dtype=np.float64), tree)


def tree_copy(tree):
    return tree_map(lambda a: np.array(a, dtype=np.float64), tree)


def tree_add(a, b, scale: float = 1.0):
    """a + scale * b."""
    return tree_map(lambda p, q: p + scale * q, a, b)


def layer_names(params) -> list[str]:
    return [f"hidden_{i}" for i in range(len(params) - 1)] + ["output"]


def forward(params, x):
    """h_0 = x;  h_{l+1} = relu(h_l W_l + b_l);  logits = h_last W_output + b_output.

    Returns the logits [B, C] and the list of the inputs of each layer, [h_0, h_1, ...].
    """
    h = np.asarray(x, dtype=np.float64)
    activations = [h]
    for name in layer_names(params)[:-1]:
        h = np.maximum(h @ params[name]["kernel"] + params[name]["bias"], 0.0)
        activations.append(h)
    return h @ params["output"]["kernel"] + params["output"]["bias"], activations


def gradient(params, x, dlogits):
    """Backpropagation, summed over the rows: with d the gradient at a layer's output,

    dW = h^T d,  db = sum_rows d,  and below it  d <- (d W^T) * [h > 0].
    """
    _, activations = forward(params, x)
    d = np.asarray(dlogits, dtype=np.float64)
    grads = {}
    for name, h in reversed(list(zip(layer_names(params), activations))):
        grads[name] = {"kernel": h.T @ d, "bias": d.sum(axis=0)}
        d = (d @ params[name]["kernel"].T) * (h > 0)
    return grads


def masked_softmax(logits_row, active_row):
    """p_c = exp(z_c) / sum_{active k} exp(z_k) for active c, and 0 for inactive c (one row)."""
    p = np.zeros(len(logits_row))
    z = logits_row[active_row]
    e = np.exp(z - z.max())
    p[active_row] = e / e.sum()
    return p


def masked_log_softmax(logits_row, active_row):
    """log p_c for active c, and -inf for inactive c (one row)."""
    log_p = np.full(len(logits_row), -np.inf)
    z = logits_row[active_row]
    log_p[active_row] = z - z.max() - np.log(np.exp(z - z.max()).sum())
    return log_p


def cross_entropy(params, x, y, w, active):
    """L = sum_b w_b * (-log p(y_b | x_b)) / max(sum_b w_b, 1e-12), and dL/dparams.

    active is bool [C] or [B, C].  Row gradient at the logits: w_b (p - onehot(y_b)) / sum w.
    Rows of weight 0 take no part at all.
    """
    logits, _ = forward(params, x)
    active = np.broadcast_to(np.asarray(active, dtype=bool), logits.shape)
    total = max(float(np.sum(w)), 1e-12)
    loss, dlogits = 0.0, np.zeros_like(logits)
    for b in range(len(logits)):
        if w[b] == 0:
            continue
        loss += w[b] * -masked_log_softmax(logits[b], active[b])[y[b]] / total
        dlogits[b] = masked_softmax(logits[b], active[b])
        dlogits[b, y[b]] -= 1.0
        dlogits[b] *= w[b] / total
    return loss, gradient(params, x, dlogits)


def init_state(params):
    """State of the optimizer: the number of steps taken and Adam's two moments."""
    return {"count": 0, "m": tree_zeros(params), "v": tree_zeros(params)}


def sgd_step(params, grads, state, lr: float):
    """p <- p - lr g."""
    return tree_add(params, grads, -lr), {**state, "count": state["count"] + 1}


def adam_step(params, grads, state, lr: float, b1=0.9, b2=0.999, eps=1e-8):
    """m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  after step number t = 1, 2, ...

    m_hat = m / (1 - b1^t);  v_hat = v / (1 - b2^t);  p <- p - lr m_hat / (sqrt(v_hat) + eps).
    """
    t = state["count"] + 1
    m = tree_map(lambda m, g: b1 * m + (1 - b1) * g, state["m"], grads)
    v = tree_map(lambda v, g: b2 * v + (1 - b2) * g**2, state["v"], grads)

    def move(p, m, v):
        m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
        return p - lr * m_hat / (np.sqrt(v_hat) + eps)

    return tree_map(move, params, m, v), {"count": t, "m": m, "v": v}


OPTIMIZERS = {"sgd": sgd_step, "adam": adam_step}
