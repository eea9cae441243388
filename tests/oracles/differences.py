"""Agreement in float64, and gradients by central differences."""

import numpy as np


def agree(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


def slopes(f, x: np.ndarray, h: float = 1e-6) -> np.ndarray:
    """Central differences of the number f(x), for each entry of x."""
    found = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[index] = h
        found[index] = (f(x + step) - f(x - step)) / (2 * h)
    return found


def check_gradients(loss, weights: list, gradients: list) -> None:
    """gradients are those of loss(weights), for each of the weights."""
    assert len(gradients) == len(weights)
    for m, gradient in enumerate(gradients):
        numeric = slopes(lambda w, m=m: loss([*weights[:m], w, *weights[m + 1 :]]), weights[m])
        np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=1e-8)
