"""Large-chunk test-time training: a gated fast network, updated once per chunk, beside window attention."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from cl_zoo.checks import Count, Range, checked
from cl_zoo.entries import LayerEntry
from cl_zoo.layers._linear_attention import widen
from cl_zoo.layers._rotary import rotary
from cl_zoo.layers.attention import KeyValues, attend_window, empty_key_values, window_step
from cl_zoo.layers.mixer import Mixer, from_chunks, head_mixer, head_width, linear, product, to_chunks
from cl_zoo.layers.norms import normalise, rms_norm
from cl_zoo.types import Array, Key, PyTree

__all__ = ["ENTRY", "LactCache", "SwiGlu", "lact", "lact_chunked", "newton_schulz"]


class SwiGlu(NamedTuple):
    """f(x) = (silu(x gate) * (x up)) down.

    Attributes:
      gate, up: `[..., d, h]`.
      down: `[..., h, d]`.
    """

    gate: Array
    up: Array
    down: Array

    def __call__(self, x: Array) -> Array:
        """`[..., C, d]` -> `[..., C, d]`."""
        return (jax.nn.silu(x @ self.gate) * (x @ self.up)) @ self.down


class LactCache(NamedTuple):
    """Attributes:
    weights: the fast network of the current chunk.
    gradient: of the chunk's tokens so far.
    momentum: of the chunks before; None without.
    momentum_decay: `[B, H]`, of the chunk's tokens so far, added up.
    window: keys and values of the window.
    """

    weights: SwiGlu
    gradient: SwiGlu
    momentum: SwiGlu | None
    momentum_decay: Array
    window: KeyValues


def newton_schulz(matrix: Array, steps: int = 5) -> Array:
    """Steps towards the nearest orthogonal matrix, of `[..., n, m]`: five bring singular values to 0.7 to 1.2.

        X <- a X + (b A + c A^2) X,   A = X X^T,   (a, b, c) = (3.4445, -4.7750, 2.0315),   X_0 = matrix / ||matrix||_F

    Source: Jordan et al. 2024, Muon, kellerjordan.github.io/posts/muon.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = jnp.swapaxes(matrix, -1, -2) if tall else matrix
    x = x / (_norm(x, (-2, -1)) + 1e-7)
    for _ in range(steps):
        square = x @ jnp.swapaxes(x, -1, -2)
        x = a * x + (b * square + c * square @ square) @ x
    return jnp.swapaxes(x, -1, -2) if tall else x


def _gradient(weights: SwiGlu, k: Array, v: Array, rates: Array) -> SwiGlu:
    """sum over tokens of rate times the gradient of -f(k) . v: k, v `[..., C, d]`, rates `[..., C, 3]`."""
    gated, up = k @ weights.gate, k @ weights.up
    active, pull = jax.vjp(jax.nn.silu, gated)
    back = -v @ jnp.swapaxes(weights.down, -1, -2)

    def outer(x: Array, g: Array, i: int) -> Array:
        return jnp.swapaxes(x * rates[..., i : i + 1], -1, -2) @ g

    return SwiGlu(outer(k, pull(back * up)[0], 0), outer(k, back * active, 1), outer(active * up, -v, 2))


def _norm(x: Array, axis: int | tuple[int, int]) -> Array:
    """||x||; at 0 it is 1e-15, and has a gradient of 0, where that of a root is infinite."""
    return jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=axis, keepdims=True), 1e-30))


def _norms(weights: SwiGlu) -> SwiGlu:
    """Of the weights of every output unit."""
    return jax.tree.map(lambda w: _norm(w, -2), weights)


def _write(
    weights: SwiGlu, norms: SwiGlu, gradient: SwiGlu, momentum: SwiGlu | None, momentum_decay: Array, muon: bool
) -> tuple[SwiGlu, SwiGlu | None]:
    """The fast network after a chunk; every unit keeps the norm that it began with."""
    if momentum is not None:
        gradient = momentum = jax.tree.map(lambda m, g: momentum_decay[..., None, None] * m + g, momentum, gradient)
    if muon:
        gradient = jax.tree.map(newton_schulz, gradient)
    moved = jax.tree.map(jnp.subtract, weights, gradient)
    return jax.tree.map(lambda w, now, norm: w / now * norm, moved, _norms(moved), norms), momentum


