"""Numbers from the accuracy matrix R `[..., T + 1, T]`: row 0 before any training, row t + 1 after task t.

Some take a curve of scores within tasks instead, or too. All keep leading axes (seeds, settings).
Libraries disagree on several of these; the formulas here are in terms of a_{t,i} = R[t + 1, i], the score on task i
after training on task t, both from 0.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

__all__ = [
    "Statistics",
    "anytime_accuracy",
    "average_accuracy",
    "average_anytime_accuracy",
    "average_incremental_accuracy",
    "backward_transfer",
    "forgetting",
    "forward_transfer",
    "learning_accuracy",
    "min_accuracy",
    "stability_gap",
    "statistics",
    "summary",
]


def _after(matrix: ArrayLike) -> np.ndarray:
    if hasattr(matrix, "measures"):
        raise ValueError("the accuracy matrix is a Result, but it must be an array; give result.accuracy")
    matrix = np.asarray(matrix, np.float64)
    if matrix.ndim < 2 or matrix.shape[-2] != matrix.shape[-1] + 1:
        raise ValueError(f"the accuracy matrix must be [..., T + 1, T], but its shape is {matrix.shape}")
    return matrix[..., 1:, :]


def _diagonal(after: np.ndarray) -> np.ndarray:
    return np.diagonal(after, axis1=-2, axis2=-1)


def average_accuracy(matrix: ArrayLike) -> np.ndarray:
    """ACC = 1/T sum_i a_{T-1,i}: the mean over all tasks at the end."""
    return _after(matrix)[..., -1, :].mean(-1)


def accuracy_after_each_task(matrix: ArrayLike) -> np.ndarray:
    """A_t = 1/(t+1) sum_{i<=t} a_{t,i}: the mean over the tasks seen, after each task, `[..., T]`."""
    after = _after(matrix)
    seen = np.tril(np.ones(after.shape[-2:], bool))
    return np.where(seen, after, 0).sum(-1) / seen.sum(-1)


def average_incremental_accuracy(matrix: ArrayLike) -> np.ndarray:
    """1/T sum_t A_t."""
    return accuracy_after_each_task(matrix).mean(-1)


def backward_transfer(matrix: ArrayLike) -> np.ndarray:
    """BWT = 1/(T-1) sum_{i<T-1} (a_{T-1,i} - a_{i,i}) (Lopez-Paz and Ranzato 2017); nan for one task."""
    after = _after(matrix)
    return _mean((after[..., -1, :] - _diagonal(after))[..., :-1])


def forgetting(matrix: ArrayLike) -> np.ndarray:
    """1/(T-1) sum_{i<T-1} (max_{i<=t<T-1} a_{t,i} - a_{T-1,i}) (Chaudhry et al. 2018); nan for one task."""
    after = _after(matrix)
    learnt = np.where(np.tril(np.ones(after.shape[-2:], bool)), after, -np.inf)
    return _mean(learnt[..., :-1, :-1].max(-2, initial=-np.inf) - after[..., -1, :-1])


def forward_transfer(matrix: ArrayLike) -> np.ndarray:
    """FWT = 1/(T-1) sum_{i>0} (a_{i-1,i} - R[0,i]): before task i is trained, less untrained; nan for one task."""
    after, before = _after(matrix), np.asarray(matrix, np.float64)[..., 0, :]
    return _mean(np.diagonal(after, offset=1, axis1=-2, axis2=-1) - before[..., 1:])


def learning_accuracy(matrix: ArrayLike) -> np.ndarray:
    """1/T sum_i a_{i,i}: each task just after it was trained."""
    return _diagonal(_after(matrix)).mean(-1)


def min_accuracy(curve: ArrayLike, matrix: ArrayLike) -> np.ndarray:
    """min-ACC = 1/(T-1) sum_{i<T-1} min over all points after task i's own end (De Lange et al. 2023).

    Args:
      curve: `[..., T, points, T]`, scores within each task.
      matrix: R, for the scores at the ends of tasks.
    """
    curve, after = _within(curve, matrix)
    lowest = []
    for i in range(after.shape[-1] - 1):
        within = curve[..., i + 1 :, :, i].min((-2, -1))
        lowest.append(np.minimum(within, after[..., i + 1 :, i].min(-1)))
    return _mean(np.stack(lowest, -1)) if lowest else np.full(after.shape[:-2], np.nan)


def stability_gap(curve: ArrayLike, matrix: ArrayLike) -> np.ndarray:
    """1/(T-1) sum_{t>0} mean_{i<t} max(0, a_{t-1,i} - min over points within task t): how far scores on earlier tasks
    fall while task t is trained, below where they stood when it began; nan for one task."""
    curve, after = _within(curve, matrix)
    falls = [
        np.maximum(after[..., t - 1, :t] - curve[..., t, :, :t].min(-2), 0).mean(-1) for t in range(1, after.shape[-1])
    ]
    return _mean(np.stack(falls, -1)) if falls else np.full(after.shape[:-2], np.nan)


def anytime_accuracy(curve: ArrayLike, seen: ArrayLike | None = None) -> np.ndarray:
    """A(n) = mean over the tasks seen by point n of their scores there, `[..., T * points]`.

    Args:
      curve: `[..., T, points, T]`, scores at points spread evenly over the stream.
      seen: bool, of a shape that broadcasts to the curve's; None counts each task from its own training on.
    """
    curve = np.asarray(curve, np.float64)
    if curve.ndim < 3 or curve.shape[-3] != curve.shape[-1]:
        raise ValueError(f"the curve must be [..., T, points, T], but its shape is {curve.shape}")
    n_tasks = curve.shape[-1]
    counts = np.tril(np.ones((n_tasks, n_tasks), bool))[:, None] if seen is None else np.asarray(seen, bool)
    counts = np.broadcast_to(counts, curve.shape)
    if not counts.any(-1).all():
        raise ValueError("anytime accuracy: at some point of the curve no task was seen")
    means = np.where(counts, curve, 0).sum(-1) / counts.sum(-1)
    return means.reshape((*means.shape[:-2], -1))


def average_anytime_accuracy(curve: ArrayLike, seen: ArrayLike | None = None) -> np.ndarray:
    """A_AUC = 1/N sum_n A(n): the area under the curve of anytime accuracy over the whole stream, whose length is 1
    (Koh et al. 2022); arguments as in `anytime_accuracy`."""
    return anytime_accuracy(curve, seen).mean(-1)


def _within(curve: ArrayLike, matrix: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    curve, after = np.asarray(curve, np.float64), _after(matrix)
    n_tasks = after.shape[-1]
    if (
        curve.ndim < 3
        or curve.shape[-3] != n_tasks
        or curve.shape[-1] != n_tasks
        or curve.shape[:-3] != after.shape[:-2]
    ):
        raise ValueError(f"the curve must be [..., T, points, T] with T = {n_tasks}, but its shape is {curve.shape}")
    return curve, after


def _mean(values: np.ndarray) -> np.ndarray:
    return values.mean(-1) if values.shape[-1] else np.full(values.shape[:-1], np.nan)


def summary(matrix: ArrayLike) -> dict[str, np.ndarray]:
    """All metrics of one matrix, by name."""
    functions = (
        average_accuracy,
        average_incremental_accuracy,
        backward_transfer,
        forgetting,
        forward_transfer,
        learning_accuracy,
    )
    return {function.__name__: function(matrix) for function in functions}


class Statistics(NamedTuple):
    """Attributes:
    mean: of the runs.
    sd: standard deviation of one run, divisor n - 1; nan for one run.
    sem: standard error of the mean, sd / sqrt(n).
    n: runs.
    """

    mean: float
    sd: float
    sem: float
    n: int


def statistics(values: ArrayLike) -> Statistics:
    """Mean, standard deviation, standard error and number of runs."""
    values = np.ravel(np.asarray(values, np.float64))
    if values.size == 0:
        raise ValueError("statistics of no runs")
    sd = float(values.std(ddof=1)) if values.size > 1 else float("nan")
    return Statistics(float(values.mean()), sd, sd / float(np.sqrt(values.size)), int(values.size))


def confidence_interval(values: ArrayLike, level: float = 0.95, axis: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """mean -+ t sd / sqrt(n), t of Student's distribution with n - 1 degrees: holds the expected value of a run with
    probability `level`, if runs are normal.

    Args:
      values: scores, runs along `axis`; nan for one run.
      level: in (0, 1).
      axis: of the runs.

    Returns:
      Lower and upper end.

    Raises:
      ValueError: a level outside of (0, 1).

    Example:
      >>> low, high = confidence_interval([0.5, 0.7, 0.9])
      >>> round(float(low), 3), round(float(high), 3)
      (0.203, 1.197)
    """
    if not 0 < level < 1:
        raise ValueError(f"confidence_interval: level is {level}, but it must be in (0, 1)")
    from scipy import stats  # slow to import, and only needed here

    values = np.asarray(values, np.float64)
    n = values.shape[axis]
    if n < 2:
        nothing = np.full_like(values.mean(axis=axis), np.nan)
        return nothing, nothing
    half = stats.t.ppf((1 + level) / 2, n - 1) * values.std(axis=axis, ddof=1) / np.sqrt(n)
    return values.mean(axis=axis) - half, values.mean(axis=axis) + half


def class_accuracy(confusion: ArrayLike) -> np.ndarray:
    """Of each class, the fraction of its examples that are predicted as it, n_cc / sum_k n_ck: `[..., C, C]` ->
    `[..., C]`; nan where there are none."""
    counts = np.asarray(confusion, np.float64)
    total = counts.sum(axis=-1)
    return np.diagonal(counts, axis1=-2, axis2=-1) / np.where(total > 0, total, np.nan)
