"""Look-ahead MAML: learning from a stream so that new examples interfere least with old ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cl_zoo.buffers import Reservoir, batch_rows, reservoir_add, reservoir_init, reservoir_sample
from cl_zoo.checks import Count, NonNegative, check_range, check_whole, checked
from cl_zoo.counters import cycled
from cl_zoo.entries import Entry
from cl_zoo.estimators.inner_loop import inner_loop, per_parameter_rates
from cl_zoo.losses import cross_entropy, mask_outputs, weighted_mean
from cl_zoo.types import Array, Batch, Component, Context, Key, PyTree, Record, TrainState

__all__ = ["ENTRY", "LaMamlState", "la_maml", "look_ahead_sgd"]


class LaMamlState(NamedTuple):
    """Attributes:
    memory: examples of the stream.
    updates: `i32[]`, so that an example used in several updates enters the memory once.
    """

    memory: Reservoir
    updates: Array


@checked
def la_maml(
    capacity: Count,
    *,
    batch_size: int = 10,
    rate: NonNegative | None = None,
    order: Literal[1, 2] = 1,
    updates_per_batch: Count = 1,
    loss: Callable[[PyTree, PyTree], Array] = cross_entropy,
    name: str = "la_maml",
) -> Component:
    """The examples of a batch are learned one by one in a look-ahead; the real step lowers the loss along that path.

        phi_0 = theta;   phi_{j+1} = phi_j - relu(alpha) * grad loss(phi_j; example j)
        L(theta, alpha) = mean_j  loss(phi_{j+1}; batch and examples from memory)

    with alpha a learned rate for each parameter (La-MAML, with a model from `with_learning_rates`) or one fixed number
    (C-MAML). With the optimiser `look_ahead_sgd(eta)`:

        alpha <- alpha - eta * clip(dL / d alpha);   theta <- theta - relu(alpha) * clip(dL / d theta)

    The gradient of alpha is minus the elementwise product of the inner gradients and those of the loss on new and old
    examples: rates grow where the two agree, and fall to 0 where learning would interfere with the memory.

    Args:
      capacity: examples in memory, at least 1.
      batch_size: examples drawn for each step, from 1 to the capacity.
      rate: None takes the model's learned rates; a number is that of every parameter.
      order: 1 takes inner gradients as constants, as the authors do; 2 differentiates through them.
      updates_per_batch: updates per batch, as in the stream; examples enter the memory at the first.
      loss: `(outputs [B, C], y) -> f32[B]`.
      name: key in state and metrics.

    Returns:
      A component with a `LaMamlState`. It is the learner's objective, in place of `supervised`.

    Raises:
      ValueError: capacity or updates_per_batch below 1, batch_size below 1 or above the capacity, a negative rate,
        another order; at `init`, a model without learning rates where `rate` is None.

    Source: Gupta, Yadav and Paull 2020, "Look-ahead meta learning for continual learning", arXiv 2007.13904.

    Differences from the paper or its code: the authors' code for MNIST draws old examples from a memory that, after the
    first task, contains those of the current task too, as here. Its reservoir draws among one slot too many; here it is
    algorithm R. Inner gradients are not clipped (its clipping for MNIST has no effect). The authors draw from the
    memory with replacement, here examples of a batch are different; their clipping adds 1e-6 to the norm it divides by.

    Example:
      >>> import optax
      >>> from cl_zoo import compose
      >>> from cl_zoo.models import mlp
      >>> from cl_zoo.wrappers import with_learning_rates
      >>> model = with_learning_rates(mlp((4,), 3), 0.15)
      >>> learner = compose(model, look_ahead_sgd(0.3), la_maml(capacity=200, batch_size=10))
    """
    check_whole(name, "batch_size", batch_size, 1, capacity)

    def init(context: Context, state: TrainState, batch: Batch, key: Key) -> LaMamlState:
        if rate is None and not (isinstance(state.params, dict) and "learning_rates" in state.params):
            raise ValueError(f"{name}: the model has no learning rates; wrap it in with_learning_rates, or give rate=")
        return LaMamlState(reservoir_init(batch_rows(batch), capacity), jnp.zeros((), jnp.int32))

    def loss_hook(
        context: Context,
        state: TrainState,
        part: LaMamlState,
        params: PyTree,
        forward: Callable[[], PyTree],
        batch: Batch,
        key: Key,
    ) -> tuple[Array, dict[str, PyTree]]:
        order_key, draw_key = jax.random.split(key)
        (x, y, task), weight = reservoir_sample(part.memory, batch_size, draw_key)
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), batch, Batch(x, y, task, weight))
        rows = jax.random.permutation(order_key, batch.weight.shape[0])

        def loss_on(network: PyTree, rows: Batch) -> Array:
            whole = {**params, "params": network} if rate is None else network
            outputs, _, _ = context.model.apply(whole, state.model_state, rows.x, task=rows.task, weight=rows.weight)
            outputs = mask_outputs(outputs, context.active(state.task, rows.task))
            return weighted_mean(loss(outputs, rows.y), rows.weight)

        def one_row(network: PyTree, j: Array) -> Array:
            return loss_on(network, jax.tree.map(lambda leaf: leaf[rows[j]][None], batch))

        if rate is None:
            network = params["params"]
            optimiser = per_parameter_rates(jax.tree.map(jax.nn.relu, params["learning_rates"]))
        else:
            network, optimiser = params, optax.sgd(rate)
        _, ahead = inner_loop(
            one_row, network, optimiser, len(rows), order=order, each=lambda phi, _: loss_on(phi, both)
        )
        return weighted_mean(ahead, batch.weight[rows]), {}

    def observe(
        context: Context, state: TrainState, part: LaMamlState, record: Record, key: Key
    ) -> tuple[TrainState, LaMamlState]:
        new = record.batch.weight * (part.updates % updates_per_batch == 0)
        memory = reservoir_add(part.memory, batch_rows(record.batch), new, key)
        present = jnp.any(record.batch.weight > 0)
        return state, LaMamlState(memory, cycled(part.updates, present, updates_per_batch))

    own = getattr(loss, "reads_ignored", False)
    return Component(name, init=init, loss=loss_hook, observe=observe, reads_ignored=own)


def look_ahead_sgd(
    rate_learning_rate: Array | float, learning_rate: Array | float | None = None, *, clip: Array | float = 2.0
) -> optax.GradientTransformation:
    """Gradient descent on parameters and their learning rates alpha, `{"params": p, "learning_rates": alpha}`.

        g_p, g_alpha each scaled down to a norm of at most `clip`
        alpha <- alpha - rate_learning_rate * g_alpha
        p <- p - relu(alpha) * g_p          or, with a `learning_rate` (Sync La-MAML),  p <- p - learning_rate * g_p

    p is updated with the new rates (asynchronous).

    Args:
      rate_learning_rate: at least 0.
      learning_rate: None, or at least 0.
      clip: above 0.

    Returns:
      An optax optimiser for models from `with_learning_rates`.

    Raises:
      ValueError: a number outside its range; at the first update, parameters without learning rates.

    Source: Gupta, Yadav and Paull 2020, arXiv 2007.13904.
    """
    check_range("look_ahead_sgd", "rate_learning_rate", rate_learning_rate, 0)
    check_range("look_ahead_sgd", "clip", clip, 1e-30)
    if learning_rate is not None:
        check_range("look_ahead_sgd", "learning_rate", learning_rate, 0)

    def clipped(tree: PyTree) -> PyTree:
        # Nothing is divided by a norm of 0.
        scale = jnp.minimum(1.0, clip / jnp.maximum(optax.tree.norm(tree), 1e-30))
        return jax.tree.map(lambda g: scale * g, tree)

    def update(gradient: Any, params: Any) -> Any:
        if params is None or set(params) != {"params", "learning_rates"}:
            raise ValueError(
                "look_ahead_sgd: the parameters have no learning rates; wrap the model in with_learning_rates"
            )
        step = jax.tree.map(lambda g: -rate_learning_rate * g, clipped(gradient["learning_rates"]))
        if learning_rate is None:
            rates = jax.tree.map(lambda a, s: jax.nn.relu(a + s), params["learning_rates"], step)
        else:
            rates = jax.tree.map(lambda a: jnp.full_like(a, learning_rate), params["learning_rates"])
        moved = jax.tree.map(lambda r, g: -r * g, rates, clipped(gradient["params"]))
        return {"params": moved, "learning_rates": step}

    return optax.stateless(update)


ENTRY = (
    Entry(
        name="la_maml",
        family="meta-learning",
        summary="a replay memory, and a learning rate for each parameter, low where learning would interfere with it",
        factory=la_maml,
        arguments={"capacity": 20, "batch_size": 8, "updates_per_batch": 2},
        papers=("gupta2020look",),
        results="la-maml",
        own_loss=True,
    ),
    Entry(
        name="c_maml",
        family="meta-learning",
        summary="a replay memory, on which the loss after each look-ahead along the new examples is minimised",
        factory=la_maml,
        arguments={"capacity": 20, "batch_size": 8, "rate": 0.5},
        numbers=("rate",),
        papers=("gupta2020look",),
        results="c-maml",
        own_loss=True,
    ),
)
