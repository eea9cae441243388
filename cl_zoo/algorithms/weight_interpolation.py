"""Continual learning with weight interpolation: old and new weights are aligned and averaged after each task."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from cl_zoo.buffers import Reservoir
from cl_zoo.checks import Count, Fraction, checked
from cl_zoo.counters import counted
from cl_zoo.entries import Entry, Null
from cl_zoo.estimators.alignment import match_activations, match_weights, permute, permute_statistics, readers
from cl_zoo.estimators.averaging import floating, interpolate, recompute_statistics
from cl_zoo.types import Array, Batch, Component, Context, Key, PyTree, TrainState

__all__ = ["ENTRY", "WeightInterpolationState", "weight_interpolation"]


class WeightInterpolationState(NamedTuple):
    """Attributes:
    params, model_state: the old model, as the last task left it after interpolation.
    finished: `i32[]`, tasks so far.
    moved: `f32[]`, fraction of the old model's hidden units that changed place at the last alignment.
    distance: `f32[]`, || theta_new - P(theta_old) || at the last interpolation.
    """

    params: PyTree
    model_state: PyTree
    finished: Array
    moved: Array
    distance: Array


@checked
def weight_interpolation(
    old_weight: Fraction,
    *,
    alignment: Literal["activations", "weights"] | None = "activations",
    sample: str = "task",
    micro_batch: Count = 100,
    sweeps: Count = 20,
    name: str = "weight_interpolation",
) -> Component:
    """After each task from the second on, the old weights are put in the new ones' order and the two are averaged.

        theta = (1 - old_weight) theta_new + old_weight P(theta_old);   theta_old <- theta

    P permutes hidden units, which leaves the old model's function as it was. Then running statistics of normalisation
    layers, averaged likewise, are recomputed from the sample (`recompute_statistics`), and the optimiser starts afresh.

    Args:
      old_weight: in [0, 1], weighs the OLD model.
      alignment: how P is found: "activations", where units of the two models correlate best over the sample
        (`match_activations`); "weights", where their weights are nearest (`match_weights`); None, no permutation.
      sample: what activations and statistics are taken from: "task", the finished task's sample, or the name of a
        replay component, whose whole memory is used (as the paper does).
      micro_batch: examples of that memory in one forward pass; batches of the task's sample are taken as they come.
      sweeps: of weight matching, at most.
      name: key in state.

    Returns:
      A component with a `WeightInterpolationState`. Place it before components that anchor weights, such as `ewc`.

    Raises:
      ValueError: old_weight outside [0, 1]; unknown alignment; micro_batch or sweeps below 1; at `init`, a model
        without units, or without the taps that "activations" needs; when a task's end is compiled, a `sample` that
        names no component with a memory.

    Source: Kozal et al. 2024, arXiv 2404.04002; "weights": Ainsworth et al. 2022, arXiv 2209.04836.

    Differences from the paper or its code: the code sums activations of feature maps over positions but divides by the
    number of images, so that for convolutions these are no correlations; here positions count as examples. Examples of
    the memory are not augmented. After the reset, normalisation layers go on with their own momentum (there: with
    cumulative means), and batches count by their examples. The optimiser starts afresh after the first task too. Groups
    of units are matched in their order, not in a random one. In correlations the authors add 1e-4 to the product of
    standard deviations and divide by n - 1; ties of dead units are arbitrary there. For ResNets their code drops
    permuted shortcuts and leaves the stem's ReLU out, so that their aligned old network is another function; their
    published numbers carry it.

    Example:
      >>> import optax
      >>> from cl_zoo import compose, replay, supervised
      >>> from cl_zoo.models import mlp
      >>> components = supervised(), replay(200), weight_interpolation(old_weight=0.3, sample="replay")
      >>> learner = compose(mlp((4,), 3), optax.sgd(0.1), *components)
    """

    source = sample  # the hook's own argument has that name

    def init(context: Context, state: TrainState, batch: Batch, key: Key) -> WeightInterpolationState:
        model = context.model
        if alignment is not None and not model.units:
            raise ValueError(
                f"{name}: alignment is {alignment!r}, but the model names no hidden units (Model.units);"
                " it must be None"
            )
        if alignment == "activations":
            _, _, taps = jax.eval_shape(
                lambda: model.apply(state.params, state.model_state, batch.x, task=batch.task, weight=batch.weight)
            )
            try:
                readers(model.units, taps)
            except ValueError as error:
                raise ValueError(
                    f"{name}: alignment is 'activations', but {error}; it must be 'weights' or None"
                ) from error
        zero = jnp.zeros((), jnp.float32)
        return WeightInterpolationState(state.params, state.model_state, jnp.zeros((), jnp.int32), zero, zero)

    def aligned(
        context: Context, state: TrainState, part: WeightInterpolationState, rows: PyTree
    ) -> tuple[PyTree, PyTree, Array]:
        """The old model in the new one's order, and the fraction of its units that changed place."""
        units = context.model.units
        if alignment is None:
            return part.params, part.model_state, jnp.zeros((), jnp.float32)
        if alignment == "weights":
            order = match_weights(units, state.params, part.params, sweeps=sweeps)
        else:
            new, old = (state.params, state.model_state), (part.params, part.model_state)
            order = match_activations(context.model, new, old, rows)
        moved = jnp.concatenate([p != jnp.arange(len(p)) for p in order])
        return (
            permute(part.params, units, order),
            permute_statistics(part.model_state, units, order),
            jnp.mean(moved.astype(jnp.float32)),
        )

    def end_task(
        context: Context, state: TrainState, part: WeightInterpolationState, sample: Batch, key: Key
    ) -> tuple[TrainState, WeightInterpolationState]:
        rows: PyTree = sample if source == "task" else _memory(name, source, state.parts, micro_batch)
        has_statistics = any(floating(leaf) for leaf in jax.tree.leaves(state.model_state))
        if rows is None and (alignment == "activations" or has_statistics):
            raise ValueError(
                f"{name}: sample is 'task', but end_task was given no sample to take activations or statistics from"
            )

        def average() -> tuple[PyTree, PyTree, Array, Array]:
            old_params, old_model_state, moved = aligned(context, state, part, rows)
            squares = jax.tree.map(lambda a, b: jnp.sum(jnp.square(a - b)), state.params, old_params)
            params = interpolate(state.params, old_params, old_weight)
            model_state = interpolate(state.model_state, old_model_state, old_weight)
            if has_statistics:
                model_state = recompute_statistics(context.model, params, model_state, rows, key)
            distance = jnp.sqrt(jnp.asarray(sum(jax.tree.leaves(squares)), jnp.float32))
            return params, model_state, moved, distance

        def leave() -> tuple[PyTree, PyTree, Array, Array]:
            zero = jnp.zeros((), jnp.float32)
            return state.params, state.model_state, zero, zero

        # The first model has nothing to be averaged with.
        params, model_state, moved, distance = jax.lax.cond(part.finished > 0, average, leave)
        opt_state = context.optimiser.init(params)
        state = state._replace(params=params, model_state=model_state, opt_state=opt_state)
        return state, WeightInterpolationState(params, model_state, counted(part.finished, 1), moved, distance)

    needs = {"boundaries"}
    if source == "task" and alignment == "activations":
        needs.add("end_sample")
    return Component(name, frozenset(needs), init=init, end_task=end_task)


