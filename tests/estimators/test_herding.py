import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cl_zoo.estimators.herding import herding_ranks, unit_rows

ranks = jax.jit(herding_ranks, static_argnums=3)


def greedy(features, labels, weight, steps):
    """The definition, one class, one pick and one candidate at a time."""
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-30)
    order = np.full(len(labels), len(labels))
    for label in set(labels.tolist()):
        rows = [i for i in range(len(labels)) if labels[i] == label and weight[i] > 0]
        if not rows:
            continue
        mean = unit[rows].mean(0)
        mean = mean / np.linalg.norm(mean)
        picked = []
        for k in range(1, min(steps, len(rows)) + 1):
            rest = [i for i in rows if i not in picked]
            distances = [np.linalg.norm(mean - (unit[picked].sum(0) + unit[i]) / k) for i in rest]
            picked.append(rest[int(np.argmin(distances))])
            order[picked[-1]] = k - 1
    return order


def test_worked_by_hand() -> None:
    # Unit rows a = (1, 0), b = (0, 1), c = (0.6, 0.8); their unit mean is (1.6, 1.8) / 2.408 = (0.664, 0.747).
    # First c, at distance 0.083. Then a: (a + c) / 2 = (0.8, 0.4) at 0.373; (b + c) / 2 = (0.3, 0.9) at 0.395.
    # The lengths of the rows as given do not count.
    features = jnp.array([[5.0, 0.0], [0.0, 0.1], [3.0, 4.0]])
    assert ranks(features, jnp.zeros(3, int), jnp.ones(3), 1, 3).tolist() == [1, 2, 0]
    assert ranks(features, jnp.zeros(3, int), jnp.ones(3), 1, 1).tolist() == [3, 3, 0]


def test_the_row_nearest_the_mean_is_not_always_next() -> None:
    # Unit rows at angles 0, 0.1, 0.12 and -0.4; all small, so the mean is near angle -0.045. First 0. The second pick
    # shall bring the mean of two there, so angle -0.09 would be best: 0.1 is 0.19 off, 0.12 is 0.21 and -0.4 is 0.31.
    # Then the third would best be -0.235: now -0.4 is 0.165 off, and 0.12 is 0.355, though it is nearer the mean.
    angle = jnp.array([0.0, 0.1, 0.12, -0.4])
    features = jnp.stack([jnp.cos(angle), jnp.sin(angle)], 1)
    assert ranks(features, jnp.zeros(4, int), jnp.ones(4), 1, 4).tolist() == [0, 1, 3, 2]


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_greedy_loop(seed: int) -> None:
    random = np.random.default_rng(seed)
    features = np.maximum(random.normal(size=(60, 7)) + 0.3, 0)  # as after a ReLU
    features[5] = 0
    labels, weight = random.integers(0, 4, 60), (random.random(60) < 0.8).astype(float)
    labels[labels == 2] = 1  # a class without rows
    for steps in (1, 6, 40):
        found = ranks(jnp.asarray(features, jnp.float32), jnp.asarray(labels), jnp.asarray(weight), 4, steps)
        assert found.tolist() == greedy(features, labels, weight, steps).tolist()
    for label in range(4):
        own = np.sort(np.asarray(found)[(labels == label) & (weight > 0)])
        assert own.tolist() == list(range(min(40, len(own))))


def test_a_shorter_list_is_the_beginning_of_a_longer_one() -> None:
    features = jax.random.normal(jax.random.key(0), (30, 5))
    labels = jnp.arange(30) % 2
    short, long = (np.asarray(ranks(features, labels, jnp.ones(30), 2, steps)) for steps in (4, 11))
    np.testing.assert_array_equal(short, np.where(long < 4, long, 30))


def test_the_mean_of_the_picks_nears_that_of_all() -> None:
    features = unit_rows(jax.random.normal(jax.random.key(1), (400, 10)) + 0.5)
    order = ranks(features, jnp.zeros(400, int), jnp.ones(400), 1, 20)
    mean = unit_rows(jnp.mean(features, 0))
    gap = lambda rows: float(jnp.linalg.norm(unit_rows(jnp.mean(rows, 0)) - mean))  # noqa: E731
    drawn = [gap(jax.random.choice(jax.random.key(i), features, (20,), replace=False)) for i in range(20)]
    assert gap(features[order < 20]) < min(drawn) / 2


def test_unit_rows() -> None:
    np.testing.assert_allclose(unit_rows(jnp.array([[3.0, 4.0], [0.0, 0.0]])), [[0.6, 0.8], [0, 0]], rtol=1e-6)
    assert np.isfinite(jax.jacobian(unit_rows)(jnp.zeros(2))).all()
