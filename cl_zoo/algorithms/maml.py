"""Model-agnostic meta-learning: parameters from which a few gradient steps solve a new problem."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cl_zoo.checks import Count, Whole, checked
from cl_zoo.entries import Entry, Null
from cl_zoo.estimators.inner_loop import inner_loop, per_parameter_rates
from cl_zoo.losses import cross_entropy, mask_outputs, weighted_mean
from cl_zoo.types import Array, Batch, Component, Context, Episode, Key, PyTree, TrainState

__all__ = ["ENTRY", "Adaptation", "maml"]


class Adaptation(NamedTuple):
    """How a network learns from the support of an episode.

    Attributes:
      loss: `(outputs [N, C], y) -> f32[N]`.
      inner: an optax optimiser, or "learned": the rates of `with_learning_rates`.
      steps: of the inner loop; None is one pass over the support.
      inner_batch_size: examples of the support that each step takes, in order and cyclically; None takes all.
      only: names of the parameters that are updated; if empty, all.
    """

    loss: Callable[[PyTree, PyTree], Array]
    inner: optax.GradientTransformation | Literal["learned"]
    steps: int | None
    inner_batch_size: int | None
    only: tuple[str, ...]

    def network(self, params: PyTree) -> PyTree:
        """The parameters of the network itself."""
        return params["params"] if self.inner == "learned" else params

    def with_network(self, params: PyTree, network: PyTree) -> PyTree:
        """`params` with another network in them."""
        return {**params, "params": network} if self.inner == "learned" else network

    def answer(self, context: Context, state: TrainState, params: PyTree, x: PyTree, active: Array | None) -> Array:
        """Masked outputs of the network for examples, in evaluation mode."""
        outputs, _, _ = context.model.apply(params, state.model_state, x)
        return mask_outputs(outputs, active)

    def run(
        self,
        context: Context,
        state: TrainState,
        params: PyTree,
        support: tuple[PyTree, PyTree, Array],
        active: Array | None,
        each: Callable[[PyTree], PyTree] | None = None,
        **options: Any,
    ) -> tuple[PyTree, PyTree]:
        """The inner loop from `params` on `support`, `(x, y, weight)` of K examples; see `inner_loop`."""
        size = jax.tree.leaves(support[0])[0].shape[0]

        def loss(network: PyTree, i: Array) -> Array:
            x, y, weight = support
            if self.inner_batch_size is not None:
                index = (i * self.inner_batch_size + jnp.arange(self.inner_batch_size)) % size
                x, y, weight = jax.tree.map(lambda leaf: leaf[index], support)
            outputs = self.answer(context, state, self.with_network(params, network), x, active)
            return weighted_mean(self.loss(outputs, y), weight)

        optimiser = self.inner
        if isinstance(optimiser, str):
            optimiser = per_parameter_rates(params["learning_rates"], self.only)
        looked = None if each is None else lambda network, i: each(self.with_network(params, network))
        network, seen = inner_loop(
            loss,
            self.network(params),
            optimiser,
            -(-size // (self.inner_batch_size or size)) if self.steps is None else self.steps,
            only=self.only,
            each=looked,
            **options,
        )
        return self.with_network(params, network), seen

    def over_episodes(
        self,
        context: Context,
        state: TrainState,
        x: Episode,
        task: Array | None,
        function: Callable[..., PyTree],
        *more: PyTree,
    ) -> PyTree:
        """`function(support, query_x, active, *more)` for every episode, vmapped."""
        active = context.active(state.task, task)
        per_row = active is not None and active.ndim == 2
        ones = jnp.ones(jax.tree.leaves(x.support_x)[0].shape[:2])
        axes = (0, 0, 0 if per_row else None, *(0 for _ in more))
        return jax.vmap(function, in_axes=axes)((x.support_x, x.support_y, ones), x.query_x, active, *more)

    def predict(self, context: Context, state: TrainState, part: PyTree, x: PyTree, task: Array | None) -> PyTree:
        """The hook: an episode's queries are predicted after learning from its support, plain examples directly."""
        if not isinstance(x, Episode):
            return self.answer(context, state, state.params, x, context.active(state.task, task))

        def one(support: tuple[PyTree, PyTree, Array], query: PyTree, active: Array | None) -> Array:
            params, _ = self.run(context, state, state.params, support, active)
            return self.answer(context, state, params, query, active)

        return self.over_episodes(context, state, x, task, one)

    def adapt(
        self, context: Context, state: TrainState, part: PyTree, batch: Batch, key: Key
    ) -> tuple[TrainState, PyTree, None]:
        """The hook: the network learns from labelled examples, for good. Episodes do not change it: see `predict`."""
        if not isinstance(batch.x, Episode):
            active = context.active(state.task, batch.task)
            params, _ = self.run(context, state, state.params, (batch.x, batch.y, batch.weight), active)
            state = state._replace(params=params)
        return state, part, None


