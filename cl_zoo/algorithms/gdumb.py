"""GDumb: a class-balanced memory, and a network trained on it alone whenever a task has ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cl_zoo.algorithms.supervised import no_loss
from cl_zoo.buffers import ClassBalanced, batch_rows, check_n_classes, class_balanced_memory
from cl_zoo.checks import Count, check_whole, checked
from cl_zoo.entries import Entry
from cl_zoo.losses import cross_entropy, mask_outputs, weighted_mean
from cl_zoo.shuffle import shuffled_index
from cl_zoo.types import Array, Batch, Component, Context, Key, PyTree, Record, TrainState

__all__ = ["ENTRY", "GdumbState", "gdumb"]

GdumbState = ClassBalanced
"""The memory."""


@checked
def gdumb(
    capacity: Count,
    n_classes: Count,
    *,
    epochs: Count = 10,
    batch_size: int = 16,
    optimiser: optax.GradientTransformation | None = None,
    loss: Callable[[PyTree, PyTree], Array] = cross_entropy,
    name: str = "gdumb",
) -> Component:
    """The stream fills a memory M; nothing is learned until a task ends. Then, from re-initialised parameters p,

        L(p) = mean_b loss(f_p(x_b), y_b),   b running through `epochs` random orders of M

    is minimised, over the outputs active at that time.

    Args:
      capacity: examples in memory, at least 1.
      n_classes: labels of the stream.
      epochs: passes over the memory at each task's end, at least 1.
      batch_size: examples per step, from 1 to capacity; the last of a pass may be incomplete.
      optimiser: for that training, initialised each time; None takes the learner's. A schedule goes in here: a pass
        has ceil(|M| / batch_size) steps.
      loss: `(outputs, y) -> f32[B]`.
      name: key in state.

    Returns:
      A component with a `GdumbState`, in place of `supervised`. Its loss on the stream is 0, and it restores parameters
      that moved nevertheless (weight decay).

    Raises:
      ValueError: a size outside its range; at the first trace, a stream without labels.

    Source: Prabhu, Torr and Dokania 2020, doi 10.1007/978-3-030-58536-5_31; the memory: `class_balanced_add`.

    Differences from the paper or its code: for MNIST they take SGD with momentum 0.9, weight decay 1e-6, gradients
    clipped at norm 10, batches of 16, 128 epochs, a cosine from 0.05 to 0.0005 with warm restarts after 1, 2, 4, ...
    epochs, after a first epoch at 0.005, and the best of all epochs on the test set; here the last. All but that can be
    set by `optimiser` and `epochs` (for a memory that is full). They also shift images, and on other data mix them
    (cutmix); not here. Their code takes the first capacity / C examples of each class, here the greedy sampler runs.

    Example:
      >>> import optax
      >>> from cl_zoo import compose
      >>> from cl_zoo.models import mlp
      >>> rate = optax.cosine_decay_schedule(0.05, decay_steps=10 * 2)
      >>> learner = compose(mlp((4,), 3), optax.sgd(0.1), gdumb(capacity=30, n_classes=3, optimiser=optax.sgd(rate)))
    """
    check_whole(name, "batch_size", batch_size, 1, capacity)
    memory = class_balanced_memory(capacity, n_classes)

    def init(context: Context, state: TrainState, batch: Batch, key: Key) -> GdumbState:
        check_n_classes(name, n_classes, context.n_outputs(state, batch))
        return memory.init(batch_rows(batch))

    def observe(
        context: Context, state: TrainState, part: GdumbState, record: Record, key: Key
    ) -> tuple[TrainState, GdumbState]:
        part = memory.add(part, batch_rows(record.batch), record.batch.weight, key)
        return state._replace(params=record.old_params), part

    def end_task(
        context: Context, state: TrainState, part: GdumbState, sample: Batch | None, key: Key
    ) -> tuple[TrainState, GdumbState]:
        trainer = context.optimiser if optimiser is None else optimiser
        init_key, order_key, train_key = jax.random.split(key, 3)
        first = jax.tree.map(lambda leaf: leaf[:1], part.rows[0])
        params, model_state = context.model.init(init_key, first)
        held = jnp.sum(part.held)
        per_epoch = -(-held // batch_size)

        def step(number: Array, carry: tuple[PyTree, PyTree, Any]) -> tuple[PyTree, PyTree, Any]:
            params, model_state, opt_state = carry
            position = number % per_epoch * batch_size + jnp.arange(batch_size)
            weight = (position < held).astype(jnp.float32)
            index = shuffled_index(order_key, position, held, number // per_epoch)
            x, y, task = jax.tree.map(lambda leaf: leaf[index], part.rows)

            def objective(params: PyTree) -> tuple[Array, PyTree]:
                outputs, after, _ = context.model.apply(
                    params,
                    model_state,
                    x,
                    task=task,
                    weight=weight,
                    key=jax.random.fold_in(train_key, number),
                    train=True,
                )
                outputs = mask_outputs(outputs, context.active(state.task, task))
                return weighted_mean(loss(outputs, y), weight), after

            gradient, model_state = jax.grad(objective, has_aux=True)(params)
            updates, opt_state = trainer.update(gradient, opt_state, params)
            return optax.apply_updates(params, updates), model_state, opt_state

        start = (params, model_state, trainer.init(params))
        params, model_state, _ = jax.lax.fori_loop(0, epochs * per_epoch, step, start)
        return state._replace(params=params, model_state=model_state), part

    return Component(name, frozenset({"boundaries"}), init=init, loss=no_loss, observe=observe, end_task=end_task)


ENTRY = Entry(
    name="gdumb",
    family="replay",
    summary="a class-balanced memory; at the end of each task a new network is trained on it alone",
    factory=gdumb,
    arguments={"capacity": 20, "n_classes": 6, "epochs": 2, "batch_size": 8},
    papers=("prabhu2020gdumb",),
    results="gdumb",
    own_loss=True,
)