def _memory(owner: str, sample: str, parts: dict[str, PyTree], micro_batch: int) -> Batch:
    """All examples of a replay component's memory, `Batch[M, micro_batch, ...]`; empty slots have weight 0."""

    def memories(part: PyTree) -> list[Reservoir]:
        leaves = jax.tree.leaves(part, is_leaf=lambda leaf: isinstance(leaf, Reservoir))
        return [leaf for leaf in leaves if isinstance(leaf, Reservoir)]

    if sample not in parts or not memories(parts[sample]):
        known = [repr(name) for name, part in parts.items() if memories(part)]
        raise ValueError(
            f"{owner}: sample is {sample!r}, but it must be 'task' or the name of a component with a memory of"
            f" examples ({', '.join(known) or 'the learner has none'})"
        )
    memory = memories(parts[sample])[0]
    capacity = jax.tree.leaves(memory.rows)[0].shape[0]
    size = min(micro_batch, capacity)
    padding = -capacity % size
    # Some store outputs beside their examples.
    x, y, task = memory.rows if len(memory.rows) == 3 else memory.rows[0]
    weight = (jnp.arange(capacity) < memory.seen).astype(jnp.float32)

    def split(leaf: Array) -> Array:
        padded = jnp.pad(leaf, [(0, padding)] + [(0, 0)] * (leaf.ndim - 1))
        return padded.reshape((-1, size, *leaf.shape[1:]))

    return jax.tree.map(split, Batch(x, y, task, weight))


ENTRY = Entry(
    name="weight_interpolation",
    family="weight averaging",
    summary="the old weights, permuted to match the new ones' units and averaged with them after each task",
    factory=weight_interpolation,
    arguments={"old_weight": 0.5},
    numbers=("old_weight",),
    papers=("kozal2024continual",),
    null=Null({"old_weight": 0.0}, "old weight 0, and an optimiser without state", sgd=True),
    results="+ activations",
    found="after replay on split MNIST, a plain mean of the weights is as good without matching",
)
