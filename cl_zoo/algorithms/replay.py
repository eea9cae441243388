"""Experience replay."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp

from cl_zoo.buffers import (
    ClassBalanced,
    Reservoir,
    Ring,
    batch_rows,
    check_n_classes,
    class_balanced_memory,
    joined,
    reservoir_memory,
    ring_memory,
)
from cl_zoo.checks import Count, check_whole, checked
from cl_zoo.entries import Entry, Null
from cl_zoo.types import Batch, Component, Context, Key, Record, TrainState

__all__ = ["ENTRY", "ReplayState", "replay"]

ReplayState = Reservoir | Ring | ClassBalanced
"""The memory: examples as they came from the stream (uint8 images stay uint8), and how many were seen."""


@checked
def replay(
    capacity: Count,
    *,
    batch_size: int = 32,
    weighting: Literal["examples", "tasks"] = "examples",
    memory: Literal["reservoir", "ring", "class_balanced"] = "reservoir",
    n_classes: int | None = None,
    name: str = "replay",
) -> Component:
    """Each batch is joined by `batch_size` different examples drawn uniformly from a memory of those seen.

    With n current examples and m replayed ones, the loss of the joined batch is

        weighting "examples":   L = sum of all losses / (n + m)
        weighting "tasks":  L = 1/t * (mean current loss) + (1 - 1/t) * (mean replayed loss),   t = tasks so far

    Args:
      capacity: examples in memory, at least 1.
      batch_size: examples replayed with each batch, at least 0; those the memory cannot supply yet have weight 0.
      weighting: as above; "tasks" needs task boundaries.
      memory: "reservoir", a uniform sample of all examples seen; "ring", the last capacity // n_classes examples of
        each class; "class_balanced", classes as equal in number as possible.
      n_classes: labels of the stream; needed by the last two.
      name: key in state.

    Returns:
      A component with a `ReplayState`. Other components see the joined batch, current examples first.

    Raises:
      ValueError: capacity below 1, batch_size below 0 or above the capacity, unknown weighting or memory, a memory by
        class without n_classes or without labels.

    Source: Chaudhry et al. 2019, arXiv 1902.10486, also for the ring; weighting "tasks": van de Ven et al. 2022,
    doi 10.1038/s42256-022-00568-3; reservoir: Vitter 1985; class-balanced memory: Prabhu et al. 2020,
    doi 10.1007/978-3-030-58536-5_31.

    Differences from the paper or its code: draws are without replacement. Van de Ven's code fills its memory at each
    task's end with a fixed number of examples per class, here every example seen is offered to a reservoir, so the
    whole capacity is used from the start, also for the current task.

    Example:
      >>> import optax
      >>> from cl_zoo import compose, supervised
      >>> from cl_zoo.models import mlp
      >>> learner = compose(mlp((4,), 3), optax.sgd(0.1), supervised(), replay(capacity=500, batch_size=10))
    """
    check_whole(name, "batch_size", batch_size, 0, capacity)
    if memory == "reservoir":
        kind = reservoir_memory(capacity)
    else:
        check_whole(name, "n_classes", n_classes, 1, capacity)
        assert n_classes is not None
        kind = (ring_memory if memory == "ring" else class_balanced_memory)(capacity, n_classes)

    def init(context: Context, state: TrainState, batch: Batch, key: Key) -> ReplayState:
        if n_classes is not None:
            check_n_classes(name, n_classes, context.n_outputs(state, batch))
        return kind.init(batch_rows(batch))

    def prepare(
        context: Context, state: TrainState, part: ReplayState, batch: Batch, key: Key
    ) -> tuple[Batch, ReplayState]:
        if batch_size == 0:
            return batch, part
        (x, y, task), weight = kind.sample(part, batch_size, key)
        if weighting == "tasks":
            # Weights whose sum is t - 1 times that of the current examples.
            current = jnp.sum(batch.weight)
            weight = weight * state.task.astype(jnp.float32) * current / jnp.maximum(jnp.sum(weight), 1)
        replayed = Batch(x, y, task, weight.astype(batch.weight.dtype))
        return joined(batch, replayed), part

    def observe(
        context: Context, state: TrainState, part: ReplayState, record: Record, key: Key
    ) -> tuple[TrainState, ReplayState]:
        # `record.batch`, not the joined one: the memory must not be fed its own replays.
        return state, kind.add(part, batch_rows(record.batch), record.batch.weight, key)

    needs = {"boundaries"} if weighting == "tasks" else set()
    return Component(name, frozenset(needs), init=init, prepare=prepare, observe=observe)


ENTRY = Entry(
    name="replay",
    family="replay",
    summary="a uniform sample of all examples seen, replayed with every batch",
    factory=replay,
    arguments={"capacity": 20, "batch_size": 8},
    papers=("chaudhry2019tiny",),
    null=Null({"batch_size": 0}, "0 examples replayed"),
    results="replay",
)
