"""Scores of learners that learn from what they are tested on."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_zoo import Component, Stream, accuracy, compose, run_stream, supervised, ttt
from cl_zoo.evaluation import adapted_accuracy, evaluate_adapting
from cl_zoo.losses import IGNORED, reads_ignored
from cl_zoo.models import mlp
from cl_zoo.streams import split_mnist
from cl_zoo.wrappers import with_rotation_head
from tests.tiny import close, same_bytes

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def made(tiny_images: Any) -> tuple[Any, Any, Any]:
    """A stream, a learner that learns much at test time, and its state."""
    stream = split_mnist(3, "domain", images=tiny_images, batch_size=8, steps=1, evaluation_batch=25)
    model = with_rotation_head(mlp((4, 4), 2, hidden=(6,)), mlp((6,), 4, hidden=()), "output")
    learner = compose(model, optax.sgd(0.1), supervised(), ttt(1.0, steps=1, views=2), tasks=stream.tasks)
    batch, _ = stream.next(stream.init(KEY))
    return stream, learner, learner.init(KEY, batch)


def run(stream: Any, learner: Any, state: Any, **options: Any) -> tuple[Any, Any]:
    program = jax.jit(lambda learner, stream, state: evaluate_adapting(learner, stream, state, **options))
    return program(learner, stream, state)


def soft(stream: Any) -> Any:
    """Scored by the probability of the label, which shows every change."""

    def score(outputs: Any, batch: Any) -> Any:
        return jnp.take_along_axis(jax.nn.softmax(outputs), batch.y[:, None], 1)[:, 0]

    return dataclasses.replace(stream, score_function=score)


def changed_rows(stream: Stream, change: Any) -> Stream:
    """The same stream, each leaf of a task's evaluation changed."""

    def evaluation(data: Any, task: Any, split: str) -> Any:
        assert stream.evaluation_function is not None
        return jax.tree.map(change, stream.evaluation_function(data, task, split))

    return dataclasses.replace(stream, evaluation_function=evaluation)


def test_what_has_no_label_does_not_count(made: Any) -> None:
    stream, learner, state = made

    @reads_ignored
    def score(outputs: Any, batch: Any) -> Any:
        return jnp.where(batch.y == IGNORED, jnp.nan, 1.0)

    def hidden(leaf: Any) -> Any:
        return jnp.where(jnp.arange(leaf.shape[1]) % 2 == 0, IGNORED, leaf) if leaf.dtype == jnp.int32 else leaf

    half = dataclasses.replace(changed_rows(stream, hidden), score_function=score)
    np.testing.assert_array_equal(run(half, learner, state, batch_size=5)[0], 1)


