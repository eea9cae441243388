"""Networks for meta-learning: ones that take episodes, ones that bring a learning rate for each parameter."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from cl_zoo.types import Array, Episode, Key, Model, PyTree, check_range

__all__ = ["episodic", "with_learning_rates"]


def episodic(model: Model) -> Model:
    """Takes a batch of rows as before, and an `Episode` too: it answers all queries, without having learnt from them.

    Outputs of an episode are `[B, Q, C]`; taps are those of its `B Q` query rows. What learns from the support is the
    component, `maml` say.

    Args:
      model: any network.

    Returns:
      A `Model` with the same parameters and units.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from cl_zoo import Episode, mlp
      >>> model = episodic(mlp((1,), 1))
      >>> x = Episode(jnp.zeros((4, 5, 1)), jnp.zeros((4, 5)), jnp.zeros((4, 7, 1)))
      >>> params, model_state = model.init(jax.random.key(0), x)
      >>> model.apply(params, model_state, x)[0].shape
      (4, 7, 1)
    """

    def rows(x: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: leaf.reshape((-1, *leaf.shape[2:])), x.query_x)

    def init(key: Key, x: PyTree) -> tuple[PyTree, PyTree]:
        return model.init(key, rows(x) if isinstance(x, Episode) else x)

    def apply(
        params: PyTree, model_state: PyTree, x: PyTree, *, task: Any = None, weight: Any = None, **options: Any
    ) -> tuple[PyTree, PyTree, dict[str, tuple[Array, Array]]]:
        if not isinstance(x, Episode):
            return model.apply(params, model_state, x, task=task, weight=weight, **options)
        shape = jax.tree.leaves(x.query_x)[0].shape[:2]
        task, weight = (
            None if told is None else jnp.broadcast_to(told[:, None], shape).ravel() for told in (task, weight)
        )
        outputs, model_state, taps = model.apply(params, model_state, rows(x), task=task, weight=weight, **options)
        outputs = jax.tree.map(lambda leaf: leaf.reshape((*shape, *leaf.shape[1:])), outputs)
        return outputs, model_state, taps

    return model._replace(init=init, apply=apply)


def with_learning_rates(model: Model, low: float, high: float | None = None) -> Model:
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
      >>> from cl_zoo import mlp
      >>> model = with_learning_rates(mlp((1,), 1, hidden=(2,)), 0.005, 0.1)
      >>> params, _ = model.init(jax.random.key(0), jnp.zeros((1, 1)))
      >>> params["learning_rates"]["output"]["kernel"].shape
      (2, 1)
    """
    check_range("with_learning_rates", "low", low, 0)
    if high is not None:
        check_range("with_learning_rates", "high", high, low)

    def init(key: Key, x: PyTree) -> tuple[PyTree, PyTree]:
        params, model_state = model.init(key, x)
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
    ) -> tuple[PyTree, PyTree, dict[str, tuple[Array, Array]]]:
        if perturb is not None:
            perturb = {name.removeprefix("params/"): value for name, value in perturb.items()}
        outputs, model_state, taps = model.apply(params["params"], model_state, x, perturb=perturb, **options)
        return outputs, model_state, {f"params/{name}": tap for name, tap in taps.items()}

    units = tuple(tuple((("params", *path), axis, role) for path, axis, role in group) for group in model.units)
    return Model(init, apply, units)
