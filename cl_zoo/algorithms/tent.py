"""Tent: normalisation layers minimise the entropy of predictions on test batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from cl_zoo.checks import Count, NonNegative, checked
from cl_zoo.entries import Entry, Null
from cl_zoo.estimators.inner_loop import movable
from cl_zoo.losses import finite, mask_outputs, weighted_mean
from cl_zoo.types import Array, Batch, Component, Context, Key, PyTree, TrainState

__all__ = ["ENTRY", "TentState", "tent"]


class TentState(NamedTuple):
    """Attributes:
    opt_state: of the optimiser at test time, over what is updated.
    calls: `i32[]`, test batches so far, so that each draws (dropout) afresh.
    """

    opt_state: PyTree
    calls: Array


@checked
def tent(
    learning_rate: NonNegative = 1e-3,
    *,
    optimiser: optax.GradientTransformation | None = None,
    steps: Count = 1,
    only: Sequence[str] = (),
    name: str = "tent",
) -> Component:
    """At test time the scales and biases of normalisation layers minimise the entropy of predictions on a batch.

        H(p) = mean_b - sum_c q_bc log q_bc,   q_b = softmax of the active outputs, by the statistics of the batch
        p <- p + optimiser(grad H(p)),   p the scales and biases;   predictions are those before the step

    With several steps they are those before the last one. Running statistics stay as they are. The optimiser's state
    and the parameters stay in the learner's state; `evaluate_adapting(reset=)` decides whether they are kept for the
    next test batch. It needs batches: on a single example, or examples sorted by class, it collapses.

    Args:
      learning_rate: of Adam, at least 0; 0 predicts by the statistics of the batch alone, the baseline "norm".
      optimiser: any optax optimiser in Adam's place.
      steps: on each test batch, at least 1.
      only: names of the parameters that are updated ("norm_0", "norm_1/scale"); if empty, every scale and bias of a
        layer that has a scale.
      name: key in state.

    Returns:
      A component with a `TentState`, for any learner; it does nothing in training.

    Raises:
      ValueError: a number outside its range; at `init`, a model without normalisation layers, a name that is not
        a parameter.

    Source: Wang et al. 2021, "Tent: fully test-time adaptation by entropy minimization", arXiv 2006.10726.

    Differences from the paper or its code: theirs is Adam with 1e-3 for CIFAR-10-C and SGD with momentum 0.9 and 2.5e-4
    for ImageNet-C, both with batches (200 and 64) that set the rate; pass your own as `optimiser`. Their code deletes
    the running statistics, here they are left unused, so that `predict` is that of the source model. Layer and group
    normalisation have no batch statistics; their scales and biases are updated all the same.

    Example:
      >>> import optax
      >>> from cl_zoo import compose, supervised, tent
      >>> from cl_zoo.models import mlp
      >>> model = mlp((28, 28), 10, norm="batch")
      >>> learner = compose(model, optax.sgd(0.1), supervised(), tent(learning_rate=1e-3))
    """
    descent = optax.adam(learning_rate) if optimiser is None else optimiser

    def init(context: Context, state: TrainState, batch: Batch, key: Key) -> TentState:
        moving, _ = movable(state.params, only or _normalisation(name, state.params))
        return TentState(descent.init(moving), jnp.zeros((), jnp.int32))

    def adapt(
        context: Context, state: TrainState, part: TentState, batch: Batch, key: Key
    ) -> tuple[TrainState, TentState, Array]:
        moving, whole = movable(state.params, only or _normalisation(name, state.params))
        key, active = jax.random.fold_in(key, part.calls), context.active(state.task, batch.task)

        def entropy(moving: list[Array], i: Array) -> tuple[Array, Array]:
            outputs, _, _ = context.model.apply(
                whole(moving),
                state.model_state,
                batch.x,
                task=batch.task,
                weight=batch.weight,
                key=jax.random.fold_in(key, i),
                train=True,
            )
            outputs = finite(mask_outputs(outputs, active))
            each = -jnp.sum(jax.nn.softmax(outputs) * jax.nn.log_softmax(outputs), axis=-1)
            return weighted_mean(each, batch.weight), outputs

        def step(carry: tuple[list[Array], PyTree], i: Array) -> tuple[tuple[list[Array], PyTree], Array]:
            moving, opt_state = carry
            gradient, outputs = jax.grad(entropy, has_aux=True)(moving, i)
            updates, opt_state = descent.update(gradient, opt_state, moving)
            return (optax.apply_updates(moving, updates), opt_state), outputs

        before = (moving, part.opt_state)
        after, outputs = jax.lax.scan(step, before, jnp.arange(steps))
        # Adam moves on a gradient of zero: a batch of padding alone must not.
        any_row = jnp.any(batch.weight > 0)
        moving, opt_state = jax.tree.map(lambda new, old: jnp.where(any_row, new, old), after, before)
        part = TentState(opt_state, part.calls + any_row.astype(jnp.int32))
        return state._replace(params=whole(moving)), part, outputs[-1]

    return Component(name, init=init, adapt=adapt)


def _normalisation(owner: str, params: PyTree) -> tuple[str, ...]:
    """Names of the scales and biases of normalisation layers: the layers that have a scale."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    found = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    layers = {path.removesuffix("scale") for path in found if path.split("/")[-1] == "scale"}
    if not layers:
        raise ValueError(
            f"{owner}: none of the model's layers normalises (no parameter is named scale), so nothing can be adapted;"
            ' give it a norm, as in mlp(..., norm="batch"), or name parameters in only'
        )
    return tuple(path for path in found if path in {layer + leaf for layer in layers for leaf in ("scale", "bias")})


ENTRY = Entry(
    name="tent",
    family="test-time training",
    summary="nothing; scales and biases of normalisation layers minimise the entropy of predictions on the test batch",
    factory=tent,
    arguments={"learning_rate": 0.1},
    numbers=("learning_rate",),
    papers=("wang2021tent",),
    null=Null({"learning_rate": 0.0}, "in training at any setting; with rate 0 nothing moves at test time"),
    results="tent",
)
