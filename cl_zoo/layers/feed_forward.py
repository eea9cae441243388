"""Feed-forward networks of decoders: each token by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cl_zoo.checks import Count, checked
from cl_zoo.layers.mixer import Mixer, linear, product, refuse_prefix
from cl_zoo.types import Array, Key, PyTree

__all__ = ["cms", "memoryless", "swiglu"]


def memoryless(name: str, width: int, init: Callable[[Key], PyTree], apply: Callable[[PyTree, Array], Array]) -> Mixer:
    """A layer that gives each token by itself: `(params, [..., D]) -> [..., D]`, with nothing to remember."""

    def start(
        params: PyTree,
        batch_size: int,
        length: int,
        dtype: Any,
        padding: Array | None = None,
        prefix: tuple[Array, Array] | None = None,
    ) -> Array:
        refuse_prefix(name, prefix)
        return jnp.zeros(0)  # nothing, but a leaf: blocks are counted by their leaves

    def go_on(params: PyTree, cache: PyTree, x: Array) -> tuple[Array, PyTree]:
        return apply(params, x), cache

    return Mixer(name, width, init, apply, start, go_on, go_on, memoryless=True)


@checked
def swiglu(width: Count, hidden: Count) -> Mixer:
    """y = (silu(x W_g) * (x W_u)) W_d, of each token.

    Args:
      width: D.
      hidden: of W_g and W_u `[D, hidden]`, W_d `[hidden, D]`.

    Returns:
      A `Mixer` without memory; parameters "gate", "up" and "down".

    Raises:
      ValueError: sizes below 1.

    Source: Shazeer 2020, arXiv 2002.05202.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = swiglu(8, 32)
      >>> layer.apply(layer.init(jax.random.key(0)), jnp.ones((1, 5, 8))).shape
      (1, 5, 8)
    """

    def init(key: Key) -> PyTree:
        keys = jax.random.split(key, 4)[1:]  # the first is that of a sequence layer before it, see `decoder`
        return {
            "gate": linear(keys[0], width, hidden),
            "up": linear(keys[1], width, hidden),
            "down": linear(keys[2], hidden, width),
        }

    def apply(params: PyTree, x: Array) -> Array:
        return product(jax.nn.silu(product(x, params["gate"])) * product(x, params["up"]), params["down"])

    return memoryless("swiglu", width, init, apply)


@checked
def cms(width: Count, hidden: Count, levels: Count = 3) -> Mixer:
    """A continuum memory system: a chain of networks, which are to move at frequencies of their own.

        h_0 = x;   h_l = h_{l-1} + silu(h_{l-1} U_l) D_l;   y = h_L - x

    "level_0" is applied first. How often a level moves is said by what trains it: by optimiser steps, on the loss of
    the whole network, with `optimisers.clocks(optimiser, path -> C)`; along each sequence with
    `language.ttt_e2e(decoder, {"ffn/level_0": 64, "ffn/level_1": 16})`. With one level it is a feed-forward network.

    Args:
      width: D.
      hidden: of U_l `[D, hidden]` and D_l `[hidden, D]`.
      levels: L.

    Returns:
      A `Mixer` without memory of its own; parameters "level_l", each with "up" and "down".

    Raises:
      ValueError: sizes below 1.

    Source: Behrouz et al. 2025, arXiv 2512.24695, section 7 (sequential; all initial states are learned together).

    Differences from the paper or its code: no code is published. The text counts levels from the slowest, and its
    figures put the fastest first; here neither is fixed. Networks are residual, as the paper's memories are.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = cms(8, 16, levels=2)
      >>> layer.apply(layer.init(jax.random.key(0)), jnp.ones((1, 5, 8))).shape
      (1, 5, 8)
    """

    def init(key: Key) -> PyTree:
        keys = jax.random.split(key, (levels, 2))
        return {
            f"level_{i}": {"up": linear(up, width, hidden), "down": levels**-0.5 * linear(down, hidden, width)}
            for i, (up, down) in enumerate(keys)
        }

    def apply(params: PyTree, x: Array) -> Array:
        h = x
        for i in range(levels):
            level = params[f"level_{i}"]
            h = h + product(jax.nn.silu(product(h, level["up"])), level["down"])
        return h - x

    return memoryless("cms", width, init, apply)
