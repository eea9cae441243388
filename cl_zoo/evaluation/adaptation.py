"""Scores of a learner that learns from what it is tested on."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from cl_zoo._learner import Learner
from cl_zoo.checks import Count, checked
from cl_zoo.losses import mean_score, scored
from cl_zoo.types import Array, Batch, Stream, TrainState

__all__ = ["evaluate_adapting"]


@checked
def evaluate_adapting(
    learner: Learner,
    stream: Stream,
    state: TrainState,
    split: str = "test",
    *,
    reset: Literal["batch", "task", "never"] = "batch",
    batch_size: Count = 1,
    examples: Count | None = None,
    together: Count = 1,
    by_example: bool = False,
) -> tuple[Array, TrainState]:
    """The mean score on every task of a stream, each test batch predicted by `learner.adapt`, learning from it.

    Args:
      learner, stream, state: what to score.
      split: "validation" or "test".
      reset: what a test batch starts from. "batch": always from `state`, its draws included, so that a prediction
        depends on nothing but its own batch. "task": from what the batch before left, each task from `state`. "never":
        from what the batch before left, through all tasks in their order.
      batch_size: examples per test batch, in the stream's order.
      examples: examples of each task; None takes all.
      together: with reset="batch", test batches that are computed at once; more memory, less time.
      by_example: return the score of every example, in the stream's order, not their mean.

    Returns:
      `f32[T]`, or by example `f32[T, N]`, 0 for padding and `IGNORED` labels; the state at the end with
      reset="never", else the given one.

    Raises:
      ValueError: another reset, batch_size, examples or together below 1, together without reset="batch".

    Example:
      >>> import jax, optax
      >>> from cl_zoo import compose, supervised, tent
      >>> from cl_zoo.evaluation import evaluate_adapting
      >>> from cl_zoo.models import mlp
      >>> from cl_zoo.streams import split_mnist
      >>> stream = split_mnist(scenario="domain", steps=1)
      >>> learner = compose(mlp((28, 28), 2, hidden=(8,), norm="batch"), optax.sgd(0.1), supervised(), tent())
      >>> state = learner.init(jax.random.key(0), stream.next(stream.init(jax.random.key(0)))[0])
      >>> scores, state = evaluate_adapting(learner, stream, state, reset="task", batch_size=50, examples=100)
      >>> scores.shape
      (5,)
    """
    if together > 1 and reset != "batch":
        raise ValueError(
            f'evaluate_adapting: together is {together}, but with reset="{reset}" every test batch waits for the one'
            ' before; only with reset="batch" they are independent'
        )

    def regrouped(leaf: Array) -> Array:
        """`[E, B, ...]` to test batches `[n, batch_size, ...]`; the last is filled with zeros, also in its weight."""
        leaf = leaf.reshape((-1, *leaf.shape[2:]))[:examples]
        missing = -leaf.shape[0] % batch_size
        leaf = jnp.pad(leaf, [(0, missing)] + [(0, 0)] * (leaf.ndim - 1))
        return leaf.reshape((-1, batch_size, *leaf.shape[1:]))

    def one(state: TrainState, batch: Batch) -> tuple[TrainState, Array]:
        state, outputs = learner.adapt(state, batch)
        return state, stream.score(outputs, batch)

    def summary(scores: Array, batches: Batch, n: int) -> Array:
        weight = jax.vmap(lambda y, weight: scored(y, weight, stream.score_function))(batches.y, batches.weight)
        if by_example:
            return jnp.where(weight > 0, scores, 0).ravel()[:n]
        return mean_score(scores, weight)

    def on_task(start: TrainState, task: Array) -> tuple[TrainState, Array]:
        given = stream.evaluation(task, split)
        n, batches = given.weight.ravel()[:examples].size, jax.tree.map(regrouped, given)
        if reset == "batch":
            scores = jax.lax.map(
                lambda batch: one(start, batch)[1], batches, batch_size=together if together > 1 else None
            )
            return start, summary(scores, batches, n)
        after, scores = jax.lax.scan(one, start, batches)
        return after if reset == "never" else start, summary(scores, batches, n)

    state, scores = jax.lax.scan(on_task, state, jnp.arange(stream.n_tasks, dtype=jnp.int32))
    return scores, state
