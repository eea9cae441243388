import itertools
from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from cl_zoo.buffers import (
    Reservoir,
    batch_rows,
    class_balanced_add,
    class_balanced_init,
    class_balanced_memory,
    reservoir_add,
    reservoir_init,
    reservoir_memory,
    reservoir_sample,
    ring_add,
    ring_init,
    ring_memory,
)
from cl_zoo.types import Batch
from tests.oracles.reservoir import reservoir as oracle
from tests.tiny import same_bytes

add = jax.jit(reservoir_add)
sample = jax.jit(reservoir_sample, static_argnums=1)


def draws_of(seen, present, key):
    """The draw of each row, made exactly as the library makes them."""
    number = seen + np.cumsum(present) - present
    return np.asarray(jax.random.randint(key, present.shape, 0, jnp.asarray(number + 1)))


def subset_chi_square(counts, trials, size):
    """Of how often each of n things was among `size` drawn without replacement; n - 1 degrees of freedom."""
    n = len(counts)
    share = size / n
    variance = trials * share * (1 - share) * n / (n - 1)
    return ((counts - trials * share) ** 2).sum() / variance


def filled(n, capacity):
    """A reservoir that holds the rows 0, ..., n - 1."""
    return add(reservoir_init(jnp.zeros(1, int), capacity), jnp.arange(n), jnp.ones(n), jax.random.key(0))


@pytest.mark.parametrize("seed", range(4))
def test_equals_rows_offered_one_by_one(seed):
    capacity, size = 8, 16
    random = np.random.default_rng(seed)
    memory = reservoir_init({"id": jnp.zeros(1, int), "x": jnp.zeros((1, 2))}, capacity)
    valid, draws, ids, collisions = [], [], [], 0
    for number in range(6):
        key = jax.random.key(100 * seed + number)
        present = random.random(size) < 0.7
        present &= number != 3  # one batch has no row at all
        row_ids = size * number + np.arange(size) + 1
        drawn = draws_of(sum(valid), present.astype(int), key)
        inside = drawn[present & (np.cumsum(present) + sum(valid) > capacity) & (drawn < capacity)]
        collisions += len(inside) - len(set(inside.tolist()))
        rows = {"id": jnp.asarray(row_ids), "x": jnp.stack([jnp.asarray(row_ids, jnp.float32)] * 2, 1)}
        memory = add(memory, rows, jnp.asarray(present * random.uniform(0.1, 2, size), jnp.float32), key)
        valid, draws, ids = [*valid, *present], [*draws, *drawn[present]], [*ids, *row_ids]
        expected = oracle(capacity, draws, valid, ids)
        assert memory.rows["id"].tolist() == expected + [0] * (capacity - len(expected))
        np.testing.assert_array_equal(memory.rows["x"], jnp.stack([memory.rows["id"]] * 2, 1))
        assert int(memory.seen) == sum(valid)
    assert collisions > 0, "the case where two rows of a batch draw one slot was not met"


def test_every_row_is_equally_likely_to_be_kept():
    n, capacity, trials = 40, 8, 2000

    def held(key):
        def step(memory, inputs):
            rows, key = inputs
            return reservoir_add(memory, rows, jnp.ones(5), key), None

        start = reservoir_init(jnp.zeros(1, int), capacity)
        memory, _ = jax.lax.scan(step, start, (jnp.arange(n).reshape(8, 5), jax.random.split(key, 8)))
        return memory.rows

    rows = np.asarray(jax.jit(jax.vmap(held))(jax.random.split(jax.random.key(0), trials)))
    assert all(len(set(row)) == capacity for row in rows.tolist())
    assert subset_chi_square(np.bincount(rows.ravel(), minlength=n), trials, capacity) < chi2.ppf(0.999, n - 1)


def test_one_large_batch_keeps_every_row_equally_often():
    n, capacity, trials = 12, 3, 2000
    keys = jax.random.split(jax.random.key(1), trials)
    start = reservoir_init(jnp.zeros(1, int), capacity)
    memory = jax.jit(jax.vmap(lambda key: reservoir_add(start, jnp.arange(n), jnp.ones(n), key)))(keys)
    rows = np.asarray(memory.rows)
    assert all(len(set(row)) == capacity for row in rows.tolist())
    assert subset_chi_square(np.bincount(rows.ravel(), minlength=n), trials, capacity) < chi2.ppf(0.999, n - 1)


