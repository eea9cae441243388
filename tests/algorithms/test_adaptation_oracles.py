"""The oracles of adaptation at test time: their gradients are those of their losses, and what stays put does."""

import numpy as np

from tests.oracles import adaptation
from tests.oracles.differences import agree, check_gradients

RANDOM = np.random.default_rng(0)
X, LIVE = RANDOM.normal(size=(7, 3)), np.array([1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
HIDDEN = (RANDOM.normal(size=(3, 5)), RANDOM.normal(size=5))
GAIN, SHIFT = RANDOM.normal(1, 0.3, 5), RANDOM.normal(0, 0.3, 5)
OUTPUT = (RANDOM.normal(size=(5, 4)), RANDOM.normal(size=4))


def test_tent_moves_down_the_entropy() -> None:
    def mean_entropy(weights: list) -> float:
        logits = adaptation.tent_forward(X[LIVE > 0], np.ones(5), HIDDEN, *weights, OUTPUT)[0]
        p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        return float(-np.sum(p * np.log(p)) / 5)

    logits, gain, shift = adaptation.tent_step(X, LIVE, HIDDEN, GAIN, SHIFT, OUTPUT, 0.1)
    check_gradients(mean_entropy, [GAIN, SHIFT], [(GAIN - gain) / 0.1, (SHIFT - shift) / 0.1])
    assert mean_entropy([gain, shift]) < mean_entropy([GAIN, SHIFT])
    agree(adaptation.tent_loss(X, LIVE, HIDDEN, GAIN, SHIFT, OUTPUT)[0], mean_entropy([GAIN, SHIFT]))
    still, same_gain, same_shift = adaptation.tent_step(X, LIVE, HIDDEN, GAIN, SHIFT, OUTPUT, 0.0)
    agree(still, logits)
    agree(np.stack([same_gain, same_shift]), np.stack([GAIN, SHIFT]))


def test_tent_does_not_see_rows_of_weight_zero() -> None:
    other = np.where(LIVE[:, None] > 0, X, 9.0)
    one, two = (adaptation.tent_step(x, LIVE, HIDDEN, GAIN, SHIFT, OUTPUT, 0.1) for x in (X, other))
    agree(one[0][LIVE > 0], two[0][LIVE > 0])
    agree(np.stack(one[1:]), np.stack(two[1:]))
    a_hat = adaptation.tent_forward(X, LIVE, HIDDEN, GAIN, SHIFT, OUTPUT, eps=0.0)[2][LIVE > 0]
    agree(a_hat.mean(axis=0), np.zeros(5))
    agree(a_hat.var(axis=0), np.ones(5))


def test_ttt_steps_move_trunk_and_rotation_head_only() -> None:
    shapes = {"trunk": (3, 5), "main": (5, 6), "rotation": (5, 4)}
    params = {
        name: {"kernel": RANDOM.normal(size=shape), "bias": RANDOM.normal(size=shape[1])}
        for name, shape in shapes.items()
    }
    views, labels = RANDOM.normal(size=(2, 8, 3)), np.tile(np.arange(4), (2, 2))

    def loss(weights: list, step: int) -> float:
        h = np.maximum(views[step] @ weights[0] + weights[1], 0)
        logits = h @ weights[2] + weights[3]
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return float(-np.mean(log_p[np.arange(8), labels[step]]))

    flat = lambda p: [p[name][leaf] for name in ("trunk", "rotation") for leaf in ("kernel", "bias")]  # noqa: E731
    once = adaptation.ttt_steps(params, views[:1], labels[:1], 0.1)
    twice = adaptation.ttt_steps(params, views, labels, 0.1)
    for step, (start, end) in enumerate(((params, once), (once, twice))):
        moved = [(a - b) / 0.1 for a, b in zip(flat(start), flat(end))]
        check_gradients(lambda weights, step=step: loss(weights, step), flat(start), moved)
    for leaf in ("kernel", "bias"):
        np.testing.assert_array_equal(twice["main"][leaf], params["main"][leaf])
    assert np.abs(adaptation.answers(twice, X) - adaptation.answers(params, X)).max() > 1e-3
    agree(adaptation.answers(adaptation.ttt_steps(params, views, labels, 0.0), X), adaptation.answers(params, X))
