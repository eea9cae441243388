"""Learning without forgetting: the outputs of the last task's model are kept by distillation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from cl_zoo.checks import NonNegative, Positive, check_softmax, checked
from cl_zoo.entries import Entry, Null
from cl_zoo.losses import soft_cross_entropy, weighted_mean
from cl_zoo.types import Array, Batch, Component, Context, Key, PyTree, TrainState

__all__ = ["ENTRY", "LwfState", "lwf"]


class LwfState(NamedTuple):
    """Attributes:
    params, model_state: the teacher, a copy of the model when the last task ended.
    """

    params: PyTree
    model_state: PyTree


@checked
def lwf(
    strength: NonNegative = 1.0,
    *,
    temperature: Positive = 2.0,
    weighting: Literal["constant", "tasks"] = "constant",
    temperature_squared: bool = False,
    name: str = "lwf",
) -> Component:
    """The model as it was before the new task gives soft labels to its inputs; these are learned too.

        L = L_task + strength * mean_b [ - sum_c softmax(teacher_b / T)_c log softmax(student_b / T)_c ]

    from the second task on. Examples that carry their task (task-incremental) are distilled on each finished task's
    head, and these are averaged; for others the teacher's softmax is over the outputs active when it was copied, the
    student's over those active now. Outputs `[B, L, C]`, of tokens, are averaged over L.

    Args:
      strength: at least 0.
      temperature: T above 0.
      weighting: "constant", or "tasks": times the number of finished tasks.
      temperature_squared: times T^2, as Hinton et al. advise.
      name: key in state and metrics.

    Returns:
      A component with an `LwfState`; metric `lwf/loss`.

    Raises:
      ValueError: a number outside its range, unknown weighting.

    Source: Li and Hoiem 2016, arXiv 1606.09282.

    Differences from the paper or its code: the paper first trains the new head alone ("warm-up") and weighs by epochs,
    which is left out here as in van de Ven's code (arXiv 1904.07734 and doi 10.1038/s42256-022-00568-3). There, 2022:
    weighting "tasks" in the task- and domain-incremental settings, "constant" in the class-incremental one; 2019:
    weighting "tasks" and T^2, all divided by the number of tasks, a common factor that Adam cancels. Examples replayed
    by another component are distilled too. In Mammoth's code the student's softmax is over past classes alone; here it
    is over those open now.

    Example:
      >>> import optax
      >>> from cl_zoo import compose, supervised
      >>> from cl_zoo.models import mlp
      >>> learner = compose(mlp((4,), 3), optax.sgd(0.1), supervised(), lwf(temperature=2.0))
    """

    def init(context: Context, state: TrainState, batch: Batch, key: Key) -> LwfState:
        return LwfState(state.params, state.model_state)

    def loss(
        context: Context,
        state: TrainState,
        part: LwfState,
        params: PyTree,
        forward: Callable[[], PyTree],
        batch: Batch,
        key: Key,
    ) -> tuple[Array, dict[str, PyTree]]:
        why = "lwf distils the softmax of the outputs, so targets must be classes; der keeps outputs of any kind"
        student = forward()
        check_softmax(name, batch.y, student, why)
        teacher, _, _ = context.model.apply(
            part.params, part.model_state, batch.x, task=batch.task, weight=batch.weight
        )
        if context.tasks is not None and batch.task is not None:
            heads = context.tasks.active
            finished = (jnp.arange(heads.shape[0]) < state.task).astype(student.dtype)
            per_head = jax.vmap(lambda head: soft_cross_entropy(student, teacher, temperature, head, head))(heads)
            each = jnp.tensordot(finished, per_head, 1) / jnp.maximum(jnp.sum(finished), 1)
        else:
            before = context.active(jnp.maximum(state.task - 1, 0))
            each = soft_cross_entropy(student, teacher, temperature, context.active(state.task), before)
        rows = jnp.mean(each.reshape((each.shape[0], -1)), axis=1)  # over tokens, where an example has many
        factor = state.task if weighting == "tasks" else jnp.minimum(state.task, 1)
        scale = strength * factor.astype(student.dtype)
        if temperature_squared:
            scale = scale * temperature**2
        return scale * weighted_mean(rows, batch.weight), {}

    def end_task(
        context: Context, state: TrainState, part: LwfState, sample: Batch | None, key: Key
    ) -> tuple[TrainState, LwfState]:
        return state, LwfState(state.params, state.model_state)

    return Component(name, frozenset({"boundaries"}), init=init, loss=loss, end_task=end_task)


ENTRY = Entry(
    name="lwf",
    family="distillation",
    summary="the last model's outputs on new inputs, by distillation",
    factory=lwf,
    arguments={"strength": 1.0, "temperature": 2.0},
    numbers=("strength", "temperature"),
    papers=("li2016learning",),
    null=Null({"strength": 0.0}, "strength 0"),
    results="lwf",
)
