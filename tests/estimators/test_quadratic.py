"""Sums of quadratics in constant memory."""

import jax
import jax.numpy as jnp
import numpy as np

from cl_zoo.estimators.quadratic import add_quadratic, quadratic_penalty, zero_quadratic


def test_sum_of_quadratics_is_one_quadratic() -> None:
    keys = jax.random.split(jax.random.key(0), 9)
    total = zero_quadratic({"w": jnp.zeros(7)})
    point, expected = jax.random.normal(keys[8], (7,)), 0.0
    for k in range(4):
        precision = jax.random.uniform(keys[2 * k], (7,)) * (jnp.arange(7) != 3)  # one parameter that nobody holds
        anchor = jax.random.normal(keys[2 * k + 1], (7,))
        total = add_quadratic(total, {"w": precision}, {"w": anchor})
        expected += float(jnp.sum(precision * (point - anchor) ** 2))
    np.testing.assert_allclose(quadratic_penalty(total, {"w": point}), expected, rtol=1e-5)


def test_it_does_not_cancel_at_strength_1e10() -> None:
    """Anchors that differ by 1e-4: sums of F a would lose the difference in float32."""
    anchors = np.float32(1.0) + np.array([0.0, 1e-4, 2e-4], np.float32)
    fishers = np.array([3e-3, 1e-3, 2e-3], np.float32)
    total = zero_quadratic({"w": jnp.zeros(1)})
    for fisher, anchor in zip(fishers, anchors, strict=True):
        total = add_quadratic(total, {"w": jnp.array([fisher])}, {"w": jnp.array([anchor])})
    doubles = fishers.astype(float), anchors.astype(float)
    gradient = jax.grad(lambda p: 1e10 * quadratic_penalty(total, {"w": p}) / 2)(jnp.array([1.0]))
    np.testing.assert_allclose(gradient, 1e10 * np.sum(doubles[0] * (1.0 - doubles[1])), rtol=2e-3)
    value = 1e10 / 2 * quadratic_penalty(total, {"w": jnp.array([1.0])})
    np.testing.assert_allclose(value, 1e10 / 2 * np.sum(doubles[0] * (1.0 - doubles[1]) ** 2), rtol=2e-3)
