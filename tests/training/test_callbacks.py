"""What a run tells while it goes on, and tasks that end early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from cl_zoo import accuracy, at, fit, replay, run_stream, supervised
from cl_zoo.training import Event, patience
from tests.tiny import STEPS, same_bytes, tiny_learner, tiny_stream

KEY = jax.random.key(3)
CURVE = {"accuracy": accuracy(), "curve": at(2, accuracy())}


@pytest.fixture(scope="module")
def parts(tiny_images: Any) -> Any:
    stream = tiny_stream(tiny_images)
    return tiny_learner(stream, supervised(), replay(12, batch_size=4)), stream


def test_a_callback_is_told_what_happened(parts: Any, tmp_path: Path) -> None:
    told: list[Event] = []
    result = fit(*parts, KEY, tmp_path, measure=CURVE, callback=told.append, checkpoint_every=3, progress=False)
    assert [(event.step, event.task, event.task_ended) for event in told] == [
        (STEPS * task + step, task, step == STEPS) for task in range(3) for step in (2, 3, 4, 6)
    ]
    for event in told:
        within = event.step - STEPS * event.task
        assert event.metrics["loss"] == float(result.metrics["loss"][event.task, within - 1])
        wanted = ({"curve"} if within % 2 == 0 else set()) | ({"accuracy"} if event.task_ended else set())
        assert event.scores.keys() == wanted
        if event.task_ended:
            np.testing.assert_array_equal(event.scores["accuracy"], result.accuracy[event.task + 1])
    assert [int(event.step) for event in told if event.task_ended] == [6, 12, 18]


def test_a_task_ends_where_it_is_told_to(parts: Any, tmp_path: Path) -> None:
    """And the next begins with its own first batch; a resumed run decides alike."""
    learner, stream = parts
    seen: list[int] = []

    def stop(scores: np.ndarray) -> bool:
        seen.append(len(scores))
        return len(scores) == 2 and float(scores[0, 0]) >= 0 and len(seen) < 4  # the first task, after 4 updates

    options: dict[str, Any] = {"measure": CURVE, "stop": {"curve": stop}, "progress": False, "checkpoint_seconds": 0}
    result = fit(learner, stream, KEY, tmp_path, **options)
    assert np.asarray(result.updated).sum(axis=1).tolist() == [4, 6, 6]
    assert np.isnan(result.metrics["loss"][0, 4:]).all() and np.isfinite(result.metrics["loss"][1:]).all()
    assert np.isnan(result.measures["curve"][0, 2]).all()
    assert int(result.state.step) == 16 and int(result.cursor.step) == 18
    whole = run_stream(learner, stream, KEY, measure=CURVE)
    np.testing.assert_allclose(result.metrics["loss"][0, :4], whole.metrics["loss"][0, :4], rtol=1e-5)
    again = fit(learner, stream, KEY, tmp_path, **options)
    same_bytes(again.state, result.state)
    np.testing.assert_array_equal(again.updated, result.updated)


def test_patience() -> None:
    stop = patience(2, least=0.1)
    assert not stop(np.array([0.5])) and not stop(np.array([0.5, 0.55])) and stop(np.array([0.5, 0.55, 0.58]))
    assert not stop(np.array([[0.5, np.nan], [0.55, np.nan], [0.7, np.nan]]))
    with pytest.raises(ValueError, match="n is 0"):
        patience(0)


def test_careless_arguments(parts: Any, tmp_path: Path) -> None:
    for options, message in (
        ({"callback": 3}, "callback is int, but it must be a function of an Event"),
        ({"stop": {"curves": patience(1)}, "measure": CURVE}, "stop has 'curves'.*one of curve"),
        ({"stop": {"accuracy": patience(1)}}, "stop has 'accuracy'.*one of none here"),
        ({"stop": {"curve": 3}, "measure": CURVE}, "stop has 'curve': int"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(*parts, KEY, tmp_path, progress=False, **options)
