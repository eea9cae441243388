"""Convolution and pooling without the operations that compilers for CPUs do badly inside loops."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from cl_zoo.types import Array

__all__ = ["convolve", "max_pool"]


def convolve(x: Array, kernel: Array, *_: Any, **__: Any) -> Array:
    """A convolution `[B, H, W, in]`, `[h, w, in, out]` of stride 1 that keeps height and width, as one matrix product
    over patches. To be given to `nnx.Conv` as `conv_general_dilated`.

    Same numbers up to rounding. Inside a `scan`, XLA's backend for CPUs makes gradients of a small convolution ten
    times slower than outside, and this as fast; on accelerators it only takes more memory.

    Example:
      >>> x = jnp.arange(4.0).reshape((1, 2, 2, 1))
      >>> convolve(x, jnp.ones((3, 3, 1, 1)))[0, :, :, 0].tolist()
      [[6.0, 6.0], [6.0, 6.0]]
    """
    h, w, depth, features = kernel.shape
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), ((h - 1) // 2, h // 2), ((w - 1) // 2, w // 2), (0, 0)))
    shifts = [padded[:, i : i + height, j : j + width] for i in range(h) for j in range(w)]
    return jnp.concatenate(shifts, axis=-1) @ kernel.reshape((h * w * depth, features))


def max_pool(x: Array) -> Array:
    """The largest of each 2 x 2 block; an odd last row or column is left out.

    Example:
      >>> max_pool(jnp.arange(9.0).reshape((1, 3, 3, 1))).ravel().tolist()
      [4.0]
    """
    height, width = x.shape[1] // 2, x.shape[2] // 2
    blocks = x[:, : 2 * height, : 2 * width].reshape((x.shape[0], height, 2, width, 2, x.shape[3]))
    # Not by `max`: its gradient looks for the place of the maximum, and where x is computed anew it may find none.
    rows = _larger(blocks[:, :, 0], blocks[:, :, 1])
    return _larger(rows[:, :, :, 0], rows[:, :, :, 1])


def _larger(a: Array, b: Array) -> Array:
    return jnp.where(a >= b, a, b)
