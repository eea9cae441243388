"""Counters that do not turn negative where int32 ends."""

from __future__ import annotations

import jax.numpy as jnp

from cl_zoo.types import Array

__all__ = ["LAST", "counted", "cycled"]

LAST = 2**31 - 2
"""Where counters stand still: one more is still int32."""


def counted(count: Array, more: Array | int) -> Array:
    """count + more, at most `LAST`.

    Example:
      >>> int(counted(jnp.int32(LAST - 1), 5)) == LAST
      True
    """
    return count + jnp.minimum(jnp.asarray(more, jnp.int32), LAST - count)


def cycled(count: Array, more: Array | int, period: int, least: int = 0) -> Array:
    """count + more; beyond 2^30 it goes on from `least`, in step with multiples of `period`.

    For what reads a count only modulo `period`, and whether it is below `least`.

    Example:
      >>> int(cycled(jnp.int32(2**30), 1, period=5, least=5))  # 2^30 + 1 = 0 (modulo 5)
      5
    """
    count = count + jnp.asarray(more, jnp.int32)
    return jnp.where(count > 2**30, least + (count - least) % period, count)
