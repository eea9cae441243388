"""A run that goes on: with tasks that did not exist when it began, from a state, with more outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

from cl_zoo import accuracy, at, compose, ewc, fit, replay, run_stream, supervised
from cl_zoo.models import mlp
from cl_zoo.streams import task_stream
from cl_zoo.training import _fit, grow_outputs
from cl_zoo.training.run_directory import ConfigError
from tests.tiny import same_bytes

KEY = jax.random.key(4)
MEASURE = {"accuracy": accuracy(), "curve": at(2, accuracy(batches=1))}
FAST = {"measure": MEASURE, "progress": False, "checkpoint_every": 3, "checkpoint_seconds": 0}


def pairs(n_tasks: int) -> list[Any]:
    random = np.random.default_rng(0)
    made = []
    for t, n in enumerate((40, 23, 31)):
        y = random.integers(2 * t, 2 * t + 2, n)
        made.append((random.normal(size=(n, 6)) + np.eye(6)[y % 6] * 3, y))
    return made[:n_tasks]


def stream_of(n_tasks: int, classes: int | None = 6, **options: Any) -> Any:
    return task_stream(pairs(n_tasks), classes=classes, batch_size=8, sample_size=16, **options)


def learner_of(stream: Any) -> Any:
    components = supervised(), replay(12, batch_size=4), ewc(10.0)
    net = mlp((6,), stream.tasks.active.shape[1], hidden=(8,))
    return compose(net, optax.adam(0.01), *components, tasks=stream.tasks)


@pytest.fixture(scope="module")
def whole() -> Any:
    stream = stream_of(3)
    return run_stream(learner_of(stream), stream, KEY, measure=MEASURE)


@pytest.fixture(scope="module")
def two() -> Any:
    stream = stream_of(2)
    return run_stream(learner_of(stream), stream, KEY, measure=MEASURE)


def check_measures(found: Any, whole: Any) -> None:
    """Every score that could be measured, and nan for the third task before it was there."""
    assert np.isnan(found.accuracy[:2, 2]).all() and not np.isnan(found.accuracy[2:]).any()
    np.testing.assert_array_equal(found.accuracy[:, :2], whole.accuracy[:, :2])
    np.testing.assert_array_equal(found.accuracy[2:], whole.accuracy[2:])
    assert found.measures["curve"].shape == whole.measures["curve"].shape
    np.testing.assert_array_equal(found.measures["curve"][..., :2], whole.measures["curve"][..., :2])
    np.testing.assert_array_equal(found.measures["curve"][2], whole.measures["curve"][2])
    for name in whole.metrics:
        np.testing.assert_array_equal(found.metrics[name], whole.metrics[name])
    np.testing.assert_array_equal(found.updated, whole.updated)
    np.testing.assert_array_equal(found.finite, whole.finite)


def test_run_stream_goes_on_to_the_same_result(whole: Any, two: Any) -> None:
    stream = stream_of(3)
    found = run_stream(learner_of(stream), stream, KEY, measure=MEASURE, after=two)
    same_bytes(found.state, whole.state)
    same_bytes(found.cursor, whole.cursor)
    check_measures(found, whole)


def test_fit_goes_on_in_its_directory(tmp_path: Path) -> None:
    """Finished after one task, after two and after three: the bytes of a run that had all three from the start."""
    once = fit(learner_of(stream_of(3)), stream_of(3), KEY, tmp_path / "once", **FAST)
    for n_tasks in (1, 2, 3):
        found = fit(learner_of(stream_of(n_tasks)), stream_of(n_tasks), KEY, tmp_path / "grown", **FAST)
    same_bytes(found.state, once.state)
    assert np.isnan(found.accuracy[1, 1:]).all() and np.isnan(found.accuracy[2, 2])
    np.testing.assert_array_equal(np.tril(found.accuracy, -1), np.tril(once.accuracy, -1))
    assert (tmp_path / "once" / "metrics.csv").read_text().count("train") == sum(
        line.split(",")[1] == "train" for line in (tmp_path / "grown" / "metrics.csv").read_text().splitlines()
    )
    again = fit(learner_of(stream_of(3)), stream_of(3), KEY, tmp_path / "grown", **FAST)
    same_bytes(again.state, once.state)
    np.testing.assert_array_equal(again.accuracy, found.accuracy)
    with pytest.raises(ConfigError, match="has 3 tasks, and now there are 2"):
        fit(learner_of(stream_of(2)), stream_of(2), KEY, tmp_path / "grown", **FAST)


def test_a_run_that_grew_and_was_stopped_at_once_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its configuration is that of three tasks, its checkpoints those of two."""

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    once = fit(learner_of(stream_of(3)), stream_of(3), KEY, tmp_path / "once", **FAST)
    fit(learner_of(stream_of(2)), stream_of(2), KEY, tmp_path / "grown", **FAST)
    with monkeypatch.context() as patch:
        patch.setattr(_fit, "train_steps", interrupted)
        patch.setattr(_fit, "_programs", _fit._programs.__wrapped__)
        with pytest.raises(KeyboardInterrupt):
            fit(learner_of(stream_of(3)), stream_of(3), KEY, tmp_path / "grown", **FAST)
    found = fit(learner_of(stream_of(3)), stream_of(3), KEY, tmp_path / "grown", **FAST)
    same_bytes(found.state, once.state)


