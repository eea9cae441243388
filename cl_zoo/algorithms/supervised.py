"""Learning from labels. Alone it is the naive baseline: each task is trained after the last, and nothing is kept."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import jax.numpy as jnp

from cl_zoo.checks import checked
from cl_zoo.entries import Entry, Null
from cl_zoo.losses import IGNORED, cross_entropy, mask_outputs, weighted_mean
from cl_zoo.types import Array, Batch, Component, Context, Key, PyTree, TrainState

__all__ = ["ENTRY", "no_loss", "supervised"]


def no_loss(
    context: Context,
    state: TrainState,
    part: PyTree,
    params: PyTree,
    forward: Callable[[], PyTree],
    batch: Batch,
    key: Key,
) -> tuple[Array, dict[str, PyTree]]:
    """The `loss` hook of a component that does not learn by gradients: 0, without a forward pass."""
    return jnp.zeros(()), {}


@checked
def supervised(loss: Callable[..., Array] = cross_entropy, *, name: str = "supervised") -> Component:
    """L = sum_b w_b loss(outputs_b, y_b) / sum_b w_b.

    With `compose(..., tasks=stream.tasks)` the logits are masked: examples that carry their task compete among that
    task's outputs (task-incremental, a multi-head network), others among those active now (class-incremental: the
    classes seen so far, or all).

    Args:
      loss: `(outputs, y) -> f32[B]`. One with an argument `active` is given the logits as they are, and
        `active`, `bool[C]` or `bool[B, C]`: label smoothing, or a squared error to one-hot targets, must not see masked
        logits, which are about -1e38.
      name: key in metrics.

    Returns:
      A component without state.

    Raises:
      ValueError: at the first trace, if the stream has no labels.

    Source: the naive baseline and the masks of van de Ven et al. 2022, doi 10.1038/s42256-022-00568-3.

    Differences from the paper or its code: none.

    Example:
      >>> import jax.numpy as jnp
      >>> cross_entropy(jnp.zeros((1, 4)), jnp.array([2]))
      Array([1.3862944], dtype=float32)
    """

    reads_active = "active" in inspect.signature(loss).parameters

    def loss_hook(
        context: Context,
        state: TrainState,
        part: None,
        params: PyTree,
        forward: Callable[[], PyTree],
        batch: Batch,
        key: Key,
    ) -> tuple[Array, dict[str, PyTree]]:
        if batch.y is None:
            raise ValueError(f"{name}: the batch has no labels (y is None), but a supervised loss needs them")
        outputs, active = forward(), context.active(state.task, batch.task)
        if reads_active:
            active = jnp.ones(outputs.shape[-1:], bool) if active is None else active
            return weighted_mean(loss(outputs, batch.y, active=active), batch.weight), {}
        each = loss(mask_outputs(outputs, active), batch.y)
        if active is not None and loss is cross_entropy:  # the masked output of a label that is not open is no loss
            label = jnp.clip(batch.y, 0, outputs.shape[-1] - 1)[:, None]
            is_open = jnp.take_along_axis(jnp.broadcast_to(active, outputs.shape), label, axis=1)[:, 0]
            each = jnp.where(is_open | (batch.y == IGNORED), each, jnp.nan)
        return weighted_mean(each, batch.weight), {}

    return Component(name, loss=loss_hook, reads_ignored=getattr(loss, "reads_ignored", False))


ENTRY = Entry(
    name="supervised",
    family="baseline",
    summary="nothing: each task is trained after the last (the naive baseline)",
    factory=supervised,
    papers=("vandeven2022three",),
    null=Null({}, "it is the naive learner"),
    results="none",
    own_loss=True,
)
