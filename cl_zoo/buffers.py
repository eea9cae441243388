"""Memories of past rows: pytrees of fixed shape with init, add and sample."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cl_zoo.shuffle import shuffled_index
from cl_zoo.types import Array, Batch, Key, PyTree

__all__ = ["Reservoir", "reservoir_add", "reservoir_init", "reservoir_sample"]


class Reservoir(NamedTuple):
    """A uniform sample, without replacement, of all rows seen.

    Attributes:
      rows: a pytree of `[capacity, ...]` arrays.
      seen: `i32[]`, rows offered so far.
    """

    rows: PyTree
    seen: Array


def reservoir_init(row: PyTree, capacity: int) -> Reservoir:
    """An empty reservoir for rows like those of the batch `row` (`[B, ...]` leaves), in their own dtypes."""
    empty = jax.tree.map(lambda leaf: jnp.zeros((capacity, *leaf.shape[1:]), leaf.dtype), row)
    return Reservoir(empty, jnp.zeros((), jnp.int32))


def reservoir_slots(seen: Array, present: Array, capacity: int, key: Key) -> Array:
    """Where each row of a batch goes, `i32[B]`; `capacity` means nowhere.

    Algorithm R for all rows at once: the i-th row ever seen goes to slot i while that is free, and afterwards to a slot
    j drawn from 0..i, if that exists. Where two rows of a batch draw one slot the later wins, as one by one.
    """
    number = seen + jnp.cumsum(present, dtype=jnp.int32) - present.astype(jnp.int32)  # how many came before each row
    drawn = jax.random.randint(key, present.shape, 0, number + 1)
    slot = jnp.where(number < capacity, number, drawn)
    slot = jnp.where(present & (slot < capacity), slot, capacity)
    later = jnp.triu(slot[:, None] == slot[None, :], 1)
    return jnp.where(jnp.any(later, axis=1), capacity, slot)


def reservoir_add(reservoir: Reservoir, rows: PyTree, weight: Array, key: Key) -> Reservoir:
    """Offers the rows of weight above 0.

    Args:
      reservoir: the memory.
      rows: a pytree of `[B, ...]` arrays.
      weight: `f32[B]`; rows of weight 0 are not seen.
      key: for the draws.

    Source: Vitter 1985, "Random sampling with a reservoir", algorithm R.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> memory = reservoir_init(jnp.zeros((1,), int), capacity=3)
      >>> memory = reservoir_add(memory, jnp.array([7, 8]), jnp.ones(2), jax.random.key(0))
      >>> memory.rows.tolist(), int(memory.seen)
      ([7, 8, 0], 2)
    """
    present = weight > 0
    capacity = jax.tree.leaves(reservoir.rows)[0].shape[0]
    slots = reservoir_slots(reservoir.seen, present, capacity, key)
    kept = jax.tree.map(lambda old, new: old.at[slots].set(new, mode="drop"), reservoir.rows, rows)
    return Reservoir(kept, reservoir.seen + jnp.sum(present, dtype=jnp.int32))


def reservoir_sample(reservoir: Reservoir, size: int, key: Key) -> tuple[PyTree, Array]:
    """`size` different rows drawn uniformly, and `f32[size]` weights: 0 for those beyond what the memory holds."""
    capacity = jax.tree.leaves(reservoir.rows)[0].shape[0]
    held = jnp.minimum(reservoir.seen, capacity)
    index = shuffled_index(key, jnp.arange(size), held)
    rows = jax.tree.map(lambda leaf: leaf[index], reservoir.rows)
    return rows, (jnp.arange(size) < held).astype(jnp.float32)


def batch_rows(batch: Batch) -> PyTree:
    """What a memory keeps of a batch: everything but its weights."""
    return (batch.x, batch.y, batch.task)
