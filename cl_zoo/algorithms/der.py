"""Dark experience replay: the network's own past outputs are replayed, and in DER++ the labels too."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from cl_zoo.buffers import Reservoir, batch_rows, reservoir_add, reservoir_init, reservoir_sample
from cl_zoo.checks import Count, NonNegative, check_classes, check_whole, checked
from cl_zoo.entries import Entry, Null
from cl_zoo.losses import cross_entropy, finite, mask_outputs, weighted_mean
from cl_zoo.types import Array, Batch, Component, Context, Key, PyTree, Record, TrainState

__all__ = ["ENTRY", "DerState", "der"]

DerState = Reservoir
"""The memory: examples as they came from the stream, each with the network's outputs when it came."""


@checked
def der(
    capacity: Count,
    *,
    alpha: NonNegative,
    beta: NonNegative | None = None,
    batch_size: int = 32,
    name: str = "der",
) -> Component:
    """A uniform sample of all examples seen is stored with the outputs z' they had; those, and labels, are replayed.

        DER     L = L_task + alpha * mean_b mean_c (f(x'_b)_c - z'_bc)^2
        DER++   L = L_DER  + beta * mean_b [ - log softmax(f(x''_b))_{y''_b} ]

    x' and x'' are independent draws of `batch_size` different examples from memory. z' are all outputs, before any
    mask, of the forward pass in which the example was first learned from.

    Args:
      capacity: examples in memory, at least 1.
      alpha: at least 0.
      beta: at least 0; None is DER, a number DER++.
      batch_size: examples of each draw, from 1 to the capacity.
      name: key in state and metrics.

    Returns:
      A component with a `DerState`; metrics `der/loss`, and within it `der/outputs` and `der/labels`.

    Raises:
      ValueError: a number outside its range; at the first trace, no other component whose loss makes a forward pass.

    Source: Buzzega et al. 2020, arXiv 2004.07211; reservoir: Vitter 1985.

    Differences from the paper or its code: the paper writes a squared norm over classes, its code (and this) takes
    their mean. Both draws go through the network in one pass, which matters for batch normalisation alone; its running
    statistics are updated by the stream's examples only. Where examples carry their task, the labels compete among its
    outputs, as in `supervised`.

    Example:
      >>> import optax
      >>> from cl_zoo import compose, supervised
      >>> from cl_zoo.models import mlp
      >>> learner = compose(mlp((4,), 3), optax.sgd(0.1), supervised(), der(200, alpha=0.5, beta=0.5))
    """
    check_whole(name, "batch_size", batch_size, 1, capacity)

    def init(context: Context, state: TrainState, batch: Batch, key: Key) -> DerState:
        if beta is not None:
            check_classes(name, batch.y, "beta weighs a cross-entropy; without it, outputs of any kind are kept")
        outputs = jax.eval_shape(
            lambda s, b: context.model.apply(s.params, s.model_state, b.x, task=b.task, weight=b.weight)[0],
            state,
            batch,
        )
        return reservoir_init((batch_rows(batch), jnp.zeros(outputs.shape, outputs.dtype)), capacity)

    def loss(
        context: Context,
        state: TrainState,
        part: DerState,
        params: PyTree,
        forward: Callable[[], PyTree],
        batch: Batch,
        key: Key,
    ) -> tuple[Array, dict[str, PyTree]]:
        draws = [reservoir_sample(part, batch_size, k) for k in jax.random.split(key, 1 if beta is None else 2)]
        ((x, y, task), then), weight = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *draws)
        now, _, _ = context.model.apply(
            params, state.model_state, x, task=task, weight=weight, key=jax.random.fold_in(key, 2), train=True
        )
        first, second = slice(0, batch_size), slice(batch_size, None)
        squares = jnp.square(finite(now[first]) - finite(then[first]))
        error = jnp.mean(squares, axis=tuple(range(1, squares.ndim)))  # over tokens too, where an example has many
        terms = {"outputs": alpha * weighted_mean(error, weight[first])}
        if beta is not None:
            active = context.active(state.task, None if task is None else task[second])
            error = cross_entropy(mask_outputs(now[second], active), y[second])
            terms["labels"] = beta * weighted_mean(error, weight[second])
        return sum(terms.values(), jnp.zeros(())), terms

    def observe(
        context: Context, state: TrainState, part: DerState, record: Record, key: Key
    ) -> tuple[TrainState, DerState]:
        if record.outputs is None:
            raise ValueError(f"{name}: no loss made a forward pass on the batch, so there are no outputs to store")
        rows = batch_rows(record.batch), record.outputs[: record.batch.weight.shape[0]]
        return state, reservoir_add(part, rows, record.batch.weight, key)

    return Component(name, init=init, loss=loss, observe=observe)


ENTRY = (
    Entry(
        name="der",
        family="replay",
        summary="a sample of all examples seen and the logits that they had when they came, by replay",
        factory=der,
        arguments={"capacity": 20, "batch_size": 8, "alpha": 0.5},
        numbers=("alpha",),
        papers=("buzzega2020dark",),
        null=Null({"alpha": 0.0}, "alpha 0"),
        results="der",
    ),
    Entry(
        name="der_plus_plus",
        family="replay",
        summary="a sample of all examples seen, their logits and, on a second draw, their labels, by replay",
        factory=der,
        arguments={"capacity": 20, "batch_size": 8, "alpha": 0.5, "beta": 0.5},
        numbers=("alpha", "beta"),
        papers=("buzzega2020dark",),
        null=Null({"alpha": 0.0, "beta": 0.0}, "alpha and beta 0"),
        results="der++",
    ),
)
