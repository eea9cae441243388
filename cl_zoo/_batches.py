"""What a learner asks of the batches and states that it is given."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cl_zoo.types import Array, Batch, TrainState

__all__ = ["blanked", "check_batch", "check_state", "copied"]


def check_state(owner: str, state: Any) -> None:
    if not isinstance(state, TrainState):
        raise ValueError(f"{owner}: state is {type(state).__name__}, but it must be a TrainState, as init gives it")


def check_batch(owner: str, batch: Any, state: Any = None) -> None:
    """Refuses what is no batch, or whose leaves are of different numbers of examples."""
    if state is not None:
        check_state(owner, state)
    if not isinstance(batch, Batch):
        raise ValueError(f"{owner}: batch is {type(batch).__name__}, but it must be a Batch")
    for field in ("x", "y", "task", "weight"):
        for leaf in jax.tree.leaves(getattr(batch, field)):
            if np.ndim(leaf) == 0:
                raise ValueError(f"{owner}: {field} of the batch is {leaf!r}, but it must be an array, [B, ...]")
    if np.ndim(batch.weight) != 1:
        told = "None" if batch.weight is None else f"of shape {list(np.shape(batch.weight))}"
        raise ValueError(f"{owner}: weight of the batch is {told}, but it must be [B], one number for each example")
    rows = {field: {len(leaf) for leaf in jax.tree.leaves(getattr(batch, field))} for field in ("x", "y", "task")}
    n = len(batch.weight)
    for field, found in rows.items():
        if found - {n}:
            raise ValueError(f"{owner}: {field} of the batch has {min(found - {n})} examples, but weight has {n}")
    if n == 0:
        raise ValueError(f"{owner}: the batch has no examples, but there must be at least one")


def blanked(batch: Batch) -> Batch:
    """Examples of weight 0 become zeros before any arithmetic: 0 * NaN would be NaN."""

    weight = jnp.asarray(batch.weight)
    if not jnp.issubdtype(weight.dtype, jnp.floating):
        weight = weight.astype(jnp.float32)

    def blank(leaf: Array) -> Array:
        present = (weight > 0).reshape((-1,) + (1,) * (leaf.ndim - 1))
        return jnp.where(present, leaf, jnp.zeros_like(leaf))

    rows = {"x": batch.x, "y": batch.y, "task": batch.task}
    return batch._replace(weight=weight, **{name: jax.tree.map(blank, leaf) for name, leaf in rows.items()})


def copied(leaf: Array) -> Array:
    """The same array or key in memory of its own: that of a state may be donated to the next one."""
    if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jnp.copy(leaf)
    return jax.random.wrap_key_data(jnp.copy(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
