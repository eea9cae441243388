"""What is measured in a run, and when."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from cl_zoo._learner import Learner
from cl_zoo.checks import Count, check_choice, check_classes, check_whole, checked
from cl_zoo.evaluation.adaptation import evaluate_adapting
from cl_zoo.identity import alike
from cl_zoo.losses import mask_outputs
from cl_zoo.types import Array, Key, PyTree, Stream, TrainState

__all__ = ["Measure", "accuracy", "adapted_accuracy", "at", "confusion", "settled"]

Function = Callable[[Learner, TrainState, Stream, Key], PyTree]
Measures = Mapping[str, "Measure | Function"]


MANY = 100
"""Tasks, above which the default R is warned of: it is then most of many a run."""


class Measure(NamedTuple):
    """A function of a learner, and when it is called. Measuring changes no draw of the learner.

    Attributes:
      function: `(learner, state, stream, key) -> pytree of arrays`.
      when: "task", after `init` and after the end of each task; a number n, after n, 2 n, ... updates of each task,
        before its end; "end", after the last task. Results have leading axes `[T + 1]`, `[T, steps // n]`, or none.
      report: `(arrays) -> pytree of arrays`, applied to each result outside the program (scores computed by Python);
        None leaves it as it is.
      needs_examples: whether it reads `stream.evaluation`, which not every stream has.
    """

    function: Function
    when: str | int = "task"
    report: Callable[[PyTree], PyTree] | None = None
    needs_examples: bool = False

    def __call__(self, learner: Learner, state: TrainState, stream: Stream, key: Key | None = None) -> PyTree:
        return self.function(learner, state, stream, jax.random.key(0) if key is None else key)


@checked
def at(when: str | int, measure: Measure | Function) -> Measure:
    """The measure, taken at other times.

    Args:
      when: "task", a number of updates, or "end", see `Measure`.
      measure: a `Measure`, or its function.

    Raises:
      ValueError: another word, a number below 1.

    Example:
      >>> at(100, accuracy(batches=1)).when
      100
    """
    if isinstance(when, str):
        check_choice("at", "when", when, ("task", "end"))
    else:
        check_whole("at", "when", when, 1)
    whole = measure if isinstance(measure, Measure) else Measure(measure)
    return whole._replace(function=alike(whole.function), when=when)


@checked
def accuracy(
    split: Literal["validation", "test"] = "test",
    *,
    batches: Count | None = None,
    within_task: bool = False,
    tasks: Sequence[int] | None = None,
) -> Measure:
    """The score on every task, `f32[T]`: `stream.evaluate`. At "task" it is the matrix R, `f32[T + 1, T]`.

    R of many tasks costs T^2 evaluations: where training is short, most of a run. `at("end", accuracy())` costs T, and
    `tasks` of a fixed number, (T + 1) times that.

    Args:
      split: "test" or "validation".
      batches: of each task's examples; None for all. Each batch is a fair part of the whole.
      within_task: whether predictions are restricted to the labels that occur in the task, which gives the
        task-incremental score of a class-incremental run. Needs logits.
      tasks: the tasks that are scored, in this order, as range(0, 160, 10); None for all.

    Returns:
      A `Measure`.

    Raises:
      ValueError: an unknown split, batches below 1; tasks that are none, or not of the stream.

    Example:
      >>> import jax, optax
      >>> from cl_zoo import compose, run_stream, supervised
      >>> from cl_zoo.models import mlp
      >>> from cl_zoo.streams import split_mnist
      >>> stream = split_mnist(scenario="domain", steps=20)
      >>> learner = compose(mlp((28, 28), 2), optax.sgd(0.1), supervised())
      >>> curve = at(5, accuracy(batches=1))
      >>> result = run_stream(learner, stream, jax.random.key(0), measure={"R": accuracy(), "curve": curve})
      >>> result.measures["R"].shape, result.measures["curve"].shape
      ((6, 5), (5, 4, 5))
    """

    if tasks is not None and (not tasks or min(tasks) < 0):
        allowed = "a sequence of tasks of the stream, from 0 to T - 1, as range(0, 160, 10)"
        raise ValueError(f"accuracy: tasks is {tasks!r}, but it must be {allowed}")
    chosen = None if tasks is None else tuple(tasks)

    def function(learner: Learner, state: TrainState, stream: Stream, key: Key) -> Array:
        if chosen is not None and max(chosen) >= stream.n_tasks:
            raise ValueError(f"accuracy: tasks has {max(chosen)}, but the stream's last task is {stream.n_tasks - 1}")
        agent = learner.agent(state)

        def on_examples(task: Array) -> Array:
            examples = jax.tree.map(lambda leaf: leaf[:batches], stream.evaluation(task, split))

            def within(x: PyTree, task: Array | None = None) -> Array:
                outputs = agent.predict(x, task)
                label = jax.nn.one_hot(examples.y, outputs.shape[-1]) * examples.weight[..., None]
                return mask_outputs(outputs, jnp.any(label > 0, axis=(0, 1)))

            return stream.mean_score(agent._replace(predict=within) if within_task else agent, examples)

        def on_task(task: Array) -> Array:
            if batches is not None or within_task:
                return on_examples(task)
            return stream.evaluate(agent, task, split, jax.random.fold_in(key, task))

        return jax.lax.map(on_task, jnp.array(range(stream.n_tasks) if chosen is None else chosen, jnp.int32))

    return Measure(alike(function), needs_examples=batches is not None or within_task)


@checked
def confusion(split: Literal["validation", "test"] = "test", *, tasks: Sequence[int] | None = None) -> Measure:
    """How many examples of class c are predicted as class k, n_ck: `i32[C, C]`, over all tasks.

    Args:
      split: "test" or "validation".
      tasks: over these alone.

    Returns:
      A `Measure`; `metrics.class_accuracy` of it is the accuracy of each class. Examples without a label, and
      predictions that are nan, are left out.

    Raises:
      ValueError: at the trace, where targets are no classes.

    Example:
      >>> import jax, optax
      >>> from cl_zoo import compose, run_stream, supervised
      >>> from cl_zoo.models import mlp
      >>> from cl_zoo.streams import split_mnist
      >>> stream = split_mnist(2, "class", steps=5)
      >>> learner = compose(mlp((28, 28), 10), optax.adam(1e-3), supervised(), tasks=stream.tasks)
      >>> result = run_stream(learner, stream, jax.random.key(0), measure={"confusion": confusion()})
      >>> result.measures["confusion"].shape, int(result.measures["confusion"][-1].sum())
      ((3, 10, 10), 2000)
    """

    def function(learner: Learner, state: TrainState, stream: Stream, key: Key) -> Array:
        chosen = jnp.arange(stream.n_tasks) if tasks is None else jnp.asarray(list(tasks))
        n = stream.tasks.active.shape[-1]

        def of_batch(batch: Any) -> Array:
            check_classes("confusion", batch.y, "a confusion matrix counts classes")
            outputs = learner.predict(state, batch.x, batch.task)
            here = (batch.weight > 0) & (batch.y >= 0) & (batch.y < n) & ~jnp.isnan(outputs).any(axis=-1)
            place = jnp.where(here, batch.y * n + outputs.argmax(axis=-1), n * n)
            return jnp.zeros(n * n, jnp.int32).at[place].add(1, mode="drop")

        def of_task(task: Array) -> Array:
            return jax.lax.map(of_batch, stream.evaluation(task, split)).sum(axis=0)

        return jax.lax.map(of_task, chosen).sum(axis=0).reshape(n, n)

    return Measure(alike(function), needs_examples=True)


@checked
def adapted_accuracy(split: str = "test", **options: Any) -> Measure:
    """The score on every task where each test batch is first learned from, `f32[T]`.

    Args:
      split: "test" or "validation".
      **options: of `evaluate_adapting`.

    Returns:
      A `Measure`.
    """

    def function(learner: Learner, state: TrainState, stream: Stream, key: Key) -> Array:
        return evaluate_adapting(learner, stream, state, split, **options)[0]

    return Measure(alike(function), needs_examples=True)


def settled(measure: Measures | None, stream: Stream) -> tuple[tuple[str, Measure], ...]:
    """The measures of a run by name; R alone where none are given.

    Raises:
      ValueError: a number of updates above a task's; examples wanted of a stream that has none; what is not a function.
    """
    found = []
    if measure is not None and not isinstance(measure, Mapping):
        told = type(measure).__name__
        raise ValueError(f"measure is a {told}, but it must be a mapping by name, as {{'accuracy': accuracy()}}")
    if measure is None and stream.n_tasks > MANY:
        warnings.warn(
            f"no measure is given, so that all {stream.n_tasks} tasks are scored after each, {stream.n_tasks**2} times"
            " in all; measure={'accuracy': at('end', accuracy())} or accuracy(tasks=...) cost less",
            stacklevel=3,
        )
    for name, given in ({"accuracy": accuracy()} if measure is None else measure).items():
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(f"measure: the name {name!r} must be of letters, digits, '_', '-' and '.'")
        if not callable(given):
            raise ValueError(
                f"measure: {name!r} is {given!r}, but it must be a function or a Measure, as accuracy() is"
            )
        for function in (accuracy, adapted_accuracy, at):
            if given is function:
                raise ValueError(
                    f"measure: {name!r} is the function {function.__name__}; call it, {function.__name__}()"
                )
        one = at(given.when, given) if isinstance(given, Measure) else at("task", given)
        if isinstance(one.when, int) and one.when > stream.steps:
            raise ValueError(f"measure: {name!r} is at {one.when} updates, but a task has only {stream.steps}")
        if one.needs_examples and stream.evaluation_function is None:
            raise ValueError(f"measure: {name!r} needs examples, but this stream is evaluated without any")
        found.append((name, one))
    return tuple(found)