def test_sample_is_uniform_and_without_replacement():
    held, size, trials = 10, 3, 4000
    memory = filled(held, 12)
    keys = jax.random.split(jax.random.key(2), trials)
    rows, weight = jax.jit(jax.vmap(lambda key: reservoir_sample(memory, size, key)))(keys)
    assert np.all(weight == 1)
    assert all(len(set(row)) == size for row in rows.tolist())
    assert subset_chi_square(np.bincount(rows.ravel(), minlength=held), trials, size) < chi2.ppf(0.999, held - 1)
    first = np.bincount(rows[:, 0], minlength=held)
    assert ((first - trials / held) ** 2).sum() / (trials / held) < chi2.ppf(0.999, held - 1)


@pytest.mark.parametrize("held,capacity,size", [(5, 8, 8), (5, 8, 3), (20, 8, 8), (3, 4, 10), (20, 4, 10)])
def test_weight_is_zero_beyond_what_is_held(held, capacity, size):
    memory = filled(held, capacity)
    rows, weight = sample(memory, size, jax.random.key(3))
    n = min(held, capacity, size)
    assert weight.tolist() == [1.0] * n + [0.0] * (size - n)
    drawn = rows[:n].tolist()
    assert len(set(drawn)) == n and set(drawn) <= set(memory.rows[: min(held, capacity)].tolist())


def test_empty_memory_gives_only_weight_zero():
    memory = reservoir_init({"x": jnp.ones((1, 2))}, 4)
    rows, weight = sample(memory, 3, jax.random.key(0))
    assert weight.tolist() == [0.0, 0.0, 0.0]
    np.testing.assert_array_equal(rows["x"], np.zeros((3, 2)))


def test_rows_of_weight_zero_never_enter():
    memory = reservoir_init(jnp.zeros((1, 2)), 4)
    for number in range(10):
        weight = jnp.array([0.0, 1.0, 0.0, 1.0])
        rows = jnp.where(weight[:, None] > 0, 1.0, jnp.nan) * jnp.ones((4, 2))
        memory = add(memory, rows, weight, jax.random.key(number))
        assert np.all(np.isfinite(memory.rows))
    assert int(memory.seen) == 20
    np.testing.assert_array_equal(memory.rows, np.ones((4, 2)))


@pytest.mark.parametrize("held", [2, 9])
def test_a_batch_of_weight_zero_changes_nothing(held):
    memory = filled(held, 4)
    same_bytes(add(memory, jnp.full(3, 77), jnp.zeros(3), jax.random.key(1)), memory)


def test_dtypes_are_kept():
    batch = Batch(jnp.full((3, 2, 2), 200, jnp.uint8), jnp.arange(3), None, jnp.ones(3))
    memory = add(reservoir_init(batch_rows(batch), 4), batch_rows(batch), batch.weight, jax.random.key(0))
    (x, y, task), weight = sample(memory, 2, jax.random.key(0))
    assert (memory.rows[0].dtype, x.dtype, y.dtype, weight.dtype) == (jnp.uint8, jnp.uint8, jnp.int32, jnp.float32)
    assert task is None and np.all(x == 200)


def test_parts_of_a_row_stay_together():
    n = 50
    rows = (jnp.arange(n), 3 * jnp.arange(n))
    memory = add(reservoir_init(rows, 6), rows, jnp.ones(n), jax.random.key(5))
    (a, b), _ = sample(memory, 6, jax.random.key(6))
    assert len(set(a.tolist())) == 6
    np.testing.assert_array_equal(b, 3 * a)


def test_init_is_empty():
    memory = reservoir_init(jnp.ones((7, 3), jnp.uint8), 5)
    same_bytes(memory, Reservoir(jnp.zeros((5, 3), jnp.uint8), jnp.zeros((), jnp.int32)))


def numbered_batches(n_classes, seed, count=6, size=16):
    """Batches of rows (their number, their label), some absent, one of them wholly."""
    random = np.random.default_rng(seed)
    for batch in range(count):
        labels = random.choice(n_classes, size, p=np.arange(1, n_classes + 1) / np.arange(1, n_classes + 1).sum())
        present = (random.random(size) < 0.7) & (batch != 3)
        yield size * batch + np.arange(size) + 1, labels, present


