"""A whole stream, or many, as one compiled program."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cl_zoo._learner import Learner
from cl_zoo.compilation import jit, staged
from cl_zoo.evaluation.measures import Measure, Measures, settled
from cl_zoo.training._continue import check_begun, joined
from cl_zoo.training.loop import (
    Carry,
    Metrics,
    Result,
    begin,
    check_finite,
    check_run,
    chosen_metrics,
    finish,
    histories,
    is_finite,
    measured,
    reported,
    room,
    slots,
    start,
    task_lengths,
    train_steps,
    updates,
)
from cl_zoo.types import Array, Key, PyTree, Stream, TrainState

__all__ = ["clear_programs", "run_one", "run_stream", "stream_program", "with_reports"]


def run_stream(
    learner: Learner,
    stream: Stream,
    key: Key,
    *,
    measure: Measures | None = None,
    metrics: Metrics | None = None,
    state: TrainState | None = None,
    after: Result | None = None,
) -> Result:
    """Trains on every task in turn and measures: a `scan` over tasks, one compiled program.

    The programs of the last 64 learners, streams and measures are kept: the same learner on an equal stream, with any
    key, weights or data of the same shapes, compiles nothing. It may be jitted and vmapped; then nothing is
    checked, and reports are left out.

    Args:
      learner, stream: what learns, and from what.
      key: of the whole run.
      measure: what is measured, by name, see `at` and `Measure`. None is `{"accuracy": accuracy()}`: the score on every
        task of the test split, before the first task and after each.
      metrics: which of the learner's metrics to keep: names, or by name n, to keep every n-th value. None keeps all.
      state: to begin from, in place of the learner's own first state: another run's, or one that was loaded.
      after: the result of a run with this key over the first tasks of this stream, which goes on with the others.

    Returns:
      A `Result`; with `after`, that of all tasks, nan where a task was not there yet to be measured on.

    Raises:
      ValueError: the learner needs what the stream lacks; a measure that this stream cannot give, or at more updates
        than a task has; unknown metrics; weights that are not those of the model; a state of other shapes, `after` with
        another key or without tasks to come.
      NonFiniteError: a loss or penalty was not finite; names task, step and likely cause.

    Example:
      >>> import jax, optax
      >>> from cl_zoo import compose, replay, supervised
      >>> from cl_zoo.models import mlp
      >>> from cl_zoo.streams import split_mnist
      >>> stream = split_mnist(scenario="class", steps=20)
      >>> learner = compose(mlp((28, 28), 10), optax.adam(1e-3), supervised(), replay(200), tasks=stream.tasks)
      >>> result = run_stream(learner, stream, jax.random.key(0))
      >>> result.metrics["loss"].shape, result.accuracy.shape
      ((5, 20), (6, 5))
    """
    check_run("run_stream", learner, stream, key)
    measures, chosen = settled(measure, stream), chosen_metrics(metrics)
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((learner, stream, key, state, after)))
    if staged() or traced:
        if after is not None:
            raise ValueError(
                "run_stream: after is given inside of a program, but there a run can only go on from a state"
            )
        return run_one(learner, stream, key, None if state is None else (state, None), measures, chosen)
    first, begun = check_begun("run_stream", learner, stream, key, state, after)
    program = _program(jax.tree.structure((learner, stream)), measures, chosen, first)
    result = program(learner, stream, key, begun)
    _check_result(result, stream, dict(chosen or ()), first)
    result = with_reports(result, measures, stream)
    return result if after is None else joined(after, result, stream, measures)


def _check_result(result: Result, stream: Stream, strides: dict[str, int], first: int = 0) -> None:
    """Refuses a run whose metrics or states are not finite; `first` is its first task."""

    @functools.cache  # most metrics have the same stride
    def numbers(stride: int) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        task, place = np.nonzero(updates(stream, stride)[first:])
        return (first + task) * stream.steps + (place + 1) * stride - 1, (task, place)

    found = {}
    for name, values in jax.device_get(result.metrics).items():
        number, place = numbers(strides.get(name, 1))
        found[name] = number, values[place]
    last = (np.arange(stream.n_tasks) * stream.steps + np.asarray(task_lengths(stream)) - 1)[first:]
    finite = dict(zip(last.tolist(), jax.device_get(result.finite).tolist(), strict=True))
    check_finite(numbers(1)[0], found, result.state, finite, stream.steps)


def stream_program(
    learner: Learner, stream: Stream, *, measure: Measures | None = None, metrics: Metrics | None = None
) -> Callable[[Learner, Stream, Key], Result]:
    """The jitted program behind `run_stream`, to lower, compile and time: `(learner, stream, key) -> Result`.

    Args and errors are those of `run_stream`, except that a loss that is not finite raises nothing, and that measures
    are not reported.
    """
    check_run("run_stream", learner, stream, None)
    return _program(jax.tree.structure((learner, stream)), settled(measure, stream), chosen_metrics(metrics), 0)


@functools.lru_cache(maxsize=64)
def _program(structure: Any, *options: Any) -> Callable[..., Result]:
    """One program for each structure; when evicted, all that it holds is freed."""
    return jit(lambda learner, stream, key, begun=None: run_one(learner, stream, key, begun, *options))


def with_reports(result: Result, measures: tuple[tuple[str, Measure], ...], stream: Stream, leading: int = 0) -> Result:
    """What the measures' reports make of their results; `leading` axes stand before those of a run."""
    found = {name: reported(one, result.measures[name], leading + len(slots(one, stream))) for name, one in measures}
    return result._replace(measures=found)


