"""Pooling over windows that do not overlap, by reshapes: on a CPU a third of the time of windowed reductions."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from cl_zoo.types import Array

__all__ = ["max_pool", "mean_pool"]


def max_pool(x: Array, window: Sequence[int] = (2, 2)) -> Array:
    """The largest of each window of `x: [B, *S, C]`; what is left at the far edges is dropped. Of equal values, the
    first takes the gradient.

    Example:
      >>> max_pool(jnp.arange(9.0).reshape((1, 3, 3, 1))).ravel().tolist()
      [4.0]
    """
    blocks = _blocks(x, window)
    # Not by `max`: its gradient looks for the place of the maximum, and where x is computed anew it may find none.
    places = [blocks[_place(place)] for place in np.ndindex(*window)]
    return functools.reduce(lambda a, b: jnp.where(a >= b, a, b), places)


def mean_pool(x: Array, window: Sequence[int] = (2, 2)) -> Array:
    """The mean of each window of `x: [B, *S, C]`; what is left at the far edges is dropped.

    Example:
      >>> mean_pool(jnp.arange(9.0).reshape((1, 3, 3, 1))).ravel().tolist()
      [2.0]
    """
    return jnp.mean(_blocks(x, window), axis=tuple(range(2, 2 * len(window) + 1, 2)))


def _blocks(x: Array, window: Sequence[int]) -> Array:
    """`[B, S_0, w_0, S_1, w_1, ..., C]`."""
    counts = [length // w for length, w in zip(x.shape[1:-1], window, strict=True)]
    x = x[(slice(None), *(slice(n * w) for n, w in zip(counts, window)))]
    return x.reshape((x.shape[0], *(length for pair in zip(counts, window) for length in pair), x.shape[-1]))


def _place(place: tuple[int, ...]) -> tuple[slice | int, ...]:
    return (slice(None), *(index for i in place for index in (slice(None), i)))
