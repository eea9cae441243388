"""Diagnostics of a network: dormant units, rank of its features, size of its weights, score as it learns.

All are functions of arrays, to be used inside a compiled program or outside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cl_zoo.checks import checked
from cl_zoo.losses import mask_outputs, weighted_mean
from cl_zoo.types import Array, Batch, Component, Context, Key, PyTree, TrainState

__all__ = [
    "dormant_fraction",
    "effective_rank",
    "mean_absolute_weight",
    "online_score",
    "stable_rank",
    "weight_norm",
]


def dormant_fraction(activations: Array, weight: Array | None = None, *, threshold: Array | float = 0.0) -> Array:
    """The fraction of a layer's n units whose activity is at most `threshold` times the layer's mean activity.

        a_i = mean_b |h_bi|;   fraction = #{i: a_i <= threshold * mean_j a_j} / n

    Threshold 0 counts dead units, those that are 0 on all examples.

    Args:
      activations: `[B, ..., n]`, with positions between for feature maps.
      weight: `f32[B]`; examples of weight 0 are absent. None: all count.
      threshold: at least 0.

    Returns:
      `f32[]`; nan where an activity is.

    Source: threshold 0: Dohare et al. 2024, doi 10.1038/s41586-024-07711-7; others: Sokar et al. 2023,
    arXiv 2302.12902.

    Example:
      >>> import jax.numpy as jnp
      >>> float(dormant_fraction(jnp.array([[0.0, 1.0, 3.0, 0.0], [0.0, 2.0, 3.0, 0.1]]), threshold=0.1))
      0.5
    """
    h = jnp.abs(activations).reshape((activations.shape[0], -1, activations.shape[-1])).mean(1)
    h = h if weight is None else jnp.where(weight[:, None] > 0, h, 0)
    activity = jnp.mean(h, axis=0) if weight is None else weight @ h / jnp.maximum(jnp.sum(weight), 1e-12)
    fraction = jnp.mean((activity <= threshold * jnp.mean(activity)).astype(jnp.float32))
    return jnp.where(jnp.any(jnp.isnan(activity)), jnp.nan, fraction)


def effective_rank(features: Array, weight: Array | None = None) -> Array:
    """exp(- sum_i p_i log p_i) with p_i = s_i / sum_j s_j, s the singular values: n for n equal ones, 1 for one.

    Args:
      features: `[B, F]`; not centred.
      weight: `f32[B]`; examples of weight 0 are absent. None: all count.

    Returns:
      `f32[]`; 0 for a matrix of zeros.

    Source: Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality".

    Example:
      >>> import jax.numpy as jnp
      >>> round(float(effective_rank(2.0 * jnp.eye(5))), 4)
      5.0
    """
    values = _singular_values(features, weight)
    total = jnp.sum(values)
    p = values / jnp.where(total > 0, total, 1)
    entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0))
    return jnp.where(total > 0, jnp.exp(entropy), total)  # 0, or nan


def stable_rank(features: Array, weight: Array | None = None) -> Array:
    """sum_i s_i^2 / max_i s_i^2, s the singular values; 0 for a matrix of zeros. Arguments as in `effective_rank`.

    Others use this name for the number of singular values that make up 99 % of their sum.

    Example:
      >>> import jax.numpy as jnp
      >>> float(stable_rank(jnp.diag(jnp.array([2.0, 1.0]))))
      1.25
    """
    squares = jnp.square(_singular_values(features, weight))
    largest = jnp.max(squares)
    return jnp.sum(squares) / jnp.where(largest > 0, largest, 1)


def _singular_values(features: Array, weight: Array | None) -> Array:
    if weight is not None:
        features = jnp.where(weight[:, None] > 0, features, 0)  # a row of zeros adds nothing to any singular value
    return jnp.linalg.svd(features, compute_uv=False)


def mean_absolute_weight(params: PyTree) -> Array:
    """The mean of |p| over all parameters, biases too."""
    leaves = jax.tree.leaves(params)
    return sum((jnp.sum(jnp.abs(leaf)) for leaf in leaves), jnp.zeros(())) / sum(leaf.size for leaf in leaves)


def weight_norm(params: PyTree) -> Array:
    """sqrt(sum p^2) over all parameters."""
    return optax.tree.norm(params)


@checked
def online_score(
    score: Callable[[Any, Batch], Array], *, batch_size: int | None = None, name: str = "online_score"
) -> Component:
    """Tests each batch before it is learned from (prequential): the score of the network before the step.

        score = sum_b w_b score(outputs_b, y_b) / sum_b w_b,   loss = 0

    It reads the pass that the losses share, so it costs nothing, and has that pass's dropout and batch statistics.

    Args:
      score: `(outputs, batch) -> f32[B]`, `stream.score` say; outputs masked as the loss masks them.
      batch_size: how many of the first examples count, where another component adds its own (replay): that of the
        stream. None: all.
      name: of the component; the metric is `name/score`.

    Returns:
      A component without state.

    Example:
      >>> import jax, optax
      >>> from cl_zoo import compose, run_stream, supervised
      >>> from cl_zoo.models import mlp
      >>> from cl_zoo.streams import split_mnist
      >>> stream = split_mnist(n_tasks=2, scenario="domain", steps=20)
      >>> learner = compose(mlp((28, 28), 5), optax.adam(1e-3), supervised(), online_score(stream.score))
      >>> run_stream(learner, stream, jax.random.key(0)).metrics["online_score/score"].shape
      (2, 20)
    """

    def loss(
        context: Context,
        state: TrainState,
        part: None,
        params: PyTree,
        forward: Callable[[], PyTree],
        batch: Batch,
        key: Key,
    ) -> tuple[Array, dict[str, PyTree]]:
        outputs = mask_outputs(jax.lax.stop_gradient(forward()), context.active(state.task, batch.task))
        outputs, batch = jax.tree.map(lambda leaf: leaf[:batch_size], (outputs, batch))
        values = score(outputs, batch)
        return jnp.zeros((), values.dtype), {"score": weighted_mean(values, batch.weight)}

    return Component(name, loss=loss)
