"""Streaming linear discriminant analysis: a mean per class and one covariance, exact after every example."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp

from cl_zoo.algorithms.supervised import no_loss
from cl_zoo.checks import Range, check_classes, checked
from cl_zoo.counters import counted
from cl_zoo.entries import Entry
from cl_zoo.estimators.averaging import wide
from cl_zoo.losses import mask_outputs
from cl_zoo.types import Array, Batch, Component, Context, Key, PyTree, Record, TrainState

__all__ = ["ENTRY", "SldaState", "slda"]


class SldaState(NamedTuple):
    """Attributes:
    counts: `i32[C]`, examples of each class; the network has C outputs.
    means: `f32[C, F]`.
    covariance: `f32[F, F]`.
    """

    counts: Array
    means: Array
    covariance: Array


@checked
def slda(
    *,
    shrinkage: Annotated[Array | float, Range(1e-8, 1)] = 1e-4,
    features: Literal["input", "penultimate"] = "input",
    counter: Literal["total", "class"] = "total",
    name: str = "slda",
) -> Component:
    """Classifies features z by their class means and one shared covariance, updated once for each example.

    Example by example, with y its class, n_y the examples of y so far and t all examples so far:

        d = z - mu_y;   Sigma <- (t Sigma + c d d^T) / (t + 1),   c = t / (t + 1) or n_y / (n_y + 1)
                        mu_y  <- mu_y + d / (n_y + 1)

        Lambda = [(1 - eps) Sigma + eps I]^-1;   outputs(z) = mu Lambda z - diag(mu Lambda mu^T) / 2

    A batch of examples is one matrix product. Lambda mu^T is solved for at each prediction, as any update changes it:
    about F^3 / 3 operations, once for all examples of the batch.

    Args:
      shrinkage: eps in (0, 1].
      features: "input", what the network's first layer reads, flattened; or "penultimate", what its last layer reads.
      counter: c is by "total" (t, as in the paper) or by "class" (n_y).
      name: key in state.

    Returns:
      A component with an `SldaState`. Alone it replaces `supervised` and its loss is 0: the network stays as it is
      (under any optimiser that does not move at gradient 0: not with weight decay). With "penultimate" the statistics
      are those of a fixed network: a trained one, or one whose optimiser updates the last layer only. A class without
      examples is never predicted.

    Raises:
      ValueError: a number outside its range, unknown features or counter; at the first trace, a stream without labels,
        a model without taps.

    Source: Hayes and Kanan 2020, arXiv 1909.01520.

    Differences from the paper or its code: theirs begins with means and covariance of a first set of classes (the
    covariance by an oracle-approximating shrinkage), here all begin at 0. c by "total" is what the paper states and its
    code does; the result then depends on the order of examples, and the first of a class adds about z z^T. By "class"
    it is, in any order, the within-class covariance of all examples seen (sum / t), that of batch discriminant analysis
    with equal priors; for a stream of one class the two are the same. Their code takes the pseudo-inverse, here a
    Cholesky factor.

    Example:
      >>> import optax
      >>> from cl_zoo import compose
      >>> from cl_zoo.models import mlp
      >>> learner = compose(mlp((4,), 3), optax.sgd(0.1), slda(features="penultimate"))
    """

    def extract(context: Context, state: TrainState, x: PyTree, task: Array | None) -> Array:
        if features == "penultimate":
            return wide(context.features(state, x, task))
        _, _, taps = context.model.apply(state.params, state.model_state, x, task=task)  # all but its start is dropped
        if not taps:
            raise ValueError(f"{name}: the model records no taps, but its features are the input of a tapped layer")
        first = next(iter(taps.values()))[0]
        return wide(first.reshape(first.shape[0], -1))

    def init(context: Context, state: TrainState, batch: Batch, key: Key) -> SldaState:
        check_classes(name, batch.y, "class means need labels")
        outputs, z = jax.eval_shape(
            lambda: (
                context.model.apply(state.params, state.model_state, batch.x, task=batch.task)[0],
                extract(context, state, batch.x, batch.task),
            )
        )
        c, f = outputs.shape[-1], z.shape[-1]
        return SldaState(jnp.zeros(c, jnp.int32), jnp.zeros((c, f), z.dtype), jnp.zeros((f, f), z.dtype))

    def observe(
        context: Context, state: TrainState, part: SldaState, record: Record, key: Key
    ) -> tuple[TrainState, SldaState]:
        z = extract(context, state, record.batch.x, record.batch.task)
        return state, _absorb(part, z, record.batch.y, record.batch.weight > 0, counter)

    def predict(context: Context, state: TrainState, part: SldaState, x: PyTree, task: Array | None) -> Array:
        z = extract(context, state, x, task)
        with jax.default_matmul_precision("highest"):
            shrunk = (1 - shrinkage) * part.covariance + shrinkage * jnp.eye(part.covariance.shape[0])
            weights = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(shrunk), part.means.T)  # [F, C]
            outputs = z @ weights - jnp.sum(part.means.T * weights, axis=0) / 2
        return mask_outputs(mask_outputs(outputs, context.active(state.task, task)), part.counts > 0)

    return Component(name, init=init, loss=no_loss, observe=observe, predict=predict)


def _absorb(part: SldaState, z: Array, y: Array, is_row: Array, counter: str) -> SldaState:
    """The statistics after the examples `z` (`[B, F]`) one by one, without a loop over them."""
    own = ((y[:, None] == jnp.arange(part.counts.shape[0])) & is_row[:, None]).astype(z.dtype)  # [B, C]
    present, new, counts = jnp.sum(own, axis=1), jnp.sum(own, axis=0), part.counts.astype(z.dtype)
    # By default accelerators round the factors of a product to ten bits, and these are sums that must not drift.
    with jax.default_matmul_precision("highest"):
        centred = present[:, None] * z - own @ part.means
        earlier = jnp.tril(own @ own.T, -1)  # the examples of its class before each
        n_before = own @ counts + jnp.sum(earlier, axis=1)
        d = centred - (earlier @ centred) / jnp.maximum(n_before, 1)[:, None]
        t_before = jnp.sum(counts) + jnp.cumsum(present) - present
        n = t_before if counter == "total" else n_before
        scatter = (n / (n + 1) * d.T) @ d
        means = part.means + (own.T @ centred) / jnp.maximum(counts + new, 1)[:, None]
    total = jnp.maximum(jnp.sum(counts) + jnp.sum(new), 1)
    covariance = part.covariance + (scatter - jnp.sum(new) * part.covariance) / total
    return SldaState(counted(part.counts, new.astype(jnp.int32)), means, covariance)


ENTRY = Entry(
    name="slda",
    family="replay",
    summary="a mean of features for each class and one covariance; predictions by linear discriminant analysis",
    factory=slda,
    arguments={"shrinkage": 0.001},
    numbers=("shrinkage",),
    papers=("hayes2020lifelong",),
    results="slda",
    own_loss=True,
    trains=False,
)
