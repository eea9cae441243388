"""The pieces of a run that the compiled stream and the host loop share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np

from cl_zoo._learner import Learner
from cl_zoo.checks import check_whole
from cl_zoo.evaluation.measures import Measure
from cl_zoo.types import NEEDS, Agent, Array, Batch, Key, PyTree, Stream, TrainState

__all__ = [
    "Metrics",
    "NonFiniteError",
    "Result",
    "begin",
    "check_bound",
    "check_finite",
    "check_needs",
    "chosen_metrics",
    "example_batch",
    "finish",
    "histories",
    "measured",
    "reported",
    "room",
    "slots",
    "start",
    "task_lengths",
    "train_steps",
    "update",
    "updates",
]

Carry = tuple[TrainState, PyTree]
Histories = dict[str, Array]
Metrics = Sequence[str] | Mapping[str, int]


class Result(NamedTuple):
    """What a run returns.

    Attributes:
      state: the final `TrainState`.
      metrics: per update, `{name: f32[T, steps]}`, or `[T, steps // n]` of each n-th; nan beyond the end of a task.
      measures: what was measured, by name.
      updated: `bool[T, steps]`, false beyond the end of a task that is shorter than others.
    """

    state: PyTree
    metrics: dict[str, Array]
    measures: dict[str, PyTree]
    updated: Array

    @property
    def accuracy(self) -> Array:
        """The matrix R, `f32[T + 1, T]`: row 0 before any training, row t + 1 after task t. KeyError where it was
        not measured."""
        return self.measures["accuracy"]


class NonFiniteError(FloatingPointError):
    """A loss or penalty became infinite or not a number."""


def check_needs(learner: Learner, stream: Stream) -> None:
    """Refuses a learner that needs what the stream does not provide, before anything compiles.

    Raises:
      ValueError: names the component, what it needs, and what the stream provides.
    """
    for name, need in sorted(learner.needs):
        if need not in stream.provides:
            raise ValueError(
                f"{name} needs {need!r}, {NEEDS[need]}, which this stream does not provide;"
                f" it provides {', '.join(sorted(stream.provides))}"
            )


def check_bound(weights: PyTree) -> None:
    """Refuses weights that are not a tree of arrays."""
    for leaf in jax.tree.leaves(weights):
        if not hasattr(leaf, "shape"):
            raise ValueError(
                f"weights holds a {type(leaf).__name__}, but it must be a tree of arrays; of what load_pretrained"
                " gives, that is .params"
            )


def chosen_metrics(metrics: Metrics | None) -> tuple[tuple[str, int], ...] | None:
    """Names and strides of the histories that are kept; None for all of them.

    Raises:
      ValueError: a stride below 1, a single name.
    """
    if metrics is None:
        return None
    if isinstance(metrics, str):
        raise ValueError(f"metrics is {metrics!r}, but it must be a sequence of names, or strides by name")
    strides = dict(metrics) if isinstance(metrics, Mapping) else dict.fromkeys(metrics, 1)
    for name, stride in strides.items():
        check_whole("metrics", name, stride, 1)
    return tuple(strides.items())


def example_batch(learner: Learner, stream: Stream, key: Key) -> Batch:
    """A batch of zeros, as the stream gives them to this learner."""
    cursor, asked = jax.eval_shape(stream.init, key), []

    def outputs(x: PyTree, task: Any = None) -> Array:
        asked.append("predict")
        return jnp.zeros((jax.tree.leaves(x)[0].shape[0], stream.tasks.active.shape[-1]))

    def act(x: PyTree, key: Key) -> tuple[Array, dict[str, Array]]:
        asked.append("act")
        n = jax.tree.leaves(x)[0].shape[0]
        return jnp.zeros(n, jnp.int32), {"log_probability": jnp.zeros(n)}

    def zeros(shapes: Batch) -> Batch:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    batch = zeros(jax.eval_shape(lambda cursor: stream.next(cursor, Agent(outputs, act))[0], cursor))
    if asked:  # an environment: what it keeps of an action has the shapes of this learner's actions
        state = jax.eval_shape(learner.init, key, batch)
        batch = zeros(jax.eval_shape(lambda cursor, s: stream.next(cursor, learner.agent(s))[0], cursor, state))
    return batch


def start(learner: Learner, stream: Stream, key: Key) -> tuple[Learner, Carry]:
    """The learner with its frozen weights, and state and cursor before the first task. Learner and stream draw from
    keys of their own."""
    learner_key, stream_key = jax.random.split(key)
    cursor = stream.init(stream_key)
    batch = example_batch(learner, stream, key)
    learner = learner.drawn(learner_key, batch)
    return learner, (learner.init(learner_key, batch), cursor)


def begin(learner: Learner, stream: Stream, key: Key, state: TrainState, t: Array) -> TrainState:
    """Begins task `t`. On a stream without boundaries, neither this nor `finish` does anything."""
    if "boundaries" not in stream.provides:
        return state
    task = jax.tree.map(lambda leaf: leaf[t], stream.tasks)
    return learner.begin_task(state, task, _sample(stream, key, t))


def finish(learner: Learner, stream: Stream, key: Key, state: TrainState, t: Array) -> TrainState:
    """Ends task `t`, with the same sample of it."""
    if "boundaries" not in stream.provides:
        return state
    return learner.end_task(state, _sample(stream, key, t))


def _sample(stream: Stream, key: Key, t: Array) -> Batch | None:
    """Of task `t`, where the stream gives any; dropped by the compiler where no component reads it."""
    return stream.sample(t, jax.random.split(key)[1]) if stream.sample_function else None


def task_lengths(stream: Stream) -> np.ndarray | Array:
    """Updates of each task, `i32[T]`."""
    return np.full(stream.n_tasks, stream.steps, np.int32) if stream.task_steps is None else stream.task_steps


def updates(stream: Stream, stride: int = 1) -> Array:
    """Which of the values of each stride-th update a run fills, `bool[T, steps // stride]`."""
    return jnp.arange(stream.steps // stride) < jnp.asarray(task_lengths(stream))[:, None] // stride


def histories(
    learner: Learner, stream: Stream, carry: Carry, size: int, metrics: tuple[tuple[str, int], ...] | None = None
) -> tuple[dict[str, int], Histories]:
    """Stride of each metric that is kept, and room for its values in `size` updates: nan where there is none.

    Raises:
      ValueError: a metric that the learner does not have.
    """
    found = jax.eval_shape(lambda carry: update(learner, stream, carry)[1], carry)
    strides = dict.fromkeys(found, 1) if metrics is None else dict(metrics)
    if unknown := sorted(set(strides) - set(found)):
        raise ValueError(f"metrics has {unknown[0]!r}, but the learner gives {', '.join(sorted(found))}")
    return strides, {name: jnp.full(-(-size // n), jnp.nan, found[name].dtype) for name, n in strides.items()}


def update(learner: Learner, stream: Stream, carry: Carry) -> tuple[Carry, dict[str, Array]]:
    """Fetches the next batch and learns from it."""
    state, cursor = carry
    batch, cursor = stream.next(cursor, learner.agent(state))
    state, metrics = learner.update(state, batch)
    return (state, cursor), metrics


def train_steps(
    learner: Learner,
    stream: Stream,
    carry: Carry,
    first: Array | int,
    count: Array | int,
    strides: Mapping[str, int],
    kept: Histories,
) -> tuple[Carry, Histories]:
    """`count` updates, from the `first` of a task on; of every metric the value after each `stride` of them is kept."""

    def body(i: Array, both: tuple[Carry, Histories]) -> tuple[Carry, Histories]:
        carry, kept = both
        carry, metrics = update(learner, stream, carry)
        # A place is written `stride` times, and so keeps the last of them.
        place = {name: (first + i) // stride for name, stride in strides.items()}
        kept = {
            name: jax.lax.dynamic_update_index_in_dim(history, metrics[name], place[name], 0)
            for name, history in kept.items()
        }
        return carry, kept

    return jax.lax.fori_loop(0, count, body, (carry, kept))


def slots(measure: Measure, stream: Stream) -> tuple[int, ...]:
    """The leading axes of its results in a run: one place for each time it is taken."""
    if isinstance(measure.when, int):
        return stream.n_tasks, stream.steps // measure.when
    return (stream.n_tasks + 1,) if measure.when == "task" else ()


def measured(
    name: str, measure: Measure, learner: Learner, stream: Stream, key: Key, state: TrainState, slot: Array | int
) -> PyTree:
    """One result of a measure; it draws from a key of the run, its name and the number of the slot."""
    own = jax.random.fold_in(jax.random.fold_in(key, crc32(f"measure/{name}".encode())), slot)
    return measure(learner, state, stream, own)


def room(
    name: str,
    measure: Measure,
    learner: Learner,
    stream: Stream,
    key: Key,
    state: TrainState,
    axes: tuple[int, ...],
    full: Callable[..., Any] = jnp.full,
) -> PyTree:
    """Place for the results of a measure: nan, or 0 for whole numbers, where it is never taken."""
    shapes = jax.eval_shape(lambda state: measured(name, measure, learner, stream, key, state, 0), state)
    return jax.tree.map(
        lambda leaf: full((*axes, *leaf.shape), jnp.nan if jnp.issubdtype(leaf.dtype, jnp.inexact) else 0, leaf.dtype),
        shapes,
    )


def reported(measure: Measure, found: PyTree, leading: int, made: Mapping[int, PyTree] | None = None) -> PyTree:
    """What the measure's report makes of its results, each on its own: those that are not `made` yet, by number."""
    if measure.report is None:
        return found
    shape = jax.tree.leaves(found)[0].shape[:leading]
    flat = jax.tree.map(lambda leaf: np.asarray(leaf).reshape((-1, *leaf.shape[leading:])), found)
    made = made or {}
    numbers = range(math.prod(shape))
    each = [made[i] if i in made else measure.report(jax.tree.map(lambda leaf, i=i: leaf[i], flat)) for i in numbers]
    return jax.tree.map(lambda *leaves: np.stack(leaves).reshape(shape + np.shape(leaves[0])), *each)


