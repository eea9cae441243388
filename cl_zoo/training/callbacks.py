"""What a user is told while `fit` runs, and when a task ends early."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cl_zoo.checks import Count, checked
from cl_zoo.types import TrainState

__all__ = ["Event", "patience"]


class Event(NamedTuple):
    """What `fit` tells its callback, after each chunk of updates and at the end of each task.

    Attributes:
      step: updates of the stream so far.
      task: the current task.
      task_ended: whether its last update was made, and what its end brings.
      metrics: the newest value of each, by name.
      scores: what was measured since the last event, by the measure's name.
      state: the state now. Its memory is given to the next update: copy what is kept.
    """

    step: int
    task: int
    task_ended: bool
    metrics: dict[str, float]
    scores: dict[str, Any]
    state: TrainState


@checked
def patience(n: Count, *, least: float = 0.0) -> Callable[[np.ndarray], bool]:
    """Ends a task when a score has not risen for `n` measurements.

    Args:
      n: measurements.
      least: by which the best score must be exceeded to count as risen.

    Returns:
      `(scores) -> bool` of the scores in the task so far, `[k, ...]`, whose trailing axes are averaged: for
      `fit(stop={name: ...})`.

    Example:
      >>> import numpy as np
      >>> [patience(2)(np.array(scores)) for scores in ([1, 2, 3], [1, 3, 2], [1, 3, 2, 3])]
      [False, False, True]
    """

    def stop(scores: np.ndarray) -> bool:
        best, place = -np.inf, -1
        for i, score in enumerate(np.nanmean(scores.reshape((len(scores), -1)), axis=1)):
            if score > best + (least if place >= 0 else 0):
                best, place = score, i
        return len(scores) - 1 - place >= n

    return stop
