"""Memories of past examples: pytrees of fixed shape with init, add and sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cl_zoo.checks import check_classes, check_whole
from cl_zoo.compilation import DoesNotFitError, device_bytes, told_bytes, tree_bytes
from cl_zoo.counters import counted, cycled
from cl_zoo.shuffle import shuffled_index
from cl_zoo.types import Array, Batch, Key, PyTree

__all__ = [
    "ClassBalanced",
    "Memory",
    "Reservoir",
    "Ring",
    "class_balanced_add",
    "class_balanced_init",
    "class_balanced_memory",
    "class_balanced_sample",
    "reservoir_add",
    "reservoir_init",
    "reservoir_memory",
    "reservoir_sample",
    "ring_add",
    "ring_init",
    "ring_memory",
    "ring_sample",
]


class Reservoir(NamedTuple):
    """A uniform sample, without replacement, of all examples seen.

    Attributes:
      rows: the stored examples, a pytree of `[capacity, ...]` arrays.
      seen: `i32[]`, examples offered so far. It stands still at 2^31 - 2; from then on an example enters with the
        probability that the last one had, so the sample leans, very slowly, towards new examples.
    """

    rows: PyTree
    seen: Array


def reservoir_init(row: PyTree, capacity: int) -> Reservoir:
    """An empty reservoir for examples like those of the batch `row` (`[B, ...]` leaves), in their own dtypes."""
    return Reservoir(_empty(row, capacity), jnp.zeros((), jnp.int32))


def reservoir_slots(seen: Array, present: Array, capacity: int, key: Key) -> Array:
    """The slot of each example of a batch, `i32[B]`; `capacity` means none.

    Algorithm R for all examples at once: the i-th example ever seen goes to slot i while that is free, and afterwards
    to a slot j drawn from 0..i, if that exists. If two of a batch draw the same slot, the later wins, as one by one.
    """
    number = counted(seen, jnp.cumsum(present, dtype=jnp.int32) - present)  # how many came before each
    drawn = jax.random.randint(key, present.shape, 0, number + 1)
    slot = jnp.where(number < capacity, number, drawn)
    return _last_wins(jnp.where(present & (slot < capacity), slot, capacity), capacity)


def reservoir_add(reservoir: Reservoir, rows: PyTree, weight: Array, key: Key) -> Reservoir:
    """Offers the examples of weight above 0.

    Args:
      reservoir: the memory.
      rows: the examples, a pytree of `[B, ...]` arrays.
      weight: `f32[B]`; examples of weight 0 are ignored.
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
    return Reservoir(_put(reservoir.rows, rows, slots), counted(reservoir.seen, jnp.sum(present, dtype=jnp.int32)))


def reservoir_sample(reservoir: Reservoir, size: int, key: Key) -> tuple[PyTree, Array]:
    """`size` different examples drawn uniformly, and `f32[size]` weights: 0 beyond the number stored."""
    capacity = jax.tree.leaves(reservoir.rows)[0].shape[0]
    held = jnp.minimum(reservoir.seen, capacity)
    index = shuffled_index(key, jnp.arange(size), held)
    rows = jax.tree.map(lambda leaf: leaf[index], reservoir.rows)
    return rows, (jnp.arange(size) < held).astype(jnp.float32)


class Ring(NamedTuple):
    """The last m = capacity // n_classes examples of each class: slots c m, ..., c m + m - 1 belong to class c.

    Attributes:
      rows: the stored examples, a pytree of `[m * n_classes, ...]` arrays.
      seen: `i32[n_classes]`, examples of each class offered so far. Beyond 2^30 it goes on from m, in step with m.
    """

    rows: PyTree
    seen: Array


