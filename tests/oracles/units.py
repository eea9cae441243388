"""Continual backprop's accounts of an MLP's hidden units, in plain loops over units and rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def hidden(params: dict[str, Any], x: np.ndarray) -> list[np.ndarray]:
    """Activations of every hidden layer, `[B, n]` each."""
    found = []
    for i in range(len(params) - 1):
        layer = params[f"hidden_{i}"]
        x = np.maximum(x @ layer["kernel"] + layer["bias"], 0)
        found.append(x)
    return found


def account(
    groups: list[dict[str, Any]],
    before: dict[str, Any],
    after: dict[str, Any],
    x: np.ndarray,
    w: np.ndarray,
    *,
    rate: float,
    maturity: int,
    decay: float,
    utility: str,
) -> list[list[int]]:
    """One step of the accounts, in place; which units of each group are to be replaced.

    Args:
      groups: for each hidden layer {"u", "m", "a": lists over units, "c": number}.
      before, after: parameters around the optimiser's step.
      x, w: the batch and its weights.
    """
    names = [f"hidden_{i}" for i in range(len(before) - 1)] + ["output"]
    chosen = []
    for g, (account_of, h) in enumerate(zip(groups, hidden(before, x), strict=True)):
        w_in, w_out = after[names[g]]["kernel"], after[names[g + 1]]["kernel"]
        scores, eligible = {}, []
        for i in range(h.shape[1]):
            account_of["a"][i] += 1
            age = account_of["a"][i]
            correction = 1 - decay**age
            average = sum(wb * h[b, i] for b, wb in enumerate(w)) / sum(w)
            account_of["m"][i] = decay * account_of["m"][i] + (1 - decay) * average
            if utility == "paper":
                use = sum(wb * abs(h[b, i]) for b, wb in enumerate(w)) / sum(w) * sum(abs(v) for v in w_out[i])
            else:
                centre = account_of["m"][i] / correction
                spread = sum(wb * abs(h[b, i] - centre) for b, wb in enumerate(w)) / sum(w)
                use = spread * np.mean(np.abs(w_out[i])) / np.mean(np.abs(w_in[:, i]))
            account_of["u"][i] = decay * account_of["u"][i] + (1 - decay) * use
            if age > maturity:
                eligible.append(i)
                scores[i] = account_of["u"][i] / correction
        account_of["c"] += rate * len(eligible)
        out = sorted(eligible, key=lambda i: scores[i])[: math.floor(account_of["c"])]
        account_of["c"] -= len(out)
        for i in out:
            account_of["u"][i] = account_of["m"][i] = 0.0
            account_of["a"][i] = 0
        chosen.append(sorted(out))
    return chosen
