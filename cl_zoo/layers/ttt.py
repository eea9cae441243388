"""Test-time training layers: the hidden state is a model, and reading a token is a step of training it.

What is called a TTT layer differs between publications. This is that of Sun et al. 2024: mini-batches of tokens with a
causal mask within, a reconstruction loss through LayerNorm and a residual, rates learned for every token. (The layers
of video models derived from it use rate 1/b without a mask; LaCT's are in `lact.py`, Titans' in `titans.py`.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cl_zoo.checks import Count, check_whole, checked
from cl_zoo.entries import LayerEntry
from cl_zoo.layers._linear_attention import widen
from cl_zoo.layers._rotary import rotary
from cl_zoo.layers.fast_weights import (
    FastLayer,
)
from cl_zoo.layers.mixer import Mixer, head_mixer, head_width, linear, product
from cl_zoo.layers.ttt_core import InnerLoss, TttCache, gelu, ttt_chunked, ttt_start, ttt_step
from cl_zoo.types import Array, Key, PyTree

__all__ = ["ENTRY", "ttt_linear", "ttt_mlp"]


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
        """Weights at the start, rates of places `[b]` and of tokens `[B, H, ...]`, and the loss."""
        (logit,) = widen(product(x, params["rate"]["kernel"]))
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
        """One copy per sequence, in float32 at least."""

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


@checked
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
    c, w, a, the start W_0, b_0 and LN's numbers are learned. Queries and keys are rotated by i, not by t. A LayerNorm
    over all heads follows.

    Args:
      width, heads: D, and H that divides it; d = D / H.
      mini_batch: b, tokens whose gradients are taken at the same weights, at least 1. 1 is online gradient descent, T
        or more is batch gradient descent.
      base_rate: at least 0 to learn (0 is the frozen layer q + LN(q W_0 + b_0), below 0 is gradient ascent); may be
        traced.
      average: rates fall as 1/i, a mean over the mini-batch; False: 1 in its place, a sum, as batch gradient descent
        has it.
      inner_norm: LN and the residuals in loss and output; False: loss 1/2 ||f(k) - v||^2, output f(q).
      convolution: width of short convolutions of q, k and v; 0 for none.
      gate: gelu(x W_g) times the output, as in the paper's Mamba backbone.
      theta: base of the rotary positions.

    Returns:
      A `Mixer`; the cache's state is a `TttCache`, the fast weights in float32.

    Raises:
      ValueError: sizes below 1, heads that do not divide the width.

    Source: Sun et al. 2024, arXiv 2407.04620.

    Differences from the paper or its code: with convolutions q and k have projections of their own (the code's Mamba
    backbone shares one), and a SiLU follows; no warm-up of the rate. The code convolves q and k only, with a bias; its
    initial weights have a deviation of 0.02.

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


@checked
def ttt_mlp(
    width: int,
    heads: int,
    *,
    mini_batch: int = 16,
    base_rate: Array | float = 0.1,
    average: bool = True,
    inner_norm: bool = True,
    expansion: Count = 4,
    convolution: int = 0,
    gate: bool = False,
    theta: float = 10_000.0,
) -> Mixer:
    """`ttt_linear` with a network of two layers in each head: f(x) = gelu(x W_1 + b_1) W_2 + b_2.

        W_t = W - sum_{j <= t} eta_tj grad_W loss(k_j, v_j; W)   for both layers

    Args:
      width, heads, mini_batch, average, inner_norm, convolution, gate, theta: see `ttt_linear`.
      base_rate: see `ttt_linear`; a tenth of that by default.
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


ENTRY = (
    LayerEntry(
        name="ttt_linear",
        summary="a linear model with LayerNorm and residual, trained by gradient descent on mini-batches of tokens",
        factory=ttt_linear,
        arguments={"mini_batch": 4},
        numbers=("base_rate",),
        papers=("sun2024learning",),
        state="constant",
        frozen={"base_rate": 0.0},
    ),
    LayerEntry(
        name="ttt_mlp",
        summary="a network with LayerNorm and residual, trained by gradient descent on mini-batches of tokens",
        factory=ttt_mlp,
        arguments={"mini_batch": 4, "expansion": 2},
        numbers=("base_rate",),
        papers=("sun2024learning",),
        state="constant",
        frozen={"base_rate": 0.0},
    ),
)
