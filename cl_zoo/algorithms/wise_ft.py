"""Robust fine-tuning, task by task: each task's weights are averaged with those from before it."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from cl_zoo.checks import Fraction, checked
from cl_zoo.counters import counted
from cl_zoo.entries import Entry, Null
from cl_zoo.estimators.averaging import interpolate
from cl_zoo.types import Array, Batch, Component, Context, Key, PyTree, TrainState

__all__ = ["ENTRY", "WiseFtState", "wise_ft"]


class WiseFtState(NamedTuple):
    """Attributes:
    params, model_state: the anchor that the next task's weights are averaged with.
    finished: `i32[]`, tasks so far.
    """

    params: PyTree
    model_state: PyTree
    finished: Array


@checked
def wise_ft(
    old_weight: Fraction, *, anchor: Literal["last", "first"] = "last", pretrained: bool = False, name: str = "wise_ft"
) -> Component:
    """At each task's end the weights are moved back towards those from before it.

        theta = old_weight theta_anchor + (1 - old_weight) theta_new

    Args:
      old_weight: in [0, 1], of the anchor; 1 minus the paper's alpha.
      anchor: "last", what the last task left after averaging; "first", what the first task left, throughout.
      pretrained: whether the initial network is worth keeping: then it is the first anchor, and the first task is
        averaged with it too; otherwise the first task's weights stay as they are.
      name: key in state.

    Returns:
      A component with a `WiseFtState`.

    Raises:
      ValueError: old_weight outside [0, 1], unknown anchor.

    Source: Wortsman et al. 2022, arXiv 2109.01903; task by task, anchor "last": CoMA, Marouf et al. 2024, arXiv
    2312.08977.

    Differences from the paper or its code: the paper averages once, a zero-shot model with its fine-tuning; here every
    task is a fine-tuning. Running statistics of normalisation layers are averaged like weights. The optimiser keeps its
    state; `reset_optimiser` drops it.

    Example:
      >>> import optax
      >>> from cl_zoo import compose, supervised
      >>> from cl_zoo.models import mlp
      >>> learner = compose(mlp((4,), 3), optax.sgd(0.1), supervised(), wise_ft(old_weight=0.5))
    """

    def init(context: Context, state: TrainState, batch: Batch, key: Key) -> WiseFtState:
        return WiseFtState(state.params, state.model_state, jnp.zeros((), jnp.int32))

    def end_task(
        context: Context, state: TrainState, part: WiseFtState, sample: Batch | None, key: Key
    ) -> tuple[TrainState, WiseFtState]:
        new, old = (state.params, state.model_state), (part.params, part.model_state)
        has_anchor = jnp.array(True) if pretrained else part.finished > 0

        def choose(condition: Array, a: PyTree, b: PyTree) -> PyTree:
            return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)

        merged = choose(has_anchor, interpolate(new, old, old_weight), new)
        kept = merged if anchor == "last" else choose(has_anchor, old, merged)
        part = WiseFtState(kept[0], kept[1], counted(part.finished, 1))
        return state._replace(params=merged[0], model_state=merged[1]), part

    return Component(name, frozenset({"boundaries"}), init=init, end_task=end_task)


ENTRY = Entry(
    name="wise_ft",
    family="weight averaging",
    summary="the weights from before each task, averaged with the new ones at its end",
    factory=wise_ft,
    arguments={"old_weight": 0.5},
    numbers=("old_weight",),
    papers=("wortsman2022robust",),
    null=Null({"old_weight": 0.0}, "old weight 0"),
    results="wise-ft",
)
