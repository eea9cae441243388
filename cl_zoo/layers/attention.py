"""Softmax attention, over all tokens before or over a window of them: what linear-time layers are compared with."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cl_zoo.checks import Count, checked
from cl_zoo.entries import LayerEntry
from cl_zoo.layers._blocks import SIZE, attend_by_blocks
from cl_zoo.layers._rotary import RotaryScaling, rotary
from cl_zoo.layers.mixer import Mixer, causal_mask, from_chunks, head_mixer, head_width, to_chunks
from cl_zoo.layers.norms import EPSILON, rms_norm
from cl_zoo.types import Array, Key, PyTree

__all__ = ["ENTRY", "KeyValues", "attend", "attend_window", "softmax_attention", "window_attention"]


class KeyValues(NamedTuple):
    """Attributes:
    k: `[B G, d, L]`, keys (already rotated) of G key-value heads, laid out as the product with a query reads them: XLA
      would transpose the whole cache for every token.
    v: `[B G, L, d]`, their values. L tokens at most; a ring of L tokens for windows.
    padding: `i32[B]`, places at the beginning of each sequence that are never seen; None is none.
    """

    k: Array
    v: Array
    padding: Array | None = None


def attend(q: Array, k: Array, v: Array, *, scale: float | None = None) -> Array:
    """z_t = sum_{s <= t} p_ts v_s,   p_t = softmax_s(scale q_t . k_s).

    Args:
      q: `[B, H, T, d]`.
      k, v: `[B, G, T, d]`, G dividing H: each serves H / G queries.
      scale: None is 1 / sqrt(d).

    Returns:
      `[B, H, T, d]`; softmax in float32 at least.

    Source: Vaswani et al. 2017, arXiv 1706.03762; shared keys: Ainslie et al. 2023, arXiv 2305.13245.
    """
    heads, time, d = q.shape[1:]
    groups = k.shape[1]
    if jax.default_backend() == "cpu" and time > SIZE:
        scaled = (q * (d**-0.5 if scale is None else scale)).reshape((-1, heads // groups, time, d))
        return attend_by_blocks(scaled, *(a.reshape((-1, time, d)) for a in (k, v))).reshape(q.shape)
    if jax.default_backend() == "cpu" or q.dtype == jnp.float64:  # the fused kernel has a softmax in float32
        return jax.checkpoint(_attend_seen, static_argnums=4)(q, *_merged(k, v), causal_mask(time), scale)
    z = jax.nn.dot_product_attention(*(jnp.moveaxis(a, 1, 2) for a in (q, k, v)), scale=scale, is_causal=True)
    return jnp.moveaxis(z, 2, 1)


def _attend_seen(q: Array, k: Array, v: Array, seen: Array, scale: float | None) -> Array:
    """`[B, H, T, d]` to those of k `[B G, d, L]`, v `[B G, L, d]` that `seen` `bool[T, L]` or `bool[B, 1, 1, T, L]`
    marks."""
    batch, heads, time, d = q.shape
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("ntd,ndl->ntl", q.reshape((len(k), -1, d)), k, preferred_element_type=wide)
    by_head = scores.reshape((batch, len(k) // batch, -1, time, k.shape[-1]))
    by_head = jnp.where(seen, by_head * (d**-0.5 if scale is None else scale), jnp.finfo(wide).min)
    rows = jax.nn.softmax(by_head.reshape((-1, k.shape[-1])))  # one axis of rows, as in `rms_norm`
    z = jnp.einsum("ntl,nld->ntd", rows.reshape(scores.shape).astype(v.dtype), v)
    return z.reshape((batch, heads, time, d))


def _merged(k: Array, v: Array) -> tuple[Array, Array]:
    """Of `[B, G, T, d]`, as `KeyValues` has them."""
    k = jnp.swapaxes(k, -1, -2)
    return k.reshape((-1, *k.shape[2:])), v.reshape((-1, *v.shape[2:]))


def attend_window(
    q: Array,
    k: Array,
    v: Array,
    window: int,
    *,
    scale: float | None = None,
    before: tuple[Array, Array, Array] | None = None,
) -> Array:
    """`attend` to the last `window` tokens alone, the token itself among them: t - window < s <= t.

    Tokens are cut into chunks of `window`, each of which sees itself and the one before it: time linear in T. With
    `before`, k and v `[B, G, window, d]` of the tokens before these, of which the last n are there, `i32[]`.
    """
    time = q.shape[-2]
    size = min(window, time)
    q, k, v = (to_chunks(a, size) for a in (q, k, v))
    there, length = jnp.int32(0), size
    first_k, first_v = (jnp.zeros_like(a[0]) for a in (k, v))
    if before is not None:
        first_k, first_v, there = before
        length = window  # what is before them is longer than they are, where they are one chunk

    def with_previous(a: Array, first: Array) -> Array:
        previous = first[None] if len(a) == 1 else jnp.concatenate([first[None], a[:-1]])
        return jnp.concatenate([previous, a], axis=-2)

    row, column = jnp.arange(size)[:, None] + length, jnp.arange(length + size)
    seen = (column <= row) & (column > row - window)
    is_first = jnp.arange(q.shape[0])[:, None, None] == 0
    seen = seen & ~(is_first & (column < length - there))
    k, v = jax.vmap(_merged)(with_previous(k, first_k), with_previous(v, first_v))
    z = jax.vmap(lambda q, k, v, seen: _attend_seen(q, k, v, seen, scale))(q, k, v, seen)
    return from_chunks(z, time)


def _attend_filled(q: Array, cache: KeyValues, position: Array) -> Array:
    """Tokens `[B, H, T, d]` at the places position, position + 1, ... of a cache to those up to their own."""

    def rows(q: Array, first: Array) -> Array:
        column = jnp.arange(cache.v.shape[1])
        seen = column <= (first + jnp.arange(q.shape[2]))[:, None]
        if cache.padding is not None:
            seen = seen & (column >= cache.padding[:, None, None, None, None])
        return _attend_seen(q, cache.k, cache.v, seen, None)

    time = q.shape[2]
    if time <= SIZE or jax.default_backend() != "cpu":
        return rows(q, position)
    blocks = to_chunks(q, SIZE)
    z = jax.lax.map(lambda each: rows(*each), (blocks, position + SIZE * jnp.arange(len(blocks))))
    return from_chunks(z, time)


def empty_key_values(
    head_size: int, heads: int, batch_size: int, length: int, dtype: Any, padding: Array | None = None
) -> KeyValues:
    """Room for `length` tokens."""
    n = batch_size * heads
    return KeyValues(jnp.zeros((n, head_size, length), dtype), jnp.zeros((n, length, head_size), dtype), padding)


def window_extend(cache: KeyValues, position: Array, q: Array, k: Array, v: Array) -> tuple[Array, KeyValues]:
    """T more tokens `[B, H, T, d]` (q, k already rotated), with a ring of as many places as the window has."""
    size, batch = cache.v.shape[1], len(q)
    # In order: the last is the token before these.
    old_k, old_v = jnp.roll(cache.k, -position % size, -1), jnp.roll(cache.v, -position % size, -2)
    before_k, before_v = (a.reshape((batch, -1, *a.shape[1:])) for a in (jnp.swapaxes(old_k, -1, -2), old_v))
    z = attend_window(q, k, v, size, before=(before_k, before_v, jnp.minimum(position, size)))
    turn = (position + q.shape[2]) % size
    new_k, new_v = _merged(k, v)
    new_k = jnp.concatenate([old_k, new_k.astype(old_k.dtype)], -1)[..., -size:]
    new_v = jnp.concatenate([old_v, new_v.astype(old_v.dtype)], -2)[..., -size:, :]
    return z, KeyValues(jnp.roll(new_k, turn, -1), jnp.roll(new_v, turn, -2))


def window_step(cache: KeyValues, position: Array, q: Array, k: Array, v: Array) -> tuple[Array, KeyValues]:
    """One more token (q, k already rotated) in a ring of as many places as the window has."""
    size = cache.v.shape[1]
    place, (k, v) = position % size, (a.reshape((-1, a.shape[-1])) for a in (k, v))
    cache = KeyValues(cache.k.at[..., place].set(k), cache.v.at[:, place].set(v))
    seen = (jnp.arange(size) <= position)[None]
    return _attend_seen(q[:, :, None], cache.k, cache.v, seen, None)[:, :, 0], cache


@checked
def softmax_attention(
    width: int,
    heads: int,
    *,
    kv_heads: int | None = None,
    head_size: int | None = None,
    biases: Sequence[str] = (),
    qk_norm: bool = False,
    convolution: int = 0,
    theta: float = 10_000.0,
    scaling: RotaryScaling | None = None,
    epsilon: float = EPSILON,
) -> Mixer:
    """z_t = sum_{s <= t} softmax_s(q_t . k_s / sqrt(d)) v_s, queries and keys rotated by their positions.

    Time is quadratic in T, and the cache grows with it; it remembers every earlier token exactly.

    Args:
      width, heads: D, and H that divides it.
      kv_heads: heads of keys and values, dividing H; None is H.
      head_size: d; None is D / H, and otherwise H need not divide D.
      biases: which of the projections "query", "key", "value", "output" have a bias.
      qk_norm: an RMSNorm of every query and key, before they are rotated.
      convolution: width of short convolutions of q, k and v; 0 for none.
      theta: base of the rotary positions.
      scaling: of the rotary wavelengths.
      epsilon: of those norms.

    Returns:
      A `Mixer`; its cache holds `length` keys and values.

    Raises:
      ValueError: sizes below 1, or that do not divide each other; unknown biases.

    Source: Vaswani et al. 2017, arXiv 1706.03762; qk_norm: Yang et al. 2025 (Qwen3), arXiv 2505.09388.

    Differences from the paper or its code: rotary positions, no biases unless asked for, no dropout, as in
    current decoders.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> mixer = softmax_attention(8, 2)
      >>> mixer.apply(mixer.init(jax.random.key(0)), jnp.ones((1, 5, 8))).shape
      (1, 5, 8)
    """
    d = head_width("softmax_attention", width, heads) if head_size is None else head_size

    def turned(params: PyTree, q: Array, k: Array, positions: Array) -> tuple[Array, Array]:
        return _turned(params, q, k, positions, qk_norm, epsilon, theta, scaling)

    def parallel(params: PyTree, q: Array, k: Array, v: Array, x: Array) -> Array:
        return attend(*turned(params, q, k, jnp.arange(q.shape[-2])), v)

    def start(
        params: PyTree,
        batch_size: int,
        length: int,
        dtype: Any,
        padding: Array | None = None,
        prefix: tuple[Array, Array] | None = None,
    ) -> KeyValues:
        cache = empty_key_values(d, kv_heads or heads, batch_size, length, dtype, padding)
        if prefix is None:
            return cache
        if padding is not None:
            raise ValueError("softmax_attention: a prefix and padding cannot both be given")
        shapes = (kv_heads or heads, d), (kv_heads or heads, d)
        k, v = prefix
        places = k.shape[-1]
        if (k.shape[:-1], (v.shape[0], v.shape[2])) != shapes or v.shape[1] != places or places > length:
            raise ValueError(
                f"softmax_attention: prefix has the shapes {k.shape} and {v.shape}, but they must be"
                f" {(*shapes[0], 'P')} and {(shapes[0][0], 'P', d)} with P at most {length}"
            )
        keys, values = (jnp.tile(a, (batch_size, 1, 1)).astype(dtype) for a in (k, v))
        return cache._replace(k=cache.k.at[..., :places].set(keys), v=cache.v.at[:, :places].set(values))

    def extend(
        params: PyTree, cache: KeyValues, position: Array, q: Array, k: Array, v: Array, x: Array
    ) -> tuple[Array, KeyValues]:
        places = position + jnp.arange(q.shape[2])
        skipped = jnp.int32(0) if cache.padding is None else cache.padding[:, None, None]
        q, k = turned(params, q, k, jnp.maximum(places - skipped, 0))
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(store, one.astype(store.dtype), position, axis)
            for store, one, axis in zip((cache.k, cache.v), _merged(k, v), (2, 1))
        )
        new = KeyValues(keys, values, cache.padding)

        def to_cache() -> Array:
            return _attend_filled(q, new, position)

        if cache.padding is not None or q.shape[2] <= SIZE:
            return to_cache(), new
        return jax.lax.cond(position == 0, lambda: attend(q, k, v), to_cache), new  # a prompt sees itself alone

    def recur(
        params: PyTree, cache: KeyValues, position: Array, q: Array, k: Array, v: Array, x: Array
    ) -> tuple[Array, KeyValues]:
        z, cache = extend(params, cache, position, q[:, :, None], k[:, :, None], v[:, :, None], x)
        return z[:, :, 0], cache

    return head_mixer(
        "softmax_attention",
        width,
        heads,
        init=functools.partial(_init_norms, d, qk_norm),
        parallel=parallel,
        start=start,
        recur=recur,
        extend=extend,
        kv_heads=kv_heads,
        head_size=head_size,
        biases=biases,
        convolution=convolution,
        norm=None,
        keeps_all=True,
    )


@checked
def window_attention(
    width: int,
    heads: int,
    *,
    window: Count = 64,
    kv_heads: int | None = None,
    qk_norm: bool = False,
    convolution: int = 0,
    theta: float = 10_000.0,
    epsilon: float = EPSILON,
) -> Mixer:
    """z_t = sum_{t - window < s <= t} softmax_s(q_t . k_s / sqrt(d)) v_s: softmax attention that forgets.

    Args:
      width, heads, kv_heads, qk_norm, convolution, theta, epsilon: see `softmax_attention`.
      window: tokens that are seen, the token itself among them, at least 1.

    Returns:
      A `Mixer` with time linear in T; its cache is a ring of `window` keys and values.

    Raises:
      ValueError: sizes below 1, or that do not divide each other.

    Source: Beltagy et al. 2020, arXiv 2004.05150.

    Differences from the paper or its code: rotary positions; no global tokens.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> mixer = window_attention(8, 2, window=3)
      >>> mixer.apply(mixer.init(jax.random.key(0)), jnp.ones((1, 5, 8))).shape
      (1, 5, 8)
    """

    d = head_width("window_attention", width, heads)

    def turned(params: PyTree, q: Array, k: Array, positions: Array) -> tuple[Array, Array]:
        return _turned(params, q, k, positions, qk_norm, epsilon, theta)

    def parallel(params: PyTree, q: Array, k: Array, v: Array, x: Array) -> Array:
        return attend_window(*turned(params, q, k, jnp.arange(q.shape[-2])), v, window)

    def start(params: PyTree, batch_size: int, length: int, dtype: Any) -> KeyValues:
        return empty_key_values(d, kv_heads or heads, batch_size, window, dtype)

    def extend(
        params: PyTree, cache: KeyValues, position: Array, q: Array, k: Array, v: Array, x: Array
    ) -> tuple[Array, KeyValues]:
        q, k = turned(params, q, k, position + jnp.arange(q.shape[2]))
        return window_extend(cache, position, q, k, v)

    def recur(
        params: PyTree, cache: KeyValues, position: Array, q: Array, k: Array, v: Array, x: Array
    ) -> tuple[Array, KeyValues]:
        return window_step(cache, position, *turned(params, q, k, position), v)

    return head_mixer(
        "window_attention",
        width,
        heads,
        init=functools.partial(_init_norms, d, qk_norm),
        parallel=parallel,
        start=start,
        recur=recur,
        extend=extend,
        kv_heads=kv_heads,
        convolution=convolution,
        norm=None,
    )


def _init_norms(d: int, qk_norm: bool, key: Key) -> dict[str, Any]:
    return {f"{n}_norm": {"scale": jnp.ones(d)} for n in ("query", "key") if qk_norm}


def _turned(
    params: PyTree,
    q: Array,
    k: Array,
    positions: Array,
    qk_norm: bool,
    epsilon: float,
    theta: float,
    scaling: RotaryScaling | None = None,
) -> tuple[Array, Array]:
    """Normalised where that is asked for, and rotated."""
    if qk_norm:
        q, k = (rms_norm(a, params[f"{n}_norm"]["scale"], epsilon) for n, a in (("query", q), ("key", k)))
    return rotary(q, positions, theta, scaling=scaling), rotary(k, positions, theta, scaling=scaling)


ENTRY = (
    LayerEntry(
        name="softmax_attention",
        summary="all keys and values, appended token by token",
        factory=softmax_attention,
        arguments={"kv_heads": 1},
        papers=("vaswani2017attention",),
        state="grows",
    ),
    LayerEntry(
        name="window_attention",
        summary="the keys and values of the last tokens, in a ring buffer",
        factory=window_attention,
        arguments={"window": 5},
        papers=("beltagy2020longformer",),
        state="constant",
    ),
)