@checked
def maml(
    loss: Callable[[PyTree, PyTree], Array] = cross_entropy,
    *,
    inner: optax.GradientTransformation | Literal["learned"],
    inner_steps: Whole | None = 1,
    test_steps: Whole | None = None,
    order: Literal[1, 2] = 2,
    only: Sequence[str] = (),
    inner_batch_size: Count | None = None,
    step_weights: Sequence[float] | None = None,
    rematerialise: bool = False,
    name: str = "maml",
) -> Component:
    """Each example of a batch is an episode: learn from its support, be evaluated on its query.

        phi_e = inner_steps steps of `inner` on mean_k loss(f(support_x_k; phi), support_y_k), from phi = theta
        L(theta) = sum_e w_e mean_q loss(f(query_x_q; phi_e), query_y_q) / sum_e w_e

    The gradient of L passes through the inner loop (order 2), or takes its gradients as constants (order 1, FOMAML).
    With `step_weights` L is sum_i v_i L_i, L_i the loss after inner step i (multi-step loss). With inner="learned"
    each parameter moves by its own learned rate (Meta-SGD): phi <- phi - rates * grad. With `only` naming the last
    layer it is ANIL. It predicts the queries of an `Episode` after learning from its support;
    `learner.adapt(state, batch)` learns from labelled examples and keeps what it learned.

    Args:
      loss: `(outputs [N, C], y) -> f32[N]`.
      inner: any optax optimiser, or "learned", with a model from `with_learning_rates`.
      inner_steps: when training, at least 0; None is one pass over the support, `inner_batch_size` at a time.
      test_steps: when predicting; None is `inner_steps`.
      order: 2 or 1.
      only: names of the parameters that the inner loop updates ("output"); if empty, all.
      inner_batch_size: examples of the support in each inner step, in order; None takes all.
      step_weights: v, one for each inner step; None counts the last alone.
      rematerialise: recompute inner steps in the backward pass: slower, less memory.
      name: key in metrics.

    Returns:
      A component without state, for `episodic` models. It is the learner's objective, in place of `supervised`.

    Raises:
      ValueError: another order, a negative number of steps, inner_batch_size below 1, not one weight per step; at the
        first trace, batches that are not episodes, a name that is not a parameter.

    Source: Finn et al. 2017, arXiv 1703.03400; Meta-SGD: Li et al. 2017, arXiv 1707.09835; ANIL: Raghu et al. 2020,
    arXiv 1909.09157; multi-step loss: Antoniou et al. 2019, arXiv 1810.09502.

    Differences from the paper or its code: networks run in evaluation mode, so normalisation layers use their running
    statistics; the authors' code normalises each batch by itself. For tasks in groups, all weigh the same. For
    classification the original code's losses are N times the mean, for N classes: its inner rate of 0.4 (5-way) is 2.0
    here.

    Example:
      >>> import optax
      >>> from cl_zoo import compose
      >>> from cl_zoo.wrappers import episodic
      >>> from cl_zoo.models import mlp
      >>> from cl_zoo.losses import squared_error
      >>> model = episodic(mlp((1,), 1, hidden=(40, 40)))
      >>> learner = compose(model, optax.adam(1e-3), maml(squared_error, inner=optax.sgd(0.01)))
    """
    if step_weights is not None and len(step_weights) != inner_steps:
        raise ValueError(
            f"{name}: step_weights has {len(step_weights)} numbers, but there must be one for each of the"
            f" {inner_steps} inner steps"
        )
    training = Adaptation(loss, inner, inner_steps, inner_batch_size, tuple(only))
    answering = training if test_steps is None else training._replace(steps=test_steps)

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

        def one(support: tuple[PyTree, PyTree, Array], query: PyTree, active: Array | None, y: PyTree) -> Array:
            def query_loss(phi: PyTree) -> Array:
                return mean(loss(training.answer(context, state, phi, query, active), y), query)

            options: dict[str, Any] = {"order": order, "rematerialise": rematerialise}
            if step_weights is None:
                return query_loss(training.run(context, state, params, support, active, **options)[0])
            _, losses = training.run(context, state, params, support, active, each=query_loss, **options)
            return jnp.asarray(step_weights, losses.dtype) @ losses

        return weighted_mean(
            training.over_episodes(context, state, batch.x, batch.task, one, batch.y), batch.weight
        ), {}

    own = getattr(loss, "reads_ignored", False)
    return Component(name, loss=loss_hook, adapt=answering.adapt, predict=answering.predict, reads_ignored=own)


