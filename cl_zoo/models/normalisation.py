"""Normalisation layers of the bundled networks, and how examples of weight 0 stay out of them."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jax import lax

from cl_zoo.checks import check_choice
from cl_zoo.models.convolution import accumulator
from cl_zoo.types import Array

__all__ = ["check_norm", "normalise", "normalising"]

EPSILON = 1e-5


def check_norm(owner: str, norm: str | None, allowed: tuple[str | None, ...], groups: int = 1, *channels: int) -> None:
    """Refuses an unknown kind, and groups that do not divide the channels."""
    check_choice(owner, "norm", norm, allowed)
    for count in channels:
        if norm == "group" and count % groups:
            raise ValueError(f"{owner}: a layer has {count} channels, which are not a multiple of {groups} groups")


def normalising(norm: str, features: int, groups: int, rngs: nnx.Rngs) -> nnx.Module:
    """y = scale (x - mean) / sqrt(var + 1e-5) + bias, mean and var over examples ("batch"; positions too), over
    the features of an example ("layer"), or over its positions and each of `groups` groups of channels ("group").

    Running statistics of "batch" have decay 0.9.
    """
    if norm == "batch":
        return nnx.BatchNorm(features, momentum=0.9, epsilon=EPSILON, use_fast_variance=False, rngs=rngs)
    if norm == "layer":
        return nnx.LayerNorm(features, epsilon=EPSILON, use_fast_variance=False, rngs=rngs)
    return nnx.GroupNorm(features, groups, epsilon=EPSILON, use_fast_variance=False, rngs=rngs)


def normalise(layer: nnx.Module, x: Array, weight: Array | None) -> Array:
    """What the layer makes of `x: [B, *S, C]`; examples of weight 0 take no part in the statistics of a batch.

    The same as the layers' own `__call__`, whose reductions (over a few channels of a last axis, or under a mask) take
    two to four times as long on a CPU as these, which are over places first.
    """
    if not isinstance(layer, (nnx.BatchNorm, nnx.GroupNorm)):
        return layer(x)
    flat = x.reshape((x.shape[0], -1, x.shape[-1])).astype(accumulator(x.dtype))
    over = _over_groups(layer.num_groups) if isinstance(layer, nnx.GroupNorm) else _over_batch(weight, flat)
    if isinstance(layer, nnx.BatchNorm) and layer.use_running_average:
        mean, variance = (v[...].reshape((1, 1, -1)) for v in (layer.mean, layer.var))
        centred = flat - mean
    else:
        if isinstance(layer, nnx.BatchNorm) and flat.shape[0] * flat.shape[1] == 1:
            raise ValueError(
                "batch normalisation: the batch is one example, whose statistics are itself; give several, or"
                ' another norm ("layer", "group")'
            )
        mean = over(jnp.mean(flat, 1, keepdims=True))
        centred = flat - mean
        variance = over(jnp.mean(jnp.square(centred), 1, keepdims=True))
        if isinstance(layer, nnx.BatchNorm):
            for running, now in ((layer.mean, mean), (layer.var, variance)):
                running[...] = layer.momentum * running[...] + (1 - layer.momentum) * now.ravel()
    scale, bias = layer.scale, layer.bias
    assert scale is not None and bias is not None
    a, b = (v[...].reshape((1, 1, -1)) for v in (scale, bias))
    found = centred * (lax.rsqrt(variance + EPSILON) * a) + b
    return found.reshape(x.shape).astype(jnp.promote_types(x.dtype, scale.dtype))


def _over_groups(groups: int) -> Callable[[Array], Array]:
    """`[B, 1, C]` -> the means over each group of channels, at each of its channels."""

    def over(means: Array) -> Array:
        grouped = means.reshape((*means.shape[:-1], groups, -1))
        return jnp.broadcast_to(jnp.mean(grouped, -1, keepdims=True), grouped.shape).reshape(means.shape)

    return over


def _over_batch(weight: Array | None, x: Array) -> Callable[[Array], Array]:
    """`[B, 1, C]` -> the means over the examples that count, `[1, 1, C]`."""
    # Where no example counts, all do: statistics of nothing would be NaN.
    counts = jnp.ones(x.shape[:1], bool) if weight is None else (weight > 0) | ~jnp.any(weight > 0)
    fraction = counts / jnp.sum(counts, dtype=x.dtype)

    def over(means: Array) -> Array:
        # An example of weight 0 may hold NaN, and 0 times NaN is NaN.
        return jnp.tensordot(fraction, jnp.where(counts[:, None, None], means, 0), 1)[None]

    return over
