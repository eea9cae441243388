"""The pieces of a run that the compiled stream and the host loop share."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cl_zoo.types import (
    NEEDS,
    Array,
    Key,
    Learner,
    PyTree,
    Stream,
    TaskInfo,
    TrainState,
)

__all__ = [
    "NonFiniteError",
    "Result",
    "begin",
    "check_arrays",
    "check_finite",
    "check_needs",
    "finish",
    "start",
    "stream_functions",
    "train_steps",
]


class Result(NamedTuple):
    """What a run gives.

    Attributes:
      state: the final `TrainState`.
      metrics: per update, `{name: f32[T, steps]}`.
      accuracy: the matrix R, `f32[T + 1, T]`: row 0 before any training, row t + 1 after task t.
      within_task_accuracy: the same with answers restricted to each task's own labels, or None.
      curve: `f32[T, points, T]`, the scores within each task, or None.
    """

    state: PyTree
    metrics: dict[str, Array]
    accuracy: Array
    within_task_accuracy: Array | None = None
    curve: Array | None = None


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


def check_arrays(weights: PyTree) -> None:
    """Refuses weights that are no tree of arrays."""
    for leaf in jax.tree.leaves(weights):
        if not hasattr(leaf, "shape"):
            raise ValueError(
                f"weights holds a {type(leaf).__name__}, but it must be a tree of arrays; of what load_pretrained"
                " gives, that is .params"
            )


def stream_functions(stream: Stream) -> Stream:
    """The stream without its arrays: hashable, so that programs can be kept by it."""
    return stream._replace(tasks=None, data=None)  # type: ignore[arg-type]


def start(
    learner: Learner, stream: Stream, data: PyTree, key: Key, weights: PyTree = None
) -> tuple[TrainState, PyTree]:
    """The state and the cursor before the first task. Learner and stream draw from keys of their own."""
    learner_key, stream_key = jax.random.split(key)
    cursor = stream.init(stream_key)
    shapes, _ = jax.eval_shape(lambda: stream.next(data, cursor, lambda x: None))
    example = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return learner.init(learner_key, example, *(() if weights is None else (weights,))), cursor


def begin(
    learner: Learner, stream: Stream, tasks: TaskInfo, data: PyTree, key: Key, state: TrainState, t: Array
) -> TrainState:
    """Begins task `t`; the sample is dropped by the compiler where no component reads it.

    A stream without boundaries has none to tell the learner of: neither this nor `finish` does anything then.
    """
    if "boundaries" not in stream.provides:
        return state
    sample = stream.sample(data, t, jax.random.split(key)[1])
    return learner.begin_task(state, jax.tree.map(lambda leaf: leaf[t], tasks), sample)


def finish(learner: Learner, stream: Stream, data: PyTree, key: Key, state: TrainState, t: Array) -> TrainState:
    """Ends task `t`, with the same sample of it."""
    if "boundaries" not in stream.provides:
        return state
    return learner.end_task(state, stream.sample(data, t, jax.random.split(key)[1]))


def train_steps(
    learner: Learner, stream: Stream, data: PyTree, carry: tuple[TrainState, PyTree], n: int
) -> tuple[tuple[TrainState, PyTree], dict[str, Array]]:
    """`n` updates: `((state, cursor), {name: f32[n]})`."""

    def step(carry: tuple[TrainState, PyTree], _: Any) -> tuple[tuple[TrainState, PyTree], dict[str, Array]]:
        state, cursor = carry
        batch, cursor = stream.next(data, cursor, lambda x: learner.predict(state, x))
        state, metrics = learner.update(state, batch)
        return (state, cursor), metrics

    return jax.lax.scan(step, carry, length=n)


def check_finite(metrics: dict[str, Any], params: PyTree, steps: int, first_step: int = 0, kept: str = "") -> None:
    """Refuses metrics, or parameters after the last update, that are not finite.

    Args:
      metrics: `{name: [n]}` of consecutive updates.
      params: after them.
      steps: updates per task.
      first_step: number of the first of them, from 0.
      kept: what is left to go on from, for the message.

    Raises:
      NonFiniteError: names the task, the step and the likely cause.
    """
    values = {name: np.ravel(np.asarray(value)) for name, value in metrics.items()}
    bad = {
        name: int(np.flatnonzero(~np.isfinite(value))[0])
        for name, value in values.items()
        if not np.isfinite(value).all()
    }
    if not bad:
        if all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(params)):
            return
        # The last update did it: no loss has seen these parameters yet.
        values["parameters"] = np.append(np.zeros(len(values["loss"]) - 1), np.nan)
        bad["parameters"] = len(values["loss"]) - 1
    name = min(bad, key=lambda name: (bad[name], name != "loss"))
    task, step = divmod(first_step + bad[name], steps)
    last = max(bad[name] - 1, 0)
    penalties = [value[last] for metric, value in values.items() if metric.endswith("/penalty")]
    if name.endswith("/penalty") or any(value > 100 * max(values["loss"][0], 1.0) for value in penalties):
        cause = (
            "a penalty grew until it overflowed: with plain SGD, strength x learning rate x largest Fisher value must"
            " stay below 2; lower the strength or the learning rate, or use Adam"
        )
    else:
        cause = "too high a learning rate, or inputs that are not finite"
    raise NonFiniteError(
        f"{name} is {values[name][bad[name]]} at task {task}, step {step}; likely cause: {cause}{kept}"
    )
