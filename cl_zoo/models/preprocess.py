"""What a model does to its input first, inside the compiled program."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cl_zoo.types import Array, PyTree

__all__ = ["scale_images"]


def scale_images(x: PyTree) -> PyTree:
    """uint8 becomes float32 in [0, 1]; floating point stays as it is.

    Raises:
      ValueError: other whole numbers, whose scale is not known.
    """

    def scaled(leaf: Array) -> Array:
        if leaf.dtype == jnp.uint8:
            return leaf.astype(jnp.float32) / 255
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            raise ValueError(f"scale_images: x is {leaf.dtype}, but it must be uint8, or floating point as it is meant")
        return leaf

    return jax.tree.map(scaled, x)
