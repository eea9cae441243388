"""Sums of diagonal quadratic penalties in constant memory."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cl_zoo.estimators.averaging import wide
from cl_zoo.types import Array, PyTree

__all__ = ["Quadratic", "add_quadratic", "quadratic", "quadratic_penalty", "zero_quadratic"]


class Quadratic(NamedTuple):
    """sum over k of sum_i F_ki (p_i - a_ki)^2  =  residual + sum_i F_i (p_i - a_i)^2.

    Attributes:
      precision: F = sum over k of F_k, a tree like the parameters.
      anchor: a, the F-weighted mean of the anchors a_k.
      residual: `f32[]`, the part that does not depend on p.
    """

    precision: PyTree
    anchor: PyTree
    residual: Array


def zero_quadratic(params: PyTree) -> Quadratic:
    """No penalty at all."""
    return quadratic(jax.tree.map(jnp.zeros_like, params), params)


def quadratic(precision: PyTree, anchor: PyTree) -> Quadratic:
    """sum_i F_i (p_i - a_i)^2, in float32 at least."""
    return Quadratic(wide(precision), wide(anchor), jnp.zeros(()))


def add_quadratic(old: Quadratic, precision: PyTree, anchor: PyTree) -> Quadratic:
    """The sum of `old` and sum_i precision_i (p_i - anchor_i)^2, as one quadratic.

    Means are updated, a <- a + F_new / (F_old + F_new) (a_new - a), since sums of F a would cancel in float32 once F
    is large.
    """

    def share(f: Array, f_new: Array) -> Array:
        total = f + f_new
        return jnp.where(total > 0, f_new / jnp.where(total > 0, total, 1), 0)

    precision, anchor = wide(precision), wide(anchor)
    shares = jax.tree.map(share, old.precision, precision)
    moved = jax.tree.map(lambda a, s, b: a + s * (b - a), old.anchor, shares, anchor)
    spread = jax.tree.map(
        lambda f, s, a, b: jnp.sum(f * s * jnp.square(b - a)), old.precision, shares, old.anchor, anchor
    )
    total = jax.tree.map(jnp.add, old.precision, precision)
    return Quadratic(total, moved, old.residual + sum(jax.tree.leaves(spread)))


def quadratic_penalty(own: Quadratic, params: PyTree) -> Array:
    """residual + sum_i F_i (p_i - a_i)^2, `f32[]`."""
    terms = jax.tree.map(lambda f, p, a: jnp.sum(f * jnp.square(p - a)), own.precision, params, own.anchor)
    return own.residual + sum(jax.tree.leaves(terms))
