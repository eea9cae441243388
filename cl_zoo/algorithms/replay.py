"""Experience replay from a reservoir."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cl_zoo.buffers import Reservoir, batch_rows, reservoir_add, reservoir_init, reservoir_sample
from cl_zoo.types import Batch, Component, Context, Key, Record, TrainState, check_choice, check_whole

__all__ = ["ReplayState", "replay"]

ReplayState = Reservoir
"""The memory: rows as the stream gave them (uint8 images stay uint8), and how many were seen."""


def replay(capacity: int, *, batch_size: int = 32, weighting: str = "rows", name: str = "replay") -> Component:
    """Each batch is joined by `batch_size` different rows drawn from a uniform sample of all rows seen.

    With n current rows and m replayed ones, the loss of the joined batch is

        weighting "rows":   L = sum of all losses / (n + m)
        weighting "tasks":  L = 1/t * (mean current loss) + (1 - 1/t) * (mean replayed loss),   t = tasks so far

    Args:
      capacity: rows in memory, at least 1.
      batch_size: rows replayed with each batch, at least 0; those the memory cannot give yet have weight 0.
      weighting: as above; "tasks" needs task boundaries.
      name: key in state.

    Returns:
      A component with a `ReplayState`. Other components see the joined batch, current rows first.

    Raises:
      ValueError: capacity below 1, batch_size below 0 or above the capacity, unknown weighting.

    Source: Chaudhry et al. 2019, arXiv 1902.10486; weighting "tasks": van de Ven et al. 2022,
    doi 10.1038/s42256-022-00568-3; reservoir: Vitter 1985.

    Differences from the paper or its code: draws are without replacement. Van de Ven's code fills its memory at each
    task's end with a fixed number of rows per class, here every row seen is offered to a reservoir, so the memory is
    full from the start and also replays the task at hand.

    Example:
      >>> import optax
      >>> from cl_zoo import compose, mlp, supervised
      >>> learner = compose(mlp((4,), 3), optax.sgd(0.1), supervised(), replay(capacity=500, batch_size=10))
    """
    check_whole(name, "capacity", capacity, 1)
    check_whole(name, "batch_size", batch_size, 0, capacity)
    check_choice(name, "weighting", weighting, ("rows", "tasks"))

    def init(context: Context, state: TrainState, batch: Batch, key: Key) -> ReplayState:
        return reservoir_init(batch_rows(batch), capacity)

    def prepare(context: Context, state: TrainState, part: ReplayState, batch: Batch, key: Key) -> Batch:
        if batch_size == 0:
            return batch
        (x, y, task), weight = reservoir_sample(part, batch_size, key)
        if weighting == "tasks":
            # Weights whose sum is t - 1 times that of the current rows.
            current = jnp.sum(batch.weight)
            weight = weight * state.task.astype(jnp.float32) * current / jnp.maximum(jnp.sum(weight), 1)
        replayed = Batch(x, y, task, weight.astype(batch.weight.dtype))
        return jax.tree.map(lambda now, then: jnp.concatenate([now, then]), batch, replayed)

    def observe(
        context: Context, state: TrainState, part: ReplayState, record: Record, key: Key
    ) -> tuple[TrainState, ReplayState]:
        # `record.batch`, not the joined one: the memory must not be fed its own replays.
        return state, reservoir_add(part, batch_rows(record.batch), record.batch.weight, key)

    needs = {"boundaries"} if weighting == "tasks" else set()
    return Component(name, frozenset(needs), init=init, prepare=prepare, observe=observe)
