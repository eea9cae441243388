"""Exponential moving average: a slow copy of the network makes the predictions."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from cl_zoo.checks import Fraction, checked
from cl_zoo.counters import counted
from cl_zoo.entries import Entry, Null
from cl_zoo.estimators.averaging import as_in, wide
from cl_zoo.estimators.teacher import moved_teacher
from cl_zoo.losses import mask_outputs
from cl_zoo.types import Array, Batch, Component, Context, Key, PyTree, Record, TrainState

__all__ = ["ENTRY", "EmaState", "ema"]


class EmaState(NamedTuple):
    """Attributes:
    params, model_state: the moving average.
    updates: `i32[]`, how many it averages.
    """

    params: PyTree
    model_state: PyTree
    updates: Array


@checked
def ema(decay: Fraction, *, warm_up: bool = False, name: str = "ema") -> Component:
    """The network learns as usual, but its moving average predicts.

        average = d average + (1 - d) theta     after every update

    with d = decay, or with `warm_up` d = min(decay, n / (n + 1)) after n updates: the plain mean of all weights so far,
    until the decay takes over.

    Args:
      decay: in [0, 1]; the average reaches back about 1 / (1 - decay) updates.
      warm_up: whether the initial weights are forgotten at once.
      name: key in state.

    Returns:
      A component with an `EmaState`. It predicts, so no other component of the learner may.

    Raises:
      ValueError: decay outside [0, 1].

    Source: Polyak and Juditsky 1992, doi 10.1137/0330046; Tarvainen and Valpola 2017, arXiv 1703.01780; in continual
    learning: Arani et al. 2022, arXiv 2201.12604.

    Differences from the paper or its code: Arani et al. keep two averages, updated at random steps, and distil them
    into the network; here there is one, updated at every step, and the network does not depend on it. Running
    statistics of normalisation layers are averaged like weights.

    Example:
      >>> import optax
      >>> from cl_zoo import compose, supervised
      >>> from cl_zoo.models import mlp
      >>> learner = compose(mlp((4,), 3), optax.sgd(0.1), supervised(), ema(decay=0.99))
    """

    def init(context: Context, state: TrainState, batch: Batch, key: Key) -> EmaState:
        return EmaState(wide(state.params), wide(state.model_state), jnp.zeros((), jnp.int32))

    def observe(
        context: Context, state: TrainState, part: EmaState, record: Record, key: Key
    ) -> tuple[TrainState, EmaState]:
        n = part.updates.astype(jnp.float32)
        d = jnp.minimum(decay, n / (n + 1)) if warm_up else decay
        new, old = (state.params, state.model_state), (part.params, part.model_state)
        params, model_state = moved_teacher(old, new, d, record.batch)
        learned = jnp.any(record.batch.weight > 0)
        return state, EmaState(params, model_state, counted(part.updates, learned))

    def predict(context: Context, state: TrainState, part: EmaState, x: PyTree, task: Array | None) -> PyTree:
        params, model_state = as_in((part.params, part.model_state), (state.params, state.model_state))
        outputs, _, _ = context.model.apply(params, model_state, x, task=task)
        return mask_outputs(outputs, context.active(state.task, task))

    return Component(name, init=init, observe=observe, predict=predict)


ENTRY = Entry(
    name="ema",
    family="weight averaging",
    summary="an exponential moving average of the weights, which predicts in the network's place",
    factory=ema,
    arguments={"decay": 0.9},
    numbers=("decay",),
    papers=("tarvainen2017mean",),
    null=Null({"decay": 0.0}, "decay 0"),
    results="ema",
)
