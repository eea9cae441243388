"""Memory-aware synapses: parameters that the outputs are sensitive to are kept, without labels."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cl_zoo.checks import Count, Fraction, NonNegative, checked
from cl_zoo.entries import Entry, Null
from cl_zoo.estimators.moments import gradient_moment
from cl_zoo.estimators.quadratic import Quadratic, quadratic, quadratic_penalty, zero_quadratic
from cl_zoo.types import Array, Batch, Component, Context, Key, PyTree, TrainState

__all__ = ["ENTRY", "MasState", "mas"]

MasState = Quadratic
"""Importance of the finished tasks, and the parameters when the last one ended."""


@checked
def mas(
    strength: NonNegative,
    *,
    decay: Fraction | None = None,
    whole_first: bool = False,
    micro_batch: Count = 16,
    name: str = "mas",
) -> Component:
    """Keeps parameters near their last values, each in proportion to how much the outputs depend on it.

        Omega_t,i = mean_x | d ||f(x)||^2 / d p_i |                        each example's own gradient
        Omega <- Omega + Omega_t,   or   decay * Omega + (1 - decay) * Omega_t
        penalty(p) = strength * sum_i Omega_i (p_i - a_i)^2

    f(x) are the active outputs for x, and a the parameters when the last task ended.

    Args:
      strength: lambda, at least 0.
      decay: None adds tasks up; a number in [0, 1] takes a moving average over them.
      whole_first: the moving average begins with the first task's Omega, as in Avalanche, not with 0, which makes
        the first task's smaller by 1 - decay.
      micro_batch: examples whose gradients are computed at once where no fast path exists.
      name: key in state and metrics.

    Returns:
      A component with a `MasState`; metric `mas/penalty`.

    Raises:
      ValueError: negative strength, decay outside [0, 1], whole_first without a decay, micro_batch below 1.

    Source: Aljundi et al. 2018, arXiv 1711.09601.

    Differences from the paper or its code: none; the paper adds tasks up, Avalanche averages with decay 0.5. Some code
    takes the gradient of a batch's mean norm, in which examples of opposite sign cancel; here it is each example's own.

    Example:
      >>> import optax
      >>> from cl_zoo import compose, supervised
      >>> from cl_zoo.models import mlp
      >>> learner = compose(mlp((4,), 3), optax.sgd(0.1), supervised(), mas(strength=1.0))
    """
    if decay is None and whole_first:
        raise ValueError(f"{name}: whole_first says how a moving average begins, but decay is None: tasks are added up")

    def init(context: Context, state: TrainState, batch: Batch, key: Key) -> MasState:
        return zero_quadratic(state.params)

    def penalty(context: Context, state: TrainState, part: MasState, params: PyTree) -> Array:
        return strength * quadratic_penalty(part, params)

    def end_task(
        context: Context, state: TrainState, part: MasState, sample: Batch, key: Key
    ) -> tuple[TrainState, MasState]:
        def forward(params: PyTree, batch: Batch, perturb: dict[str, Array] | None) -> tuple[Array, dict]:
            outputs, _, taps = context.model.apply(
                params, state.model_state, batch.x, task=batch.task, weight=batch.weight, perturb=perturb
            )
            return outputs, taps

        def cotangents(outputs: Array, batch: Batch, key: Key | None) -> Array:
            active = context.active(state.task, batch.task)
            return 2 * (outputs if active is None else jnp.where(active, outputs, 0))[None]

        new = gradient_moment(forward, state.params, sample, cotangents, moment=jnp.abs, micro_batch=micro_batch)
        kept, added = (1, 1) if decay is None else (decay, 1 - decay)
        if whole_first:
            added = jnp.where(state.task == 0, 1, added)
        omega = jax.tree.map(lambda o, n: kept * o + added * n, part.precision, new)
        return state, quadratic(omega, state.params)

    return Component(name, frozenset({"boundaries", "end_sample"}), init=init, penalty=penalty, end_task=end_task)


ENTRY = Entry(
    name="mas",
    family="regularisation",
    summary="parameters that the outputs are sensitive to, by a quadratic penalty that needs no labels",
    factory=mas,
    arguments={"strength": 1.0},
    numbers=("strength",),
    papers=("aljundi2018memory",),
    null=Null({"strength": 0.0}, "strength 0"),
    results="mas",
)
