"""PackNet: every task keeps a fraction of the weights that are still free, and never loses them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cl_zoo.checks import Fraction, Whole, checked
from cl_zoo.entries import Entry
from cl_zoo.losses import mask_outputs
from cl_zoo.types import Array, Batch, Component, Context, Key, PyTree, Record, TrainState

__all__ = ["ENTRY", "PackNetState", "packnet"]

_FREE = 2**15 - 1  # above every task's index, so that "usable by task k" is owner <= k


class PackNetState(NamedTuple):
    """Attributes:
    owner: `i16` for every parameter, the task that it belongs to; 32767 while it is free.
    model_state: the model's own state as the first task left it.
    """

    owner: PyTree
    model_state: PyTree


@checked
def packnet(
    prune: Fraction = 0.5, retrain_steps: Whole = 100, *, pack_outputs: bool = False, name: str = "packnet"
) -> Component:
    """Each task trains the free weights, keeps the largest of them for good, and leaves the rest to later tasks.

        while task t trains:   w_i moves only where w_i is free
        when it ends:          per layer, of its n free weights, the round(prune * n) smallest |w_i| = 0 and stay free,
                               the others belong to t and are trained `retrain_steps` steps more
        task k is predicted by w_i [owner_i <= k]

    Weights of earlier tasks are frozen to the bit under any optimiser, so what a task scores never changes once it has
    ended. Biases, and all else with less than two axes, belong to the first task and are frozen after it, and so is
    `model_state`. The network's last layer is not packed: each task owns the whole of its active outputs.
    Where no weight is left free, a later task trains its own outputs alone (with `pack_outputs`, nothing at all).

    Args:
      prune: fraction of a layer's free weights, in [0, 1], that a task gives back.
      retrain_steps: updates after pruning, on the batches of the end sample in turn; at least 0.
      pack_outputs: the last layer is packed like any other, as if its outputs were shared.
      name: key in state.

    Returns:
      A component with a `PackNetState`; it predicts. Place it after components that edit parameters.

    Raises:
      ValueError: prune outside [0, 1], retrain_steps below 0; at `init`, a model without taps, whose last layer is
        unknown, unless all outputs are active (`tasks=None`) or `pack_outputs`.

    Source: Mallya and Lazebnik 2018, arXiv 1711.05769.

    Differences from the paper or its code: the paper starts from a network trained on ImageNet and retrains for half as
    many epochs as it trained, here the first task starts from the initial weights, and `retrain_steps` counts. The
    retraining starts with a fresh optimiser; the run's own goes on, compose `reset_optimiser()` for one per task, as
    there. Ties in magnitude are broken by position, so that the number of owned weights is exact; there, all that tie
    with the last are pruned. Normalisation uses the statistics of the batch while later tasks train, there those of the
    first task. While a task trains it is predicted by all weights as they are.

    Example:
      >>> import optax
      >>> from cl_zoo import compose, supervised
      >>> from cl_zoo.models import mlp
      >>> from cl_zoo.streams import split_mnist
      >>> stream = split_mnist(scenario="task", steps=10)
      >>> learner = compose(mlp((28, 28), 10), optax.adam(1e-3), supervised(), packnet(0.5, 50), tasks=stream.tasks)
      >>> sorted(need for name, need in learner.needs if name == "packnet")
      ['boundaries', 'end_sample', 'task_ids']
    """

    def last_layer(context: Context, state: TrainState, batch: Batch) -> str:
        """The path of the layer whose outputs belong to tasks; "" where it is packed like all others."""
        if pack_outputs or context.tasks is None:
            return ""
        names: list[str] = []

        def apply() -> None:
            names.extend(context.model.apply(state.params, state.model_state, batch.x, task=batch.task)[2])

        jax.eval_shape(apply)
        if not names:
            raise ValueError(f"{name}: the model records no taps, so its last layer is unknown; give pack_outputs=True")
        return names[-1]

    def init(context: Context, state: TrainState, batch: Batch, key: Key) -> PackNetState:
        last_layer(context, state, batch)
        n = 0 if context.tasks is None else len(context.tasks.index)
        if n >= _FREE:
            raise ValueError(
                f"{name}: the stream has {n} tasks, but owners of weights are int16: there must be fewer than {_FREE}"
            )
        owner = jax.tree.map(lambda leaf: jnp.full(leaf.shape, _FREE, jnp.int16), state.params)
        return PackNetState(owner, state.model_state)

    def as_first_left_it(state: TrainState, part: PackNetState) -> PyTree:
        first = state.task == 0
        return jax.tree.map(lambda now, kept: jnp.where(first, now, kept), state.model_state, part.model_state)

    def transform(
        context: Context, state: TrainState, part: PackNetState, record: Record, grads: PyTree, key: Key
    ) -> tuple[PyTree, PackNetState]:
        # Frozen weights take no part in what an optimiser makes of all gradients together (clipping by norm, say).
        return _where(lambda owner: owner >= state.task, part.owner, grads, jax.tree.map(jnp.zeros_like, grads)), part

    def observe(
        context: Context, state: TrainState, part: PackNetState, record: Record, key: Key
    ) -> tuple[TrainState, PackNetState]:
        params = _where(lambda owner: owner >= state.task, part.owner, state.params, record.old_params)
        return state._replace(params=params, model_state=as_first_left_it(state, part)), part

    def end_task(
        context: Context, state: TrainState, part: PackNetState, sample: Batch, key: Key
    ) -> tuple[TrainState, PackNetState]:
        task = state.task.astype(jnp.int16)
        outputs = last_layer(context, state, jax.tree.map(lambda leaf: leaf[0], sample))

        def settle(path: tuple[Any, ...], owner: Array, weight: Array) -> tuple[Array, Array]:
            free = owner == _FREE
            if outputs and jax.tree_util.keystr(path, simple=True, separator="/").startswith(f"{outputs}/"):
                mine = free & context.tasks.active[state.task]  # type: ignore[union-attr]
                return jnp.where(mine, task, owner), weight  # later tasks' outputs stay as they are
            handed_back = _smallest(jnp.abs(weight), free, prune) if weight.ndim > 1 else jnp.zeros_like(free)
            return jnp.where(free & ~handed_back, task, owner), jnp.where(handed_back, 0, weight)

        settled = jax.tree_util.tree_map_with_path(settle, part.owner, state.params)
        owner, params = jax.tree.transpose(jax.tree.structure(part.owner), jax.tree.structure((0, 0)), settled)

        def mine(new: PyTree, old: PyTree) -> PyTree:
            return _where(lambda owner: owner == task, owner, new, old)

        params = retrain(context, state, mine, params, sample, key)
        return state._replace(params=params), PackNetState(owner, as_first_left_it(state, part))

    def retrain(
        context: Context,
        state: TrainState,
        mine: Callable[[PyTree, PyTree], PyTree],
        params: PyTree,
        sample: Batch,
        key: Key,
    ) -> PyTree:
        """Steps on the weights that the finished task owns; `mine(new, old)` moves those alone."""

        def step(carry: tuple[PyTree, PyTree], i: Array) -> tuple[tuple[PyTree, PyTree], None]:
            batch = jax.tree.map(lambda leaf: leaf[i % leaf.shape[0]], sample)

            def move() -> tuple[PyTree, PyTree]:
                old, opt_state = carry
                gradient = jax.grad(context.objective, argnums=1)(state, old, batch, jax.random.fold_in(key, i))
                gradient = mine(gradient, jax.tree.map(jnp.zeros_like, gradient))
                updates, opt_state = context.optimiser.update(gradient, opt_state, old)
                return mine(optax.apply_updates(old, updates), old), opt_state

            return jax.lax.cond(jnp.any(batch.weight > 0), move, lambda: carry), None

        carry = params, context.optimiser.init(params)
        return jax.lax.scan(step, carry, jnp.arange(retrain_steps))[0][0]

    def predict(context: Context, state: TrainState, part: PackNetState, x: PyTree, task: Array | None) -> PyTree:
        def answer(params: PyTree) -> Array:
            return context.model.apply(params, state.model_state, x, task=task)[0]

        if task is None:
            outputs = answer(state.params)
        else:
            # Before a task has ended, its weights are among the free ones, and all are used.
            rows = jnp.clip(task, 0, state.task)

            def one(k: Array, answered: Array) -> Array:
                usable = _where(
                    lambda owner: (owner <= k) | (k == state.task),
                    part.owner,
                    state.params,
                    jax.tree.map(jnp.zeros_like, state.params),
                )
                mine = (rows == k).reshape((-1,) + (1,) * (answered.ndim - 1))
                return jnp.where(mine, answer(usable), answered)

            shape = jax.eval_shape(answer, state.params)
            # One pass where all examples share a task, as in most batches.
            outputs = jax.lax.fori_loop(jnp.min(rows), jnp.max(rows) + 1, one, jnp.zeros(shape.shape, shape.dtype))
        return mask_outputs(outputs, context.active(state.task, task))

    return Component(
        name,
        frozenset({"boundaries", "task_ids", "end_sample"}),
        init=init,
        transform=transform,
        observe=observe,
        end_task=end_task,
        predict=predict,
    )


def _where(test: Callable[[Array], Array], owner: PyTree, then: PyTree, otherwise: PyTree) -> PyTree:
    """Each number from `then` where its owner passes the test, else from `otherwise`."""
    return jax.tree.map(lambda o, a, b: jnp.where(test(o), a, b), owner, then, otherwise)


def _smallest(magnitude: Array, free: Array, share: Array | float) -> Array:
    """Which of the free are the round(share * free) smallest; exactly so many, ties broken by position."""
    order = jnp.argsort(jnp.where(free, magnitude, jnp.inf).ravel())
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(order.size))
    return (rank < jnp.round(share * jnp.sum(free))).reshape(free.shape) & free


ENTRY = Entry(
    name="packnet",
    family="parameter isolation",
    summary="the largest of the free weights for each task, frozen to the bit; others are pruned for later tasks",
    factory=packnet,
    arguments={"prune": 0.5, "retrain_steps": 4},
    numbers=("prune",),
    scenarios=("task",),
    papers=("mallya2018packnet",),
    results="packnet",
)
