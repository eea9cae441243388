import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from cl_zoo.buffers import Reservoir, batch_rows, reservoir_add, reservoir_init, reservoir_sample
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
