"""Floating-point operations of a function, counted in what JAX traces, before anything compiles."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

__all__ = ["operations"]

_MOVES = {
    "broadcast_in_dim", "reshape", "transpose", "squeeze", "slice", "dynamic_slice", "dynamic_update_slice", "pad",
    "concatenate", "rev", "gather", "copy", "convert_element_type", "stop_gradient", "optimization_barrier",
    "iota", "select_n", "scatter", "name", "split", "sharding_constraint", "bitcast_convert_type", "random_bits",
    "random_wrap", "random_unwrap", "random_fold_in", "random_seed", "random_split", "threefry2x32", "eq", "ne",
    "lt", "le", "gt", "ge", "and", "or", "not", "is_finite", "sort", "argmax", "argmin", "reduce_and", "reduce_or",
    "reduce_precision",
}  # fmt: skip
"""What moves or compares numbers, as XLA's count has it."""
_SEVERAL = {"erf_inv": 70, "logistic": 3, "integer_pow": 2}
"""Functions that XLA writes out as polynomials."""


def operations(function: Callable[..., Any], *arguments: Any) -> float:
    """Operations on floating-point numbers: 2 for a multiply-add, 1 for each number of an elementwise result.

    It is XLA's count for what it is given (before fusion), which takes the body of every loop once; the other rounds of
    `scan` are counted here. Loops whose rounds are only known as they run (`while_loop`) count once.

    Args:
      function: anything that JAX can lower.
      *arguments: arrays, or their shapes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> operations(lambda a, b: a @ b + 1, jnp.ones((2, 3)), jnp.ones((3, 4)))  # 2 * 2 * 3 * 4 + 2 * 4
      56.0
      >>> loop = lambda a: jax.lax.scan(lambda a, _: (a @ a, None), a, length=10)[0]
      >>> round(operations(loop, jnp.ones((4, 4))), -1)  # 10 * 2 * 4 * 4 * 4
      1280.0
    """
    traced = jax.jit(function).trace(*arguments)
    analysis: Any = traced.lower().cost_analysis() or {}
    jaxpr = traced.jaxpr.jaxpr
    needed = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]
    return max(float(analysis.get("flops", 0.0)), 0.0) + _count(needed, True) - _count(needed, False)


def _count(jaxpr: Any, all_rounds: bool) -> float:
    return float(sum(_of_equation(eqn, all_rounds) for eqn in jaxpr.eqns))


def _of_equation(eqn: Any, all_rounds: bool) -> float:
    name = eqn.primitive.name
    inner = [_count(jaxpr, all_rounds) for jaxpr in _inner(eqn.params)]
    if name == "cond":
        return max(inner)
    if name == "scan":
        return (eqn.params["length"] if all_rounds else 1) * sum(inner)
    if inner and not name.startswith(("reduce", "scatter")):
        return sum(inner)
    out = sum(math.prod(v.aval.shape) for v in eqn.outvars if _is_float(v.aval))
    if name in _MOVES or not out:
        return 0.0
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2.0 * out * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
    if name == "conv_general_dilated":
        kernel, spec = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec
        return 2.0 * out * math.prod(kernel) / kernel[spec[0]]
    if name.startswith(("reduce_", "cum")):
        return float(math.prod(eqn.invars[0].aval.shape))
    if name.startswith("scatter"):
        return float(math.prod(eqn.invars[-1].aval.shape))
    return float(out * _SEVERAL.get(name, 1))


def _is_float(aval: Any) -> bool:
    return hasattr(aval, "dtype") and jnp.issubdtype(aval.dtype, jnp.inexact)


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs that an equation holds."""
    for value in params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(one, "jaxpr") and hasattr(one.jaxpr, "eqns"):
                yield one.jaxpr
            elif hasattr(one, "eqns"):
                yield one