def clear_programs() -> None:
    """Forgets all programs that `run_stream`, `sweep` and `fit` have kept, and with them their learners."""
    from cl_zoo.training import _fit, _sweep

    for kept in (_program, _sweep._sweep_program, _sweep._maker, _fit._programs):
        kept.cache_clear()


def run_one(
    learner: Learner,
    stream: Stream,
    key: Key,
    begun: tuple[TrainState, PyTree] | None,
    measures: tuple[tuple[str, Measure], ...],
    metrics: tuple[tuple[str, int], ...] | None,
    first: int = 0,
) -> Result:
    """From the `first` task on; `begun` is a state to begin from, and the place in the stream where that is another."""
    learner, carry = start(learner, stream, key)
    if begun is not None:
        carry = begun[0], carry[1] if begun[1] is None else begun[1]
    by_task = [(name, one) for name, one in measures if one.when == "task"]

    def take(name: str, one: Measure, state: TrainState, slot: Array | int) -> PyTree:
        return measured(name, one, learner, stream, key, state, slot)

    @jax.jit  # traced once, though its shapes are asked for before it is used
    def train(carry: Carry, t: Array) -> tuple[Carry, Any]:
        carry = begin(learner, stream, key, carry[0], t), carry[1]
        carry, outputs = _task(learner, stream, key, carry, t, measures, metrics)
        state = finish(learner, stream, key, carry[0], t)
        return (state, carry[1]), (*outputs, is_finite(state))

    def measure_then_train(carry: Carry, t: Array) -> tuple[Carry, Any]:
        """One more round than tasks, the last without training: a measure is compiled once, not twice."""
        found = {name: take(name, one, carry[0], t) for name, one in by_task}
        shapes = jax.eval_shape(train, carry, t)[1]
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        carry, outputs = jax.lax.cond(t < stream.n_tasks, lambda c: train(c, t), lambda c: (c, nothing), carry)
        return carry, (found, outputs)

    rounds = jnp.arange(first, stream.n_tasks + 1, dtype=jnp.int32)
    carry, (found, outputs) = jax.lax.scan(measure_then_train, carry, rounds)
    kept, points, finite = jax.tree.map(lambda leaf: leaf[:-1], outputs)
    last = {name: take(name, one, carry[0], 0) for name, one in measures if one.when == "end"}
    return Result(carry[0], kept, {**found, **points, **last}, updates(stream)[first:], finite, carry[1])


def _task(
    learner: Learner,
    stream: Stream,
    key: Key,
    carry: Carry,
    t: Array,
    measures: tuple[tuple[str, Measure], ...],
    metrics: tuple[tuple[str, int], ...] | None,
) -> tuple[Carry, tuple[dict[str, Array], dict[str, PyTree]]]:
    """All updates of task t: `(carry, (metrics, measures within the task))`."""
    strides, kept = histories(learner, stream, carry, stream.steps, metrics)
    steps = stream.steps if stream.task_steps is None else stream.task_steps[t]
    within = {name: one for name, one in measures if isinstance(one.when, int)}

    def cut(kept: dict[str, Array]) -> dict[str, Array]:
        """Without values of updates after the last multiple of a stride."""
        kept = {name: history[: stream.steps // strides[name]] for name, history in kept.items()}
        if stream.task_steps is None:
            return kept
        filled = {name: jnp.arange(len(history)) < steps // strides[name] for name, history in kept.items()}
        return {name: jnp.where(filled[name], history, jnp.nan) for name, history in kept.items()}

    if not within:
        carry, kept = train_steps(learner, stream, carry, 0, steps, strides, kept)
        return carry, (cut(kept), {})

    periods = {int(one.when) for one in within.values()}
    chunk = math.gcd(*periods)
    whole = stream.task_steps is None and stream.steps % chunk == 0

    def chunk_then_measure(i: Array, loop: Any) -> Any:
        carry, kept, points = loop
        first = i * chunk
        count = chunk if whole else jnp.minimum(chunk, steps - first)
        carry, kept = train_steps(learner, stream, carry, first, count, strides, kept)
        done = first + count
        for name, one in within.items():
            period = int(one.when)
            slot = done // period - 1

            def add(points: PyTree, name: str = name, one: Measure = one, slot: Array = slot) -> PyTree:
                number = t * slots(one, stream)[1] + slot
                new = measured(name, one, learner, stream, key, carry[0], number)
                return jax.tree.map(
                    lambda all_, now: jax.lax.dynamic_update_index_in_dim(all_, now, slot, 0), points, new
                )

            if whole and periods == {chunk}:
                new = add(points[name])
            else:
                new = jax.lax.cond(done % period == 0, add, lambda same: same, points[name])
            points = {**points, name: new}
        return carry, kept, points

    points = {
        name: room(name, one, learner, stream, key, carry[0], slots(one, stream)[1:]) for name, one in within.items()
    }
    loop = carry, kept, points
    carry, kept, points = jax.lax.fori_loop(0, -(-steps // chunk), chunk_then_measure, loop)
    return carry, (cut(kept), points)