def mean(values: Array, x: PyTree) -> Array:
    """Of a loss over the examples x; refused where it does not give one number for each."""
    return weighted_mean(values, jnp.ones(jax.tree.leaves(x)[0].shape[0], values.dtype))


def check_episodes(owner: str, batch: Batch, model_state: PyTree) -> None:
    """Refuses batches of anything but episodes, and networks whose statistics the inner loop would not learn."""
    if jax.tree.leaves(model_state):
        raise ValueError(
            f"{owner}: the model keeps statistics, which learning from a support does not move; take norm='layer',"
            " norm='group' or None"
        )
    if not isinstance(batch.x, Episode):
        raise ValueError(f"{owner}: the examples of the batch are not episodes, as those of few_shot or sinusoids are")


ENTRY = (
    Entry(
        name="maml",
        family="meta-learning",
        summary="parameters from which a few gradient steps solve a new problem",
        factory=maml,
        arguments={"inner": optax.sgd(0.5), "inner_steps": 2},
        scenarios=("episodes",),
        papers=("finn2017model",),
        null=Null({"inner_steps": 0}, "no inner steps: joint training"),
        results="maml",
        own_loss=True,
    ),
    Entry(
        name="first_order_maml",
        family="meta-learning",
        summary="parameters as maml's, with inner gradients taken as constants",
        factory=maml,
        arguments={"inner": optax.sgd(0.5), "inner_steps": 2, "order": 1},
        scenarios=("episodes",),
        papers=("finn2017model",),
        null=Null({"inner_steps": 0}, "no inner steps: joint training"),
        results="fomaml",
        own_loss=True,
    ),
    Entry(
        name="anil",
        family="meta-learning",
        summary="parameters as maml's, where only the last layer adapts to a new problem",
        factory=maml,
        arguments={"inner": optax.sgd(0.5), "inner_steps": 2, "only": ("output",)},
        scenarios=("episodes",),
        papers=("raghu2020rapid",),
        null=Null({"inner_steps": 0}, "no inner steps: joint training"),
        results="anil",
        own_loss=True,
    ),
    Entry(
        name="meta_sgd",
        family="meta-learning",
        summary="parameters as maml's, and a learned inner learning rate for each of them",
        factory=maml,
        arguments={"inner": "learned"},
        scenarios=("episodes",),
        papers=("li2017meta",),
        null=Null({"inner_steps": 0}, "no inner steps: joint training"),
        results="meta-sgd",
        own_loss=True,
    ),
)
