"""Classifiers that adapt at test time: one hidden layer, gradients by hand."""

import numpy as np

from .mlp import cross_entropy, tree_copy


def tent_forward(x, weights, hidden, gain, shift, output, eps=1e-5):
    """Batch normalisation by the batch's own statistics, ahead of the ReLU:

    a = x W + b,  a_hat = (a - mean) / sqrt(variance + eps),  h = relu(gain a_hat + shift),  logits = h V + c.
    mean and (biased) variance are over the rows, weighted; a row of weight 0 has no part in them, but has logits.
    hidden is (W, b), output (V, c). Returns logits, h, a_hat.
    """
    a = np.asarray(x, dtype=np.float64) @ hidden[0] + hidden[1]
    share = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    mean = sum(share[b] * a[b] for b in range(len(a)))
    variance = sum(share[b] * (a[b] - mean) ** 2 for b in range(len(a)))
    a_hat = (a - mean) / np.sqrt(variance + eps)
    h = np.maximum(gain * a_hat + shift, 0.0)
    return h @ output[0] + output[1], h, a_hat


def entropy(logits):
    """H = -sum_c p_c log p_c of one row, and dH/dlogits_c = -p_c (log p_c + H)."""
    log_p = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    value = -np.sum(np.exp(log_p) * log_p)
    return value, -np.exp(log_p) * (log_p + value)


def tent_loss(x, weights, hidden, gain, shift, output, eps=1e-5):
    """L = sum_b w_b H_b / sum_b w_b, with its gradients for gain and shift: a_hat depends on neither."""
    logits, h, a_hat = tent_forward(x, weights, hidden, gain, shift, output, eps)
    loss, dgain, dshift = 0.0, np.zeros_like(gain), np.zeros_like(shift)
    for b in range(len(logits)):
        if weights[b] == 0:
            continue
        value, dlogits = entropy(logits[b])
        d = (output[0] @ dlogits) * (h[b] > 0) * weights[b] / np.sum(weights)
        loss, dgain, dshift = loss + weights[b] / np.sum(weights) * value, dgain + d * a_hat[b], dshift + d
    return loss, dgain, dshift


def tent_step(x, weights, hidden, gain, shift, output, lr, eps=1e-5):
    """One SGD step on the mean entropy; returns (logits before the step, new gain, new shift)."""
    logits, _, _ = tent_forward(x, weights, hidden, gain, shift, output, eps)
    _, dgain, dshift = tent_loss(x, weights, hidden, gain, shift, output, eps)
    return logits, gain - lr * dgain, shift - lr * dshift


def ttt_steps(params, views, labels, lr):
    """Step n: SGD on the rotation head's mean cross-entropy on views[n] [N, in], labels[n] [N].

        h = relu(x W + b),  rotations = h R + r,  answers = h M + m;  W, b, R, r move and M, m do not.

    params = {'trunk': {'kernel', 'bias'}, 'main': ..., 'rotation': ...}; returns all of them.
    """
    params = tree_copy(params)
    for x, y in zip(views, labels):
        rotations = params["rotation"]["kernel"].shape[1]
        network = {"hidden_0": params["trunk"], "output": params["rotation"]}
        _, grads = cross_entropy(network, x, y, np.ones(len(x)), np.ones(rotations, dtype=bool))
        for part, layer in (("trunk", "hidden_0"), ("rotation", "output")):
            params[part] = {name: value - lr * grads[layer][name] for name, value in params[part].items()}
    return params


def answers(params, x):
    """The main head's logits."""
    h = np.maximum(np.asarray(x, dtype=np.float64) @ params["trunk"]["kernel"] + params["trunk"]["bias"], 0.0)
    return h @ params["main"]["kernel"] + params["main"]["bias"]
