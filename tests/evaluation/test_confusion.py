"""Confusion of classes, counted."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

from cl_zoo import compose, run_stream, supervised
from cl_zoo.evaluation import confusion, metrics
from cl_zoo.losses import squared_error
from cl_zoo.models import mlp
from cl_zoo.streams import task_stream

KEY = jax.random.key(0)


def test_it_counts_what_a_loop_counts() -> None:
    random = np.random.default_rng(1)
    y = [random.integers(0, 2, 30), random.integers(2, 5, 30)]
    pairs = [(random.normal(size=(30, 5)) + np.eye(5)[labels] * 2, labels) for labels in y]
    tests = [
        (x[:n], np.where(np.arange(n) == 1, -1, labels[:n])) for (x, labels), n in zip(pairs, (13, 8), strict=True)
    ]
    stream = task_stream(pairs, tests=tests, epochs=5, batch_size=8, evaluation_batch=4)
    learner = compose(mlp((5,), 5, hidden=(8,)), optax.adam(0.02), supervised(), tasks=stream.tasks)
    result = run_stream(learner, stream, KEY, measure={"all": confusion(), "second": confusion(tasks=[1])})
    wanted = np.zeros((2, 5, 5), int)
    for t, (x, labels) in enumerate(tests):
        predicted = np.asarray(learner.predict(result.state, x.astype(np.float32))).argmax(-1)
        np.add.at(wanted[t], (labels[labels >= 0], predicted[labels >= 0]), 1)
    assert result.measures["all"].shape == (3, 5, 5)
    np.testing.assert_array_equal(result.measures["all"][-1], wanted.sum(axis=0))
    np.testing.assert_array_equal(result.measures["second"][-1], wanted[1])
    assert np.isfinite(metrics.class_accuracy(result.measures["all"][-1])).any()


def test_targets_that_are_no_classes_are_refused() -> None:
    x = np.ones((8, 2))
    stream = task_stream([(x, x[:, :1] / 3)], scenario="domain", batch_size=4)
    learner = compose(mlp((2,), 1), optax.sgd(0.1), supervised(squared_error))
    with pytest.raises(ValueError, match="confusion: y is float32"):
        run_stream(learner, stream, KEY, measure={"confusion": confusion()})
