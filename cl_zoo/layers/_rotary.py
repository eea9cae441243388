"""Rotary position embedding."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from cl_zoo.types import Array

__all__ = ["RotaryScaling", "rotary"]


class RotaryScaling(NamedTuple):
    """How rotary wavelengths are stretched for longer sequences than a model was first trained on.

    All are `factor` times as long ("linear"); or, with `original_length`, those longer than
    original_length / low_frequency are, those shorter than original_length / high_frequency stay, and between the two
    the frequencies are mixed, linearly in original_length / wavelength ("llama3").

    Source: Chen et al. 2023, arXiv 2306.15595; Dubey et al. 2024 (Llama 3.1's code), arXiv 2407.21783.
    """

    factor: float
    original_length: int | None = None
    low_frequency: float = 1.0
    high_frequency: float = 4.0


def rotary(
    x: Array,
    positions: Array,
    theta: float = 10_000.0,
    period: int | None = None,
    scaling: RotaryScaling | None = None,
) -> Array:
    """Rotary positions: the pair (x_i, x_{i + d/2}) is rotated by position * theta^(-2 i / d) radians.

    Args:
      x: `[..., T, d]`, d even.
      positions: `i32[T]`, or any shape that broadcasts to `x.shape[:-1]`.
      theta: the base of wavelengths.
      period: positions are taken modulo this; None: as they are. Only this many sines are computed.
      scaling: of the wavelengths.

    Raises:
      ValueError: an odd d.

    Source: Su et al. 2021, arXiv 2104.09864; halves instead of neighbours are paired, as in Llama's Hugging Face code.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"rotary: a head is {x.shape[-1]} wide, but it must be even, as pairs are rotated")
    half = x.shape[-1] // 2
    wide = jnp.promote_types(x.dtype, jnp.float32)
    table = positions if period is None else jnp.arange(period)
    frequency = theta ** (-jnp.arange(half, dtype=wide) / half)
    if scaling is not None:
        kept: Array | float = 0.0  # the fraction of the frequency that stays
        if scaling.original_length is not None:
            turns = scaling.original_length * frequency / (2 * jnp.pi)
            low, high = scaling.low_frequency, scaling.high_frequency
            kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
        frequency = frequency * (kept + (1 - kept) / scaling.factor)
    angle = table[..., None].astype(wide) * frequency
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    if period is not None:
        cos, sin = cos[positions % period], sin[positions % period]
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
