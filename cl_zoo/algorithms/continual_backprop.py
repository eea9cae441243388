"""Continual backprop: units of least utility are re-initialised, a few at a time."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp

from cl_zoo.checks import Fraction, NonNegative, Range, checked
from cl_zoo.counters import counted
from cl_zoo.entries import Entry, Null
from cl_zoo.estimators.units import (
    check_units,
    group_size,
    lowest,
    reset_units,
    row_mean,
    unit_activations,
    weight_magnitude,
)
from cl_zoo.types import Array, Batch, Component, Context, Key, Record, TrainState

__all__ = ["ENTRY", "ContinualBackpropState", "continual_backprop"]


class ContinualBackpropState(NamedTuple):
    """One entry for each group of n units.

    Attributes:
      utility: `f32[n]`, running means of each unit's utility, from 0.
      activation: `f32[n]`, running means of its activation, from 0.
      age: `i32[n]`, updates since it was initialised.
      due: `f32[]`, the fraction of a unit that is due to be replaced.
      replaced: `i32[]`, units replaced so far.
    """

    utility: tuple[Array, ...]
    activation: tuple[Array, ...]
    age: tuple[Array, ...]
    due: tuple[Array, ...]
    replaced: tuple[Array, ...]


@checked
def continual_backprop(
    replacement_rate: Fraction,
    *,
    maturity: NonNegative = 100,
    decay: Annotated[Array | float, Range(0, 1 - 1e-6)] = 0.99,
    utility: Literal["paper", "released"] = "paper",
    name: str = "continual_backprop",
) -> Component:
    """After each step, a small fraction of the mature units, those of least utility, is replaced by new ones.

    For unit i of a group, with h_i its activation in the step's pass, m_i a running mean of it and a_i its age,

        a_i <- a_i + 1;   u_i <- decay * u_i + (1 - decay) * y_i
        utility "paper":      y_i = mean_b |h_bi| * sum_k |w_out_ik|
        utility "released":   y_i = mean_b |h_bi - m_i| * mean_k |w_out_ik| / mean_k |w_in_ik|
        c <- c + replacement_rate * #{i: a_i > maturity}

    and the floor(c) eligible units of the lowest u_i / (1 - decay^a_i) are replaced, c <- c - floor(c): weights and
    biases that make them are re-initialised, weights that read them are 0, and a, u, m and the optimiser's moments
    start afresh. In a feature map, means of h are over its positions too, and w_out are all weights that read the
    channel.

    Args:
      replacement_rate: fraction of the eligible units replaced per step, in [0, 1]; 1e-6 to 1e-3 are usual.
      maturity: steps for which a new unit is protected, at least 0.
      decay: of the running means, in [0, 1).
      utility: "paper" | "released", as above.
      name: key in state.

    Returns:
      A component with a `ContinualBackpropState`. Place it before components that anchor parameters.

    Raises:
      ValueError: a number outside its range, unknown utility; at `init`, a model without units, or without taps of the
        layers that read them.

    Source: Dohare et al. 2024, "Loss of plasticity in deep continual learning", Nature 632, 768-774,
    doi 10.1038/s41586-024-07711-7.

    Differences from the paper or its code: "released" is what the authors' configurations of permuted MNIST and
    ImageNet use; the paper's text gives the other, without the correction by age, which keeps units from being replaced
    for being young. Biases of new units are those of the model's own initialisation (0 by default, as in the paper).
    The authors' code is meant to move the mean output of a replaced unit to the next biases, but has no effect; it is
    left out. Moments are reset, but not Adam's count of steps, which the authors keep for each weight. A weight between
    two units that are replaced at once is 0. With Adam, the authors' code computes a bias correction for new weights
    and throws it away: their first step is much larger there (1e-2 for 3e-5).

    Example:
      >>> import optax
      >>> from cl_zoo import compose, supervised
      >>> from cl_zoo.models import mlp
      >>> learner = compose(mlp((4,), 3), optax.sgd(0.1), supervised(), continual_backprop(1e-4))
    """

    def init(context: Context, state: TrainState, batch: Batch, key: Key) -> ContinualBackpropState:
        check_units(name, context, state, batch)
        sizes = [group_size(state.params, group) for group in context.model.units]
        return ContinualBackpropState(
            utility=tuple(jnp.zeros(n) for n in sizes),
            activation=tuple(jnp.zeros(n) for n in sizes),
            age=tuple(jnp.zeros(n, jnp.int32) for n in sizes),
            due=tuple(jnp.zeros(()) for _ in sizes),
            replaced=tuple(jnp.zeros((), jnp.int32) for _ in sizes),
        )

    def observe(
        context: Context, state: TrainState, part: ContinualBackpropState, record: Record, key: Key
    ) -> tuple[TrainState, ContinualBackpropState]:
        units, weight = context.model.units, record.prepared.weight
        present = jnp.any(record.batch.weight > 0)
        chosen, groups = [], []
        for i, h in enumerate(unit_activations(name, units, state.params, record.taps)):
            age = counted(part.age[i], 1)
            corrected = 1 - decay ** age.astype(jnp.float32)
            mean = decay * part.activation[i] + (1 - decay) * row_mean(h, weight)
            read, readers = weight_magnitude(state.params, units[i], "in")
            if utility == "paper":
                use = row_mean(jnp.abs(h), weight) * read
            else:
                made, makers = weight_magnitude(state.params, units[i], "out")
                spread = row_mean(jnp.abs(h - mean / corrected), weight)
                use = spread * (read / readers) / jnp.maximum(made / makers, 1e-12)
            use = decay * part.utility[i] + (1 - decay) * use
            eligible = age > maturity
            due = part.due[i] + replacement_rate * jnp.sum(eligible)
            out = present & lowest(use / corrected, eligible, jnp.floor(due))
            number = jnp.sum(out, dtype=jnp.int32)
            chosen.append(out)
            groups.append(
                [jnp.where(out, 0, leaf) for leaf in (use, mean, age)]
                + [due - number, counted(part.replaced[i], number)]
            )
        params, opt_state = reset_units(context, state.params, state.opt_state, tuple(chosen), record.batch.x, key)
        new = ContinualBackpropState(*zip(*groups, strict=True))
        new = jax.tree.map(lambda now, before: jnp.where(present, now, before), new, part)
        return state._replace(params=params, opt_state=opt_state), new

    return Component(name, init=init, observe=observe)


ENTRY = Entry(
    name="continual_backprop",
    family="plasticity",
    summary="plasticity, by re-initialising the units of least utility",
    factory=continual_backprop,
    arguments={"replacement_rate": 0.0625, "maturity": 2},
    numbers=("replacement_rate",),
    papers=("dohare2024loss",),
    null=Null({"replacement_rate": 0.0}, "no unit replaced"),
    results="continual backprop",
)
