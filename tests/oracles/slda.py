"""Streaming linear discriminant analysis on the features of a network that does not move."""

import numpy as np

from .mlp import forward


def init(n_features: int, n_classes: int):
    """Means mu [C, F], counts c [C], the shared covariance Sigma [F, F], rows so far."""
    return {
        "mu": np.zeros((n_classes, n_features)),
        "count": np.zeros(n_classes),
        "sigma": np.zeros((n_features, n_features)),
        "rows": 0,
    }


def observe(state, z, y, counter="total"):
    """One row z of class y, after t rows:

    t > 0:  Delta = n / (n + 1) (z - mu_y)(z - mu_y)^T,  Sigma <- (t Sigma + Delta) / (t + 1),
            n = t, or with counter 'class' c_y;
    then    mu_y <- (c_y mu_y + z) / (c_y + 1),  c_y <- c_y + 1.
    mu_y is the mean before this row, 0 for a class not seen yet.
    """
    t, z = state["rows"], np.asarray(z, dtype=np.float64)
    mu, count, sigma = state["mu"].copy(), state["count"].copy(), state["sigma"]
    if t > 0:
        n = {"total": t, "class": count[y]}[counter]
        delta = n / (n + 1) * np.outer(z - mu[y], z - mu[y])
        sigma = (t * sigma + delta) / (t + 1)
    mu[y] = (count[y] * mu[y] + z) / (count[y] + 1)
    count[y] += 1
    return {"mu": mu, "count": count, "sigma": sigma, "rows": t + 1}


def scores(state, z, shrinkage=1e-4):
    """W z + b [B, C], with Lambda = ((1 - eps) Sigma + eps I)^-1,

    w_c = Lambda mu_c,  b_c = -1/2 mu_c^T Lambda mu_c.  (0 for a class not seen.)
    """
    sigma = state["sigma"]
    inverse = np.linalg.inv((1.0 - shrinkage) * sigma + shrinkage * np.eye(len(sigma)))
    z = np.asarray(z, dtype=np.float64)
    out = np.zeros((len(z), len(state["mu"])))
    for c, mu in enumerate(state["mu"]):
        w = inverse @ mu
        for b in range(len(z)):
            out[b, c] = w @ z[b] - 0.5 * mu @ inverse @ mu
    return out


def features(params, x):
    """What the network's last layer reads."""
    return forward(params, x)[1][-1]


def run(params, tasks, shrinkage=1e-4, x_test=None, counter="total", raw=False):
    """The rows of all the tasks one by one, in order; rows of weight 0 are absent.

    tasks: list of {'batches': list of (x, y, w), 'active': bool [C]}.
    raw: the features are the inputs as they are.
    Returns (state, scores of x_test or None); params do not change.
    """
    read = (lambda x: np.asarray(x, dtype=np.float64)) if raw else (lambda x: features(params, x))
    state = init(params["hidden_0" if raw else "output"]["kernel"].shape[0], params["output"]["kernel"].shape[1])
    for task in tasks:
        for x, y, w in task["batches"]:
            z = read(x)
            for b in range(len(x)):
                if w[b] > 0:
                    state = observe(state, z[b], int(y[b]), counter)
    return state, None if x_test is None else scores(state, read(x_test), shrinkage)