def ring_init(row: PyTree, capacity: int, n_classes: int) -> Ring:
    """An empty ring for examples like those of the batch `row`, in their own dtypes.

    Raises:
      ValueError: fewer slots than classes.
    """
    check_whole("ring", "n_classes", n_classes, 1)
    check_whole("ring", "capacity", capacity, n_classes)
    return Ring(_empty(row, capacity // n_classes * n_classes), jnp.zeros(n_classes, jnp.int32))


def ring_add(ring: Ring, rows: PyTree, labels: Array, weight: Array) -> Ring:
    """The i-th example of class c takes slot c m + (i mod m) and replaces the oldest of its class.

    Args:
      ring: the memory.
      rows: the examples, a pytree of `[B, ...]` arrays.
      labels: `i32[B]`, the class of each; examples of classes other than the ring's are ignored.
      weight: `f32[B]`; examples of weight 0 are ignored.

    Source: Chaudhry et al. 2019, arXiv 1902.10486, ring buffer.

    Example:
      >>> import jax.numpy as jnp
      >>> memory = ring_init(jnp.zeros((1,), int), capacity=4, n_classes=2)
      >>> memory = ring_add(memory, jnp.array([7, 8, 9, 5]), jnp.array([0, 0, 0, 1]), jnp.ones(4))
      >>> memory.rows.tolist(), memory.seen.tolist()
      ([9, 8, 5, 0], [3, 1])
    """
    capacity, n_classes = jax.tree.leaves(ring.rows)[0].shape[0], ring.seen.shape[0]
    per_class = capacity // n_classes
    member = (labels[:, None] == jnp.arange(n_classes)) & (weight > 0)[:, None]
    number = ring.seen + jnp.cumsum(member, axis=0, dtype=jnp.int32) - 1  # of each example, if it were of each class
    slot = jnp.arange(n_classes) * per_class + number % per_class
    slot = jnp.min(jnp.where(member, slot, capacity), axis=1)
    new = jnp.sum(member, axis=0, dtype=jnp.int32)
    seen = cycled(ring.seen, new, per_class, least=per_class)
    return Ring(_put(ring.rows, rows, _last_wins(slot, capacity)), seen)


def ring_sample(ring: Ring, size: int, key: Key) -> tuple[PyTree, Array]:
    """`size` different stored examples drawn uniformly, and `f32[size]` weights: 0 beyond the number stored."""
    per_class = jax.tree.leaves(ring.rows)[0].shape[0] // ring.seen.shape[0]
    held = jnp.minimum(ring.seen, per_class)
    ends = jnp.cumsum(held)
    drawn = shuffled_index(key, jnp.arange(size), ends[-1])
    label = jnp.minimum(jnp.sum(drawn[:, None] >= ends, axis=1), ring.seen.shape[0] - 1)
    index = label * per_class + drawn - (ends - held)[label]
    rows = jax.tree.map(lambda leaf: leaf[index], ring.rows)
    return rows, (jnp.arange(size) < ends[-1]).astype(jnp.float32)


class ClassBalanced(NamedTuple):
    """All examples while there is room; afterwards classes are kept as equal in number as possible.

    Attributes:
      rows: the stored examples, a pytree of `[capacity, ...]` arrays.
      labels: `i32[capacity]`, the class of each stored example.
      held: `i32[n_classes]`, stored examples of each class; together they fill the first slots.
    """

    rows: PyTree
    labels: Array
    held: Array


def class_balanced_init(row: PyTree, capacity: int, n_classes: int) -> ClassBalanced:
    """An empty memory for examples like those of the batch `row`, in their own dtypes.

    Raises:
      ValueError: no slots, or no classes.
    """
    check_whole("class_balanced", "n_classes", n_classes, 1)
    check_whole("class_balanced", "capacity", capacity, 1)
    return ClassBalanced(_empty(row, capacity), jnp.zeros(capacity, jnp.int32), jnp.zeros(n_classes, jnp.int32))


def class_balanced_add(memory: ClassBalanced, rows: PyTree, labels: Array, weight: Array, key: Key) -> ClassBalanced:
    """Offers the examples of weight above 0, one by one.

    While the memory is not full, every example enters. Then an example of a class with fewer stored examples than the
    largest class replaces a random example of a largest class; any other is rejected.

    Args:
      memory: the memory.
      rows: the examples, a pytree of `[B, ...]` arrays.
      labels: `i32[B]`, the class of each; examples of classes other than the memory's are ignored.
      weight: `f32[B]`; examples of weight 0 are ignored.
      key: for the draws.

    Source: the greedy balancing sampler of Prabhu et al. 2020, doi 10.1007/978-3-030-58536-5_31. There an
    example of a class seen before enters only while its class has fewer than capacity / (classes seen), whether there
    is room or not, and however many the others have.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> memory = class_balanced_init(jnp.zeros((1,), int), capacity=4, n_classes=2)
      >>> rows, labels = jnp.arange(10), jnp.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 1])
      >>> class_balanced_add(memory, rows, labels, jnp.ones(10), jax.random.key(0)).held.tolist()
      [2, 2]
    """
    capacity, n_classes = memory.labels.shape[0], memory.held.shape[0]
    labels = labels.astype(jnp.int32)
    present = (weight > 0) & (labels >= 0) & (labels < n_classes)

    def offer(carry: tuple[Array, Array], row: tuple[Array, Array, Key]) -> tuple[tuple[Array, Array], Array]:
        owners, held = carry
        label, present, row_key = row
        full = jnp.sum(held) >= capacity
        enters = present & (~full | (held[label] < jnp.max(held)))

        def victim() -> Array:
            """Slots are drawn until one of a largest class is: about n_classes draws at most, whatever the capacity."""

            def draw(number: Array) -> Array:
                return jax.random.randint(jax.random.fold_in(row_key, number), (), 0, capacity)

            def again(carry: tuple[Array, Array]) -> Array:
                return (held[owners[carry[0]]] < jnp.max(held)) & full

            first = draw(jnp.zeros((), jnp.int32)), jnp.ones((), jnp.int32)
            return jax.lax.while_loop(again, lambda carry: (draw(carry[1]), carry[1] + 1), first)[0]

        slot = jax.lax.cond(enters & full, victim, lambda: jnp.sum(held, dtype=jnp.int32))
        held = held.at[jnp.where(enters & full, owners[slot], n_classes)].add(-1, mode="drop")
        held = held.at[jnp.where(enters, label, n_classes)].add(1, mode="drop")
        slot = jnp.where(enters, slot, capacity)
        return (owners.at[slot].set(label, mode="drop"), held), slot

    keys = jax.random.split(key, labels.shape[0])
    (owners, held), slots = jax.lax.scan(offer, (memory.labels, memory.held), (labels, present, keys))
    return ClassBalanced(_put(memory.rows, rows, _last_wins(slots, capacity)), owners, held)


def class_balanced_sample(memory: ClassBalanced, size: int, key: Key) -> tuple[PyTree, Array]:
    """`size` different stored examples drawn uniformly, and `f32[size]` weights: 0 beyond the number stored."""
    held = jnp.sum(memory.held)
    index = shuffled_index(key, jnp.arange(size), held)
    rows = jax.tree.map(lambda leaf: leaf[index], memory.rows)
    return rows, (jnp.arange(size) < held).astype(jnp.float32)


class Memory(NamedTuple):
    """A kind of memory as three functions, for examples in the form that `batch_rows` returns.

    Attributes:
      init: `(rows) -> memory`.
      add: `(memory, rows, weight, key) -> memory`.
      sample: `(memory, size, key) -> (rows, weight)`.
    """

    init: Callable[[PyTree], PyTree]
    add: Callable[[PyTree, PyTree, Array, Key], PyTree]
    sample: Callable[[PyTree, int, Key], tuple[PyTree, Array]]


def reservoir_memory(capacity: int) -> Memory:
    """A `Reservoir` of `capacity` examples."""
    return Memory(lambda rows: reservoir_init(rows, capacity), reservoir_add, reservoir_sample)


def ring_memory(capacity: int, n_classes: int) -> Memory:
    """A `Ring` of `capacity // n_classes` examples per class."""

    def add(memory: Ring, rows: PyTree, weight: Array, key: Key) -> Ring:
        return ring_add(memory, rows, _labels(rows), weight)

    return Memory(lambda rows: ring_init(rows, capacity, n_classes), add, ring_sample)


def class_balanced_memory(capacity: int, n_classes: int) -> Memory:
    """A `ClassBalanced` memory of `capacity` examples."""

    def add(memory: ClassBalanced, rows: PyTree, weight: Array, key: Key) -> ClassBalanced:
        return class_balanced_add(memory, rows, _labels(rows), weight, key)

    return Memory(lambda rows: class_balanced_init(rows, capacity, n_classes), add, class_balanced_sample)


def joined(batch: Batch, replayed: Batch) -> Batch:
    """The batch, then the replayed examples, marked as such.

    Where the memory has none yet, an incoming example stands in with weight 0: a model that mixes examples without
    reading their weights (batch normalisation of one's own) sees nothing strange.
    """

    def marked(part: Batch, mark: bool) -> Batch:
        given = part.replayed is not None
        return part if given else part._replace(replayed=jnp.full(part.weight.shape[0], mark))

    present = replayed.weight > 0
    stand_in = jnp.arange(present.shape[0]) % batch.weight.shape[0]

    def filled(now: Array, then: Array) -> Array:
        return jnp.where(present.reshape((-1,) + (1,) * (then.ndim - 1)), then, now[stand_in])

    rows = jax.tree.map(filled, batch_rows(batch), batch_rows(replayed))
    replayed = replayed._replace(x=rows[0], y=rows[1], task=rows[2])
    parts = marked(batch, False), marked(replayed, True)
    return jax.tree.map(lambda now, then: jnp.concatenate([now, then]), *parts)


def batch_rows(batch: Batch) -> PyTree:
    """What a memory stores of a batch: inputs, targets and tasks."""
    return (batch.x, batch.y, batch.task)


def check_n_classes(owner: str, n_classes: int, outputs: int) -> None:
    """Refuses a memory by class that would leave classes out."""
    if n_classes < outputs:
        raise ValueError(
            f"{owner}: n_classes is {n_classes}, but the model has {outputs} outputs: examples of the others would not"
            " be kept"
        )


def _labels(rows: PyTree) -> Array:
    check_classes("memory", rows[1], "a memory by class needs labels")
    return rows[1]


def _empty(row: PyTree, capacity: int) -> PyTree:
    def zeros() -> PyTree:
        return jax.tree.map(lambda leaf: jnp.zeros((capacity, *leaf.shape[1:]), leaf.dtype), row)

    n, room = tree_bytes(jax.eval_shape(zeros)), device_bytes()
    if room is not None and n > room:
        raise DoesNotFitError(
            f"{capacity} examples in memory take {told_bytes(n)}, but the device has {told_bytes(room)}"
        )
    return zeros()


def _put(kept: PyTree, rows: PyTree, slots: Array) -> PyTree:
    for old, new in zip(jax.tree.leaves(kept), jax.tree.leaves(rows), strict=True):
        if old.dtype != new.dtype or old.shape[1:] != new.shape[1:]:
            raise ValueError(
                f"memory: an example is {new.dtype}{list(new.shape[1:])}, but the memory was made for"
                f" {old.dtype}{list(old.shape[1:])}: all batches must be alike"
            )
    return jax.tree.map(lambda old, new: old.at[slots].set(new, mode="drop"), kept, rows)


def _last_wins(slot: Array, nowhere: int) -> Array:
    """If several examples of a batch go to one slot, only the last does."""
    later = jnp.triu(slot[:, None] == slot[None, :], 1)
    return jnp.where(jnp.any(later, axis=1), nowhere, slot)
