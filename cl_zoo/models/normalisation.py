"""Normalisation layers of the bundled networks, and how rows of weight 0 stay out of them."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from cl_zoo.types import Array, check_choice

__all__ = ["check_norm", "normalise", "normalising"]

EPSILON = 1e-5


def check_norm(owner: str, norm: str | None, allowed: tuple[str | None, ...], groups: int = 1, *channels: int) -> None:
    """Refuses an unknown kind, and groups that do not divide the channels."""
    check_choice(owner, "norm", norm, allowed)
    for count in channels:
        if norm == "group" and count % groups:
            raise ValueError(f"{owner}: a layer has {count} channels, which are not a multiple of {groups} groups")


def normalising(norm: str, features: int, groups: int, rngs: nnx.Rngs) -> nnx.Module:
    """y = scale (x - mean) / sqrt(var + 1e-5) + bias, mean and var over rows ("batch"; positions too), over the
    features of a row ("layer"), or over positions and each of `groups` groups of channels of a row ("group").

    Running statistics of "batch" move by a tenth with every batch.
    """
    if norm == "batch":
        return nnx.BatchNorm(features, momentum=0.9, epsilon=EPSILON, use_fast_variance=False, rngs=rngs)
    if norm == "layer":
        return nnx.LayerNorm(features, epsilon=EPSILON, use_fast_variance=False, rngs=rngs)
    return nnx.GroupNorm(features, groups, epsilon=EPSILON, use_fast_variance=False, rngs=rngs)


def normalise(layer: nnx.Module, x: Array, weight: Array | None) -> Array:
    """What the layer makes of x; rows of weight 0 take no part in the statistics of a batch."""
    if not isinstance(layer, nnx.BatchNorm) or weight is None:
        return layer(x)
    # Where no row counts all do: statistics of nothing would be no numbers.
    counts = (weight > 0) | ~jnp.any(weight > 0)
    return layer(x, mask=counts.reshape((-1,) + (1,) * (x.ndim - 1)))
