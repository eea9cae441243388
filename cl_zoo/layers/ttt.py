"""Test-time training layers: the hidden state is a model, and reading a token is a step of training it.

What is called a TTT layer differs between publications. This is that of Sun et al. 2024: mini-batches of tokens with a
causal mask within, a reconstruction loss through LayerNorm and a residual, rates learned for every token. (The layers
of video models that came of it use rate 1/b without a mask; LaCT's are in `lact.py`, Titans' in `titans.py`.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cl_zoo.checks import check_whole
from cl_zoo.layers._linear_attention import widen
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
from cl_zoo.layers.mixer import Mixer, causal_mask, from_chunks, head_mixer, head_width, linear, to_chunks
from cl_zoo.layers.norms import EPSILON, layer_norm
from cl_zoo.layers.rotary import rotary
from cl_zoo.types import Array, Key, PyTree

__all__ = ["InnerLoss", "TttCache", "ttt_chunked", "ttt_linear", "ttt_mlp", "ttt_start", "ttt_step"]


class TttCache(NamedTuple):
    """Attributes:
    weights: the fast network at the end of the last whole mini-batch.
    gradient: of the tokens since, added up, each times its own rate.
    """

    weights: list[FastLayer]
    gradient: list[FastLayer]


class InnerLoss(NamedTuple):
    """What the fast network f learns: 1/2 ||LN(f(k)) - (v - k)||^2, and answers: q + LN(f(q)).

    Attributes:
      scale, bias: of LN, `[..., d]`; None is no LN and no residual: the loss is 1/2 ||f(k) - v||^2, the answer f(q).
    """

    scale: Array | None = None
    bias: Array | None = None

    def gradient(self, z: Array, k: Array, v: Array) -> Array:
        """Of each token's loss to z = f(k), `[..., C, d]`."""
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

    the sum over tokens of its mini-batch, and the last token's weights are those the next one begins with.

    Args:
      q, k, v: `[..., T, d]`.
      weights: of the fast network at the start, leaves `[..., n_in, n_out]` and `[..., n_out]`, one layer or two.
      row_rate: `[b]`, by the place of the token that reads.
      token_rate: `[..., T]`, of the token that is learnt from.
      loss: what is learnt.
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

    # Computing a mini-batch again in the backward pass is faster than keeping all of it, and leaves the weights alone.
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
      The answer `[..., d]`, and the cache.
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


