"""The core of test-time training layers: a fast network that learns by gradient descent on mini-batches of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cl_zoo.layers.fast_weights import (
    FastLayer,
    Movement,
    dense,
    forward,
    gradients,
    move,
    read,
    scaled,
    token_gradient,
)
from cl_zoo.layers.mixer import causal_mask, from_chunks, to_chunks
from cl_zoo.layers.norms import EPSILON, layer_norm
from cl_zoo.types import Array

__all__ = ["InnerLoss", "TttCache", "gelu", "ttt_chunked", "ttt_start", "ttt_step"]


class TttCache(NamedTuple):
    """Attributes:
    weights: the fast network at the end of the last whole mini-batch.
    gradient: of the tokens since, added up, each times its own rate.
    """

    weights: list[FastLayer]
    gradient: list[FastLayer]


class InnerLoss(NamedTuple):
    """The loss of the fast network f, 1/2 ||LN(f(k)) - (v - k)||^2, and its output, q + LN(f(q)).

    Attributes:
      scale, bias: of LN, `[..., d]`; None is no LN and no residual: the loss is 1/2 ||f(k) - v||^2, the output f(q).
    """

    scale: Array | None = None
    bias: Array | None = None

    def gradient(self, z: Array, k: Array, v: Array) -> Array:
        """Of each token's loss at z = f(k), `[..., C, d]`."""
        if self.scale is None or self.bias is None:
            return z - v
        scale, bias = self.scale[..., None, :], self.bias[..., None, :]
        z = z - jnp.mean(z, axis=-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(z), axis=-1, keepdims=True) + EPSILON)
        unit = z * inverse
        g = scale * (scale * unit + bias - (v - k))
        along = jnp.mean(g * unit, axis=-1, keepdims=True)
        return inverse * (g - jnp.mean(g, axis=-1, keepdims=True) - unit * along)

    def answer(self, z: Array, q: Array) -> Array:
        """From z = f(q)."""
        if self.scale is None or self.bias is None:
            return z
        return q + layer_norm(z, self.scale[..., None, :], self.bias[..., None, :])


def gelu(x: Array) -> Array:
    """The activation of TTT-MLP."""
    return jax.nn.gelu(x, approximate=True)


def ttt_chunked(
    q: Array,
    k: Array,
    v: Array,
    weights: Sequence[FastLayer],
    row_rate: Array,
    token_rate: Array,
    loss: InnerLoss,
    *,
    mini_batch: int,
    activation: Callable[[Array], Array] = gelu,
) -> Array:
    """The dual form of mini-batch test-time training, a scan over mini-batches.

    With W the weights at the end of the last mini-batch, token t in place i of its own reads

        W_t = W - sum_{j <= t} eta_tj grad_W loss(k_j, v_j; W),   eta_tj = row_rate_i token_rate_j,

    the sum over tokens of its mini-batch, and the next one begins with the last token's weights.

    Args:
      q, k, v: `[..., T, d]`.
      weights: of the fast network at the start, leaves `[..., n_in, n_out]` and `[..., n_out]`, one layer or two.
      row_rate: `[b]`, by the place of the token that reads.
      token_rate: `[..., T]`, of the token that is learned from.
      loss: of the fast network.
      mini_batch: b. 1 is online gradient descent, T or more is one batch step from the start.
      activation: between two layers.

    Returns:
      `[..., T, d]`.

    Source: Sun et al. 2024, arXiv 2407.04620.
    """
    time = q.shape[-2]
    size = min(mini_batch, max(time, 1))
    q, k, v = (to_chunks(a, size) for a in (q, k, v))
    rates = to_chunks(token_rate, size, -1)
    mask = causal_mask(size) * row_rate[:size, None]

    def step(layers: list[FastLayer], chunk: tuple[Array, ...]) -> tuple[list[FastLayer], Array]:
        q, k, v, rate = chunk
        of_keys, of_queries = dense(layers[0], k, q)
        inputs, found = gradients(layers, k, lambda z: loss.gradient(z, k, v), activation, of_keys)
        movement = Movement(mask * rate[..., None, :])
        z = read(layers, None, movement, inputs, found, q, activation, of_queries)
        return move(layers, None, movement, inputs, found)[0], z

    # Computing a mini-batch again in the backward pass is faster than storing all of it: only weights are stored.
    _, z = jax.lax.scan(jax.checkpoint(step), list(weights), (q, k, v, rates))
    return from_chunks(loss.answer(z, q), time)


def ttt_start(weights: Sequence[FastLayer]) -> TttCache:
    """The cache of an empty sequence."""
    return TttCache(list(weights), jax.tree.map(jnp.zeros_like, list(weights)))


def ttt_step(
    cache: TttCache,
    place: Array,
    q: Array,
    k: Array,
    v: Array,
    row_rate: Array,
    token_rate: Array,
    loss: InnerLoss,
    *,
    activation: Callable[[Array], Array] = gelu,
) -> tuple[Array, TttCache]:
    """One more token, with its weights written out (the primal form).

    Args:
      cache: so far.
      place: `i32[]`, the token's place in its mini-batch, from 0.
      q, k, v: `[..., d]`.
      row_rate: `[b]`.
      token_rate: `[...]`.
      loss, activation: see `ttt_chunked`.

    Returns:
      The output `[..., d]`, and the cache.
    """
    k_row, v_row = k[..., None, :], v[..., None, :]
    found = token_gradient(cache.weights, k, lambda z: loss.gradient(z, k_row, v_row), activation)
    gradient = jax.tree.map(jnp.add, cache.gradient, scaled(token_rate, found))
    now = jax.tree.map(lambda w, g: w - row_rate[place] * g, cache.weights, gradient)
    y = forward(now, q[..., None, :], activation)[1][-1]
    last = place == row_rate.shape[0] - 1
    weights = jax.tree.map(lambda new, old: jnp.where(last, new, old), now, cache.weights)
    gradient = jax.tree.map(lambda g: jnp.where(last, 0, g), gradient)
    return loss.answer(y, q[..., None, :])[..., 0, :], TttCache(weights, gradient)
