from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from cl_zoo.shuffle import shuffled_index

N, KEYS = 10, 4000


@partial(jax.jit, static_argnums=1)
def order(key, n, *salt):
    return shuffled_index(key, jnp.arange(n), n, *salt)


@partial(jax.jit, static_argnums=(1, 2))
def orders(key, count, n):
    return jax.vmap(lambda k: shuffled_index(k, jnp.arange(n), n))(jax.random.split(key, count))


@pytest.fixture(scope="module")
def many():
    """The orders of 10 things under 4000 keys."""
    return np.asarray(orders(jax.random.key(1), KEYS, N))


def chi_square(counts):
    expected = counts.sum() / counts.size
    return ((counts - expected) ** 2 / expected).sum()


def assert_uniform(values, n):
    counts = np.bincount(values, minlength=n)
    assert len(counts) == n
    assert chi_square(counts) < chi2.ppf(0.999, n - 1)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 10, 37, 100, 1000, 1024, 4097])
def test_every_thing_has_one_place(n):
    for seed in range(3):
        assert sorted(order(jax.random.key(seed), n).tolist()) == list(range(n))


def test_n_may_be_traced():
    first_hundred = jax.jit(lambda key, n: shuffled_index(key, jnp.arange(100), n))
    for n in (1, 2, 3, 10, 37, 99, 100):
        places = first_hundred(jax.random.key(n), n)
        assert sorted(places[:n].tolist()) == list(range(n))
        assert int(places.min()) >= 0 and int(places.max()) < n, "positions beyond n stay in range"


@pytest.mark.parametrize("n", [2**24 + 1, 999_983, 2**30 - 1])
def test_a_few_draws_from_many_are_distinct(n):
    places = np.asarray(jax.jit(shuffled_index)(jax.random.key(0), n - 1 - jnp.arange(5000), n))
    assert len(set(places.tolist())) == 5000
    assert places.min() >= 0 and places.max() < n
    assert abs(places.mean() / n - 0.5) < 4 / np.sqrt(12 * 5000)


def test_same_key_same_order():
    again = shuffled_index(jax.random.key(3), jnp.arange(100), 100, 5)
    np.testing.assert_array_equal(order(jax.random.key(3), 100, 5), again)


def test_keys_give_different_orders():
    found = {tuple(row) for row in np.asarray(orders(jax.random.key(0), 100, 37))}
    assert len(found) == 100


def test_salts_give_different_orders():
    key = jax.random.key(0)
    found = (
        [order(key, 37)] + [order(key, 37, salt) for salt in range(20)] + [order(key, 37, 0, 1), order(key, 37, 1, 0)]
    )
    assert len({tuple(places.tolist()) for places in found}) == 23


def test_order_is_not_the_identity():
    assert np.mean(np.asarray(order(jax.random.key(0), 1000)) == np.arange(1000)) < 0.01


def test_vmap_over_keys_equals_single_calls():
    together = orders(jax.random.key(2), 5, 37)
    for key, places in zip(jax.random.split(jax.random.key(2), 5), together, strict=True):
        np.testing.assert_array_equal(order(key, 37), places)


@pytest.mark.parametrize("position", [0, 6])
def test_image_of_a_position_is_uniform_over_keys(many, position):
    assert_uniform(many[:, position], N)


def test_image_of_a_position_is_uniform_over_salts():
    places = jax.jit(jax.vmap(lambda salt: shuffled_index(jax.random.key(0), jnp.zeros((), int), N, 2, salt)))
    assert_uniform(np.asarray(places(jnp.arange(KEYS))), N)


@pytest.mark.parametrize("first,second", [(0, 1), (0, 9), (3, 4), (8, 5)])
def test_either_of_two_positions_comes_first_equally_often(many, first, second):
    before = np.sum(many[:, first] < many[:, second])
    assert abs(before - KEYS / 2) < 3.3 * np.sqrt(KEYS / 4)


def test_pairs_of_images_are_uniform(many):
    counts = np.zeros((N, N))
    np.add.at(counts, (many[:, 0], many[:, 1]), 1)
    counts = counts[~np.eye(N, dtype=bool)]
    assert counts.sum() == KEYS
    assert chi_square(counts) < chi2.ppf(0.999, counts.size - 1)


@pytest.mark.parametrize("n,factorial", [(3, 6), (4, 24), (5, 120)])
def test_all_orders_of_a_few_things_are_equally_likely(n, factorial):
    found, counts = np.unique(np.asarray(orders(jax.random.key(4), KEYS, n)), axis=0, return_counts=True)
    assert len(found) == factorial
    assert chi_square(counts) < chi2.ppf(0.999, factorial - 1)


@pytest.mark.parametrize("n", [8, 9, 10, 25, 36])
def test_odd_and_even_orders_are_equally_likely(n):
    signs = np.linalg.det(np.eye(n)[np.asarray(orders(jax.random.key(5), 1000, n))])
    assert abs(np.sum(signs > 0) - 500) < 3.3 * np.sqrt(250)
