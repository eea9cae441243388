"""Operations of a traced function replaced by others: convolutions by those that are fast inside loops
(`convolution.py` explains how), products by those of half precision."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxprs_in_params

from cl_zoo.compilation import staged
from cl_zoo.models.convolution import conv_general_dilated, typed
from cl_zoo.models.pooling import max_pool
from cl_zoo.types import Array

__all__ = ["Rule", "fast_convolutions", "has", "has_plain_convolutions", "rewritten"]

_PLAIN = "conv_general_dilated"
WINDOW = 16
"""Places of a window up to which its maximum is taken place by place: each takes time to compile."""


class Rule(NamedTuple):
    """Attributes:
    wanted: `(operation) -> bool`; functions without such operations are left as they are.
    replace: `(operation, operands, params) -> results`, or None where it stays.
    """

    wanted: Callable[[Any], bool]
    replace: Callable[[Any, list[Any], dict[str, Any]], list[Array] | None]


def has(rule: Rule, jaxpr: Any) -> bool:
    """Whether a traced function, or one inside it, has a wanted operation. Those that define their own derivatives
    (`custom_jvp`, `custom_vjp`) are not searched."""
    return any(
        rule.wanted(eqn)
        or (
            not eqn.primitive.name.startswith("custom_")
            and any(has(rule, inner) for inner in jaxprs_in_params(eqn.params))
        )
        for eqn in jaxpr.eqns
    )


def has_plain_convolutions(jaxpr: Any) -> bool:
    """Whether a traced function, or one inside it, convolves by `lax.conv_general_dilated`."""
    return has(_CONVOLUTIONS, jaxpr)


def fast_convolutions(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, with `conv_general_dilated` of `models.convolution` wherever it uses that of `lax`, and maxima
    over windows that do not overlap by `models.pooling`.

    It works on the function's trace, so layers of any library can be used as they are. Left as they are:
    functions without convolutions, derivatives that the function defines itself, devices other than CPUs, arrays whose
    types state how they lie on devices, and calls outside a program (`grad` and `vmap` alone make none).
    `from_nnx` and `from_linen` do this already.

    Args:
      function: pure, of and to pytrees. What it stores elsewhere (a list that it fills) is lost.

    Example:
      >>> from cl_zoo.types import Model
      >>> def apply(params, model_state, x, **_):
      ...     return jax.lax.conv(x, params, (1, 1), "SAME").mean((2, 3)), model_state, {}
      >>> model = Model(lambda key, x: (jnp.ones((5, 3, 3, 3)), {}), fast_convolutions(apply))
    """
    return rewritten(function, _CONVOLUTIONS, lambda arrays: _on_cpu_in_program() and not any(map(typed, arrays)))


def _on_cpu_in_program() -> bool:
    return jax.default_backend() == "cpu" and staged()


def rewritten(
    function: Callable[..., Any], rule: Rule, when: Callable[[list[Any]], bool] = lambda arrays: True
) -> Callable[..., Any]:
    """The function, with the operations of its trace replaced by a rule, where `when(traced arrays)` is true."""
    without: set[Hashable] = set()  # kinds of calls that are known to have none

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        leaves, treedef = jax.tree.flatten((args, kwargs))
        traced = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.core.Tracer)]
        arrays = [leaves[i] for i in traced]
        if not when(arrays):
            return function(*args, **kwargs)
        kind = (treedef, tuple((np.shape(leaf), str(getattr(leaf, "dtype", leaf))) for leaf in leaves))
        if kind in without:
            return function(*args, **kwargs)
        result: list[Any] = []

        def of_arrays(*arrays: Array) -> list[Array]:
            """The arrays among its results; all else is kept aside."""
            full = list(leaves)
            for i, array in zip(traced, arrays, strict=True):
                full[i] = array
            args, kwargs = jax.tree.unflatten(treedef, full)
            found, structure = jax.tree.flatten(function(*args, **kwargs))
            result[:] = [structure, found]
            return [leaf for leaf in found if isinstance(leaf, jax.Array)]

        jaxpr = jax.make_jaxpr(of_arrays)(*arrays)
        if not has(rule, jaxpr.jaxpr):
            without.add(kind)
            return function(*args, **kwargs)
        structure, found = result
        new = iter(_evaluate(rule, jaxpr, *arrays))
        return jax.tree.unflatten(structure, [next(new) if isinstance(v, jax.Array) else v for v in found])

    return call


def _evaluate(rule: Rule, closed: Any, *arrays: Array) -> list[Array]:
    """Runs a traced function, with its operations replaced."""
    values = dict(zip((*closed.jaxpr.constvars, *closed.jaxpr.invars), (*closed.consts, *arrays), strict=True))

    def read(v: Any) -> Any:
        return v.val if isinstance(v, Literal) else values[v]

    for eqn in closed.jaxpr.eqns:
        operands = list(map(read, eqn.invars))
        params = eqn.primitive.get_bind_params(eqn.params)
        results = rule.replace(eqn, operands, params)
        if results is None:
            if not eqn.primitive.name.startswith("custom_"):
                params = {name: _replaced(rule, value) for name, value in params.items()}
            with eqn.ctx.manager:
                found = eqn.primitive.bind(*operands, **params)
            results = found if eqn.primitive.multiple_results else [found]
        values.update(zip(eqn.outvars, results, strict=True))
    return list(map(read, closed.jaxpr.outvars))


def _fast(eqn: Any, operands: list[Any], params: dict[str, Any]) -> list[Array] | None:
    if eqn.primitive.name == _PLAIN:
        return [conv_general_dilated(*operands, **params)]
    return None if (window := _pooled(eqn)) is None else [max_pool(operands[0], window)]


_CONVOLUTIONS = Rule(lambda eqn: eqn.primitive.name == _PLAIN, _fast)


def _pooled(eqn: Any) -> tuple[int, ...] | None:
    """The window of a maximum over windows of `[B, *S, C]` that do not overlap; None of any other operation."""
    if eqn.primitive.name != "reduce_window_max":
        return None
    p, (first, *window, last) = eqn.params, eqn.params["window_dimensions"]
    plain = not any(map(any, p["padding"])) and {*p["base_dilation"], *p["window_dilation"], first, last} == {1}
    apart = p["window_strides"] == p["window_dimensions"] and window and math.prod(window) <= WINDOW
    return tuple(window) if plain and apart else None


def _replaced(rule: Rule, value: Any) -> Any:
    """A parameter of an operation; a traced function (the body of a loop, a branch) with its operations replaced."""
    if type(value) is tuple:  # not of those with names, which are something else
        return tuple(_replaced(rule, one) for one in value)
    if not isinstance(value, (ClosedJaxpr, Jaxpr)) or not has(rule, value):
        return value
    return _inner.__wrapped__(rule, value) if getattr(value, "consts", ()) else _inner(rule, value)


@functools.lru_cache(maxsize=256)  # what is the same stays the same, so that it is lowered once
def _inner(rule: Rule, value: Any) -> Any:
    closed: Any = value if hasattr(value, "consts") else ClosedJaxpr(value, [])
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, weak_type=v.aval.weak_type) for v in closed.jaxpr.invars]
    found = jax.make_jaxpr(functools.partial(_evaluate, rule, closed))(*shapes)
    return found if hasattr(value, "consts") else found.jaxpr
