"""Networks that take episodes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from cl_zoo.types import Array, Episode, Key, Model, PyTree

__all__ = ["episodic"]


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
      >>> from cl_zoo import Episode
      >>> from cl_zoo.models import mlp
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
