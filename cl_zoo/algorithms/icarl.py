"""iCaRL: exemplars chosen by herding, distillation of sigmoid outputs, prediction by the nearest mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cl_zoo.buffers import batch_rows, joined
from cl_zoo.checks import Count, Positive, check_classes, check_range, check_whole, checked
from cl_zoo.entries import Entry
from cl_zoo.estimators.averaging import wide
from cl_zoo.estimators.herding import herding_ranks, unit_rows
from cl_zoo.losses import mask_outputs, weighted_mean
from cl_zoo.shuffle import shuffled_index
from cl_zoo.types import Array, Batch, Component, Context, Key, PyTree, TaskInfo, TrainState

__all__ = ["ENTRY", "IcarlState", "icarl"]


class IcarlState(NamedTuple):
    """Attributes:
    rows: exemplars as they came from the stream, a pytree of `[capacity, ...]` arrays; the first `sum(held)` count.
    labels, ranks: `i32[capacity]`, the class of each, and its place in the order in which herding picked it.
    held: `i32[C]`, exemplars of each class.
    seen: `bool[C]`, classes of finished tasks.
    means: `f32[C, F]`, unit means of the exemplars' unit features when the last task ended.
    task_size: `f32[]`, examples of the current task.
    params, model_state: the teacher, a copy of the model when the last task ended.
    """

    rows: PyTree
    labels: Array
    ranks: Array
    held: Array
    seen: Array
    means: Array
    task_size: Array
    params: PyTree
    model_state: PyTree


@checked
def icarl(
    capacity: int,
    n_classes: Count,
    *,
    batch_size: int = 32,
    draw: Literal["weights", "examples"] = "weights",
    per_class: int | None = None,
    temperature: Positive = 1.0,
    task_size: Array | float | None = None,
    feature_batch: Count = 500,
    name: str = "icarl",
) -> Component:
    """Learns from the task's examples and the exemplars of old classes; predicts the class of the nearest mean.

        L = mean_b sum_c BCE(sigmoid(z_bc), t_bc),   t_bc = sigmoid(old z_bc / T) for classes of finished tasks,
                                                            [y_b = c]             for all others

    over the active outputs c, old z from the network when the last task ended. At a task's end each new class
    gets m = capacity // (classes seen) exemplars by herding (`herding_ranks`) from the task's sample, and the lists of
    old classes are cut to their first m. With unit features phi and mu_c the unit mean of the exemplars' phi,

        output_c(x) = - || phi(x) - mu_c ||^2

    The mean over b is over the union of |X| task examples and |P| exemplars: `batch_size` exemplars drawn uniformly
    join each batch, and together they count |P| / |X| times as much as the current examples.

    Args:
      capacity: exemplars in all, at least `n_classes`.
      n_classes: outputs of the network, `C`.
      batch_size: exemplars that join each batch, from 0 to capacity; those not yet stored have weight 0.
      draw: "weights": their weights make them count as much in every batch; "examples": each joins with weight 1, with
        the probability that makes it so on average (the noise of batches drawn from the union).
      per_class: None, or a fixed m, with per_class * n_classes at most capacity.
      temperature: T above 0, of the teacher's outputs alone.
      task_size: |X|; None counts the examples of the sample given when the task begins, which is |X| if the sample is
        the whole task.
      feature_batch: exemplars whose features are computed at once.
      name: key in state and metrics.

    Returns:
      A component with an `IcarlState`, in place of `supervised`. A class without exemplars is never predicted; before
      the first task has ended no class has any.

    Raises:
      ValueError: a number outside its range, unknown draw; at the first trace, a stream without labels, a model without
        taps or with another number of outputs.

    Source: Rebuffi et al. 2017, arXiv 1611.07725.

    Differences from the paper or its code: the equation sums over outputs as the paper's does, its code takes their
    mean (here: learning rate / C under plain SGD). The paper makes each batch from the union at random; here exemplars
    are added to the current examples, so a step uses more. Means are those at the last task's end and not recomputed
    within a task. The paper's code also averages over mirrored images, may pick an image twice, and herds towards the
    class mean as it is; here, and in van de Ven's code, it is of unit length. That code (arXiv 1904.07734, doi
    10.1038/s42256-022-00568-3) has temperature 2, and in 2022 per_class 100. Avalanche keeps the ceiling of K / t
    exemplars of a class, here it is the floor.

    Example:
      >>> import optax
      >>> from cl_zoo import compose
      >>> from cl_zoo.models import mlp
      >>> learner = compose(mlp((4,), 3), optax.adam(1e-3), icarl(capacity=30, n_classes=3, batch_size=10))
    """
    check_whole(name, "capacity", capacity, n_classes)
    check_whole(name, "batch_size", batch_size, 0, capacity)
    if per_class is not None:
        check_whole(name, "per_class", per_class, 1, capacity // n_classes)
    if task_size is not None:
        check_range(name, "task_size", task_size, 1)

    def init(context: Context, state: TrainState, batch: Batch, key: Key) -> IcarlState:
        check_classes(name, batch.y, "exemplars need labels")
        features = jax.eval_shape(lambda: context.features(state, batch.x, batch.task))
        rows = jax.tree.map(lambda leaf: jnp.zeros((capacity, *leaf.shape[1:]), leaf.dtype), batch_rows(batch))
        none = jnp.zeros(capacity, jnp.int32)
        held, means = jnp.zeros(n_classes, jnp.int32), wide(jnp.zeros((n_classes, features.shape[-1]), features.dtype))
        return IcarlState(
            rows, none, none, held, held > 0, means, jnp.ones((), jnp.float32), state.params, state.model_state
        )

    def begin_task(
        context: Context, state: TrainState, part: IcarlState, task: TaskInfo, sample: Batch | None, key: Key
    ) -> tuple[TrainState, IcarlState]:
        if task_size is not None:
            size = jnp.asarray(task_size, jnp.float32)
        elif sample is not None:
            size = jnp.maximum(jnp.sum(sample.weight > 0), 1)
        else:
            raise ValueError(f"{name}: task_size is None, and begin_task was given no sample to count")
        return state, part._replace(task_size=size.astype(jnp.float32))

    def prepare(
        context: Context, state: TrainState, part: IcarlState, batch: Batch, key: Key
    ) -> tuple[Batch, IcarlState]:
        if batch_size == 0:
            return batch, part
        held = jnp.sum(part.held)
        index_key, row_key = jax.random.split(key)
        index = shuffled_index(index_key, jnp.arange(batch_size), held)
        x, y, told = jax.tree.map(lambda leaf: leaf[index], part.rows)
        together = jnp.sum(batch.weight) * held / part.task_size
        each = together / jnp.clip(held, 1, batch_size)
        weight = jnp.where(jnp.arange(batch_size) < held, each, 0)
        if draw == "examples":  # weights above 1 mean that batch_size is too small for the fraction: then all join
            weight = jnp.where(jax.random.uniform(row_key, weight.shape) < weight, jnp.maximum(weight, 1), 0)
        return joined(batch, Batch(x, y, told, weight.astype(batch.weight.dtype))), part

    def loss(
        context: Context,
        state: TrainState,
        part: IcarlState,
        params: PyTree,
        forward: Callable[[], PyTree],
        batch: Batch,
        key: Key,
    ) -> tuple[Array, dict[str, PyTree]]:
        outputs = forward()
        if outputs.shape[-1] != n_classes:
            raise ValueError(f"{name}: n_classes is {n_classes}, but the model has {outputs.shape[-1]} outputs")
        old, _, _ = context.model.apply(part.params, part.model_state, batch.x, task=batch.task, weight=batch.weight)
        targets = jnp.where(part.seen, jax.nn.sigmoid(old / temperature), jax.nn.one_hot(batch.y, n_classes))
        terms = optax.sigmoid_binary_cross_entropy(outputs, targets)
        active = context.active(state.task, batch.task)
        if active is not None:
            terms = jnp.where(active, terms, 0)
        return weighted_mean(jnp.sum(terms, axis=-1), batch.weight), {}

    def end_task(
        context: Context, state: TrainState, part: IcarlState, sample: Batch, key: Key
    ) -> tuple[TrainState, IcarlState]:
        found = jax.lax.map(lambda batch: unit_rows(context.features(state, batch.x, batch.task)), sample)
        sample, found = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), (sample, found))
        labels = sample.y.astype(jnp.int32)
        is_new = (sample.weight > 0) & ~part.seen[labels]
        seen = part.seen.at[jnp.where(is_new, labels, n_classes)].set(True, mode="drop")
        m = capacity // jnp.maximum(jnp.sum(seen), 1) if per_class is None else jnp.int32(per_class)
        ranks = herding_ranks(found, labels, is_new, n_classes, m)

        # Old exemplars and the sample end to end; those to keep first.
        old = jnp.arange(capacity) < jnp.sum(part.held)
        keep = jnp.concatenate([old & (part.ranks < m), ranks < m])
        order = jnp.argsort(~keep, stable=True)[:capacity]
        kept = keep[order]

        def select(then: Array, now: Array) -> Array:
            rows = jnp.concatenate([then, now])[order]
            return jnp.where(kept.reshape((-1,) + (1,) * (rows.ndim - 1)), rows, jnp.zeros_like(rows))

        rows = jax.tree.map(select, part.rows, batch_rows(sample))
        labels, ranks = select(part.labels, labels), select(part.ranks, ranks)
        member = ((labels[:, None] == jnp.arange(n_classes)) & kept[:, None]).astype(part.means.dtype)

        def feature(row: PyTree) -> Array:
            x, _, told = jax.tree.map(lambda leaf: leaf[None], row)
            return unit_rows(wide(context.features(state, x, told)))[0]

        features = jax.lax.map(feature, rows, batch_size=min(feature_batch, capacity))
        held = jnp.sum(member, axis=0).astype(jnp.int32)
        means = unit_rows(member.T @ features)
        return state, IcarlState(
            rows, labels, ranks, held, seen, means, part.task_size, state.params, state.model_state
        )

    def predict(context: Context, state: TrainState, part: IcarlState, x: PyTree, task: Array | None) -> Array:
        features = unit_rows(wide(context.features(state, x, task)))
        distance = jnp.sum(features**2, -1, keepdims=True) - 2 * features @ part.means.T + jnp.sum(part.means**2, -1)
        known = mask_outputs(-distance, part.held > 0)
        return known if task is None else mask_outputs(known, context.active(state.task, task))

    needs = {"boundaries", "end_sample"} | ({"begin_sample"} if task_size is None else set())
    return Component(
        name,
        frozenset(needs),
        init=init,
        begin_task=begin_task,
        prepare=prepare,
        loss=loss,
        end_task=end_task,
        predict=predict,
    )


ENTRY = Entry(
    name="icarl",
    family="replay",
    summary="exemplars chosen by herding and the last model's outputs; predictions by the nearest mean of exemplars",
    factory=icarl,
    arguments={"capacity": 20, "n_classes": 6, "batch_size": 8, "temperature": 1.0},
    numbers=("temperature",),
    scenarios=("class",),
    papers=("rebuffi2017icarl",),
    results="icarl",
    own_loss=True,
)
