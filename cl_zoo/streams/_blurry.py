"""Streams without task boundaries: how the examples of all tasks are mixed over time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cl_zoo.checks import Range, check_range, checked
from cl_zoo.shuffle import shuffled_index
from cl_zoo.streams.arrays import Cursor, locate
from cl_zoo.types import Array, Key, PyTree

__all__ = ["DriftCursor", "Mixing", "blurry", "drifting"]


class Mixing(NamedTuple):
    """Which examples come when, in a stream without task boundaries. A part is one class of one task: part `t k + j` is
    the j-th of task t's k classes.

    Attributes:
      numbers: `(n_tasks, classes_per_task) -> arrays`, which go into the stream's data, and so into the comparison of a
        resumed run.
      most_steps: `(examples by class, n_tasks, classes_per_task, batch_size) -> steps` per task that the examples
        suffice for, whatever classes a task gets; None where examples may come again.
      init: `(key, n_parts) -> cursor`, with a field `step`.
      draw: `(numbers, sizes i32[T, k], cursor, steps, batch_size) -> (part i32[B], row i32[B], cursor)`.
    """

    numbers: Callable[[int, int], PyTree]
    most_steps: Callable[[np.ndarray, int, int, int], int] | None
    init: Callable[[Key, int], PyTree]
    draw: Callable[[PyTree, Array, PyTree, int, int], tuple[Array, Array, PyTree]]


@checked
def blurry(fraction: Annotated[float, Range(0, 1)] = 0.1, *, disjoint: Annotated[float, Range(0, 1)] = 0.0) -> Mixing:
    """Soft boundaries: a fraction of each class's examples comes in the periods of other tasks.

    The stream has T periods, one for each task. Of the n examples of a class of task t

        floor(fraction n / (T - 1))   come in each of the other periods,
        the rest                   in period t,

    in random order within a period. Disjoint classes keep all their examples in their own period. With T periods of
    equal size and disjoint 0, `fraction` is also the fraction of a period's examples that come from other tasks. Every
    example comes at most once; what a period has beyond the steps of the shortest is left out.

    Args:
      fraction: M, from 0 (ordinary tasks) to 1 (a task's own classes do not come in its period at all); a multiple of
        0.001. All periods are alike at (T - 1) / T.
      disjoint: N, the fraction of each task's classes that never leave their period; N times the classes of a task must
        be a whole number.

    Returns:
      A `Mixing`, for `split_mnist(..., mixing=...)` and its like.

    Raises:
      ValueError: a number outside its range, or not such a multiple.

    Source: blurry-M: Bang et al. 2021, arXiv 2103.17230; with disjoint classes, i-Blurry-N-M: Koh et al. 2022,
    arXiv 2110.10031.

    Differences from the paper or its code: here each class's examples are dealt to the other periods in equal numbers;
    codes of i-Blurry pool those of all classes, and deal them to all periods at random.

    Example:
      >>> import jax
      >>> from cl_zoo.streams import split_mnist
      >>> stream = split_mnist(scenario="class", outputs="all", mixing=blurry(0.1), batch_size=32)
      >>> sorted(stream.provides)
      ['open_outputs']
    """
    thousandths = round(1000 * fraction)
    if abs(1000 * fraction - thousandths) > 1e-6:
        raise ValueError(f"blurry: fraction is {fraction}, but it must be a multiple of 0.001")

    def numbers(n_tasks: int, per_task: int) -> PyTree:
        n_disjoint = disjoint * per_task
        if abs(n_disjoint - round(n_disjoint)) > 1e-6:
            raise ValueError(
                f"blurry: disjoint is {disjoint}, but times the {per_task} classes of a task it must be a whole number"
            )
        return {"thousandths": jnp.int32(thousandths), "n_disjoint": jnp.int32(round(n_disjoint))}

    def most_steps(sizes: np.ndarray, n_tasks: int, per_task: int, batch_size: int) -> int:
        away = sizes * thousandths // (1000 * max(n_tasks - 1, 1))
        n_disjoint = round(disjoint * per_task)
        n_blurred = per_task - n_disjoint
        least = np.sort(sizes)[:n_disjoint].sum() + np.sort(sizes - (n_tasks - 1) * away)[:n_blurred].sum()
        return int(least + (n_tasks - 1) * np.sort(away)[:n_blurred].sum()) // batch_size

    def draw(numbers: PyTree, sizes: Array, cursor: Cursor, steps: int, batch_size: int) -> tuple[Array, Array, Cursor]:
        n_tasks, per_task = sizes.shape
        n, home = jnp.ravel(sizes), jnp.repeat(jnp.arange(n_tasks), per_task)
        blurred = jnp.tile(jnp.arange(per_task) >= numbers["n_disjoint"], n_tasks)
        away = jnp.where(blurred, n * numbers["thousandths"] // (1000 * max(n_tasks - 1, 1)), 0)
        stay = n - (n_tasks - 1) * away

        period = jnp.minimum(cursor.step // steps, n_tasks - 1)  # beyond its end, a stream stays in its last period
        here = jnp.where(home == period, stay, away)
        came_before = jnp.where(period <= home, period * away, (period - 1) * away + stay)
        position = cursor.step % steps * batch_size + jnp.arange(batch_size)
        index = shuffled_index(cursor.key, position, jnp.sum(here), 0, period)
        part, offset = jax.vmap(lambda i: locate(here, i))(index)
        row = _row(cursor.key, came_before[part] + offset, n, part)
        return part, row, cursor._replace(step=cursor.step + 1)

    def init(key: Key, n_parts: int) -> Cursor:
        return Cursor(key, jnp.zeros((), jnp.int32))

    return Mixing(numbers, most_steps, init, draw)


class DriftCursor(NamedTuple):
    """The place in a drifting stream.

    Attributes:
      key: of the stream's draws.
      step: `i32[]`, batches handed out so far.
      shown: `i32[parts]`, examples of each part handed out so far.
    """

    key: Key
    step: Array
    shown: Array


@checked
def drifting(
    schedule: Literal["gaussian", "linear"] = "gaussian",
    *,
    width: float = 0.5,
    over: Literal["class", "task"] = "class",
) -> Mixing:
    """No task boundaries at all: each class, or each task, comes and goes gradually.

    At x, the elapsed fraction of the stream times the number U of classes (or tasks), each example of a batch is of
    class u (or task u) with probability proportional to w_u(x) times the number of examples of u:

        schedule "gaussian":   w_u(x) = exp(- (x - u - 1/2)^2 / (2 width^2))
        schedule "linear":     w_u(x) = max(0, 1 - |x - u - 1/2| / width);   with width 1, one passes into the next

    The examples of a class of a task come in random order, each once before any comes again, in a new order.

    Args:
      schedule: "gaussian" or "linear".
      width: in units of the distance between peaks; above 0, above 0.5 for "linear".
      over: "class": every class has a peak of its own, in the order of tasks. "task": all classes of a task share one,
        for streams whose tasks have the same classes.

    Returns:
      A `Mixing`, for `split_mnist(..., mixing=...)` and its like.

    Raises:
      ValueError: an unknown choice, a width outside its range.

    Source: the Gaussian schedule over classes: Shanahan et al. 2021, arXiv 2105.13327.

    Differences from the paper or its code: there a set of classes is drawn for every few batches, each class on its
    own with probability w_u, and width is given in batches: 50 of 1000, with ten classes 0.5.

    Example:
      >>> import jax
      >>> from cl_zoo.streams import permuted_mnist
      >>> stream = permuted_mnist(3, mixing=drifting("linear", width=1.0, over="task"), steps=10)
      >>> stream.next(stream.init(jax.random.key(0)))[0].task is None
      True
    """
    check_range("drifting", "width", width, 0.501 if schedule == "linear" else 1e-6)

    def numbers(n_tasks: int, per_task: int) -> PyTree:
        each = 1 if over == "class" else per_task
        n_peaks = n_tasks * per_task // each
        peaks = np.repeat(np.arange(n_peaks) + 0.5, each) / n_peaks
        return {
            "peaks": jnp.asarray(peaks, jnp.float32),
            "width": jnp.float32(width / n_peaks),
            "linear": jnp.asarray(schedule == "linear"),
        }

    def draw(
        numbers: PyTree, sizes: Array, cursor: DriftCursor, steps: int, batch_size: int
    ) -> tuple[Array, Array, DriftCursor]:
        n = jnp.ravel(sizes)
        past = jnp.minimum((cursor.step + 0.5) / (steps * sizes.shape[0]), 1)
        logits = jnp.log(n) + log_weights(numbers, past)
        part = jax.random.categorical(jax.random.fold_in(cursor.key, cursor.step), logits, shape=(batch_size,))
        drawn = jax.nn.one_hot(part, n.shape[0], dtype=jnp.int32)
        earlier = jnp.take_along_axis(jnp.cumsum(drawn, axis=0) - drawn, part[:, None], axis=1)[:, 0]
        row = _row(cursor.key, cursor.shown[part] + earlier, n, part)
        shown = cursor.shown + jnp.sum(drawn, axis=0)
        return part.astype(jnp.int32), row, cursor._replace(step=cursor.step + 1, shown=shown)

    def init(key: Key, n_parts: int) -> DriftCursor:
        return DriftCursor(key, jnp.zeros((), jnp.int32), jnp.zeros(n_parts, jnp.int32))

    return Mixing(numbers, None, init, draw)


def log_weights(numbers: dict[str, Any], past: Array) -> Array:
    """log w_u of every part, after the fraction `past` of the stream."""
    distance = jnp.abs(past - numbers["peaks"]) / numbers["width"]
    # Finite, so that there is something to draw where the classes that should come have no examples.
    return jnp.where(numbers["linear"], jnp.log(jnp.maximum(1 - distance, 1e-30)), -(distance**2) / 2)


def _row(key: Key, number: Array, n: Array, part: Array) -> Array:
    """The index of a part's `number`-th example: a random order for each pass over its n examples."""
    return jax.vmap(lambda i, p: shuffled_index(key, i % n[p], n[p], 1 + p, i // n[p]))(number, part)
