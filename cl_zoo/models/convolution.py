"""A convolution whose derivatives are as fast inside loops as outside, also on CPUs.

XLA's compiler for CPUs has a fast routine for convolutions `[B, *S, I]`, `[*K, I, O]` -> `[B, *S', O]`. Other forms
are converted to it only in the outermost computation; in the body of a loop or a `cond` they become naive nests of
loops, 10 to 30 times slower. Gradients of `lax.conv_general_dilated` are of other forms.

Here a convolution is one of the three maps that belong to y = conv(x, k), each linear in both of its operands:

    output(x, k) = y        input(y, k) = (dy/dx)^T y        kernel(x, y) = (dy/dk)^T y

The derivatives of each are the others, so three ways to compute them serve every order, forward and reverse.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType

from cl_zoo.types import Array

__all__ = ["accumulator", "conv_general_dilated", "typed"]

Pairs = tuple[tuple[int, int], ...]
CHUNK = 16
"""Examples of which the kernel's gradient is taken at once on a CPU: so many fit its cache."""
DENSE = 64
"""Channels, in and out, up to which groups of them are convolved at once on a CPU, with zeros in between."""
UNROLLED = 64
"""Places of a kernel up to which a depthwise convolution is a sum of so many products: each takes time to compile."""


class _Geometry(NamedTuple):
    """y = conv(x, k) with `x: [B, *S, I]`, `k: [*K, I / groups, O]`, `y: [B, *S', O]`, of one dtype but for y's."""

    x_shape: tuple[int, ...]
    k_shape: tuple[int, ...]
    strides: tuple[int, ...]
    padding: Pairs
    x_dilation: tuple[int, ...]
    k_dilation: tuple[int, ...]
    groups: int
    dtype: Any
    y_dtype: Any
    precision: Any

    @property
    def numbers(self) -> tuple[str, str, str]:
        places = "DHW"[-len(self.strides) :]
        return f"N{places}C", f"{places}IO", f"N{places}C"

    @property
    def dilated(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lengths of x, of k, and of y with zeros between its places, as strides leave them out."""
        x = (np.array(self.x_shape[1:-1]) - 1) * self.x_dilation + 1
        k = (np.array(self.k_shape[:-2]) - 1) * self.k_dilation + 1
        y = (x + np.array(self.padding).sum(1) - k) // self.strides * self.strides + 1
        return x, k, y

    @property
    def input_padding(self) -> Pairs:
        """Of y, with zeros between its places, where `input` is its convolution with the flipped kernel."""
        x, k, y = self.dilated
        before = k - 1 - np.array(self.padding)[:, 0]
        return tuple(zip(before.tolist(), (x + k - 1 - y - before).tolist()))


def typed(v: Any) -> bool:
    """Whether the type of an array states how it lies on devices (explicit axes of a mesh, `shard_map`)."""
    return bool(set(jax.typeof(v).sharding.mesh.axis_types) - {AxisType.Auto})


def accumulator(dtype: Any) -> Any:
    """The type to add up numbers of `dtype` in: float32, or itself where that is wider."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def conv_general_dilated(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
) -> Array:
    """`jax.lax.conv_general_dilated`, with the same arguments, values and derivatives.

    On a CPU, derivatives of every order keep the form that its fast routine takes; with several kernels (`vmap` over
    kernels, groups of many channels) one convolution follows another, and groups of few are one with zeros (a number
    that is not finite then reaches all groups); single channels (depthwise) are a sum of shifted products; kernels of
    one place are matrix products; and float16 and bfloat16 are added up in float32. On other devices all is as in
    `lax`, and also here for complex and whole numbers, batch groups and explicit shardings.

    Give it to Flax's `Conv` as `conv_general_dilated=`, or leave that to `from_nnx` and `from_linen`.

    Example:
      >>> x = jnp.arange(4.0).reshape((1, 1, 2, 2))
      >>> conv_general_dilated(x, jnp.ones((1, 1, 3, 3)), (1, 1), "SAME").ravel()
      Array([6., 6., 6., 6.], dtype=float32)
    """
    options = (lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count, batch_group_count)
    plain = functools.partial(
        lax.conv_general_dilated, lhs, rhs, window_strides, padding, *options, precision, preferred_element_type
    )
    # `lax` checks the arguments.
    y = jax.eval_shape(plain)
    ndim, lengths = len(window_strides), (*lhs.shape, *rhs.shape, *y.shape)
    if (
        batch_group_count != 1
        or out_sharding is not None
        or typed(lhs)
        or typed(rhs)
        or not jnp.issubdtype(y.dtype, jnp.floating)
        or not jnp.issubdtype(lhs.dtype, jnp.floating)
        or not 1 <= ndim <= 3
        or not all(isinstance(length, int) and length for length in lengths)
    ):
        return plain(out_sharding=out_sharding)
    x_spec, k_spec, y_spec = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    x_order, k_order, y_order = (
        (x_spec[0], *x_spec[2:], x_spec[1]),
        (*k_spec[2:], k_spec[1], k_spec[0]),
        (y_spec[0], *y_spec[2:], y_spec[1]),
    )
    x, k = lax.transpose(lhs, x_order), lax.transpose(rhs, k_order)
    ones = (1,) * ndim
    x_dilation, k_dilation = (ones if d is None else tuple(map(int, d)) for d in (lhs_dilation, rhs_dilation))
    if isinstance(padding, str):
        extents = [(length - 1) * d + 1 for length, d in zip(k.shape, k_dilation)]
        padding = lax.padtype_to_pads(x.shape[1:-1], extents, window_strides, padding)
    geometry = _Geometry(
        x.shape,
        k.shape,
        tuple(map(int, window_strides)),
        tuple((int(low), int(high)) for low, high in padding),
        x_dilation,
        k_dilation,
        feature_group_count,
        x.dtype,
        y.dtype,
        precision,
    )
    return lax.transpose(_bind("output", x, k, geometry), np.argsort(y_order))


