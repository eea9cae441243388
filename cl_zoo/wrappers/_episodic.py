"""Networks that take episodes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from cl_zoo.checks import checked
from cl_zoo.types import Episode, Key, Model, PyTree, Taps

__all__ = ["episodic"]


@checked
def episodic(model: Model) -> Model:
    """A model that takes batches of examples as before, and an `Episode` too, of which it predicts all queries.

    Outputs of an episode are `[B, Q, C]`; taps are those of its `B Q` query examples. The model does not learn from
    the support; a component such as `maml` does.

    Args:
      model: any network.

    Returns:
      A `Model` with the same parameters and units.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from cl_zoo import Episode
      >>> from cl_zoo.models import mlp
      >>> model = episodic(mlp((1,), 1))
      >>> x = Episode(jnp.zeros((4, 5, 1)), jnp.zeros((4, 5)), jnp.zeros((4, 7, 1)))
      >>> params, model_state = model.init(jax.random.key(0), x)
      >>> model.apply(params, model_state, x)[0].shape
      (4, 7, 1)
    """

    inner = model.bind(None)

    def rows(x: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: leaf.reshape((-1, *leaf.shape[2:])), x.query_x)

    def flat(x: PyTree) -> PyTree:
        return rows(x) if isinstance(x, Episode) else x

    def init(key: Key, x: PyTree, weights: PyTree = None) -> tuple[PyTree, PyTree]:
        return inner.bind(weights).init(key, flat(x))

    def apply(
        params: PyTree, model_state: PyTree, x: PyTree, *, task: Any = None, weight: Any = None, **options: Any
    ) -> tuple[PyTree, PyTree, Taps]:
        apply = inner.apply_function
        if not isinstance(x, Episode):
            return apply(params, model_state, x, task=task, weight=weight, **options)
        shape = jax.tree.leaves(x.query_x)[0].shape[:2]
        task, weight = (
            None if told is None else jnp.broadcast_to(told[:, None], shape).ravel() for told in (task, weight)
        )
        outputs, model_state, taps = apply(params, model_state, rows(x), task=task, weight=weight, **options)
        outputs = jax.tree.map(lambda leaf: leaf.reshape((*shape, *leaf.shape[1:])), outputs)
        return outputs, model_state, taps

    draw = inner.draw_function
    return dataclasses.replace(
        model,
        init_function=init,
        apply_function=apply,
        draw_function=draw and (lambda key, x: draw(key, flat(x))),
        takes_weights=True,
    )