def _ttt(
    name: str,
    width: int,
    heads: int,
    *,
    sizes: Sequence[int],
    mini_batch: int,
    base_rate: Array | float,
    average: bool,
    inner_norm: bool,
    convolution: int,
    gate: bool,
    theta: float,
) -> Mixer:
    check_whole(name, "mini_batch", mini_batch, 1)

    def init(key: Key) -> dict[str, Any]:
        keys = jax.random.split(key, len(sizes))
        layers = {
            f"layer_{i}": {
                "kernel": 0.02 * jax.random.normal(k, (heads, n_in, n_out)),
                "bias": jnp.zeros((heads, n_out)),
            }
            for i, (n_in, n_out, k) in enumerate(zip(sizes, sizes[1:], keys))
        }
        params: dict[str, Any] = {
            "weights": layers,
            "rate": {"kernel": linear(keys[-1], width, heads), "bias": jnp.zeros(heads)},
            "row_rate": jnp.zeros(mini_batch),
        }
        if inner_norm:
            params["inner_norm"] = {
                "scale": jnp.ones((heads, width // heads)),
                "bias": jnp.zeros((heads, width // heads)),
            }
        return params

    def pieces(params: PyTree, x: Array) -> tuple[list[FastLayer], Array, Array, InnerLoss]:
        """Weights at the start, rates of rows `[b]` and of tokens `[B, H, ...]`, and the loss."""
        (logit,) = widen(x @ params["rate"]["kernel"].astype(x.dtype))
        token_rate = jnp.moveaxis(jax.nn.sigmoid(logit + params["rate"]["bias"]), -1, 1) * (heads / width)
        offset = params["row_rate"]
        fall = 1 / jnp.arange(1, mini_batch + 1, dtype=offset.dtype) if average else jnp.ones_like(offset)
        norm = params.get("inner_norm", {})
        return (
            fast_weights(params, x.shape[0]),
            base_rate * jnp.maximum(fall + offset, 0),
            token_rate,
            InnerLoss(**norm),
        )

    def fast_weights(params: PyTree, batch_size: int) -> list[FastLayer]:
        """One copy a row of the batch, in float32 at least."""

        def spread(leaf: Array) -> Array:
            return jnp.broadcast_to(widen(leaf)[0], (batch_size, *leaf.shape))

        return [FastLayer(**jax.tree.map(spread, params["weights"][f"layer_{i}"])) for i in range(len(sizes) - 1)]

    def turned(q: Array, k: Array, v: Array, positions: Array) -> tuple[Array, Array, Array]:
        q, k, v = widen(q, k, v)
        return rotary(q, positions, theta, mini_batch), rotary(k, positions, theta, mini_batch), v

    def parallel(params: PyTree, q: Array, k: Array, v: Array, x: Array) -> Array:
        weights, row_rate, token_rate, loss = pieces(params, x)
        q, k, v = turned(q, k, v, jnp.arange(q.shape[-2]))
        return ttt_chunked(q, k, v, weights, row_rate, token_rate, loss, mini_batch=mini_batch)

    def start(params: PyTree, batch_size: int, length: int, dtype: Any) -> TttCache:
        return ttt_start(fast_weights(params, batch_size))

    def recur(
        params: PyTree, cache: TttCache, position: Array, q: Array, k: Array, v: Array, x: Array
    ) -> tuple[Array, TttCache]:
        _, row_rate, token_rate, loss = pieces(params, x)
        q, k, v = turned(q, k, v, position)
        return ttt_step(cache, position % mini_batch, q, k, v, row_rate, token_rate, loss)

    return head_mixer(
        name,
        width,
        heads,
        init=init,
        parallel=parallel,
        start=start,
        recur=recur,
        convolution=convolution,
        norm="layer",
        gate=gelu if gate else None,
    )


def ttt_linear(
    width: int,
    heads: int,
    *,
    mini_batch: int = 16,
    base_rate: Array | float = 1.0,
    average: bool = True,
    inner_norm: bool = True,
    convolution: int = 0,
    gate: bool = False,
    theta: float = 10_000.0,
) -> Mixer:
    """The hidden state is a linear model of each head, f(x) = x W + b, trained on the sequence while reading it.

        loss(k, v) = 1/2 ||LN(f(k)) - (v - k)||^2;   z_t = q_t + LN(f(q_t; W_t))
        W_t = W - sum_{j <= t} eta_tj grad_W loss(k_j, v_j; W)
        eta_tj = base_rate max(0, 1/i + c_i) sigmoid(x_j w + a) / d

    W is what the last mini-batch left, the sum goes over the tokens of t's own, t is in place i of it (from 1), and
    c, w, a, the start W_0, b_0 and LN's numbers are learned. Queries and keys are turned by i, not by t. A LayerNorm
    over all heads follows.

    Args:
      width, heads: D, and H that divides it; d = D / H.
      mini_batch: b, tokens whose gradients are taken at the same weights, at least 1. 1 is online gradient descent, T
        or more is batch gradient descent.
      base_rate: at least 0 to learn (0 is the frozen layer q + LN(q W_0 + b_0), below 0 is gradient ascent); may be
        traced.
      average: rates fall as 1/i, a mean over the mini-batch; False: 1 in its place, a sum, as batch gradient descent
        has it.
      inner_norm: LN and the residuals in loss and answer; False: loss 1/2 ||f(k) - v||^2, answer f(q).
      convolution: width of short convolutions of q, k and v; 0 for none.
      gate: gelu(x W_g) times the output, as in the paper's Mamba backbone.
      theta: base of the rotary positions.

    Returns:
      A `Mixer`; the cache's state is a `TttCache`, the fast weights in float32.

    Raises:
      ValueError: sizes below 1, heads that do not divide the width.

    Source: Sun et al. 2024, arXiv 2407.04620.

    Differences from the paper or its code: with convolutions q and k have projections of their own (the code's Mamba
    backbone shares one), and a SiLU follows; no warm-up of the rate.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> mixer = ttt_linear(8, 2, mini_batch=4)
      >>> mixer.apply(mixer.init(jax.random.key(0)), jnp.ones((1, 10, 8))).shape
      (1, 10, 8)
    """
    d = head_width("ttt_linear", width, heads)
    return _ttt(
        "ttt_linear",
        width,
        heads,
        sizes=(d, d),
        mini_batch=mini_batch,
        base_rate=base_rate,
        average=average,
        inner_norm=inner_norm,
        convolution=convolution,
        gate=gate,
        theta=theta,
    )


def ttt_mlp(
    width: int,
    heads: int,
    *,
    mini_batch: int = 16,
    base_rate: Array | float = 0.1,
    average: bool = True,
    inner_norm: bool = True,
    expansion: int = 4,
    convolution: int = 0,
    gate: bool = False,
    theta: float = 10_000.0,
) -> Mixer:
    """`ttt_linear` with a network of two layers in each head: f(x) = gelu(x W_1 + b_1) W_2 + b_2.

        W_t = W - sum_{j <= t} eta_tj grad_W loss(k_j, v_j; W)   for both layers

    Args:
      width, heads, mini_batch, average, inner_norm, convolution, gate, theta: see `ttt_linear`.
      base_rate: see `ttt_linear`; a tenth of its.
      expansion: hidden units, in widths of a head, at least 1.

    Returns:
      A `Mixer`; the cache's state is a `TttCache`, the fast weights in float32.

    Raises:
      ValueError: sizes below 1, heads that do not divide the width.

    Source: Sun et al. 2024, arXiv 2407.04620.

    Differences from the paper or its code: those of `ttt_linear`; the code warms base_rate up from 0.01.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> mixer = ttt_mlp(8, 2, mini_batch=4)
      >>> mixer.apply(mixer.init(jax.random.key(0)), jnp.ones((1, 10, 8))).shape
      (1, 10, 8)
    """
    check_whole("ttt_mlp", "expansion", expansion, 1)
    d = head_width("ttt_mlp", width, heads)
    return _ttt(
        "ttt_mlp",
        width,
        heads,
        sizes=(d, expansion * d, d),
        mini_batch=mini_batch,
        base_rate=base_rate,
        average=average,
        inner_norm=inner_norm,
        convolution=convolution,
        gate=gate,
        theta=theta,
    )
