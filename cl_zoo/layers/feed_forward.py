"""Feed-forward networks of decoders: each token by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cl_zoo.checks import Count, checked
from cl_zoo.layers.mixer import Mixer, linear, product
from cl_zoo.types import Array, Key, PyTree

__all__ = ["memoryless", "swiglu"]


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
        if prefix is not None:
            raise ValueError(f"{name}: prefix is given, but only softmax attention can begin after keys and values")
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