def test_fit_begins_after_a_result(whole: Any, two: Any, tmp_path: Path) -> None:
    stream = stream_of(3)
    for _ in range(2):  # and resumes so
        found = fit(learner_of(stream), stream, KEY, tmp_path / "after", after=two, **FAST)
        check_measures(found, whole._replace(measures=whole.measures))
        for a, b in zip(jax.tree.leaves(found.state.params), jax.tree.leaves(whole.state.params), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_other_tasks_and_other_outputs_are_refused(two: Any, tmp_path: Path) -> None:
    fit(learner_of(stream_of(2)), stream_of(2), KEY, tmp_path, **FAST)
    changed = pairs(3)
    changed[0] = changed[0][0] + 1, changed[0][1]
    stream = task_stream(changed, classes=6, batch_size=8, sample_size=16)
    with pytest.raises(ConfigError, match="data_crc32 was"):
        fit(learner_of(stream), stream, KEY, tmp_path, **FAST)
    stream = stream_of(3, classes=9)
    with pytest.raises(ConfigError, match="began with 6 outputs, and now there are 9"):
        fit(learner_of(stream), stream, KEY, tmp_path, **FAST)
    with pytest.raises(ValueError, match=r"state.*is .*\[6\].*this learner has .*\[9\].*grow_outputs"):
        run_stream(learner_of(stream), stream, KEY, after=two)
    with pytest.raises(ValueError, match="key is not that of the run before"):
        run_stream(learner_of(stream_of(3)), stream_of(3), jax.random.key(5), after=two)
    with pytest.raises(ValueError, match="after has 2 tasks and stream 2"):
        run_stream(learner_of(stream_of(2)), stream_of(2), KEY, after=two)
    with pytest.raises(ValueError, match="state and after are given"):
        run_stream(learner_of(stream_of(3)), stream_of(3), KEY, after=two, state=two.state)


def test_outputs_grow_by_a_call(two: Any) -> None:
    """What was learnt stays to the byte; the new outputs are learnt."""
    small, large = stream_of(2), stream_of(3, classes=9)
    batch, _ = large.next(large.init(KEY))
    grown = grow_outputs(learner_of(large), two.state, batch)
    old, new = (state.params["output"]["kernel"] for state in (two.state, grown))
    assert new.shape == (8, 9)
    np.testing.assert_array_equal(new[:, :6], old)
    np.testing.assert_array_equal(grown.opt_state[0].mu["output"]["kernel"][:, 6:], 0)
    x = pairs(1)[0][0].astype(np.float32)
    before = learner_of(small).predict(two.state, x)
    np.testing.assert_array_equal(learner_of(large).predict(grown, x)[:, :4], before[:, :4])
    found = run_stream(learner_of(large), large, KEY, after=two._replace(state=grown))
    assert found.accuracy.shape == (4, 3)
    moved = found.state.params["output"]["bias"] != grown.params["output"]["bias"]
    assert moved[4:6].all() and not moved[6:].any()
    assert int(found.state.step) == int(two.state.step) + int(large.task_steps[2])


def test_a_state_to_begin_from(two: Any) -> None:
    """Counted on from its step; of another learner it is refused."""
    stream = stream_of(2, outputs="all")  # its memory has examples of both tasks
    found = run_stream(learner_of(stream), stream, KEY, state=two.state)
    assert int(found.state.step) == 2 * int(two.state.step)
    np.testing.assert_array_equal(found.accuracy[0, 1], two.accuracy[2, 1])
    plain = compose(mlp((6,), 6, hidden=(8,)), optax.adam(0.01), supervised(), tasks=stream.tasks)
    with pytest.raises(ValueError, match=r"state\.parts\['ewc'\].*this learner has none"):
        run_stream(plain, stream, KEY, state=two.state)
    with pytest.raises(ValueError, match="state is dict, but it must be a TrainState"):
        run_stream(plain, stream, KEY, state=two.state.params)
