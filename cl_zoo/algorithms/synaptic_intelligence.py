"""Synaptic intelligence: the contribution of each parameter to a task is measured along the training path."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from cl_zoo.checks import NonNegative, Positive, checked
from cl_zoo.entries import Entry, Null
from cl_zoo.estimators.averaging import wide
from cl_zoo.estimators.quadratic import Quadratic, quadratic, quadratic_penalty, zero_quadratic
from cl_zoo.types import Array, Batch, Component, Context, Key, PyTree, Record, TrainState

__all__ = ["ENTRY", "SynapticIntelligenceState", "synaptic_intelligence"]


class SynapticIntelligenceState(NamedTuple):
    """Attributes:
    path: the drop of the loss due to each parameter in the current task, a tree like the parameters.
    quadratic: importance of the finished tasks, and the parameters when the last one ended.
    """

    path: PyTree
    quadratic: Quadratic


@checked
def synaptic_intelligence(
    strength: NonNegative,
    *,
    damping: Positive = 0.1,
    gradient: Literal["task", "total"] = "task",
    clamp: bool = True,
    name: str = "synaptic_intelligence",
) -> Component:
    """Keeps parameters near their last values, each in proportion to how much it lowered the losses of finished tasks.

        w_i <- w_i - g_i (p_i,new - p_i,old)                              after every step
        Omega_i <- max(0, Omega_i + w_i / ((p_i - a_i)^2 + damping));     a <- p;   w <- 0        after every task
        penalty(p) = strength * sum_i Omega_i (p_i - a_i)^2

    g is the gradient of the task's loss before the step, p_new - p_old the step that the optimiser took, and a the
    parameters when the last task ended: w adds up to the drop of the loss as steps become small.

    Args:
      strength: c, at least 0.
      damping: xi, above 0, in squared units of a parameter.
      gradient: "task", or "total", with the penalty's gradient.
      clamp: whether the importance is kept from falling below 0.
      name: key in state and metrics.

    Returns:
      A component with a `SynapticIntelligenceState`; metric `synaptic_intelligence/penalty`.

    Raises:
      ValueError: a number outside its range, unknown gradient.

    Source: Zenke et al. 2017, arXiv 1703.04200.

    Differences from the paper or its code: none by default; the clamp is in the official code, not in the paper. Van de
    Ven's code (doi 10.1038/s42256-022-00568-3) takes gradient="total" and clamp=False; Mammoth's clips gradients to
    [-1, 1] and has no clamp. There is no factor 1/2, so a strength here acts as one twice as large in `ewc`.

    Example:
      >>> import optax
      >>> from cl_zoo import compose, supervised
      >>> from cl_zoo.models import mlp
      >>> learner = compose(mlp((4,), 3), optax.adam(1e-3), supervised(), synaptic_intelligence(strength=0.1))
    """

    def init(context: Context, state: TrainState, batch: Batch, key: Key) -> SynapticIntelligenceState:
        zero = zero_quadratic(state.params)
        return SynapticIntelligenceState(zero.precision, zero)

    def penalty(context: Context, state: TrainState, part: SynapticIntelligenceState, params: PyTree) -> Array:
        return strength * quadratic_penalty(part.quadratic, params)

    def observe(
        context: Context, state: TrainState, part: SynapticIntelligenceState, record: Record, key: Key
    ) -> tuple[TrainState, SynapticIntelligenceState]:
        g = record.task_gradient
        if gradient == "total":
            g = jax.tree.map(jnp.add, g, record.penalty_gradient)
        g, new_params, old_params = wide((g, record.new_params, record.old_params))
        path = jax.tree.map(lambda w, g, new, old: w - g * (new - old), part.path, g, new_params, old_params)
        return state, part._replace(path=path)

    def end_task(
        context: Context, state: TrainState, part: SynapticIntelligenceState, sample: Batch | None, key: Key
    ) -> tuple[TrainState, SynapticIntelligenceState]:
        def add(omega: Array, w: Array, p: Array, a: Array) -> Array:
            total = omega + w / (jnp.square(p - a) + damping)
            return jnp.maximum(total, 0) if clamp else total

        old = part.quadratic
        omega = jax.tree.map(add, old.precision, part.path, state.params, old.anchor)
        zero = jax.tree.map(jnp.zeros_like, part.path)
        return state, SynapticIntelligenceState(zero, quadratic(omega, state.params))

    return Component(name, frozenset({"boundaries"}), init=init, penalty=penalty, observe=observe, end_task=end_task)


ENTRY = Entry(
    name="synaptic_intelligence",
    family="regularisation",
    summary="parameters of finished tasks, by a penalty weighted with what each did for the loss along the path",
    factory=synaptic_intelligence,
    arguments={"strength": 1.0, "damping": 0.1},
    numbers=("strength", "damping"),
    papers=("zenke2017continual",),
    null=Null({"strength": 0.0}, "strength 0"),
    results="si",
)