# The primitive: what it gives, in which of `levels` of vmap its two operands take part, and the geometry without vmap.
_convolution = Primitive("cl_zoo_convolution")
Levels = tuple[tuple[bool, bool], ...]


def _bind(gives: str, a: Array, b: Array, geometry: _Geometry, levels: Levels = ()) -> Array:
    return _convolution.bind(a, b, gives=gives, geometry=geometry, levels=levels)


def _plain(a: Array, b: Array, gives: str, geometry: _Geometry, levels: Levels) -> Array:
    """By `lax`, for devices other than CPUs, and for shapes."""
    if levels:
        axes = tuple(0 if here else None for here in levels[0])
        return jax.vmap(functools.partial(_plain, gives=gives, geometry=geometry, levels=levels[1:]), axes)(a, b)
    g = geometry

    def output(x: Array, k: Array) -> Array:
        return lax.conv_general_dilated(
            x, k, g.strides, g.padding, g.x_dilation, g.k_dilation, g.numbers, g.groups, 1, g.precision, g.y_dtype
        )

    if gives == "output":
        return output(a, b)
    if gives == "input":
        return jax.linear_transpose(lambda x: output(x, b), jax.ShapeDtypeStruct(g.x_shape, g.dtype))(a)[0]
    return jax.linear_transpose(lambda k: output(a, k), jax.ShapeDtypeStruct(g.k_shape, g.dtype))(b)[0]


@_convolution.def_abstract_eval
def _abstract(a: Any, b: Any, **params: Any) -> Any:
    shape = jax.eval_shape(
        functools.partial(_plain, **params), *(jax.ShapeDtypeStruct(v.shape, v.dtype) for v in (a, b))
    )
    return a.update(shape=shape.shape, dtype=shape.dtype, weak_type=False)


_compiled = jax.jit(_convolution.bind, static_argnames=("gives", "geometry", "levels"))


@_convolution.def_impl
def _at_once(a: Array, b: Array, **params: Any) -> Array:
    at_once = jax.config.jax_disable_jit  # type: ignore[attr-defined]
    return _plain(a, b, **params) if at_once else _compiled(a, b, **params)


# What the cotangent c of a result gives: to the first operand, and to the second.
_TRANSPOSED: dict[str, tuple[tuple[str, Callable[..., Any]], tuple[str, Callable[..., Any]]]] = {
    "output": (("input", lambda c, x, k: (c, k)), ("kernel", lambda c, x, k: (x, c))),
    "input": (("output", lambda c, y, k: (c, k)), ("kernel", lambda c, y, k: (c, y))),
    "kernel": (("input", lambda c, x, y: (y, c)), ("output", lambda c, x, y: (x, c))),
}


def _transpose(which: int, c: Array, a: Any, b: Any, *, gives: str, geometry: _Geometry, levels: Levels) -> Array:
    to, operands = _TRANSPOSED[gives][which]
    after = tuple(operands(True, *pair) for pair in levels)
    first, second = operands(c, a, b)
    found = _bind(to, first, second, geometry, after)
    # An operand that took no part in a level was constant along it.
    return jnp.sum(found, [i for i, pair in enumerate(levels) if not pair[which]], dtype=found.dtype)


ad.defbilinear(_convolution, functools.partial(_transpose, 0), functools.partial(_transpose, 1))


