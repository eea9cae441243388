"""Streams whose examples are learning problems of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from zlib import crc32

import jax
import jax.numpy as jnp

from cl_zoo.checks import check_whole, checked
from cl_zoo.losses import reads_ignored
from cl_zoo.streams.arrays import Cursor
from cl_zoo.types import Agent, Array, Batch, Key, PyTree, Stream, TaskInfo

__all__ = ["episode_stream", "one_task"]


@checked
def episode_stream(
    owner: str,
    data: PyTree,
    draw: Callable[[PyTree, str, Array, Key], tuple[PyTree, PyTree]],
    *,
    n_tasks: int,
    n_outputs: int,
    score: Callable[[PyTree, Batch], Array],
    reorder: Callable[[PyTree, Key], PyTree],
    steps: int,
    batch_size: int,
    task_ids: bool = False,
    sample_size: int = 100,
    evaluation_size: int = 600,
    evaluation_batch: int = 100,
) -> Stream:
    """A stream over anything of which one episode can be drawn by task and key.

    Args:
      owner: the name in error messages.
      data: what `draw` reads.
      draw: `(data, split, task, key) -> (x, y)`, x an `Episode` say, without the batch axis; it is vmapped.
      n_tasks, n_outputs: `T` and `C`; all outputs are active for every example.
      score, reorder: see `Stream`.
      steps: batches per task.
      batch_size: episodes per batch.
      task_ids: whether examples carry their task.
      sample_size: episodes of a consolidation sample.
      evaluation_size: episodes on which a task is tested or validated, the same every time.
      evaluation_batch: episodes per batch of samples and of evaluation sets.

    Returns:
      A `Stream`, every batch of which is computed from the cursor.

    Raises:
      ValueError: a size below 1.
    """
    sizes = {"n_tasks": n_tasks, "steps": steps, "batch_size": batch_size, "sample_size": sample_size}
    sizes |= {"evaluation_size": evaluation_size, "evaluation_batch": evaluation_batch}
    for field, value in sizes.items():
        check_whole(owner, field, value, 1)

    def episodes(data: PyTree, split: str, task: Array, key: Key, n: int) -> Batch:
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(n))
        x, y = jax.vmap(lambda k: draw(data, split, task, k))(keys)
        return Batch(x, y, jnp.full(n, task, jnp.int32) if task_ids else None, jnp.ones(n))

    def in_batches(data: PyTree, split: str, task: Array, key: Key, n: int) -> Batch:
        rows_each = min(evaluation_batch, n)
        flat = episodes(data, split, task, key, -(-n // rows_each) * rows_each)
        flat = flat._replace(weight=(jnp.arange(flat.weight.shape[0]) < n).astype(jnp.float32))
        return jax.tree.map(lambda leaf: leaf.reshape((-1, rows_each, *leaf.shape[1:])), flat)

    def init(key: Key) -> Cursor:
        return Cursor(key, jnp.zeros((), jnp.int32))

    def next_batch(data: PyTree, cursor: Cursor, agent: Agent) -> tuple[Batch, Cursor]:
        task = jnp.minimum(cursor.step // steps, n_tasks - 1)  # beyond its end, a stream continues with its last task
        batch = episodes(data, "train", task, jax.random.fold_in(cursor.key, cursor.step), batch_size)
        return batch, cursor._replace(step=cursor.step + 1)

    def sample(data: PyTree, task: Array, key: Key) -> Batch:
        return in_batches(data, "train", task, jax.random.fold_in(key, task), sample_size)

    def evaluation(data: PyTree, task: Array, split: str) -> Batch:
        key = jax.random.fold_in(jax.random.key(crc32(split.encode())), task)
        return in_batches(data, split, task, key, evaluation_size)

    tasks = TaskInfo(jnp.arange(n_tasks, dtype=jnp.int32), jnp.ones((n_tasks, n_outputs), bool))
    provides = {"boundaries", "begin_sample", "end_sample", "open_outputs"} | ({"task_ids"} if task_ids else set())
    return Stream(
        n_tasks,
        steps,
        frozenset(provides),
        init_function=init,
        next_function=next_batch,
        sample_function=sample,
        reorder_function=reorder,
        evaluation_function=evaluation,
        score_function=score,
        tasks=tasks,
        data=data,
    )


def one_task(
    owner: str,
    data: PyTree,
    draw: Callable[[PyTree, str, Array, Key], tuple[PyTree, PyTree]],
    n_outputs: int,
    of_tokens: Callable[[Array, Array], Array],
    **options: Any,
) -> Stream:
    """One task of drawn sequences, whose score is `of_tokens(outputs, y)`; see `episode_stream`."""

    @reads_ignored
    def score(outputs: Array, batch: Batch) -> Array:
        return of_tokens(outputs, batch.y)

    def as_it_is(data: PyTree, key: Key) -> PyTree:
        return data

    return episode_stream(owner, data, draw, n_tasks=1, n_outputs=n_outputs, score=score, reorder=as_it_is, **options)
