"""Networks whose weights learn along a sequence: what test-time-training layers and Titans share.

A fast network is a list of dense layers, `FastLayer`s, with an activation between two of them. The tokens of a chunk
take their gradients at the weights W from the chunk's start; for a dense layer with input x and gradient g of the loss
with respect to its output, one token's gradient is the outer product of the two. So token t,
which reads weights that all tokens i up to it have moved,

    W_t = keep_t W + carry_t S - sum_i read_ti x_i g_i^T

need not have its own copy of them (dual form): y W_t = keep_t y W + carry_t y S - (read o (y x^T)) g. S is what
momentum brings from before the chunk.

Source: Sun et al. 2024, arXiv 2407.04620 (dual form); with decay and momentum: Behrouz et al. 2025, arXiv 2501.00663.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cl_zoo.types import Array, PyTree

__all__ = ["FastLayer", "Movement", "dense", "forward", "gradients", "move", "read", "token_gradient"]

Activation = Callable[[Array], Array]


class FastLayer(NamedTuple):
    """Attributes:
    kernel: `[..., n_in, n_out]`.
    bias: `[..., n_out]`, or None.
    """

    kernel: Array
    bias: Array | None = None


class Movement(NamedTuple):
    """How far the weights have moved, within a chunk and at its end.

    Attributes:
      read: `[..., C, C]`, lower triangular, read_ti.
      keep, carry: `[..., C]`, keep_t and carry_t; None where all weights are kept, and where there is no momentum.
      momentum: `[..., C]`, (S at the chunk's end) = momentum_decay S - sum_i momentum_i x_i g_i^T; None without.
      momentum_decay: `[...]`.
    """

    read: Array
    keep: Array | None = None
    carry: Array | None = None
    momentum: Array | None = None
    momentum_decay: Array | None = None


def dense(layer: FastLayer, *tokens: Array) -> list[Array]:
    """One layer's outputs for each of some sets of tokens `[..., C, n]`, by one matrix product."""
    z = jnp.concatenate(tokens, axis=-2) @ layer.kernel
    z = z if layer.bias is None else z + layer.bias[..., None, :]
    return jnp.split(z, len(tokens), axis=-2)


def forward(
    layers: Sequence[FastLayer], x: Array, activation: Activation, first: Array | None = None
) -> tuple[list[Array], list[Array]]:
    """Inputs and outputs of every layer, for tokens `[..., C, n]`; the last output is the network's. `first` is the
    first layer's output, where it is known."""
    inputs, outputs = [x], dense(layers[0], x) if first is None else [first]
    for layer in layers[1:]:
        inputs.append(activation(outputs[-1]))
        outputs += dense(layer, inputs[-1])
    return inputs, outputs


def gradients(
    layers: Sequence[FastLayer],
    x: Array,
    loss_gradient: Callable[[Array], Array],
    activation: Activation,
    first: Array | None = None,
) -> tuple[list[Array], list[Array]]:
    """Every layer's input, and the gradient of each token's loss at every layer's output, all at one set of weights.

    Args:
      layers: of the fast network.
      x: `[..., C, n]`.
      loss_gradient: the network's output -> gradient of each token's loss at it.
      activation: between layers.
      first: the first layer's outputs for x, where they are known.
    """
    inputs, outputs = forward(layers, x, activation, first)
    found = [loss_gradient(outputs[-1])]
    for layer, z in zip(layers[:0:-1], outputs[-2::-1]):
        _, pull = jax.vjp(activation, z)
        found.append(pull(found[-1] @ jnp.swapaxes(layer.kernel, -1, -2))[0])
    return inputs, found[::-1]


def read(
    layers: Sequence[FastLayer],
    surprise: Sequence[FastLayer] | None,
    movement: Movement,
    inputs: list[Array],
    found: list[Array],
    q: Array,
    activation: Activation,
    first: Array,
) -> Array:
    """The outputs for queries `[..., C, n]`, each by the weights of its own place in the chunk; `first` is the first
    layer's output for them at the chunk's start."""
    y = q
    for i, (layer, x, g) in enumerate(zip(layers, inputs, found, strict=True)):
        y = activation(y) if i else y
        (z,) = dense(layer, y) if i else (first,)
        if movement.keep is not None:
            z = movement.keep[..., None] * z
        if surprise is not None and movement.carry is not None:
            (carried,) = dense(surprise[i], y)
            z = z + movement.carry[..., None] * carried
        products = y @ jnp.swapaxes(x, -1, -2)
        y = z - (movement.read * (products if layer.bias is None else products + 1)) @ g
    return y


def move(
    layers: Sequence[FastLayer],
    surprise: list[FastLayer] | None,
    movement: Movement,
    inputs: list[Array],
    found: list[Array],
) -> tuple[list[FastLayer], list[FastLayer] | None]:
    """Weights and momentum at the chunk's end."""

    def moved(start: FastLayer, x: Array, g: Array, rate: Array, keep: Array | None) -> FastLayer:
        def kept(weights: Array, axes: int) -> Array:
            return weights if keep is None else keep.reshape((*keep.shape, *[1] * axes)) * weights

        kernel = kept(start.kernel, 2) - jnp.swapaxes(x * rate[..., None], -1, -2) @ g
        if start.bias is None:
            return FastLayer(kernel)
        return FastLayer(kernel, kept(start.bias, 1) - (rate[..., None, :] @ g)[..., 0, :])

    keep = None if movement.keep is None else movement.keep[..., -1]
    new = [moved(*one, movement.read[..., -1, :], keep) for one in zip(layers, inputs, found, strict=True)]
    if surprise is None or movement.carry is None or movement.momentum is None:
        return new, surprise
    carry = movement.carry[..., -1]
    new = [
        jax.tree.map(lambda w, s: w + carry.reshape((*carry.shape, *[1] * (w.ndim - carry.ndim))) * s, w, s)
        for w, s in zip(new, surprise, strict=True)
    ]
    next_surprise = [
        moved(*one, movement.momentum, movement.momentum_decay) for one in zip(surprise, inputs, found, strict=True)
    ]
    return new, next_surprise


def token_gradient(
    layers: Sequence[FastLayer], k: Array, loss_gradient: Callable[[Array], Array], activation: Activation
) -> list[FastLayer]:
    """The gradient of one token's loss, `k` `[..., n]`, for all weights, written out (primal form)."""
    inputs, found = gradients(layers, k[..., None, :], loss_gradient, activation)
    return [
        FastLayer(jnp.swapaxes(x, -1, -2) * g, None if layer.bias is None else g[..., 0, :])
        for layer, x, g in zip(layers, inputs, found, strict=True)
    ]


def scaled(rate: Array, tree: PyTree) -> PyTree:
    """rate times every leaf: `[...]` and leaves `[..., ...]`."""
    return jax.tree.map(lambda leaf: rate.reshape((*rate.shape, *[1] * (leaf.ndim - rate.ndim))) * leaf, tree)
