"""Networks that compute in half precision and are trained in full."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from cl_zoo.checks import checked
from cl_zoo.models.rewriting import Rule, rewritten
from cl_zoo.types import Array, Model

__all__ = ["mixed_precision"]

PRODUCTS = ("dot_general", "conv_general_dilated")


@checked
def mixed_precision(model: Model, dtype: Any = jnp.bfloat16) -> Model:
    """The model, its products of matrices and its convolutions in `dtype`, forward and backward; all else (parameters,
    gradients, the optimiser, norms and their statistics, softmax, losses) stays float32. bfloat16 has the range of
    float32, so that no loss needs to be scaled.

    It pays on devices whose matrix units take `dtype`; on CPUs it does not. There, convolutions that
    `fast_convolutions` has replaced stay float32, and so does what defines its own derivative.

    Args:
      model: with parameters in float32.
      dtype: bfloat16 or float16.

    Returns:
      A `Model` with the same parameters.

    Raises:
      ValueError: another dtype.

    Source: Micikevicius et al. 2018, arXiv 1710.03740 (whose float16 needs scaled losses).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from cl_zoo.models import mlp
      >>> model = mixed_precision(mlp((4,), 3))
      >>> params, state = model.init(jax.random.key(0), jnp.zeros((2, 4)))
      >>> params["output"]["kernel"].dtype.name, model.apply(params, state, jnp.zeros((2, 4)))[0].dtype.name
      ('float32', 'float32')
    """
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)):
        raise ValueError(f"mixed_precision: dtype is {jnp.dtype(dtype).name}, but it must be bfloat16 or float16")

    def replace(eqn: Any, operands: list[Any], params: dict[str, Any]) -> list[Array] | None:
        if not wanted(eqn):
            return None
        if params.get("preferred_element_type") == jnp.float32:
            params = params | {"preferred_element_type": None}
        found = eqn.primitive.bind(*(operand.astype(dtype) for operand in operands), **params)
        return [found.astype(jnp.float32)]

    def wanted(eqn: Any) -> bool:
        full = all(v.aval.dtype == jnp.float32 for v in eqn.invars) and eqn.primitive.name in PRODUCTS
        return full and eqn.outvars[0].aval.dtype == jnp.float32

    return dataclasses.replace(model, apply_function=rewritten(model.apply_function, Rule(wanted, replace)))
