"""Sinusoids to regress, each from a few points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cl_zoo.checks import Count, check_range, checked
from cl_zoo.streams.episodes import episode_stream
from cl_zoo.types import Array, Batch, Episode, Key, Stream

__all__ = ["SinusoidData", "sinusoids"]


Interval = tuple[float, float]


class SinusoidData(NamedTuple):
    """Attributes:
    amplitude, phase: `f32[T, 2]`, the range of each task, lowest and highest.
    x_range: `f32[2]`.
    """

    amplitude: Array
    phase: Array
    x_range: Array


@checked
def sinusoids(
    n_tasks: Count = 1,
    *,
    steps: int = 70_000,
    shots: Count = 10,
    queries: Count = 10,
    batch_size: int = 25,
    amplitude: Interval | Sequence[Interval] = (0.1, 5.0),
    phase: Interval | Sequence[Interval] | None = None,
    x_range: Interval = (-5.0, 5.0),
    **options: Any,
) -> Stream:
    """Every example is a sinusoid, known at K points and to be predicted at Q others. A task is a family of them.

        y = A sin(x - phi),   A ~ U(amplitude),   phi ~ U(phase),   x ~ U(x_range)

    Args:
      n_tasks: `T`, families that come one after another, at least 1.
      steps: batches per task.
      shots: K, at least 1.
      queries: Q, at least 1.
      batch_size: sinusoids per batch (the meta-batch).
      amplitude: lowest and highest A; one range for all tasks, or T of them.
      phase: lowest and highest phi in radians; one range for all tasks, or T of them. None cuts [0, pi] into T equal
        parts, one for each task.
      x_range: lowest and highest x.
      **options: `task_ids`, `sample_size`, `evaluation_size` and `evaluation_batch`, see `episode_stream`.

    Returns:
      A `Stream` with x an `Episode` of `f32[B, K, 1]`, `f32[B, K]` and `f32[B, Q, 1]`, y `f32[B, Q]`, and one output.
      The score is minus the mean squared error over an example's queries, so that higher is better, as for all metrics.
      `reorder` shuffles the families over the tasks.

    Raises:
      ValueError: an impossible value, named.

    Source: Finn, Abbeel and Levine 2017, arXiv 1703.03400, who have one task, and test on 600 sinusoids.

    Example:
      >>> import jax
      >>> stream = sinusoids(steps=100)
      >>> batch, cursor = stream.next(stream.init(jax.random.key(0)))
      >>> batch.x.support_x.shape, batch.x.support_y.shape, batch.y.shape
      ((25, 10, 1), (25, 10), (25, 10))
    """
    owner = "sinusoids"
    borders = np.linspace(0, np.pi, n_tasks + 1)
    given = SinusoidData(
        _ranges(owner, "amplitude", amplitude, n_tasks),
        _ranges(owner, "phase", np.stack([borders[:-1], borders[1:]], 1) if phase is None else phase, n_tasks),
        _ranges(owner, "x_range", x_range, 1)[0],
    )
    check_range(owner, "amplitude", given.amplitude, 0)

    def draw(data: SinusoidData, split: str, task: Array, key: Key) -> tuple[Episode, Array]:
        keys = jax.random.split(key, 3)
        low, high = data.amplitude[task]
        a = jax.random.uniform(keys[0], minval=low, maxval=high)
        low, high = data.phase[task]
        phi = jax.random.uniform(keys[1], minval=low, maxval=high)
        low, high = data.x_range
        x = jax.random.uniform(keys[2], (shots + queries, 1), minval=low, maxval=high)
        y = a * jnp.sin(x[:, 0] - phi)
        return Episode(x[:shots], y[:shots], x[shots:]), y[shots:]

    def shuffle(data: SinusoidData, key: Key) -> SinusoidData:
        order = jax.random.permutation(key, n_tasks)
        return data._replace(amplitude=data.amplitude[order], phase=data.phase[order])

    def score(outputs: Array, batch: Batch) -> Array:
        return -jnp.mean(jnp.square(outputs[..., 0] - batch.y), axis=1)

    sizes: dict[str, Any] = {"n_tasks": n_tasks, "steps": steps, "batch_size": batch_size}
    return episode_stream(owner, given, draw, n_outputs=1, score=score, reorder=shuffle, **sizes, **options)


def _ranges(owner: str, field: str, value: Any, n: int) -> Array:
    """One range for all of n tasks, or one for each: `f32[n, 2]`."""
    try:
        found = np.asarray(value, np.float32)
    except (TypeError, ValueError):  # ragged, or no numbers
        found = np.zeros(0, np.float32)
    if found.shape not in ((2,), (n, 2)):
        several = f", or {n} such pairs" if n > 1 else ""
        raise ValueError(f"{owner}: {field} is {value!r}, but it must be a pair (low, high){several}")
    found = np.broadcast_to(found, (n, 2))
    for low, high in found:
        if not (np.isfinite([low, high]).all() and low <= high):
            raise ValueError(f"{owner}: {field} is ({low:g}, {high:g}), but it must be (low, high), low at most high")
    return jnp.asarray(found)