def _batch(
    operands: Sequence[Array], axes: Sequence[int | None], *, gives: str, geometry: _Geometry, levels: Levels
) -> tuple[Array, int]:
    a, b = (v if axis is None else jnp.moveaxis(v, axis, 0) for v, axis in zip(operands, axes))
    if axes[1] is None and gives != "kernel" and not levels:
        # Examples of one kernel: a larger batch.
        n = a.shape[0]
        larger = geometry._replace(x_shape=(n * geometry.x_shape[0], *geometry.x_shape[1:]))
        found = _bind(gives, a.reshape((n * a.shape[1], *a.shape[2:])), b, larger)
        return found.reshape((n, geometry.x_shape[0], *found.shape[1:])), 0
    return _bind(gives, a, b, geometry, ((axes[0] is not None, axes[1] is not None), *levels)), 0


batching.primitive_batchers[_convolution] = _batch


def _on_cpu(a: Array, b: Array, gives: str, geometry: _Geometry, levels: Levels, chunk: int | None) -> Array:
    """By convolutions in the form of the fast routine, one for each kernel."""
    if 0 in (*a.shape, *b.shape):
        shape = jax.eval_shape(functools.partial(_plain, gives=gives, geometry=geometry, levels=levels), a, b)
        return jnp.zeros(shape.shape, shape.dtype)
    if levels:
        (here_a, here_b), rest = levels[0], levels[1:]
        one = functools.partial(_on_cpu, gives=gives, geometry=geometry, levels=rest, chunk=chunk)
        if here_a and here_b:
            return lax.map(lambda ab: one(*ab), (a, b))
        return lax.map(lambda v: one(v, b) if here_a else one(a, v), a if here_a else b)
    g = geometry
    kind = accumulator(g.y_dtype)
    a, b = a.astype(kind), b.astype(kind)
    places = math.prod(g.k_shape[:-2])
    if g.k_shape[-2] == 1 and g.groups > 1 and places <= UNROLLED:
        found = _depthwise(gives, a, b, g)
    elif g.groups > 1:
        found = _grouped(gives, a, b, g, chunk)
    elif places == 1 and not np.any(g.padding) and math.prod(g.x_dilation) == 1:
        found = _pointwise(gives, a, b, g)
    else:
        found = _dense(gives, a, b, g, chunk)
    return found.astype(g.y_dtype if gives == "output" else g.dtype)


def _padded(v: Array, padding: Pairs, dilation: tuple[int, ...]) -> Array:
    """`[B, *S, ...]` with zeros at the edges of its places and between them."""
    places = [(low, high, d - 1) for (low, high), d in zip(padding, dilation)]
    return lax.pad(v, jnp.zeros((), v.dtype), [(0, 0, 0), *places, *((0, 0, 0),) * (v.ndim - len(places) - 1)])


def _dense(gives: str, a: Array, b: Array, g: _Geometry, chunk: int | None) -> Array:
    def convolve(x: Array, k: Array, strides: Any, padding: Pairs, x_dilation: Any, k_dilation: Any) -> Array:
        if math.prod(k.shape[:-2]) > math.prod(x.shape[1:-1]):
            # The compiler would let a smaller x and its kernel change places. With its zeros, x is never smaller.
            x = lax.optimization_barrier(_padded(x, padding, x_dilation))
            padding, x_dilation = ((0, 0),) * len(padding), None
        return lax.conv_general_dilated(
            x, k, strides, padding, x_dilation, k_dilation, g.numbers, precision=g.precision
        )

    if gives == "output":
        return convolve(a, b, g.strides, g.padding, g.x_dilation, g.k_dilation)
    if gives == "input":
        # A transposition right before a convolution would be merged into its form again.
        turned = lax.optimization_barrier(jnp.swapaxes(jnp.flip(b, range(len(g.strides))), -1, -2))
        return convolve(a, turned, g.x_dilation, g.input_padding, g.strides, g.k_dilation)
    x, k, y = g.dilated
    low = np.array(g.padding)[:, 0]
    padding = tuple(zip(low.tolist(), (y - x + k - 1 - low).tolist()))

    def some(x: Array, y: Array) -> Array:
        """Examples and channels change places, and y is the kernel."""
        x, y = lax.optimization_barrier((jnp.swapaxes(x, 0, -1), jnp.moveaxis(y, 0, -2)))
        found = convolve(x, y, g.k_dilation, padding, g.x_dilation, g.strides)
        return jnp.moveaxis(lax.optimization_barrier(found), 0, -2)

    if chunk is None or a.shape[0] <= chunk:
        return some(a, b)
    n, rest = divmod(a.shape[0], chunk)
    cut = n * chunk
    chunks = tuple(v[:cut].reshape((n, chunk, *v.shape[1:])) for v in (a, b))
    start = some(a[cut:], b[cut:]) if rest else jnp.zeros(g.k_shape, a.dtype)
    return lax.scan(lambda total, chunk: (total + some(*chunk), None), start, chunks)[0]


