"""Streaming discriminant analysis against batch discriminant analysis, and against itself row by row."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_zoo import Batch, compose, slda
from cl_zoo.models import mlp
from tests.tiny import same_bytes

N, F, C = 60, 6, 4


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, np.ndarray]:
    """Four classes, of which the last never comes."""
    random = np.random.default_rng(0)
    y = random.integers(0, C - 1, N)
    x = random.normal(size=(N, F)) @ random.normal(size=(F, F)) + 2 * random.normal(size=(C, F))[y]
    return x.astype(np.float32), y


def feed(x: np.ndarray, y: np.ndarray, sizes: list[int], **options: Any) -> tuple[Any, Any]:
    """Rows in batches of 16 of which only the first so many are present; the others are garbage."""
    learner = compose(mlp((F,), C, hidden=(5,)), optax.adam(0.1), slda(**options))
    update = jax.jit(learner.update)
    state = learner.init(jax.random.key(0), Batch(jnp.zeros((16, F)), jnp.zeros(16, jnp.int32), None, jnp.ones(16)))
    begin = 0
    for size in sizes:
        rows, labels = np.full((16, F), np.nan, np.float32), np.full(16, 99)
        rows[:size], labels[:size] = x[begin : begin + size], y[begin : begin + size]
        weight = jnp.asarray(np.arange(16) < size, jnp.float32)
        state, _ = update(state, Batch(jnp.asarray(rows), jnp.asarray(labels), None, weight))
        begin += size
    assert begin == len(x)
    return learner, state


def one_by_one(x: np.ndarray, y: np.ndarray, counter: str) -> tuple[np.ndarray, np.ndarray]:
    """The update as it is written, in float64."""
    means, covariance, counts = np.zeros((C, F)), np.zeros((F, F)), np.zeros(C)
    for t, (row, label) in enumerate(zip(x.astype(float), y, strict=True)):
        n = t if counter == "total" else counts[label]
        d = row - means[label]
        covariance = (t * covariance + n / (n + 1) * np.outer(d, d)) / (t + 1)
        means[label] += d / (counts[label] + 1)
        counts[label] += 1
    return means, covariance


@pytest.mark.parametrize("counter", ["total", "class"])
def test_batches_equal_rows_one_by_one(data: Any, counter: str) -> None:
    means, covariance = one_by_one(*data, counter)
    for sizes in ([16, 3, 0, 16, 1, 16, 8], [1] * N):
        _, state = feed(*data, sizes, counter=counter)
        part = state.parts["slda"]
        assert part.counts.tolist() == np.bincount(data[1], minlength=C).tolist()
        np.testing.assert_allclose(part.means, means, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(part.covariance, covariance, rtol=1e-4, atol=1e-4)


def test_counted_by_class_it_is_batch_discriminant_analysis(data: Any) -> None:
    x, y = data
    centred = x.astype(float)
    means = np.stack([x[y == c].mean(0) if (y == c).any() else np.zeros(F) for c in range(C)]).astype(float)
    pooled = (centred - means[y]).T @ (centred - means[y]) / N
    inverse = np.linalg.inv(0.9 * pooled + 0.1 * np.eye(F))
    answers = x @ inverse @ means.T - np.diag(means @ inverse @ means.T) / 2
    for order in (np.arange(N), np.argsort(y, kind="stable"), np.random.default_rng(1).permutation(N)):
        learner, state = feed(x[order], y[order], [16, 16, 16, 12], counter="class", shrinkage=0.1)
        np.testing.assert_allclose(state.parts["slda"].covariance, pooled, rtol=1e-3, atol=1e-4)
        found = np.asarray(learner.predict(state, jnp.asarray(x)))
        np.testing.assert_allclose(found[:, : C - 1], answers[:, : C - 1], rtol=1e-3, atol=1e-3)


def test_counted_in_total_the_order_matters(data: Any) -> None:
    """The first row of a class is then far from a mean of zero, and counts: by about z z^T / t."""
    x, y = data
    order = np.argsort(y, kind="stable")
    shuffled, sorted_ = (
        np.asarray(feed(x[o], y[o], [16, 16, 16, 12])[1].parts["slda"].covariance) for o in (np.arange(N), order)
    )
    assert np.abs(shuffled - sorted_).max() > 1e-2
    one = np.zeros(N, int)
    total, by_class = (feed(x, one, [16, 16, 16, 12], counter=c)[1].parts["slda"] for c in ("total", "class"))
    np.testing.assert_allclose(total.covariance, by_class.covariance, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(total.covariance, np.cov(x.T, bias=True), rtol=1e-3, atol=1e-4)


def test_a_class_without_rows_never_wins_and_the_network_rests(data: Any) -> None:
    learner, state = feed(*data, [16, 16, 16, 12])
    start, begun = feed(data[0][:0], data[1][:0], [0])
    far = jnp.asarray(100 * np.random.default_rng(2).normal(size=(200, F)), jnp.float32)
    answers = np.asarray(learner.predict(state, far))
    assert np.isfinite(answers).all() and set(answers.argmax(1).tolist()) == {0, 1, 2}
    assert np.isfinite(start.predict(begun, far)).all()
    same_bytes(state.params, begun.params)


def test_features(data: Any) -> None:
    """Of images the scaled pixels, or what the last layer reads."""
    images = jnp.asarray(np.random.default_rng(3).integers(0, 256, (16, 2, 3)), jnp.uint8)
    batch = Batch(images, jnp.zeros(16, jnp.int32), None, jnp.ones(16))
    flat = np.asarray(images).reshape(16, 6) / 255
    for features in ("input", "penultimate"):
        learner = compose(mlp((2, 3), C, hidden=(5,)), optax.sgd(0.1), slda(features=features))
        state, _ = learner.update(learner.init(jax.random.key(0), batch), batch)
        hidden = jax.tree.map(np.asarray, state.params["hidden_0"])
        wanted = flat if features == "input" else np.maximum(flat @ hidden["kernel"] + hidden["bias"], 0)
        np.testing.assert_allclose(state.parts["slda"].means[0], wanted.mean(0), rtol=1e-4, atol=1e-6)


def test_it_says_what_is_wrong() -> None:
    for arguments, said in (
        ({"shrinkage": 0.0}, "shrinkage is 0"),
        ({"features": "pixels"}, "features is 'pixels'"),
        ({"counter": "row"}, "counter is 'row'"),
    ):
        with pytest.raises(ValueError, match=said):
            slda(**arguments)
    learner = compose(mlp((F,), C), optax.sgd(0.1), slda())
    with pytest.raises(ValueError, match="no labels"):
        learner.init(jax.random.key(0), Batch(jnp.zeros((2, F)), None, None, jnp.ones(2)))
