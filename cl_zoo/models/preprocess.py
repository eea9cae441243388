"""What a model does to its input first, inside the compiled program."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cl_zoo.types import PyTree

__all__ = ["scale_images"]


def scale_images(x: PyTree) -> PyTree:
    """uint8 becomes float32 in [0, 1]; everything else stays as it is."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32) / 255 if leaf.dtype == jnp.uint8 else leaf, x)