def check_finite(
    ran: np.ndarray,
    metrics: Mapping[str, tuple[np.ndarray, np.ndarray]],
    params: PyTree,
    steps: int,
    kept: str = "",
) -> None:
    """Refuses metrics, or parameters after the last update, that are not finite.

    Args:
      ran: `i[N]`, numbers of the updates, in order: i of task t has the number t * steps + i.
      metrics: `{name: (i[n], f32[n])}`, numbers of those whose value was kept, and the values.
      params: after the last of them.
      steps: see `ran`.
      kept: what is left to continue from, for the message.

    Raises:
      NonFiniteError: names the task, the step and the likely cause.
    """
    bad = {}
    for name, (number, value) in metrics.items():
        if len(wrong := np.flatnonzero(~np.isfinite(value))):
            bad[name] = int(number[wrong[0]]), value[wrong[0]]
    if not bad:
        if all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(params)):
            return
        bad["parameters"] = int(ran[-1]), np.nan
    name = min(bad, key=lambda name: (bad[name][0], name != "loss"))
    found, value = bad[name]
    task, step = divmod(found, steps)
    # Which update did it is only known where something was kept of all of them.
    known = any(len(number) == len(ran) for number, _ in metrics.values())
    usual = max(metrics["loss"][1][:1], default=1.0) if "loss" in metrics else 1.0
    before = [
        value[max(int(np.searchsorted(number, found)) - 1, 0)]
        for metric, (number, value) in metrics.items()
        if metric.endswith("/penalty") and len(number)
    ]
    if name.endswith("/penalty") or any(penalty > 100 * max(usual, 1.0) for penalty in before):
        cause = (
            "a penalty grew until it overflowed: with plain SGD, strength x learning rate x largest Fisher value must"
            " stay below 2; lower the strength or the learning rate, or use Adam"
        )
    else:
        cause = "too high a learning rate, or inputs that are not finite"
    raise NonFiniteError(
        f"{name} is {value} at task {task}, step {step}{'' if known else ' or before'}; likely cause: {cause}{kept}"
    )