def lact_chunked(
    q: Array,
    k: Array,
    v: Array,
    weights: SwiGlu,
    rates: Array,
    momentum: Array | None = None,
    *,
    chunk: int,
    muon: bool = False,
) -> Array:
    """z_t = f(q_t; W of the chunk's start);   after a chunk:  W <- units of (W - G) at their initial norms,

        G = sum_t rate_t grad (-f(k_t) . v_t)  (+ mean_t momentum_t times the last G) (then orthogonalised, if muon)

    A token never reads what its own chunk wrote, so window attention is needed beside it.

    Args:
      q, k, v: `[..., T, d]`.
      weights: at the start.
      rates: `[..., T, 3]`, of gate, up and down.
      momentum: `[..., T]` in [0, 1]; None is none.
      chunk: C.
      muon: orthogonalise G.

    Returns:
      `[..., T, d]`.

    Source: Zhang et al. 2025, arXiv 2505.23884.
    """
    time = q.shape[-2]
    norms, still = _norms(weights), None if momentum is None else jax.tree.map(jnp.zeros_like, weights)
    if time <= chunk:
        return weights(q)
    chunks = [to_chunks(a, chunk) for a in (q, k, v, rates)]
    decay = jnp.zeros_like(chunks[0][..., 0, 0])
    if momentum is not None:
        decay = jnp.mean(to_chunks(momentum, chunk, -1), axis=-1)

    def step(carry: tuple[SwiGlu, SwiGlu | None], chunk: tuple[Array, ...]) -> tuple[Any, Array]:
        weights, still = carry
        q, k, v, rates, decay = chunk
        return _write(weights, norms, _gradient(weights, k, v, rates), still, decay, muon), weights(q)

    _, z = jax.lax.scan(step, (weights, still), (*chunks, decay))
    return from_chunks(z, time)


