"""Reptile: the parameters follow those that plain training on each task ends at."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from cl_zoo.algorithms.maml import Adaptation, check_episodes, mean
from cl_zoo.checks import Count, Whole, checked
from cl_zoo.entries import Entry
from cl_zoo.losses import cross_entropy, weighted_mean
from cl_zoo.types import Array, Batch, Component, Context, Episode, Key, PyTree, TrainState

__all__ = ["ENTRY", "reptile"]


@checked
def reptile(
    loss: Callable[[PyTree, PyTree], Array] = cross_entropy,
    *,
    inner: optax.GradientTransformation,
    inner_steps: Whole = 5,
    test_steps: Whole | None = None,
    inner_batch_size: Count | None = None,
    name: str = "reptile",
) -> Component:
    """The gradient is the difference between the parameters and those that training on each episode ends at.

        phi_e = inner_steps steps of `inner` on all examples of episode e, from phi = theta
        g = theta - sum_e w_e phi_e / sum_e w_e

    so that under SGD with rate eps, theta <- theta + eps (mean_e phi_e - theta). Support and query are one set.

    Args:
      loss: `(outputs [N, C], y) -> f32[N]`.
      inner: any optax optimiser; it starts afresh in every episode.
      inner_steps: when training, at least 0; with 1 it is joint training.
      test_steps: when predicting, on the support alone; None is `inner_steps`.
      inner_batch_size: examples of the episode in each inner step, in order; None takes all. When predicting, at most
        those of the support.
      name: key in metrics.

    Returns:
      A component without state, for `episodic` models, in place of `supervised`. The metric `loss` is that of all
      examples before learning.

    Raises:
      ValueError: a negative number of steps, inner_batch_size below 1; at the first trace, batches that are not
        episodes.

    Source: Nichol, Achiam and Schulman 2018, arXiv 1803.02999.

    Differences from the paper or its code: the authors keep the moments of an inner Adam from one episode to the next;
    here each starts afresh. Minibatches are taken in the order of the examples, which is random in streams.

    Example:
      >>> import optax
      >>> from cl_zoo import compose
      >>> from cl_zoo.wrappers import episodic
      >>> from cl_zoo.models import mlp
      >>> from cl_zoo.losses import squared_error
      >>> learner = compose(
      ...     episodic(mlp((1,), 1)), optax.sgd(0.1), reptile(squared_error, inner=optax.sgd(0.02), inner_batch_size=10)
      ... )
    """
    tested = inner_steps if test_steps is None else test_steps
    training = Adaptation(loss, inner, inner_steps, inner_batch_size, ())
    answering = training._replace(steps=tested)

    def loss_hook(
        context: Context,
        state: TrainState,
        part: None,
        params: PyTree,
        forward: Callable[[], PyTree],
        batch: Batch,
        key: Key,
    ) -> tuple[Array, dict[str, PyTree]]:
        check_episodes(name, batch, state.model_state)
        theta = jax.lax.stop_gradient(params)
        x, y = jax.tree.map(
            lambda a, b: jnp.concatenate([a, b], axis=1),
            (batch.x.support_x, batch.x.support_y),
            (batch.x.query_x, batch.y),
        )

        def one(every: tuple[PyTree, PyTree, Array], _: PyTree, active: Array | None) -> tuple[PyTree, Array]:
            phi, _ = training.run(context, state, theta, every, active, order=1)
            return phi, mean(loss(training.answer(context, state, theta, every[0], active), every[1]), every[0])

        phi, before = training.over_episodes(context, state, Episode(x, y, batch.x.query_x), batch.task, one)
        share = batch.weight / jnp.maximum(jnp.sum(batch.weight), 1e-12)
        back = jax.tree.map(lambda t, p: jnp.sum(share) * t - jnp.tensordot(share, p, 1), theta, phi)
        # Its value is 0 and its gradient is `back`.
        follow = optax.tree.vdot(back, jax.tree.map(jnp.subtract, params, theta))
        return weighted_mean(before, batch.weight) + follow, {}

    own = getattr(loss, "reads_ignored", False)
    return Component(name, loss=loss_hook, adapt=answering.adapt, predict=answering.predict, reads_ignored=own)


ENTRY = Entry(
    name="reptile",
    family="meta-learning",
    summary="parameters near those that training on each problem ends at",
    factory=reptile,
    arguments={"inner": optax.sgd(0.5), "inner_steps": 3, "inner_batch_size": 2},
    scenarios=("episodes",),
    papers=("nichol2018first",),
    results="reptile",
    own_loss=True,
)