@pytest.mark.parametrize("reset", ["batch", "task", "never"])
def test_it_equals_a_loop(made: Any, reset: str) -> None:
    stream, learner, start = made
    stream = soft(stream)
    found, after = run(stream, learner, start, reset=reset, batch_size=8)
    adapt, state, wanted = jax.jit(learner.adapt), start, []
    for task in range(3):
        rows = stream.evaluation(task, "test")
        rows = jax.tree.map(lambda leaf: np.asarray(leaf).reshape((-1, *leaf.shape[2:])), rows)
        rows = jax.tree.map(lambda leaf: np.concatenate([leaf, np.zeros_like(leaf)])[: -(-len(leaf) // 8) * 8], rows)
        state, scores = state if reset == "never" else start, []
        for i in range(0, len(rows.weight), 8):
            batch = jax.tree.map(lambda leaf: leaf[i : i + 8], rows)  # noqa: B023
            state, outputs = adapt(start if reset == "batch" else state, batch)
            scores.append(stream.score(outputs, batch))
        wanted.append(np.concatenate(scores) @ rows.weight / rows.weight.sum())
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    if reset == "never":
        close(after, state, 1e-4, 1e-6)
        assert (
            np.abs(after.params["params"]["hidden_0"]["kernel"] - start.params["params"]["hidden_0"]["kernel"]).max()
            > 1e-3
        )
    else:
        same_bytes(after, start)


def test_episodic_scores_do_not_depend_on_the_order_of_rows(made: Any) -> None:
    stream, learner, state = made
    stream = soft(stream)
    size = int(np.prod(stream.evaluation(0, "test").weight.shape))
    order = np.random.default_rng(0).permutation(size)
    other = changed_rows(stream, lambda leaf: leaf.reshape((-1, *leaf.shape[2:]))[order].reshape(leaf.shape))
    scores = {
        reset: [run(each, learner, state, reset=reset)[0] for each in (stream, other)] for reset in ("batch", "task")
    }
    np.testing.assert_allclose(*scores["batch"], rtol=1e-5)
    assert np.abs(scores["task"][0] - scores["task"][1]).max() > 1e-3


def test_together_changes_nothing(made: Any) -> None:
    stream, learner, state = made
    stream = soft(stream)
    one, together = (run(stream, learner, state, together=n)[0] for n in (1, 7))
    np.testing.assert_allclose(one, together, rtol=1e-5)
    rows, _ = run(stream, learner, state, batch_size=8, by_example=True)
    weight = np.stack([stream.evaluation(task, "test").weight.ravel() for task in range(3)])
    assert rows.shape == weight.shape
    means, _ = run(stream, learner, state, batch_size=8)
    np.testing.assert_allclose((rows * weight).sum(1) / weight.sum(1), means, rtol=1e-5)


def test_without_adaptation_it_is_the_accuracy(made: Any) -> None:
    stream, _, state = made
    learner = compose(with_rotation_head(mlp((4, 4), 2, hidden=(6,)), mlp((6,), 4, hidden=()), "output"),
                      optax.sgd(0.1), supervised(), ttt(0.0, steps=1, views=1), tasks=stream.tasks)  # fmt: skip
    wanted = accuracy()(learner, state, stream)
    for options in ({}, {"batch_size": 7, "reset": "never"}, {"split": "test", "batch_size": 7, "together": 2}):
        np.testing.assert_allclose(run(stream, learner, state, **options)[0], wanted, rtol=1e-6)
    limited = run(soft(stream), learner, state, examples=3)[0]
    rows = soft(stream).evaluation(1, "test")
    batch = jax.tree.map(lambda leaf: leaf.reshape((-1, *leaf.shape[2:]))[:3], rows)
    expected = soft(stream).score(learner.predict(state, batch.x), batch).mean()
    np.testing.assert_allclose(limited[1], expected, rtol=1e-5)


def test_padding_is_no_test_batch(made: Any) -> None:
    """Rows of weight 0 after the last change no state."""
    stream, learner, state = made
    padded = changed_rows(stream, lambda leaf: jnp.concatenate([leaf, jnp.zeros_like(leaf)]))
    one, other = (run(soft(each), learner, state, reset="never") for each in (stream, padded))
    close(one, other)


def test_a_run_measures_it(made: Any) -> None:
    stream, learner, _ = made
    measure = {"adapted": adapted_accuracy(batch_size=9, reset="task"), "accuracy": accuracy()}
    result = run_stream(learner, soft(stream), KEY, measure=measure)
    found = result.measures["adapted"]
    assert found.shape == (4, 3)
    wanted, _ = run(soft(stream), learner, result.state, batch_size=9, reset="task")
    np.testing.assert_allclose(found[-1], wanted, rtol=1e-4)
    assert np.abs(found - result.accuracy).max() > 1e-3
    without = dataclasses.replace(stream, evaluation_function=None)
    with pytest.raises(ValueError, match="'adapted' needs examples, but this stream is evaluated without any"):
        run_stream(learner, without, KEY, measure=measure)


def test_impossible_values_are_refused(made: Any) -> None:
    for options, words in (
        ({"reset": "always"}, "reset is 'always'"), ({"batch_size": 0}, "batch_size is 0"),
        ({"examples": 0}, "examples is 0"), ({"together": 2, "reset": "task"}, "together is 2"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            run(*made, **options)


def test_the_stream_need_not_tell_tasks(made: Any) -> None:
    stream, _, _ = made
    component = Component("count", init=lambda *_: jnp.zeros(()), adapt=lambda c, s, part, batch, k: (
        s, part + jnp.sum(batch.weight), None))  # fmt: skip
    learner = compose(mlp((4, 4), 2, hidden=(3,)), optax.sgd(0.1), supervised(), component, tasks=stream.tasks)
    state = learner.init(KEY, stream.next(stream.init(KEY))[0])
    _, after = run(stream, learner, state, reset="never", batch_size=9)
    wanted = sum(float(stream.evaluation(task, "test").weight.sum()) for task in range(3))
    assert float(after.parts["count"]) == wanted
