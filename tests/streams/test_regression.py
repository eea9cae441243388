"""Slowly-changing regression."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_zoo import compose, run_stream, supervised
from cl_zoo.losses import squared_error
from cl_zoo.models import mlp
from cl_zoo.streams import slowly_changing_regression


def take(stream: Any, n: int, key: int = 0) -> Any:
    """The first `n` batches, stacked."""
    step = lambda cursor, _: stream.next(cursor)[::-1]  # noqa: E731
    return jax.jit(lambda: jax.lax.scan(step, stream.init(jax.random.key(key)), length=n)[1])()


def target(data: Any, x: np.ndarray, beta: float) -> float:
    """y of one input, unit by unit."""
    hidden, output = np.asarray(data.hidden), np.asarray(data.output)
    x = np.append(x, 1.0)
    y = float(output[-1])
    for j in range(hidden.shape[1]):
        negative = sum(v == -1 for v in hidden[:, j])
        if sum(v * xi for v, xi in zip(hidden[:, j], x, strict=True)) >= beta * len(x) - negative:
            y += float(output[j])
    return y


def test_rows_are_those_of_the_target() -> None:
    stream = slowly_changing_regression(3, steps=4, batch_size=5, key=jax.random.key(7))
    assert set(np.unique(stream.data.hidden)) == {-1, 1} == set(np.unique(stream.data.output))
    assert stream.data.hidden.shape == (21, 100) and stream.data.output.shape == (101,)
    batch = take(stream, 12)
    assert batch.x.shape == (12, 5, 20) and set(np.unique(batch.x)) == {0, 1}
    for x, y in zip(batch.x.reshape(-1, 20), np.ravel(batch.y), strict=True):
        assert target(stream.data, np.asarray(x), 0.7) == y
    assert len(np.unique(batch.y)) > 5


@pytest.mark.parametrize("flip", ["one", "all"])
def test_slow_bits_stay_within_a_task_and_change_between(flip: str) -> None:
    stream = slowly_changing_regression(30, steps=6, flip=flip)
    slow = np.asarray(take(stream, 30 * 6 + 5).x[:, 0, :15])
    within = slow[: 30 * 6].reshape(30, 6, 15)
    assert (within == within[:, :1]).all()
    changed = (within[1:, 0] != within[:-1, 0]).sum(1)
    if flip == "one":
        assert (changed == 1).all()
        assert len(np.unique(np.argmax(within[1:, 0] != within[:-1, 0], axis=1))) > 5
    else:
        assert 5 < changed.mean() < 10
    assert (slow[30 * 6 :] == slow[30 * 6 - 1]).all()  # beyond its end, the last task goes on


def test_fast_bits_are_fair_and_differ_between_steps_and_keys() -> None:
    stream = slowly_changing_regression(1, steps=500)
    fast = np.asarray(take(stream, 500).x[:, 0, 15:])
    np.testing.assert_allclose(fast.mean(0), 0.5, atol=0.1)
    assert len(np.unique(fast, axis=0)) == 32
    assert (fast != np.asarray(take(stream, 500, key=1).x[:, 0, 15:])).mean() > 0.4
    # The cursor is all there is: going on from it gives the same rows.
    cursor = stream.init(jax.random.key(0))._replace(step=jnp.int32(123))
    np.testing.assert_array_equal(stream.next(cursor)[0].x[0, 15:], fast[123])


def test_evaluation_is_on_every_input_of_a_task() -> None:
    stream = slowly_changing_regression(4, steps=5)
    rows = stream.evaluation(jnp.int32(2), "test")
    assert rows.x.shape == (1, 32, 20) and len(np.unique(rows.x[0, :, 15:], axis=0)) == 32
    assert (rows.x[0, :, :15] == stream.data.slow[2]).all()
    large = slowly_changing_regression(4, steps=5, slow_bits=2, evaluation_size=50)
    test, validation = (large.evaluation(jnp.int32(2), split) for split in ("test", "validation"))
    assert test.x.shape == (1, 50, 20) and not np.array_equal(test.x, validation.x)
    assert large.sample(jnp.int32(1), jax.random.key(0)).x.shape == (1, 50, 20)


def test_another_order_is_another_problem() -> None:
    stream = slowly_changing_regression(4, steps=5)
    other = stream.reorder(jax.random.key(1)).data
    assert not np.array_equal(other.hidden, stream.data.hidden)
    assert not np.array_equal(other.slow, stream.data.slow)


def test_the_task_at_hand_is_learnt() -> None:
    stream = slowly_changing_regression(2, steps=1500, flip="all")
    learner = compose(mlp((20,), 1, hidden=(20,)), optax.sgd(0.01), supervised(squared_error), tasks=stream.tasks)
    result = run_stream(learner, stream, jax.random.key(0))
    scores = np.asarray(result.accuracy)
    assert (scores <= 0).all()
    assert scores[1, 0] > 0.5 * scores[0, 0] and scores[2, 1] > scores[0, 1]
    early, late = result.metrics["loss"][0, :100].mean(), result.metrics["loss"][0, -300:].mean()
    assert late < 0.5 * early
    assert -scores[1, 0] < 0.5 * early


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"flip": "two"}, "flip is 'two', but it must be one of 'one', 'all'"),
        ({"slow_bits": 21}, r"slow_bits is 21, but it must be in \[0, 20\]"),
        ({"n_tasks": 0}, "n_tasks is 0"),
        ({"beta": 1.5}, "beta is 1.5"),
    ],
)
def test_impossible_values_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        slowly_changing_regression(**options)
