"""Slowly-changing regression: a target function whose inputs change one bit at a time."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from cl_zoo.checks import Count, Fraction, check_whole, checked
from cl_zoo.losses import squared_error
from cl_zoo.streams.arrays import Cursor
from cl_zoo.types import Agent, Array, Batch, Key, PyTree, Stream, TaskInfo

__all__ = ["RegressionData", "slowly_changing_regression"]


class RegressionData(NamedTuple):
    """The target network, m inputs and H units, and what makes tasks of it.

    Attributes:
      hidden: `f32[m + 1, H]` of +1 and -1; the last row belongs to a constant input of 1.
      threshold: `f32[H]`.
      output: `f32[H + 1]` of +1 and -1, the last one a constant.
      slow: `f32[T, f]`, the slow bits of each task.
    """

    hidden: Array
    threshold: Array
    output: Array
    slow: Array


@checked
def slowly_changing_regression(
    n_tasks: Count = 100,
    *,
    steps: Count = 10_000,
    flip: Literal["one", "all"] = "one",
    bits: Count = 20,
    slow_bits: int = 15,
    target_units: Count = 100,
    beta: Fraction = 0.7,
    batch_size: Count = 1,
    key: Key | None = None,
    evaluation_size: Count = 1024,
) -> Stream:
    """y is a fixed function of m bits, of which the first f keep their values for a whole task; the others are random.

        h_j = [ sum_i v_ij x_i >= beta (m + 1) - S_j ],   y = sum_j w_j h_j,   v, w in {-1, +1},   x_m = 1, h_H = 1

    with S_j the number of -1 among v_0j, ..., v_mj: a unit is on where at least beta (m + 1) of its inputs agree with
    its weights. A small learner cannot fit the whole function, so it must keep adapting to the current task.

    Args:
      n_tasks: `T`, the periods between changes, at least 1.
      steps: batches per task.
      flip: at each change, "one" slow bit chosen at random flips, or "all" are drawn again.
      bits: m, at least 1.
      slow_bits: f, from 0 to m.
      target_units: H, at least 1.
      beta: in [0, 1].
      batch_size: examples per batch.
      key: draws the target network and the slow bits; None is key 0.
      evaluation_size: examples of a task's evaluation and of its consolidation sample. A task of at most this many
        different inputs is evaluated exactly, on each of them once.

    Returns:
      A `Stream` with x `f32[B, m]` of zeros and ones, y `f32[B]`, and one output. Batches are computed from the cursor.
      The score is minus the squared error, so that higher is better, as for all metrics. Learn it with
      `supervised(squared_error)`.

    Raises:
      ValueError: an impossible value, named.

    Source: Dohare et al. 2024, doi 10.1038/s41586-024-07711-7, who use m = 20, f = 15, tasks of 10 000 single examples
    and a learner with 5 hidden units; the target: Sutton and Whitehead 1993.

    Differences from the paper or its code: "one" is the paper's text, "all" the default of its code, which counts the
    sign of the constant input's weight in S the other way round.

    Example:
      >>> import jax, optax
      >>> from cl_zoo import compose, run_stream, supervised
      >>> from cl_zoo.models import mlp
      >>> stream = slowly_changing_regression(n_tasks=2, steps=50)
      >>> learner = compose(mlp((20,), 1, hidden=(5,)), optax.sgd(0.01), supervised(squared_error))
      >>> run_stream(learner, stream, jax.random.key(0)).accuracy.shape
      (3, 2)
    """
    owner = "slowly_changing_regression"
    check_whole(owner, "slow_bits", slow_bits, 0, bits)
    fast_bits = bits - slow_bits
    patterns = 2**fast_bits if 2**fast_bits <= evaluation_size else None

    def draw(data: PyTree, key: Key) -> RegressionData:
        keys = jax.random.split(key, 4)
        hidden = jax.random.rademacher(keys[0], (bits + 1, target_units), jnp.float32)
        output = jax.random.rademacher(keys[1], (target_units + 1,), jnp.float32)
        threshold = beta * (bits + 1) - jnp.sum(hidden < 0, axis=0)
        if flip == "all":
            slow = jax.random.bernoulli(keys[2], shape=(n_tasks, slow_bits)).astype(jnp.float32)
        else:
            first = jax.random.bernoulli(keys[2], shape=(slow_bits,))
            which = jax.random.randint(keys[3], (n_tasks,), 0, max(slow_bits, 1))
            flips = (which[:, None] == jnp.arange(slow_bits)).at[0].set(False)
            slow = ((first + jnp.cumsum(flips, axis=0)) % 2).astype(jnp.float32)
        return RegressionData(hidden, threshold, output, slow)

    def rows(data: RegressionData, task: Array, fast: Array) -> Batch:
        n = fast.shape[0]
        x = jnp.concatenate([jnp.broadcast_to(data.slow[task], (n, slow_bits)), fast], axis=1)
        on = (x @ data.hidden[:-1] + data.hidden[-1] >= data.threshold).astype(jnp.float32)
        return Batch(x, on @ data.output[:-1] + data.output[-1], None, jnp.ones(n))

    def random_bits(key: Key, n: int) -> Array:
        return jax.random.bernoulli(key, shape=(n, fast_bits)).astype(jnp.float32)

    def init(key: Key) -> Cursor:
        return Cursor(key, jnp.zeros((), jnp.int32))

    def next_batch(data: RegressionData, cursor: Cursor, agent: Agent) -> tuple[Batch, Cursor]:
        task = jnp.minimum(cursor.step // steps, n_tasks - 1)  # beyond its end, a stream continues with its last task
        fast = random_bits(jax.random.fold_in(cursor.key, cursor.step), batch_size)
        return rows(data, task, fast), cursor._replace(step=cursor.step + 1)

    def one_batch(batch: Batch) -> Batch:
        return jax.tree.map(lambda leaf: leaf[None], batch)

    def sample(data: RegressionData, task: Array, key: Key) -> Batch:
        return one_batch(rows(data, task, random_bits(jax.random.fold_in(key, task), evaluation_size)))

    def evaluation(data: RegressionData, task: Array, split: str) -> Batch:
        if patterns is None:
            fast = random_bits(jax.random.fold_in(jax.random.key(int(split == "test")), task), evaluation_size)
        else:
            fast = (jnp.arange(patterns)[:, None] >> jnp.arange(fast_bits)) % 2
        return one_batch(rows(data, task, fast.astype(jnp.float32)))

    def score(outputs: Array, batch: Batch) -> Array:
        return -squared_error(outputs, batch.y)

    tasks = TaskInfo(jnp.arange(n_tasks, dtype=jnp.int32), jnp.ones((n_tasks, 1), bool))
    data = jax.jit(draw)(None, jax.random.key(0) if key is None else key)
    provides = frozenset({"boundaries", "begin_sample", "end_sample", "open_outputs"})
    return Stream(
        n_tasks,
        steps,
        provides,
        init_function=init,
        next_function=next_batch,
        sample_function=sample,
        reorder_function=draw,
        evaluation_function=evaluation,
        score_function=score,
        tasks=tasks,
        data=data,
    )
