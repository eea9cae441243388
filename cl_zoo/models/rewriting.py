"""Functions that convolve, of any library, made to convolve fast inside of loops (`convolution.py` says how)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun, jaxprs_in_params

from cl_zoo.models.convolution import conv_general_dilated
from cl_zoo.models.pooling import max_pool
from cl_zoo.types import Array

__all__ = ["fast_convolutions", "has_plain_convolutions"]

_PLAIN = "conv_general_dilated"


def has_plain_convolutions(jaxpr: Any) -> bool:
    """Whether a traced function, or one inside of it, convolves by `lax.conv_general_dilated`."""
    return any(
        eqn.primitive.name == _PLAIN or any(map(has_plain_convolutions, jaxprs_in_params(eqn.params)))
        for eqn in jaxpr.eqns
    )


def fast_convolutions(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, with `conv_general_dilated` of `models.convolution` wherever it uses that of `lax`, and maxima
    over windows that do not overlap by `models.pooling`.

    It reads what the function does from its trace, so that layers of any library serve as they are. Derivatives that
    the function defines itself (`custom_jvp`, `custom_vjp`) are left alone. On devices other than CPUs, and outside of
    traces, the function is called as it is. `from_nnx` and `from_linen` do this already.

    Args:
      function: pure, of pytrees of arrays; other leaves (bools, strings) are constants to it.

    Example:
      >>> from cl_zoo.types import Model
      >>> def apply(params, model_state, x, **_):
      ...     return jax.lax.conv(x, params, (1, 1), "SAME").mean((2, 3)), model_state, {}
      >>> model = Model(lambda key, x: (jnp.ones((5, 3, 3, 3)), {}), fast_convolutions(apply))
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        leaves, treedef = jax.tree.flatten((args, kwargs))
        traced = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "dtype")]
        if jax.default_backend() != "cpu" or not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            return function(*args, **kwargs)

        def of_arrays(*arrays: Array) -> Any:
            full = list(leaves)
            for i, array in zip(traced, arrays, strict=True):
                full[i] = array
            args, kwargs = jax.tree.unflatten(treedef, full)
            return function(*args, **kwargs)

        arrays = [leaves[i] for i in traced]
        jaxpr, shapes = jax.make_jaxpr(of_arrays, return_shape=True)(*arrays)
        run = _evaluate if has_plain_convolutions(jaxpr.jaxpr) else lambda jaxpr, *args: jaxpr_as_fun(jaxpr)(*args)
        return jax.tree.unflatten(jax.tree.structure(shapes), run(jaxpr, *arrays))

    return call


def _evaluate(closed: Any, *arrays: Array) -> list[Array]:
    """Runs a traced function, with its convolutions replaced."""
    values = dict(zip((*closed.jaxpr.constvars, *closed.jaxpr.invars), (*closed.consts, *arrays), strict=True))

    def read(v: Any) -> Any:
        return v.val if isinstance(v, Literal) else values[v]

    for eqn in closed.jaxpr.eqns:
        operands = list(map(read, eqn.invars))
        params = eqn.primitive.get_bind_params(eqn.params)
        if eqn.primitive.name == _PLAIN:
            found: Any = conv_general_dilated(*operands, **params)
        elif (window := _pooled(eqn)) is not None:
            found = max_pool(operands[0], window)
        else:
            if not eqn.primitive.name.startswith("custom_"):
                params = {name: _replaced(value) for name, value in params.items()}
            found = eqn.primitive.bind(*operands, **params)
        values.update(zip(eqn.outvars, found if eqn.primitive.multiple_results else [found], strict=True))
    return list(map(read, closed.jaxpr.outvars))


def _pooled(eqn: Any) -> tuple[int, ...] | None:
    """The window of a maximum over windows of `[B, *S, C]` that do not overlap; None of any other operation."""
    if eqn.primitive.name != "reduce_window_max":
        return None
    p, (first, *window, last) = eqn.params, eqn.params["window_dimensions"]
    plain = not any(map(any, p["padding"])) and {*p["base_dilation"], *p["window_dilation"], first, last} == {1}
    return tuple(window) if plain and window and p["window_strides"] == p["window_dimensions"] else None


def _replaced(value: Any) -> Any:
    """A parameter of an operation; a traced function (the body of a loop, a branch) with its convolutions replaced."""
    if isinstance(value, tuple):
        return tuple(map(_replaced, value))
    if not isinstance(value, (ClosedJaxpr, Jaxpr)) or not has_plain_convolutions(value):
        return value
    closed: Any = value if hasattr(value, "consts") else ClosedJaxpr(value, [])
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, weak_type=v.aval.weak_type) for v in closed.jaxpr.invars]
    found = jax.make_jaxpr(functools.partial(_evaluate, closed))(*shapes)
    return found if hasattr(value, "consts") else found.jaxpr
