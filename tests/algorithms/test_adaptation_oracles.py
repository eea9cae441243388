"""The oracles of adaptation at test time: their gradients are those of their losses, and what stays put does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cl_zoo import Batch, compose, supervised, tent, ttt
from cl_zoo._learner import _key
from cl_zoo.models import mlp
from cl_zoo.wrappers import with_rotation_head
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


# What they are for: the algorithms, over several test batches in a row, as online learning has them.

NAMES = ("trunk", "main", "rotation")


def test_ttt_equals_its_oracle() -> None:
    net = mlp((3, 3), 2, hidden=(5,))
    model = with_rotation_head(net, mlp((5,), 4, hidden=()), "output")
    learner = compose(model, optax.sgd(0.1), supervised(), ttt(learning_rate=0.5, steps=2, views=6))
    images = jax.random.randint(jax.random.key(1), (3, 2, 3, 3), 0, 256).astype(jnp.uint8)
    batches = [Batch(x, jnp.zeros(2, int), None, jnp.array([1.0, weight])) for x, weight in zip(images, (1, 1, 0))]
    state = learner.init(jax.random.key(0), batches[0])
    adapt = jax.jit(learner.adapt)
    where = (("params", "hidden_0"), ("params", "output"), ("rotation_head", "output"))
    wanted = {name: tree64(state.params[part][layer]) for name, (part, layer) in zip(NAMES, where)}
    for call, batch in enumerate(batches):
        state, outputs = adapt(state, batch)
        key = jax.random.fold_in(_key(state.key, 0, "adapt", "ttt"), call)
        views, labels = [], []
        for step in range(2):
            turns = np.asarray(jax.random.randint(jax.random.split(jax.random.fold_in(key, step))[1], (12,), 0, 4))
            rows = [i for i in range(12) if batch.weight[i % 2] > 0]  # view after view, each the whole batch
            views.append([np.rot90(np.asarray(batch.x[i % 2]), turns[i]).ravel() / 255 for i in rows])
            labels.append(turns[rows])
        wanted = adaptation.ttt_steps(wanted, [np.array(x) for x in views], labels, 0.5)
        for name, (part, layer) in zip(NAMES, where):
            for leaf, value in wanted[name].items():
                np.testing.assert_allclose(state.params[part][layer][leaf], value, rtol=1e-4, atol=1e-6)
        seen = np.asarray(batch.x[:1]).reshape((1, -1)) / 255
        np.testing.assert_allclose(outputs[:1], adaptation.answers(wanted, seen), rtol=1e-4, atol=1e-5)


def test_tent_equals_its_oracle() -> None:
    learner = compose(
        mlp((4,), 3, hidden=(5,), norm="batch"), optax.sgd(0.1), supervised(), tent(optimiser=optax.sgd(0.7))
    )
    inputs = jax.random.normal(jax.random.key(2), (3, 6, 4))
    weight = jnp.array([1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    state = learner.init(jax.random.key(0), Batch(inputs[0], jnp.zeros(6, int), None, weight))
    adapt = jax.jit(learner.adapt)
    gain, shift = (np.asarray(state.params["norm_0"][leaf], np.float64) for leaf in ("scale", "bias"))
    hidden = (np.asarray(state.params["hidden_0"]["kernel"], np.float64), np.zeros(5))
    output = tuple(np.asarray(state.params["output"][leaf], np.float64) for leaf in ("kernel", "bias"))
    for x in inputs:
        state, outputs = adapt(state, Batch(x, jnp.zeros(6, int), None, weight))
        wanted, gain, shift = adaptation.tent_step(np.asarray(x), np.asarray(weight), hidden, gain, shift, output, 0.7)
        present = np.asarray(weight) > 0
        np.testing.assert_allclose(outputs[present], wanted[present], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(state.params["norm_0"]["scale"], gain, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(state.params["norm_0"]["bias"], shift, rtol=1e-4, atol=1e-6)
    assert np.abs(gain - 1).max() > 1e-3


def tree64(tree: dict) -> dict:
    return {name: np.asarray(leaf, np.float64) for name, leaf in tree.items()}
