"""Experience replay."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cl_zoo.buffers import (
    ClassBalanced,
    Reservoir,
    Ring,
    batch_rows,
    class_balanced_memory,
    reservoir_memory,
    ring_memory,
)
from cl_zoo.checks import check_choice, check_whole
from cl_zoo.types import Batch, Component, Context, Key, Record, TrainState

__all__ = ["ReplayState", "replay"]

ReplayState = Reservoir | Ring | ClassBalanced
"""The memory: rows as the stream gave them (uint8 images stay uint8), and how many were seen."""


def replay(
    capacity: int,
    *,
    batch_size: int = 32,
    weighting: str = "rows",
    memory: str = "reservoir",
    n_classes: int | None = None,
    name: str = "replay",
) -> Component:
    """Each batch is joined by `batch_size` different rows drawn uniformly from a memory of rows seen.

    With n current rows and m replayed ones, the loss of the joined batch is

        weighting "rows":   L = sum of all losses / (n + m)
        weighting "tasks":  L = 1/t * (mean current loss) + (1 - 1/t) * (mean replayed loss),   t = tasks so far

    Args:
      capacity: rows in memory, at least 1.
      batch_size: rows replayed with each batch, at least 0; those the memory cannot give yet have weight 0.
      weighting: as above; "tasks" needs task boundaries.
      memory: "reservoir", a uniform sample of all rows seen; "ring", the last capacity // n_classes rows of each class;
        "class_balanced", as many rows of each class as can be.
      n_classes: labels of the stream; needed by the last two.
      name: key in state.

    Returns:
      A component with a `ReplayState`. Other components see the joined batch, current rows first.

    Raises:
      ValueError: capacity below 1, batch_size below 0 or above the capacity, unknown weighting or memory, a memory by
        class without n_classes or without labels.

    Source: Chaudhry et al. 2019, arXiv 1902.10486, also for the ring; weighting "tasks": van de Ven et al. 2022,
    doi 10.1038/s42256-022-00568-3; reservoir: Vitter 1985; class-balanced memory: Prabhu et al. 2020,
    doi 10.1007/978-3-030-58536-5_31.

    Differences from the paper or its code: draws are without replacement. Van de Ven's code fills its memory at each
    task's end with a fixed number of rows per class, here every row seen is offered to a reservoir, so the memory is
    full from the start and also replays the task at hand.

    Example:
      >>> import optax
      >>> from cl_zoo import compose, supervised
      >>> from cl_zoo.models import mlp
      >>> learner = compose(mlp((4,), 3), optax.sgd(0.1), supervised(), replay(capacity=500, batch_size=10))
    """
    check_whole(name, "capacity", capacity, 1)
    check_whole(name, "batch_size", batch_size, 0, capacity)
    check_choice(name, "weighting", weighting, ("rows", "tasks"))
    check_choice(name, "memory", memory, ("reservoir", "ring", "class_balanced"))
    if memory == "reservoir":
        kind = reservoir_memory(capacity)
    else:
        check_whole(name, "n_classes", n_classes, 1, capacity)
        assert n_classes is not None
        kind = (ring_memory if memory == "ring" else class_balanced_memory)(capacity, n_classes)

    def init(context: Context, state: TrainState, batch: Batch, key: Key) -> ReplayState:
        return kind.init(batch_rows(batch))

    def prepare(context: Context, state: TrainState, part: ReplayState, batch: Batch, key: Key) -> Batch:
        if batch_size == 0:
            return batch
        (x, y, task), weight = kind.sample(part, batch_size, key)
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
        return state, kind.add(part, batch_rows(record.batch), record.batch.weight, key)

    needs = {"boundaries"} if weighting == "tasks" else set()
    return Component(name, frozenset(needs), init=init, prepare=prepare, observe=observe)