@pytest.mark.parametrize("seed", range(3))
def test_ring_keeps_the_last_rows_of_each_class_in_turn(seed):
    n_classes, capacity = 3, 14  # four of each class; batches bring more than that
    memory = ring_init({"id": jnp.zeros(1, int), "x": jnp.zeros((1, 2))}, capacity, n_classes)
    assert memory.rows["x"].shape == (12, 2)
    queues = [deque(maxlen=4) for _ in range(n_classes)]
    expected, counts, most = np.zeros(12, int), np.zeros(n_classes, int), 0
    for ids, labels, present in numbered_batches(n_classes, seed):
        rows = {"id": jnp.asarray(ids), "x": jnp.stack([jnp.asarray(ids, jnp.float32)] * 2, 1)}
        memory = jax.jit(ring_add)(memory, rows, jnp.asarray(labels), jnp.asarray(present, jnp.float32))
        most = max(most, np.bincount(labels[present], minlength=n_classes).max())
        for number, label in zip(ids[present], labels[present], strict=True):
            queues[label].append(number)
            expected[4 * label + counts[label] % 4] = number
            counts[label] += 1
        assert memory.rows["id"].tolist() == expected.tolist()
        np.testing.assert_array_equal(memory.rows["x"][:, 0], expected)
        assert memory.seen.tolist() == counts.tolist()
    assert most > 4, "no batch brought more rows of a class than the ring holds"
    assert [set(queue) for queue in queues] == [set(expected[4 * c : 4 * c + 4].tolist()) for c in range(n_classes)]


def drawn_slots(row_key, capacity):
    """The slots that are drawn for one row, until one is taken."""
    for number in itertools.count():
        yield int(jax.random.randint(jax.random.fold_in(row_key, number), (), 0, capacity))


@pytest.mark.parametrize("seed", range(3))
def test_class_balanced_memory_equals_rows_offered_one_by_one(seed):
    n_classes, capacity, size = 3, 8, 16
    memory = class_balanced_init(jnp.zeros(1, int), capacity, n_classes)
    held, replaced, refused, rewritten = [], 0, 0, 0
    for batch, (ids, labels, present) in enumerate(numbered_batches(n_classes, seed)):
        key = jax.random.key(100 * seed + batch)
        row_keys = jax.random.split(key, size)
        weight = jnp.asarray(present, jnp.float32)
        memory = jax.jit(class_balanced_add)(memory, jnp.asarray(ids), jnp.asarray(labels), weight, key)
        written = []
        for number, label, here, row_key in zip(ids, labels, present, row_keys, strict=True):
            if not here:
                continue
            count = [sum(c == other for _, c in held) for other in range(n_classes)]
            if len(held) < capacity:
                written.append(len(held))
                held.append((number, label))
            elif count[label] < max(count):
                slot = next(slot for slot in drawn_slots(row_key, capacity) if count[held[slot][1]] == max(count))
                held[slot] = (number, label)
                written.append(slot)
                replaced += 1
            else:
                refused += 1
        rewritten += len(written) - len(set(written))
        assert memory.rows.tolist() == [number for number, _ in held] + [0] * (capacity - len(held))
        assert memory.labels.tolist()[: len(held)] == [label for _, label in held]
        assert memory.held.tolist() == [sum(c == other for _, c in held) for other in range(n_classes)]
    assert min(replaced, refused, rewritten) > 0, "a case was not met"


def test_class_balanced_memory_balances():
    """Classes one after another, as in a class-incremental stream."""
    memory = class_balanced_init(jnp.zeros(1, int), 10, 5)
    add_rows = jax.jit(class_balanced_add)
    for label, shares in enumerate(([10], [5, 5], [3, 3, 4], [2, 2, 3, 3], [2, 2, 2, 2, 2])):
        for batch in range(4):
            key = jax.random.key(10 * label + batch)
            memory = add_rows(memory, jnp.arange(8), jnp.full(8, label), jnp.ones(8), key)
        assert sorted(memory.held.tolist()) == [0] * (4 - label) + sorted(shares)


