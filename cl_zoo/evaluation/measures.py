"""Scores of a learner on the tasks of a stream."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cl_zoo.losses import mask_outputs, weighted_mean
from cl_zoo.types import Array, Batch, Learner, PyTree, Stream, TrainState

__all__ = ["evaluate"]


def evaluate(
    learner: Learner,
    stream: Stream,
    data: PyTree,
    state: TrainState,
    split: str = "test",
    *,
    within_task: bool = False,
    batches: int | None = None,
) -> Array:
    """The mean score on every task of a stream, as the learner stands.

    Args:
      learner, stream, state: what to score; rows tell their task only where the stream says so ("task_ids").
      data: `stream.data`, as an argument of the program that calls this.
      split: "validation" or "test".
      within_task: answers are restricted to the labels that occur in the task, which gives the task-incremental score
        of a class-incremental run. Needs logits.
      batches: of each task; None for all. Each batch is a fair part of the whole.

    Returns:
      `f32[T]`.

    Example:
      >>> import jax, optax
      >>> from cl_zoo import compose, supervised
      >>> from cl_zoo.evaluation import evaluate
      >>> from cl_zoo.models import mlp
      >>> from cl_zoo.streams import split_mnist
      >>> stream = split_mnist(scenario="domain", steps=1)
      >>> learner = compose(mlp((28, 28), 2), optax.sgd(0.1), supervised())
      >>> cursor = stream.init(jax.random.key(0))
      >>> state = learner.init(jax.random.key(0), stream.next(stream.data, cursor, None)[0])
      >>> evaluate(learner, stream, stream.data, state).shape
      (5,)
    """

    def score_task(task: Array) -> Array:
        rows = jax.tree.map(lambda leaf: leaf[:batches], stream.evaluation(data, task, split))

        def step(carry: None, batch: Batch) -> tuple[None, Array]:
            outputs = learner.predict(state, batch.x, batch.task)
            if within_task:
                label = jax.nn.one_hot(rows.y, outputs.shape[-1]) * rows.weight[..., None]
                outputs = mask_outputs(outputs, jnp.any(label > 0, axis=(0, 1)))
            return carry, stream.score(outputs, batch)

        _, scores = jax.lax.scan(step, None, rows)
        return weighted_mean(scores, rows.weight)

    return jax.lax.map(score_task, jnp.arange(stream.n_tasks, dtype=jnp.int32))
