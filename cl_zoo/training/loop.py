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
from cl_zoo.checks import LARGEST, check_key, check_whole
from cl_zoo.evaluation.measures import Measure
from cl_zoo.types import NEEDS, Agent, Array, Batch, Key, PyTree, Stream, TrainState

__all__ = [
    "Metrics",
    "NonFiniteError",
    "Result",
    "begin",
    "check_bound",
    "check_finite",
    "check_run",
    "chosen_metrics",
    "example_batch",
    "finish",
    "histories",
    "is_finite",
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
      finite: `bool[T]`, whether the state after each task was finite (where it was not, `run_stream` and `fit` raise,
        `sweep` does not).
      cursor: the place in the stream at the end, from which a run goes on; None of a sweep.
    """

    state: PyTree
    metrics: dict[str, Array]
    measures: dict[str, PyTree]
    updated: Array
    finite: Array
    cursor: PyTree = None

    @property
    def accuracy(self) -> Array:
        """The matrix R, `f32[T + 1, T]`: row 0 before any training, row t + 1 after task t. KeyError where it was
        not measured."""
        return self.measures["accuracy"]


LARGEST_LOSS = 1e30
"""A metric above it is as good as infinite: masked outputs, which are about -1e38, went into a sum."""


class NonFiniteError(FloatingPointError):
    """A loss or penalty became infinite or not a number."""


def check_run(owner: str, learner: Learner, stream: Stream, key: Key | None) -> None:
    """Refuses what cannot be run, before anything compiles.

    Raises:
      ValueError: what is no learner, stream or key; a learner that needs what the stream does not provide, or that was
        composed with the tasks of another one; weights that are not a tree of arrays; more updates than int32 counts.
    """
    if not isinstance(learner, Learner):
        raise ValueError(f"{owner}: learner is {type(learner).__name__}, but it must be what compose returns")
    if not isinstance(stream, Stream):
        raise ValueError(f"{owner}: stream is {type(stream).__name__}, but it must be a Stream, as split_mnist() is")
    if key is not None:
        check_key(owner, "key", key)
    for name, need in sorted(learner.needs):
        if need not in stream.provides:
            raise ValueError(
                f"{name} needs {need!r}, {NEEDS[need]}, which this stream does not provide;"
                f" it provides {', '.join(sorted(stream.provides))}"
            )
    if learner.tasks is not None:
        own, theirs = learner.tasks.active, stream.tasks.active
        traced = isinstance(own, jax.core.Tracer) or isinstance(theirs, jax.core.Tracer)
        if own.shape != theirs.shape or not (traced or np.array_equal(own, theirs)):
            raise ValueError(
                f"{owner}: the learner was composed with tasks of another stream, active {list(own.shape)} where this"
                f" one has {list(theirs.shape)}{'' if own.shape != theirs.shape else ' with other outputs active'};"
                " give compose tasks=stream.tasks"
            )
    check_bound(learner.model.weights)
    if stream.n_tasks * stream.steps > LARGEST:
        raise ValueError(
            f"{owner}: the stream has {stream.n_tasks} tasks of {stream.steps} updates, but updates are counted in"
            f" int32: they must be at most {LARGEST} in all"
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


def is_finite(state: TrainState) -> Array:
    """Whether parameters and model state are finite, and nothing of optimiser and parts is nan (some keep an infinity
    to begin with), `bool[]`."""

    def every(tree: PyTree, test: Callable[[Array], Array]) -> Array:
        leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        return jnp.all(jnp.array([jnp.all(test(leaf)) for leaf in leaves]))

    kept = every((state.opt_state, state.parts), lambda leaf: ~jnp.isnan(leaf))
    return kept & every((state.params, state.model_state), jnp.isfinite)


def _what_is_not_finite(state: TrainState) -> str:
    """Names the part of a state that is not finite."""
    empty = state._replace(params=(), model_state=(), opt_state=(), parts={})
    fields = {name: {name: getattr(state, name)} for name in ("params", "model_state", "opt_state")}
    parts = {f"parts[{name!r}]": {"parts": {name: part}} for name, part in state.parts.items()}
    for name, field in {**fields, **parts}.items():
        if not is_finite(empty._replace(**field)):
            return f"state.{name}"
    return "the state"


def check_finite(
    ran: np.ndarray,
    metrics: Mapping[str, tuple[np.ndarray, np.ndarray]],
    state: TrainState,
    finite: Mapping[int, bool],
    steps: int,
    kept: str = "",
) -> None:
    """Refuses metrics, or a state, that are not finite.

    Args:
      ran: `i[N]`, numbers of the updates, in order: i of task t has the number t * steps + i.
      metrics: `{name: (i[n], f32[n])}`, numbers of those whose value was kept, and the values.
      state: the last.
      finite: `is_finite` of the states after some of the updates, by number.
      steps: see `ran`.
      kept: what is left to continue from, for the message.

    Raises:
      NonFiniteError: names what it is, the task, the step and the likely cause.
    """
    bad = {}
    for name, (number, value) in metrics.items():
        if len(wrong := np.flatnonzero(~(np.abs(value) < LARGEST_LOSS))):
            bad[name] = int(number[wrong[0]]), f"{value[wrong[0]]}"
    spoilt = [number for number, fine in finite.items() if not fine]
    if not bad and not spoilt:
        return
    if not bad or (spoilt and spoilt[0] < min(number for number, _ in bad.values())):
        bad = {_what_is_not_finite(state): (spoilt[0], "not finite")}
    name = min(bad, key=lambda name: (bad[name][0], name != "loss"))
    found, told = bad[name]
    task, step = divmod(found, steps)
    # Which update did it is only known where something was kept of all of them.
    known = any(len(number) == len(ran) for number, _ in metrics.values())
    usual = max(metrics["loss"][1][:1], default=1.0) if "loss" in metrics else 1.0
    before = [
        values[max(int(np.searchsorted(number, found)) - 1, 0)]
        for metric, (number, values) in metrics.items()
        if metric.endswith("/penalty") and len(number)
    ]
    if name.endswith("/penalty") or any(penalty > 100 * max(usual, 1.0) for penalty in before):
        cause = (
            "a penalty grew until it overflowed: with plain SGD, strength x learning rate x largest Fisher value must"
            " stay below 2; lower the strength or the learning rate, or use Adam"
        )
    elif found == ran[0] and known and ran[0] == 0:
        cause = "inputs that are not finite, or a label that is none of the outputs open now"
    else:
        cause = "too high a learning rate, inputs that are not finite, or a label that is none of the outputs open now"
    if told not in ("nan", "not finite"):
        cause += ", or a loss of one's own that sees masked outputs (see the argument active in supervised)"
    raise NonFiniteError(
        f"{name} is {told} at task {task}, step {step}{'' if known else ' or before'}; likely cause: {cause}{kept}"
    )