@checked
def lact(
    width: int,
    heads: int,
    *,
    chunk: Count = 256,
    window: Count | None = None,
    expansion: Count = 1,
    base_rate: Annotated[float, Range(0, above=True)] = 0.01,
    momentum: bool = True,
    muon: bool = False,
    convolution: int = 0,
    theta: float = 10_000.0,
) -> Mixer:
    """Window attention, and a fast SwiGLU network that is updated once per chunk with all its tokens:

        y_t = window attention(q, k, v)_t + s RMSNorm(f(q_t; W));   f(x) = (silu(x W_0) * (x W_2)) W_1
        after a chunk:  W <- units of W - sum_t rate_t grad (-f(k_t) . v_t), scaled to their initial norms

    Each token has three rates, softplus(x_t w + a), one for each matrix. Large chunks make large matrix products.
    Within a chunk, the window sees what f has not learned yet.

    Args:
      width, heads: D, and H that divides it.
      chunk: C, tokens per update, at least 1.
      window: tokens that attention sees; None is `chunk`. A shorter one leaves a gap.
      expansion: hidden units of f, in widths of a head, at least 1.
      base_rate: the rate before anything is learned, above 0.
      momentum: add the mean of the chunk's sigmoid(x_t w' + a') times the last chunk's step.
      muon: orthogonalise the step; then its size does not depend on the rates, but on `expansion` and d.
      convolution: width of short convolutions of q, k and v; 0 for none.
      theta: base of the window's rotary positions.

    Returns:
      A `Mixer`; the cache's state is a `LactCache`, the fast weights in float32.

    Raises:
      ValueError: sizes below 1, base_rate not above 0, heads that do not divide the width.

    Source: Zhang et al. 2025, arXiv 2505.23884.

    Differences from the paper or its code: the paper's chunks have 2048 tokens and more; queries and keys of both parts
    are the same projections, without scales and shifts of their own; s, d numbers a head, begins at 1. In the code
    heads share the norm's scale; its language model rotates fast queries and keys, has five steps of coefficients for
    the orthogonalisation, an epsilon of 1e-5 and a base rate of 0.001.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> mixer = lact(8, 2, chunk=4)
      >>> mixer.apply(mixer.init(jax.random.key(0)), jnp.ones((1, 10, 8))).shape
      (1, 10, 8)
    """
    seen = chunk if window is None else window
    d = head_width("lact", width, heads)
    h = expansion * d

    def init(key: Key) -> dict[str, Any]:
        keys = jax.random.split(key, 5)
        shapes = {"gate": (d, h), "up": (d, h), "down": (h, d)}
        params: dict[str, Any] = {
            "weights": {n: jax.random.normal(k, (heads, *s)) / s[0] ** 0.5 for (n, s), k in zip(shapes.items(), keys)},
            "rate": {
                "kernel": linear(keys[3], width, 3 * heads),
                "bias": jnp.full(3 * heads, jnp.log(jnp.expm1(base_rate))),
            },
            "fast_norm": {"scale": jnp.ones((heads, d))},
        }
        if momentum:
            params["momentum"] = {"kernel": linear(keys[4], width, heads), "bias": jnp.zeros(heads)}
        return params

    def fast(params: PyTree, batch_size: int) -> SwiGlu:
        return SwiGlu(
            **{n: jnp.broadcast_to(widen(w)[0], (batch_size, *w.shape)) for n, w in params["weights"].items()}
        )

    def gates(params: PyTree, x: Array) -> tuple[Array, Array | None]:
        """Rates `[B, H, ..., 3]` and momentum `[B, H, ...]`."""
        (logit,) = widen(product(x, params["rate"]["kernel"]))
        rates = jax.nn.softplus(logit + params["rate"]["bias"])
        rates = jnp.moveaxis(rates.reshape((*rates.shape[:-1], heads, 3)), -2, 1)
        if not momentum:
            return rates, None
        (logit,) = widen(product(x, params["momentum"]["kernel"]))
        return rates, jnp.moveaxis(jax.nn.sigmoid(logit + params["momentum"]["bias"]), -1, 1)

    def unit(q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        """What the fast network reads and learns."""
        q, k, v = widen(q, k, v)
        return normalise(jax.nn.silu(q)), normalise(jax.nn.silu(k)), jax.nn.silu(v)

    def both(params: PyTree, attended: Array, answered: Array) -> Array:
        """`[B, H, ..., d]` of the window and of the fast network."""
        scale = params["fast_norm"]["scale"].reshape((heads, *[1] * (answered.ndim - 3), d))
        return attended + rms_norm(answered, scale).astype(attended.dtype)

    def parallel(params: PyTree, q: Array, k: Array, v: Array, x: Array) -> Array:
        positions = jnp.arange(q.shape[-2])
        attended = attend_window(rotary(q, positions, theta), rotary(k, positions, theta), v, seen)
        q, k, v = unit(q, k, v)
        answered = lact_chunked(q, k, v, fast(params, x.shape[0]), *gates(params, x), chunk=chunk, muon=muon)
        return both(params, attended, answered)

    def start(params: PyTree, batch_size: int, length: int, dtype: Any) -> LactCache:
        weights = fast(params, batch_size)
        nothing = jax.tree.map(jnp.zeros_like, weights)
        window = empty_key_values(width // heads, heads, batch_size, seen, dtype)
        decay = jnp.zeros((batch_size, heads), weights.gate.dtype)
        return LactCache(weights, nothing, jax.tree.map(jnp.copy, nothing) if momentum else None, decay, window)

    def recur(
        params: PyTree, cache: LactCache, position: Array, q: Array, k: Array, v: Array, x: Array
    ) -> tuple[Array, LactCache]:
        attended, window = window_step(
            cache.window, position, rotary(q, position, theta), rotary(k, position, theta), v
        )
        q, k, v = (a[..., None, :] for a in unit(q, k, v))
        rates, decay = gates(params, x)
        answered = cache.weights(q)[..., 0, :]
        gradient = jax.tree.map(jnp.add, cache.gradient, _gradient(cache.weights, k, v, rates[..., None, :]))
        total = cache.momentum_decay if decay is None else cache.momentum_decay + decay

        def written(_: Any) -> tuple[SwiGlu, SwiGlu, SwiGlu | None, Array]:
            norms = _norms(fast(params, x.shape[0]))
            new, still = _write(cache.weights, norms, gradient, cache.momentum, total / chunk, muon)
            return new, jax.tree.map(jnp.zeros_like, gradient), still, jnp.zeros_like(total)

        last = (position + 1) % chunk == 0
        unchanged = (cache.weights, gradient, cache.momentum, total)
        weights, gradient, still, total = jax.lax.cond(last, written, lambda _: unchanged, 0)
        return both(params, attended, answered), LactCache(weights, gradient, still, total, window)

    return head_mixer(
        "lact", width, heads, init=init, parallel=parallel, start=start, recur=recur, convolution=convolution, norm=None
    )


ENTRY = LayerEntry(
    name="lact",
    summary="a gated network of weights of fixed norm, updated once per large chunk, beside window attention",
    factory=lact,
    arguments={"chunk": 4, "window": 3},
    papers=("zhang2025test",),
    state="constant",
)
