"""The optimiser starts afresh with every task."""

from __future__ import annotations

from typing import Any

import jax
import optax

from cl_zoo.checks import checked
from cl_zoo.entries import Entry, Null
from cl_zoo.types import Batch, Component, Context, Key, TaskInfo, TrainState

__all__ = ["ENTRY", "reset_optimiser"]


@checked
def reset_optimiser(*, only_schedule: bool = False, name: str = "reset_optimiser") -> Component:
    """opt_state = optimiser.init(p) when a task begins, so that no momentum of the last task acts on the new one, and
    schedules of the learning rate, warm-up and all, begin again.

    Args:
      only_schedule: reset the counts of schedules alone; moments stay.
      name: of the component.

    Returns:
      A component without state of its own.

    Raises:
      nothing.

    Source: done by Zenke et al. 2017, arXiv 1703.04200 (split MNIST), and many since; van de Ven et al. keep the
    optimiser's state.

    Differences from the paper or its code: none.

    Example:
      >>> import optax
      >>> from cl_zoo import compose, supervised
      >>> from cl_zoo.models import mlp
      >>> learner = compose(mlp((4,), 3), optax.adam(1e-3), supervised(), reset_optimiser())
    """

    def begin_task(
        context: Context, state: TrainState, part: None, task: TaskInfo, sample: Batch | None, key: Key
    ) -> tuple[TrainState, None]:
        fresh = context.optimiser.init(state.params)
        if only_schedule:
            fresh = jax.tree.map(_only_counts, state.opt_state, fresh, is_leaf=_is_schedule)
        return state._replace(opt_state=fresh), None

    return Component(name, frozenset({"boundaries"}), begin_task=begin_task)


def _is_schedule(node: Any) -> bool:
    return isinstance(node, optax.ScaleByScheduleState)


def _only_counts(old: Any, fresh: Any) -> Any:
    return fresh if _is_schedule(old) else old


ENTRY = Entry(
    name="reset_optimiser",
    family="plasticity",
    summary="plasticity, by resetting the optimiser's state at each task",
    factory=reset_optimiser,
    papers=("zenke2017continual",),
    null=Null({}, "an optimiser without state", sgd=True),
)