def _grouped(gives: str, a: Array, b: Array, g: _Geometry, chunk: int | None) -> Array:
    """Few channels: as one group, zeros where others are not read. Many: group after group."""
    n, (inputs, outputs) = g.groups, g.k_shape[-2:]
    if max(n * inputs, outputs) <= DENSE:
        whole = g._replace(k_shape=(*g.k_shape[:-2], n * inputs, outputs), groups=1)
        own = np.arange(n * inputs)[:, None] // inputs == np.arange(outputs) // (outputs // n)
        if gives == "kernel":
            found = jnp.where(own, _dense(gives, a, b, whole, chunk), 0)
            return jnp.sum(found.reshape((*g.k_shape[:-2], n, inputs, outputs)), -3)
        return _dense(gives, a, jnp.where(own, jnp.concatenate([b] * n, -2), 0), whole, chunk)

    def split(v: Array) -> Array:
        return jnp.moveaxis(v.reshape((*v.shape[:-1], n, v.shape[-1] // n)), -2, 0)

    alone = g._replace(x_shape=(*g.x_shape[:-1], inputs), k_shape=(*g.k_shape[:-1], outputs // n), groups=1)
    found = lax.map(lambda ab: _dense(gives, ab[0], ab[1], alone, chunk), (split(a), split(b)))
    found = jnp.moveaxis(found, 0, -2)
    return found.reshape((*found.shape[:-2], -1))


def _pointwise(gives: str, a: Array, b: Array, g: _Geometry) -> Array:
    """A kernel of one place is a matrix."""
    places = tuple(range(len(g.strides) + 1))
    strides = (1, *g.strides, 1)

    def seen(x: Array) -> Array:
        return lax.slice(x, (0,) * x.ndim, x.shape, strides)

    if gives == "output":
        return jnp.matmul(seen(a), b.reshape(b.shape[-2:]), precision=g.precision)
    if gives == "kernel":
        return jnp.tensordot(seen(a), b, (places, places), precision=g.precision).reshape(g.k_shape)
    found = jnp.matmul(a, b.reshape(b.shape[-2:]).T, precision=g.precision)
    return jax.linear_transpose(seen, jax.ShapeDtypeStruct(g.x_shape, found.dtype))(found)[0]


def _depthwise(gives: str, a: Array, b: Array, g: _Geometry) -> Array:
    """A sum over the kernel's places of products of shifted x, or of shifted y."""
    channels, more = g.x_shape[-1], g.k_shape[-1] // g.x_shape[-1]
    x_length, _, y_length = g.dilated
    places = list(np.ndindex(*g.k_shape[:-2]))
    each = (1,) * (len(places[0]) + 1) + (channels, more)

    def shifted(v: Array, place: Sequence[int], length: np.ndarray, strides: tuple[int, ...]) -> Array:
        start = np.array(place) * g.k_dilation
        rest = v.shape[len(strides) + 1 :]
        return lax.slice(
            v, (0, *start, *(0 for _ in rest)), (len(v), *(start + length), *rest), (1, *strides, *(1 for _ in rest))
        )

    if gives == "input":
        y = _padded(a.reshape((*a.shape[:-1], channels, more)), g.input_padding, g.strides)
        turned = jnp.flip(b, range(len(g.strides)))
        return jnp.asarray(
            sum(
                jnp.sum(shifted(y, place, x_length, g.x_dilation) * turned[place].reshape(each), -1) for place in places
            )
        )
    x = _padded(a, g.padding, g.x_dilation)
    seen = (shifted(x, place, y_length, g.strides)[..., None] for place in places)
    if gives == "output":
        found = jnp.asarray(sum(v * b[place].reshape(each) for v, place in zip(seen, places)))
        return found.reshape((*found.shape[:-2], -1))
    y = b.reshape((*b.shape[:-1], channels, more))
    # As products: a sum over the first axes is slow on CPUs.
    ones = jnp.ones((math.prod(y.shape[:-2]),), y.dtype)
    return jnp.stack([ones @ (v * y).reshape((ones.size, -1)) for v in seen]).reshape(g.k_shape)


def _lower_on_cpu(ctx: Any, a: Any, b: Any, **params: Any) -> Any:
    # Examples that lie on several devices stay there: cutting them into chunks would gather them.
    alone = getattr(ctx.module_context.axis_context, "num_devices", 1) == 1
    rule = functools.partial(_on_cpu, chunk=CHUNK if alone else None)
    return mlir.lower_fun(rule, multiple_results=False)(ctx, a, b, **params)


mlir.register_lowering(_convolution, mlir.lower_fun(_plain, multiple_results=False))
mlir.register_lowering(_convolution, _lower_on_cpu, platform="cpu")
