"""The contract of sequence layers, and what they share: projections into heads, short convolutions, norms, chunks.

Legend for shapes: `B` sequences, `T` tokens, `D` width of the model, `H` heads, `d` width of a head, `C` tokens of a
chunk, `N` chunks. The mathematics of a layer (its core) works on `[..., T, d]`, heads before time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cl_zoo.checks import check_whole
from cl_zoo.layers.norms import layer_norm, rms_norm
from cl_zoo.types import Array, Key, PyTree

__all__ = [
    "HeadCache",
    "Mixer",
    "causal_convolution",
    "causal_mask",
    "from_chunks",
    "head_mixer",
    "head_width",
    "linear",
    "product",
    "refuse_prefix",
    "to_chunks",
]


class Mixer(NamedTuple):
    """A layer that mixes tokens over time, as pure functions in two forms that are equal.

    Attributes:
      name: of the layer.
      width: D.
      init: `(key) -> params`.
      apply: `(params, x [B, T, D]) -> [B, T, D]`, the parallel form, for training; any T.
      start: `(params, batch_size, length, dtype, padding=None, prefix=None) -> cache` of an empty sequence, for at most
        `length` tokens of activations in `dtype`. Only softmax attention's cache grows with `length`. `padding`
        `i32[B]` tokens at the beginning of each sequence are ignored, and a `prefix`, keys `[G, d, P]` and values
        `[G, P, d]`, comes before each: layers other than softmax attention refuse both.
      step: `(params, cache, x [B, D]) -> ([B, D], cache)`, the recurrent form: one more token. The cache keeps its
        tree, shapes and dtypes, so a `scan` of `step` is a whole sequence.
      extend: `(params, cache, x [B, T, D]) -> ([B, T, D], cache)`: T more tokens at once, equal to T steps; None where
        there is no such form.
      memoryless: whether each token is mixed with no other, as in feed-forward networks.
    """

    name: str
    width: int
    init: Callable[[Key], PyTree]
    apply: Callable[[PyTree, Array], Array]
    start: Callable[..., PyTree]
    step: Callable[[PyTree, PyTree, Array], tuple[Array, PyTree]]
    extend: Callable[[PyTree, PyTree, Array], tuple[Array, PyTree]] | None = None
    memoryless: bool = False


class HeadCache(NamedTuple):
    """Attributes:
    position: `i32[]`, tokens seen.
    recent: the last inputs of each short convolution, `[B, w - 1, ...]` by name; {} without.
    state: of the layer's core.
    """

    position: Array
    recent: dict[str, Array]
    state: PyTree


def linear(key: Key, n_in: int, n_out: int) -> Array:
    """A kernel `[n_in, n_out]` from N(0, 1 / n_in)."""
    return jax.random.normal(key, (n_in, n_out)) / jnp.sqrt(float(n_in))


def product(x: Array, kernel: Any) -> Array:
    """x W for each token: `[..., n_in]`, `[n_in, n_out]` (or what stands for it) -> `[..., n_out]`.

    Tokens are one axis here: of the gradient x^T g of a kernel, XLA transposes g if they are more.
    """
    kernel = kernel.astype(x.dtype)
    return (x.reshape((-1, x.shape[-1])) @ kernel).reshape((*x.shape[:-1], -1))


def causal_convolution(x: Array, kernel: Array) -> Array:
    """y_t = sum_j kernel_j * x_{t - w + 1 + j}, each channel by itself: `[B, T, D]`, `[w, D]` -> `[B, T, D]`."""
    width, time = kernel.shape[0], x.shape[1]
    wide = jnp.promote_types(x.dtype, jnp.float32)  # rounded once, as a token after another is
    padded, kernel = jnp.pad(x, ((0, 0), (width - 1, 0), (0, 0))).astype(wide), kernel.astype(wide)
    terms = (padded[:, j : j + time] * kernel[j] for j in range(width))
    return sum(terms, start=jnp.zeros(x.shape, wide)).astype(x.dtype)


def causal_mask(size: int, *, strict: bool = False) -> Array:
    """`bool[size, size]`: row t sees column s where s <= t, or s < t."""
    return jnp.tril(jnp.ones((size, size), bool), -1 if strict else 0)


def to_chunks(x: Array, size: int, axis: int = -2) -> Array:
    """`[..., T, d]` -> `[N, ..., size, d]`, zeros after the end."""
    axis = axis % x.ndim
    padding = [(0, -x.shape[axis] % size if i == axis else 0) for i in range(x.ndim)]
    x = jnp.pad(x, padding)
    return jnp.moveaxis(x.reshape((*x.shape[:axis], -1, size, *x.shape[axis + 1 :])), axis, 0)


def from_chunks(x: Array, time: int) -> Array:
    """`[N, ..., C, d]` -> `[..., T, d]`: the first `time` tokens."""
    x = jnp.moveaxis(x, 0, -3)
    return x.reshape((*x.shape[:-3], -1, x.shape[-1]))[..., :time, :]


def head_width(name: str, width: int, heads: int) -> int:
    """d = D / H.

    Raises:
      ValueError: sizes below 1, heads that do not divide the width.
    """
    check_whole(name, "width", width, 1)
    check_whole(name, "heads", heads, 1)
    if width % heads:
        raise ValueError(f"{name}: width is {width}, but it must be a multiple of heads, {heads}")
    return width // heads


def refuse_prefix(name: str, prefix: Any) -> None:
    """Of a layer that does not hold every token apart."""
    if prefix is not None:
        raise ValueError(f"{name}: prefix is given, but only softmax attention can begin after keys and values")


def head_mixer(
    name: str,
    width: int,
    heads: int,
    *,
    init: Callable[[Key], dict[str, Any]],
    parallel: Callable[[PyTree, Array, Array, Array, Array], Array],
    start: Callable[..., PyTree],
    recur: Callable[..., tuple[Array, PyTree]],
    extend: Callable[..., tuple[Array, PyTree]] | None = None,
    kv_heads: int | None = None,
    head_size: int | None = None,
    biases: Sequence[str] = (),
    convolution: int = 0,
    norm: str | None = "rms",
    gate: Callable[[Array], Array] | None = None,
    keeps_all: bool = False,
) -> Mixer:
    """A `Mixer` around a core that works on heads.

        q, k, v = x W_q, x W_k, x W_v;   with `convolution`: each silu(causal convolution of it)
        y = gate(x W_g) * norm(core(q, k, v, x)) W_o

    Args:
      name, width, heads: of the layer.
      init: `(key) -> params` of the core, beside those of the projections.
      parallel: `(params, q, k, v [B, H, T, d], x [B, T, D]) -> [B, H, T, d]`.
      start: `(params, batch_size, length, dtype) -> state` of the core; with `keeps_all`, it takes more.
      recur: `(params, state, position, q, k, v [B, H, d], x [B, D]) -> ([B, H, d], state)`.
      extend: `(params, state, position, q, k, v [B, H, T, d], x [B, T, D]) -> ([B, H, T, d], state)`, if there is one.
      kv_heads: heads of keys and values, each serving heads / kv_heads queries; None is `heads`.
      head_size: d; None is width / heads.
      biases: which of "query", "key", "value", "output" have a bias.
      convolution: w, the width of short convolutions of q, k and v; 0 for none.
      norm: of the core's output: "rms", each head by itself; "layer", all heads together; None.
      gate: an activation, or None for no gate.
      keeps_all: whether the state holds every token apart, so that `start` takes `padding`, which it leaves out, and a
        `prefix`, which comes before.

    Raises:
      ValueError: sizes below 1, heads that do not divide the width, or kv_heads that do not divide the heads.
    """
    d = head_width(name, width, heads) if head_size is None else head_size
    inner = heads * d
    check_whole(name, "convolution", convolution, 0)
    shared = heads if kv_heads is None else kv_heads
    check_whole(name, "kv_heads", shared, 1)
    if heads % shared:
        raise ValueError(f"{name}: kv_heads is {shared}, but it must divide heads, {heads}")
    sizes = {"query": inner, "key": shared * d, "value": shared * d}
    if unknown := set(biases) - {*sizes, "output"}:
        raise ValueError(f"{name}: biases names {sorted(unknown)[0]!r}, but there are query, key, value and output")

    def init_all(key: Key) -> PyTree:
        keys = jax.random.split(key, 9)
        params: dict[str, Any] = {n: linear(k, width, size) for (n, size), k in zip(sizes.items(), keys[:3])}
        params["output"] = linear(keys[3], inner, width)
        if biases:
            params["bias"] = {n: jnp.zeros((sizes | {"output": width})[n]) for n in biases}
        if convolution:
            bound = convolution**-0.5
            params["convolution"] = {
                n: jax.random.uniform(k, (convolution, size), minval=-bound, maxval=bound)
                for (n, size), k in zip(sizes.items(), keys[4:7])
            }
        if norm is not None:
            params["norm"] = {"scale": jnp.ones(inner)}
            if norm == "layer":
                params["norm"]["bias"] = jnp.zeros(inner)
        if gate is not None:
            params["gate"] = linear(keys[7], width, inner)
        return params | init(keys[8])

    def split(x: Array) -> Array:
        """`[B, ..., n d]` -> `[B, n, ..., d]`."""
        return jnp.moveaxis(x.reshape((*x.shape[:-1], -1, d)), -2, 1)

    def merge(params: PyTree, z: Array, x: Array) -> Array:
        """`[B, H, ..., d]` and the layer's input -> the layer's output."""
        z = jnp.moveaxis(z, 1, -2).astype(x.dtype)
        flat = (*z.shape[:-2], inner)
        if norm == "rms":
            z = rms_norm(z, params["norm"]["scale"].reshape((heads, d))).reshape(flat)
        elif norm == "layer":
            z = layer_norm(z.reshape(flat), **params["norm"])
        else:
            z = z.reshape(flat)
        if gate is not None:
            z = z * gate(product(x, params["gate"]))
        return times(params, "output", z)

    def times(params: PyTree, n: str, x: Array) -> Array:
        y = product(x, params[n])
        return y + params["bias"][n].astype(x.dtype) if n in biases else y

    def project(params: PyTree, x: Array) -> dict[str, Array]:
        return {n: times(params, n, x) for n in sizes}

    def apply(params: PyTree, x: Array) -> Array:
        projected = project(params, x)
        if convolution:
            kernels = params["convolution"]
            projected = {
                n: jax.nn.silu(causal_convolution(p, kernels[n].astype(x.dtype))) for n, p in projected.items()
            }
        q, k, v = (split(p) for p in projected.values())
        return merge(params, parallel(params, q, k, v, x), x)

    def start_all(
        params: PyTree,
        batch_size: int,
        length: int,
        dtype: Any = jnp.float32,
        padding: Array | None = None,
        prefix: tuple[Array, Array] | None = None,
    ) -> HeadCache:
        if not keeps_all:
            refuse_prefix(name, prefix)
        if padding is not None and (not keeps_all or convolution):
            raise ValueError(f"{name}: padding before a sequence would change its state; give sequences of one length")
        recent = {}
        if convolution:
            recent = {n: jnp.zeros((batch_size, convolution - 1, size), dtype) for n, size in sizes.items()}
        before: dict[str, Any] = {} if padding is None else {"padding": padding}
        before |= {} if prefix is None else {"prefix": prefix}
        state = start(params, batch_size, length, dtype, **before)
        return HeadCache(jnp.asarray(0 if prefix is None else prefix[0].shape[-1], jnp.int32), recent, state)

    def extend_all(params: PyTree, cache: HeadCache, x: Array) -> tuple[Array, HeadCache]:
        assert extend is not None
        projected, recent = project(params, x), cache.recent
        if convolution:
            rows = {n: jnp.concatenate([recent[n], p], axis=1) for n, p in projected.items()}
            recent = {n: row[:, row.shape[1] - convolution + 1 :] for n, row in rows.items()}
            kernels = params["convolution"]
            projected = {
                n: jax.nn.silu(causal_convolution(row, kernels[n].astype(x.dtype))[:, convolution - 1 :])
                for n, row in rows.items()
            }
        q, k, v = (split(p) for p in projected.values())
        z, state = extend(params, cache.state, cache.position, q, k, v, x)
        return merge(params, z, x), HeadCache(cache.position + x.shape[1], recent, state)

    def step(params: PyTree, cache: HeadCache, x: Array) -> tuple[Array, HeadCache]:
        projected, recent = project(params, x), cache.recent
        if convolution:
            windows = {n: jnp.concatenate([recent[n], p[:, None]], axis=1) for n, p in projected.items()}
            recent = {n: window[:, 1:] for n, window in windows.items()}
            kernels = params["convolution"]
            projected = {
                n: jax.nn.silu(jnp.sum(window * kernels[n].astype(x.dtype), axis=1)) for n, window in windows.items()
            }
        q, k, v = (split(p) for p in projected.values())
        z, state = recur(params, cache.state, cache.position, q, k, v, x)
        return merge(params, z, x), HeadCache(cache.position + 1, recent, state)

    return Mixer(name, width, init_all, apply, start_all, step, None if extend is None else extend_all)
