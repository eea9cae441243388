"""Projections of gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from cl_zoo.types import PyTree

__all__ = ["project_conflict"]


def project_conflict(gradient: PyTree, reference: PyTree) -> PyTree:
    """g - min(0, g . r) / (r . r) r: the nearest vector to g whose dot product with r is not negative.

    g stays as it is where r is 0.

    Source: equation 11 of Chaudhry et al. 2019, arXiv 1812.00420.

    Example:
      >>> import jax.numpy as jnp
      >>> project_conflict(jnp.array([1.0, -1.0]), jnp.array([0.0, 2.0]))
      Array([1., 0.], dtype=float32)
    """
    dot = optax.tree.vdot(gradient, reference)
    square = optax.tree.vdot(reference, reference)
    scale = jnp.where(dot < 0, dot / jnp.where(square > 0, square, 1), 0)
    return jax.tree.map(lambda g, r: g - scale * r, gradient, reference)