@pytest.mark.parametrize(("labels", "gone"), [([0] * 6, 3), ([0, 0, 0, 1, 1, 1], 1)])
def test_class_balanced_memory_drops_any_row_of_a_largest_class(labels, gone):
    """Six rows of one class, or three of two: `gone` rows of a further class take the places of as many of these."""
    trials = 2000
    start = class_balanced_init(jnp.zeros(1, int), 6, 3)
    start = class_balanced_add(start, jnp.arange(6), jnp.array(labels), jnp.ones(6), jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), trials)
    new = jnp.full(gone, 2)
    memory = jax.jit(jax.vmap(lambda key: class_balanced_add(start, jnp.full(gone, 9), new, jnp.ones(gone), key)))(keys)
    rows = np.asarray(memory.rows)
    kept = rows[rows < 9].reshape(trials, 6 - gone)
    counts = np.bincount(kept.ravel(), minlength=6)
    assert subset_chi_square(counts, trials, 6 - gone) < chi2.ppf(0.999, 5)


def by_class(kind, counts, capacity):
    """A memory that was offered so many rows of each class, numbered through."""
    labels = np.repeat(np.arange(len(counts)), counts)
    memory = (ring_memory if kind == "ring" else class_balanced_memory)(capacity, len(counts))
    rows = (jnp.arange(len(labels)), jnp.asarray(labels, jnp.int32), None)
    return memory, memory.add(memory.init(rows), rows, jnp.ones(len(labels)), jax.random.key(0))


@pytest.mark.parametrize("kind", ["ring", "class_balanced"])
def test_memory_by_class_samples_uniformly_without_replacement(kind):
    size, trials = 3, 4000
    memory, state = by_class(kind, (2, 0, 5, 1), 16)  # the ring holds 2, 0, 4 and 1 of these, the other all
    ids = {"ring": [0, 1, 3, 4, 5, 6, 7], "class_balanced": list(range(8))}[kind]
    keys = jax.random.split(jax.random.key(2), trials)
    (rows, labels, told), weight = jax.jit(jax.vmap(lambda key: memory.sample(state, size, key)))(keys)
    assert told is None and np.all(weight == 1)
    assert all(len(set(row)) == size for row in rows.tolist())
    np.testing.assert_array_equal(labels, np.array([0, 0, 2, 2, 2, 2, 2, 3])[rows])
    counts = np.bincount(rows.ravel(), minlength=8)
    assert counts.sum() == counts[ids].sum()
    assert subset_chi_square(counts[ids], trials, size) < chi2.ppf(0.999, len(ids) - 1)
    everything, weight = memory.sample(state, 12, jax.random.key(3))
    assert weight.tolist() == [1.0] * len(ids) + [0.0] * (12 - len(ids))
    assert sorted(everything[0][: len(ids)].tolist()) == ids


@pytest.mark.parametrize("kind", ["ring", "class_balanced"])
def test_absent_and_unknown_rows_never_enter_a_memory_by_class(kind):
    memory, state = by_class(kind, (3, 1), 6)
    rows = (jnp.full(4, 77), jnp.array([0, 1, 5, -1]), None)
    weight = jnp.array([0.0, 0.0, 1.0, 1.0])
    same_bytes(jax.jit(memory.add)(state, rows, weight, jax.random.key(1)), state)


@pytest.mark.parametrize("memory", [reservoir_memory(4), ring_memory(4, 2), class_balanced_memory(4, 2)])
def test_every_kind_of_memory_keeps_dtypes_and_starts_empty(memory):
    rows = batch_rows(Batch(jnp.full((3, 2, 2), 200, jnp.uint8), jnp.zeros(3, jnp.int32), None, jnp.ones(3)))
    empty = memory.init(rows)
    (x, _, _), weight = memory.sample(empty, 2, jax.random.key(0))
    assert weight.tolist() == [0, 0] and np.all(x == 0)
    state = memory.add(empty, rows, jnp.ones(3), jax.random.key(0))
    (x, y, task), weight = memory.sample(state, 2, jax.random.key(0))
    assert (state.rows[0].dtype, x.dtype, y.dtype, weight.dtype) == (jnp.uint8, jnp.uint8, jnp.int32, jnp.float32)
    assert task is None and np.all(x == 200) and weight.tolist() == [1, 1]


def test_memories_by_class_say_what_is_wrong():
    with pytest.raises(ValueError, match="capacity is 2, but it must be at least 3"):
        ring_init(jnp.zeros(1), 2, 3)
    with pytest.raises(ValueError, match="capacity is 0"):
        class_balanced_init(jnp.zeros(1), 0, 3)
    memory, state = by_class("ring", (1, 1), 4)
    with pytest.raises(ValueError, match="the batch has no labels"):
        memory.add(state, (jnp.zeros(1, int), None, None), jnp.ones(1), jax.random.key(0))
