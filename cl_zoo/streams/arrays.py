"""Task streams over arrays that stay on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cl_zoo.checks import LARGEST, Count, check_whole, checked
from cl_zoo.losses import label_accuracy, reads_ignored
from cl_zoo.shuffle import shuffled_index
from cl_zoo.types import Agent, Array, Batch, Key, PyTree, Stream, TaskInfo

__all__ = ["Cursor", "array_stream", "locate", "scenario_tasks"]


Scenario = Literal["task", "domain", "class"]
Outputs = Literal["seen", "all"]
Joint = Literal["all", "seen"]


class Cursor(NamedTuple):
    """The place in a stream: everything else follows from it.

    Attributes:
      key: of the stream's shuffles.
      step: `i32[]`, batches handed out so far.
    """

    key: Key
    step: Array


def locate(counts: Array, position: Array) -> tuple[Array, Array]:
    """Which of several runs, laid end to end, a position falls in, and where in it: `(run, offset)`, `i32[]` each."""
    ends = jnp.cumsum(counts)
    run = jnp.minimum(jnp.sum(position >= ends), counts.shape[0] - 1)
    return run, position - (ends - counts)[run]


@checked
def scenario_tasks(
    scenario: Scenario,
    n_tasks: int,
    classes_per_task: int,
    outputs: Outputs = "seen",
) -> TaskInfo:
    """The active outputs of each task.

    Args:
      scenario: "task": each task has its own outputs, and examples carry their task. "domain": all tasks share one set.
        "class": each task has its own outputs, and examples do not carry their task.
      n_tasks: `T`.
      classes_per_task: k.
      outputs: active in the class-incremental scenario: those of the tasks "seen" so far, or "all".

    Returns:
      `TaskInfo` with active `bool[T, C]`; C is k if "domain", else T k.

    Raises:
      ValueError: an unknown scenario or choice of outputs.

    Source: van de Ven et al. 2022, doi 10.1038/s42256-022-00568-3.
    """
    index = np.arange(n_tasks, dtype=np.int32)
    if scenario == "domain":
        return TaskInfo(jnp.asarray(index), jnp.ones((n_tasks, classes_per_task), bool))
    owner = np.arange(n_tasks * classes_per_task) // classes_per_task
    if scenario == "task":
        active = owner == index[:, None]
    else:
        active = (owner <= index[:, None]) | (outputs == "all")
    return TaskInfo(jnp.asarray(index), jnp.asarray(active))


@reads_ignored
def score_labels(outputs: Array, batch: Batch) -> Array:
    """`label_accuracy` of each example: `[B, C]` -> `f32[B]`."""
    return label_accuracy(outputs, batch.y)


@checked
def array_stream(
    data: PyTree,
    tasks: TaskInfo,
    *,
    size: Callable[[PyTree, str], Array],
    fetch: Callable[[PyTree, str, Array, Array], tuple[PyTree, Array]],
    largest: Mapping[str, int],
    smallest: int,
    steps: int | Sequence[int],
    batch_size: Count,
    task_ids: bool,
    reorder: Callable[[PyTree, Key], PyTree] | None,
    keep_last: bool = False,
    pick: Callable[[PyTree, Key, Array, Array], Array] | None = None,
    joint: Joint | None = None,
    order: tuple[Callable[[Key], PyTree], Callable[[PyTree, PyTree], tuple[Array, Array, PyTree]]] | None = None,
    updates_per_batch: int = 1,
    sample_size: int | None = None,
    sample_batch: int = 500,
    evaluation_batch: int = 1000,
    score: Callable[[PyTree, Batch], Array] = score_labels,
) -> Stream:
    """A stream over any labelled data of which one example can be fetched by task and index.

    Every epoch of a task is a new random order of its examples. Which example
    comes at which step is computed from the cursor; there is no table of orders.

    Args:
      data: what `size` and `fetch` read.
      tasks: see `scenario_tasks`.
      size: `(data, split) -> i32[T]`, examples of each task.
      fetch: `(data, split, task, index) -> (x, y)`, one example; it is vmapped.
      largest: per split, the most examples a task may have.
      smallest: the fewest training examples a task may have.
      steps: batches per task, one number or one for each task.
      batch_size: examples per batch.
      task_ids: whether examples carry their task.
      reorder: see `Stream`.
      keep_last: whether the incomplete last batch of an epoch is filled up with examples of weight 0, and not left out.
      pick: `(data, key, task, position) -> index`, the examples at places of a task's stream, `i32[B]`, in place of one
        epoch after another.
      joint: None; "all": every batch draws from all tasks at once, the usual upper bound; "seen": from the tasks up to
        the current one.
      order: None, one task after another; or `init(key) -> cursor` and `(data, cursor) -> (task, index, cursor)`, the
        examples of the next batch, `i32[B]` each, of a stream without task boundaries. It provides neither
        boundaries nor samples at them. Its cursor has a field `step`, the different batches drawn so far.
      updates_per_batch: how often in a row each batch is handed out, for a single pass over the examples with several
        updates on each batch; `steps` counts all of them.
      sample_size: examples in a consolidation sample; None takes the whole task.
      sample_batch, evaluation_batch: examples per batch of samples and of evaluation sets.
      score: see `Stream`.

    Returns:
      A `Stream`.

    Raises:
      ValueError: a size below 1, a batch larger than a task, steps that are no multiple of updates_per_batch,
        joint="all" or an order over tasks whose outputs are not all active, or an order of examples that carry their
        task.
    """
    counted = size(data, "train")
    fewest = smallest if isinstance(counted, jax.core.Tracer) else int(np.min(np.asarray(counted)))
    if fewest < smallest:
        raise ValueError(f"stream: smallest is {smallest}, but size gives a task of {fewest} training examples")
    if batch_size > smallest and not keep_last and pick is None:
        raise ValueError(
            f"stream: batch_size is {batch_size}, but a task may have only {smallest} training examples; it must be at"
            f" most {smallest}"
        )
    n_tasks = tasks.index.shape[0]
    counts = [steps] * n_tasks if isinstance(steps, (int, np.integer)) else list(steps)
    if len(counts) != n_tasks:
        raise ValueError(f"stream: steps has {len(counts)} numbers, but there are {n_tasks} tasks; give one for each")
    sizes = {"sample_size": 1 if sample_size is None else sample_size, "sample_batch": sample_batch}
    for field, value in {"updates_per_batch": updates_per_batch, **sizes, "evaluation_batch": evaluation_batch}.items():
        check_whole("stream", field, value, 1)
    for count in counts:
        check_whole("stream", "steps", count, 1)
        if count % updates_per_batch:
            raise ValueError(
                f"stream: steps is {count} and updates_per_batch is {updates_per_batch}, but steps counts every update:"
                f" it must be a multiple of {updates_per_batch}"
            )
    different = len(set(counts)) > 1
    if sum(counts) > LARGEST:
        raise ValueError(f"stream: steps are {sum(counts)} in all, but they must be at most {LARGEST}")
    ends = np.cumsum(counts, dtype=np.int32)
    all_open = bool(np.all(tasks.active))
    if joint == "all" and not (all_open or task_ids):
        raise ValueError('stream: joint="all" needs outputs="all", as examples of later tasks come from the start')
    if pick is not None and joint is not None:
        raise ValueError(f"stream: joint is {joint!r}, but balanced batches are of one task")
    if order is not None and (task_ids or not all_open or joint is not None):
        raise ValueError(
            'stream: mixing removes task boundaries, so it needs scenario="domain", or scenario="class" with'
            ' outputs="all", and joint=None'
        )

    def rows(data: PyTree, split: str, task: Array, index: Array) -> tuple[PyTree, Array]:
        """Examples of one task (task a scalar: what depends on it is computed once), or of several (task `[B]`)."""
        return jax.vmap(lambda t, i: fetch(data, split, t, i), in_axes=(None if task.ndim == 0 else 0, 0))(task, index)

    def batch(data: PyTree, split: str, task: Array, index: Array, weight: Array) -> Batch:
        x, y = rows(data, split, task, index)
        told = jnp.broadcast_to(task, index.shape).astype(jnp.int32) if task_ids else None
        return Batch(x, y, told, weight)

    def init(key: Key) -> Cursor:
        return Cursor(key, jnp.zeros((), jnp.int32))

    def next_of_order(data: PyTree, cursor: PyTree, agent: Agent) -> tuple[Batch, PyTree]:
        drawing = cursor if updates_per_batch == 1 else cursor._replace(step=cursor.step // updates_per_batch)
        task, index, after = order[1](data, drawing)  # type: ignore[index]
        if updates_per_batch > 1:  # the order moves on with the last update on a batch
            done = (cursor.step + 1) % updates_per_batch == 0
            after = jax.tree.map(lambda new, old: jnp.where(done, new, old), after, cursor)
            after = after._replace(step=cursor.step + 1)
        return batch(data, "train", task, index, jnp.ones(batch_size)), after

    def next_batch(data: PyTree, cursor: Cursor, agent: Agent) -> tuple[Batch, Cursor]:
        # Beyond its end, a stream continues with its last task.
        if different:
            task = jnp.minimum(jnp.sum(cursor.step >= ends), n_tasks - 1).astype(jnp.int32)
            step = cursor.step - jnp.asarray(ends - np.array(counts, np.int32))[task]
        else:
            task = jnp.minimum(cursor.step // counts[0], n_tasks - 1)
            step = cursor.step - task * counts[0]
        if updates_per_batch > 1:
            step = step // updates_per_batch
        if pick is not None:
            index = pick(data, cursor.key, task, step * batch_size + jnp.arange(batch_size))
            after = cursor._replace(step=cursor.step + 1)
            return batch(data, "train", task, index, jnp.ones(batch_size)), after
        sizes = size(data, "train")
        if joint is not None:
            sizes = jnp.where((jnp.arange(n_tasks) <= task) | (joint == "all"), sizes, 0)
        n = sizes[task] if joint is None else jnp.sum(sizes)
        per_epoch = -(-n // batch_size) if keep_last else n // batch_size
        position = step % per_epoch * batch_size + jnp.arange(batch_size)
        weight = (position < n).astype(jnp.float32) if keep_last else jnp.ones(batch_size)
        index = shuffled_index(cursor.key, position, n, task, step // per_epoch)
        if joint is not None:
            task, index = jax.vmap(lambda i: locate(sizes, i))(index)
        return batch(data, "train", task, index, weight), cursor._replace(step=cursor.step + 1)

    def stacked(index: Array, rows_each: int, data: PyTree, split: str, task: Array) -> Batch:
        """Examples `[E * rows_each]` of a task in batches; places beyond what the task has get weight 0."""
        weight = (index < size(data, split)[task]).astype(jnp.float32)
        flat = batch(data, split, jnp.asarray(task), index, weight)
        return jax.tree.map(lambda leaf: leaf.reshape((-1, rows_each, *leaf.shape[1:])), flat)

    def sample(data: PyTree, task: Array, key: Key) -> Batch:
        total = largest["train"] if sample_size is None else min(sample_size, largest["train"])
        rows_each = min(sample_batch, total)
        position = jnp.arange(-(-total // rows_each) * rows_each)
        n = size(data, "train")[task]
        index = shuffled_index(key, position, n, task)
        return stacked(jnp.where(position < jnp.minimum(n, total), index, n), rows_each, data, "train", task)

    def evaluation(data: PyTree, task: Array, split: str) -> Batch:
        if largest[split] == 0:
            raise ValueError(f"stream: there are no {split} examples; hold some out with validation=0.1, say")
        rows_each = min(evaluation_batch, largest[split])
        n_batches = -(-largest[split] // rows_each)
        # Batch e takes every n_batches-th example from e on, so that each batch is a fair part of a sorted set.
        index = jnp.arange(n_batches)[:, None] + n_batches * jnp.arange(rows_each)
        return stacked(index.ravel(), rows_each, data, split, task)

    provides = {"boundaries", "begin_sample", "end_sample"} if order is None else set()
    provides |= {"task_ids"} if task_ids else set()
    provides |= {"open_outputs"} if all_open else set()
    return Stream(
        n_tasks,
        max(counts),
        frozenset(provides),
        init_function=init if order is None else order[0],
        next_function=next_batch if order is None else next_of_order,
        sample_function=sample,
        reorder_function=reorder,
        evaluation_function=evaluation,
        score_function=score,
        tasks=tasks,
        data=data,
        task_steps=jnp.asarray(counts, jnp.int32) if different else None,
    )
