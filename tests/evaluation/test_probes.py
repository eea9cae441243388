"""Probes on matrices whose answers are known."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_zoo import Batch, compose, replay, supervised
from cl_zoo.evaluation import online_score
from cl_zoo.evaluation.probes import (
    dormant_fraction,
    effective_rank,
    mean_absolute_weight,
    stable_rank,
    weight_norm,
)
from cl_zoo.models import mlp
from tests.tiny import close, tiny_stream


@pytest.mark.parametrize("n", [1, 4, 9])
def test_rank_of_the_identity(n: int) -> None:
    for rank in (effective_rank, stable_rank):
        np.testing.assert_allclose(jax.jit(rank)(3.0 * jnp.eye(n)), n, rtol=1e-5)


def test_ranks_of_other_matrices() -> None:
    one = jnp.outer(jnp.arange(1.0, 8.0), jnp.array([1.0, -2.0, 3.0]))
    np.testing.assert_allclose([effective_rank(one), stable_rank(one)], [1, 1], rtol=1e-3)
    np.testing.assert_array_equal([effective_rank(0 * one), stable_rank(0 * one)], [0, 0])
    # Singular values 3 and 1: p = 3/4, 1/4.
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    two = jnp.diag(jnp.array([3.0, 1.0]))
    np.testing.assert_allclose([effective_rank(two), stable_rank(two)], [np.exp(entropy), 10 / 9], rtol=1e-5)


def test_rows_of_weight_zero_are_absent() -> None:
    h = jax.random.normal(jax.random.key(0), (9, 4)).at[6:].set(jnp.nan)
    h = h.at[:6, 0].set(0)
    weight = jnp.array([1.0] * 6 + [0.0] * 3)
    for rank in (effective_rank, stable_rank):
        np.testing.assert_allclose(rank(h, weight), rank(h[:6]), rtol=1e-5)
    h = jnp.where(weight[:, None] > 0, h, 7.0)
    assert float(dormant_fraction(h)) == 0
    assert float(dormant_fraction(h, weight)) == 0.25


def test_dormant_share_by_hand() -> None:
    h = jnp.array([[0.0, -1.0, 2.0, 0.2], [0.0, 1.0, 4.0, 0.0]])  # means 0, 1, 3, 0.1; their mean 1.025
    for threshold, share in ((0.0, 0.25), (0.09, 0.25), (0.1, 0.5), (0.97, 0.5), (0.98, 0.75)):
        assert float(dormant_fraction(h, threshold=threshold)) == share
    maps = jnp.stack([h, h], 1)[:, :, None]  # 2 x 1 positions
    assert float(dormant_fraction(maps, threshold=0.1)) == 0.5
    assert float(dormant_fraction(jnp.zeros((3, 5)))) == 1


def test_sizes_of_weights() -> None:
    params = {"a": jnp.array([[3.0, -4.0]]), "b": jnp.array([0.0, 12.0])}
    assert float(mean_absolute_weight(params)) == 19 / 4
    assert float(weight_norm(params)) == 13


def test_online_score_is_that_of_the_batch_before_it_is_learnt(tiny_images: Any) -> None:
    stream = tiny_stream(tiny_images, "class")
    model = mlp((4, 4), 6, hidden=(5,))
    parts = supervised(), replay(20, batch_size=8)
    ours = compose(model, optax.adam(0.05), *parts, online_score(stream.score, batch_size=8), tasks=stream.tasks)
    plain = compose(model, optax.adam(0.05), *parts, tasks=stream.tasks)
    update, cursor = jax.jit(ours.update), stream.init(jax.random.key(0))
    batch, _ = stream.next(cursor)
    state = ours.init(jax.random.key(1), batch)
    other = state
    found = []
    for i in range(12):
        batch, cursor = stream.next(cursor)
        batch = batch._replace(weight=(jnp.arange(8) < 8 - i % 3).astype(jnp.float32))
        right = stream.score(ours.predict(state, batch.x), batch)
        state, metrics = update(state, batch)
        other = plain.update(other, batch)[0]
        present = np.asarray(batch.weight) > 0
        np.testing.assert_allclose(metrics["online_score/score"], np.asarray(right)[present].mean(), rtol=1e-6)
        assert float(metrics["online_score/loss"]) == 0
        found.append(float(metrics["online_score/score"]))
    close(state.params, other.params, rtol=1e-4, atol=1e-5)
    assert len(set(found)) > 2
    assert isinstance(batch, Batch)
