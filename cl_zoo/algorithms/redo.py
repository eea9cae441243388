"""ReDo: dormant units are recycled."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from cl_zoo.checks import Count, NonNegative, checked
from cl_zoo.counters import counted, cycled
from cl_zoo.entries import Entry, Null
from cl_zoo.estimators.units import check_units, reset_units, row_mean, unit_activations
from cl_zoo.types import Array, Batch, Component, Context, Key, Record, TrainState

__all__ = ["ENTRY", "RedoState", "redo"]


class RedoState(NamedTuple):
    """Attributes:
    updates: `i32[]`, updates so far.
    recycled: `i32[G]`, units recycled so far in each group.
    """

    updates: Array
    recycled: Array


@checked
def redo(threshold: NonNegative, every: Count = 1000, *, name: str = "redo") -> Component:
    """From time to time, units that are hardly active on the current batch are re-initialised.

    A unit i of a layer with n units is dormant where

        s_i = mean_b |h_bi| / (1/n sum_j mean_b |h_bj|) <= threshold

    After every `every`-th update, weights and biases that make a dormant unit are re-initialised, weights that read it
    are 0, and the optimiser's moments of both start afresh. In a feature map the means are over positions too. A layer
    that is silent altogether is dormant as a whole.

    Args:
      threshold: tau, at least 0; 0 recycles units that are exactly 0 on the whole batch.
      every: updates between two checks, at least 1.
      name: key in state.

    Returns:
      A component with a `RedoState`. Place it before components that anchor parameters.

    Raises:
      ValueError: a negative threshold, every below 1; at `init`, a model without units, or without taps of the layers
        that read them.

    Source: Sokar et al. 2023, "The dormant neuron phenomenon in deep reinforcement learning", arXiv 2302.12902.

    Differences from the paper or its code: the paper takes a batch from the replay memory, here it is the batch of the
    step, so it must not be too small (on one example, half of all ReLU units are silent). Adam's count of steps, which
    all weights share, goes on. A weight between two units that are recycled at once is 0. Dopamine's code scores units
    after the step, and leaves the moments of their biases as they are.

    Example:
      >>> import optax
      >>> from cl_zoo import compose, supervised
      >>> from cl_zoo.models import mlp
      >>> learner = compose(mlp((4,), 3), optax.adam(1e-3), supervised(), redo(threshold=0.1, every=1000))
    """

    def init(context: Context, state: TrainState, batch: Batch, key: Key) -> RedoState:
        check_units(name, context, state, batch)
        return RedoState(jnp.zeros((), jnp.int32), jnp.zeros(len(context.model.units), jnp.int32))

    def observe(
        context: Context, state: TrainState, part: RedoState, record: Record, key: Key
    ) -> tuple[TrainState, RedoState]:
        present = jnp.any(record.batch.weight > 0)
        updates = cycled(part.updates, present, every)
        now = present & (updates % every == 0)
        dormant = []
        for h in unit_activations(name, context.model.units, state.params, record.taps):
            activity = row_mean(jnp.abs(h), record.prepared.weight)
            # Not divided: a layer that is silent altogether would give 0 / 0.
            dormant.append(now & (activity <= threshold * jnp.mean(activity)))
        params, opt_state = reset_units(context, state.params, state.opt_state, tuple(dormant), record.batch.x, key)
        recycled = counted(part.recycled, jnp.stack([jnp.sum(mask, dtype=jnp.int32) for mask in dormant]))
        return state._replace(params=params, opt_state=opt_state), RedoState(updates, recycled)

    return Component(name, init=init, observe=observe)


ENTRY = Entry(
    name="redo",
    family="plasticity",
    summary="plasticity, by re-initialising dormant units",
    factory=redo,
    arguments={"threshold": 0.8, "every": 3},
    numbers=("threshold",),
    papers=("sokar2023dormant",),
    null=Null({"every": 1000000}, "never checked"),
    results="redo",
    found="on split MNIST no more is kept than without it",
)
