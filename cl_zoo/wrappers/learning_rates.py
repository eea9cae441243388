"""A learning rate for each parameter, which is a parameter too."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from cl_zoo.checks import NonNegative, check_range, checked
from cl_zoo.types import Array, Key, Model, PyTree, Taps

__all__ = ["with_learning_rates"]


@checked
def with_learning_rates(model: Model, low: NonNegative, high: float | None = None) -> Model:
    """Every parameter gets a learning rate of its own, which is a parameter too.

    Args:
      model: any network.
      low, high: rates are drawn from U(low, high); without `high`, all are `low`.

    Returns:
      A `Model` with parameters `{"params": those of the model, "learning_rates": a tree like them}`. The rates take no
      part in a forward pass; `maml(inner="learned")` and `la_maml` use them.

    Raises:
      ValueError: a negative rate, high below low.

    Source: Li et al. 2017, "Meta-SGD: learning to learn quickly for few-shot learning", arXiv 1707.09835.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from cl_zoo.models import mlp
      >>> model = with_learning_rates(mlp((1,), 1, hidden=(2,)), 0.005, 0.1)
      >>> params, _ = model.init(jax.random.key(0), jnp.zeros((1, 1)))
      >>> params["learning_rates"]["output"]["kernel"].shape
      (2, 1)
    """
    if high is not None:
        check_range("with_learning_rates", "high", high, float(low))

    inner = model.bind(None)

    def init(key: Key, x: PyTree, weights: PyTree = None) -> tuple[PyTree, PyTree]:
        params, model_state = inner.bind(weights).init(key, x)
        leaves, structure = jax.tree.flatten(params)
        if high is None:
            rates = [jnp.full(leaf.shape, low, leaf.dtype) for leaf in leaves]
        else:
            keys = jax.random.split(jax.random.fold_in(key, 1), len(leaves))
            rates = [
                jax.random.uniform(k, leaf.shape, leaf.dtype, low, high) for k, leaf in zip(keys, leaves, strict=True)
            ]
        return {"params": params, "learning_rates": jax.tree.unflatten(structure, rates)}, model_state

    def apply(
        params: PyTree, model_state: PyTree, x: PyTree, *, perturb: dict[str, Array] | None = None, **options: Any
    ) -> tuple[PyTree, PyTree, Taps]:
        if perturb is not None:
            perturb = {name.removeprefix("params/"): value for name, value in perturb.items()}
        outputs, model_state, taps = inner.apply_function(params["params"], model_state, x, perturb=perturb, **options)
        return outputs, model_state, {f"params/{name}": tap for name, tap in taps.items()}

    units = tuple(tuple((("params", *path), axis, role) for path, axis, role in group) for group in model.units)
    return dataclasses.replace(
        model,
        init_function=init,
        apply_function=apply,
        units=units,
        inner_function=lambda params, weights=None: inner.bind(weights).inner_params(params["params"]),
        takes_weights=True,
    )
