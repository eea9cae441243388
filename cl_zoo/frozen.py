"""Frozen weights: `model_state["frozen"]` never changes, so nothing that learns, loops or saves carries it along.

`compose` hides them from components, loops from `scan` and `vmap`, and programs whose caller gave them from what they
give back.
"""

from __future__ import annotations

from typing import Any

from cl_zoo.types import Array, Batch, Learner, Model, PyTree, TrainState

__all__ = ["join_state", "learner_with", "model_with", "split_state", "with_weights", "without_weights"]


def _split(model_state: PyTree) -> tuple[PyTree, PyTree]:
    if not isinstance(model_state, dict) or "frozen" not in model_state:
        return model_state, None
    return {name: value for name, value in model_state.items() if name != "frozen"}, model_state["frozen"]


def _join(model_state: PyTree, frozen: PyTree) -> PyTree:
    return model_state if frozen is None else {**model_state, "frozen": frozen}


def split_state(state: TrainState) -> tuple[TrainState, PyTree]:
    """A state without the frozen weights of its model, and these; None where there are none."""
    rest, frozen = _split(state.model_state)
    return state._replace(model_state=rest), frozen


def join_state(state: TrainState, frozen: PyTree) -> TrainState:
    """The way back."""
    return state._replace(model_state=_join(state.model_state, frozen))


def model_with(model: Model, frozen: PyTree) -> Model:
    """The model over states without frozen weights, which it holds itself."""

    def apply(params: PyTree, model_state: PyTree, x: PyTree, **options: Any) -> Any:
        outputs, model_state, taps = model.apply(params, _join(model_state, frozen), x, **options)
        return outputs, _split(model_state)[0], taps

    def init(key: Array, x: PyTree, *weights: PyTree) -> tuple[PyTree, PyTree]:
        params, model_state = model.init(key, x, *weights)
        return params, _split(model_state)[0]

    def parameters(params: PyTree, model_state: PyTree) -> PyTree:
        return params if model.parameters is None else model.parameters(params, _join(model_state, frozen))

    return Model(init, apply, model.units, parameters)


def learner_with(learner: Learner, frozen: PyTree) -> Learner:
    """The learner over states without frozen weights, which it holds itself: loops need not carry them along."""
    if frozen is None:
        return learner

    def changed(after: TrainState) -> TrainState:
        return split_state(after)[0]

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        after, metrics = learner.update(join_state(state, frozen), batch)
        return changed(after), metrics

    def adapt(state: TrainState, batch: Batch) -> tuple[TrainState, PyTree]:
        after, outputs = learner.adapt(join_state(state, frozen), batch)
        return changed(after), outputs

    return learner._replace(
        begin_task=lambda state, *rest: changed(learner.begin_task(join_state(state, frozen), *rest)),
        update=update,
        end_task=lambda state, *rest: changed(learner.end_task(join_state(state, frozen), *rest)),
        adapt=adapt,
        predict=lambda state, *rest, **options: learner.predict(join_state(state, frozen), *rest, **options),
    )


def without_weights(state: TrainState, frozen: PyTree, weights: PyTree) -> TrainState:
    """What a program gives back of a state and its frozen weights: None in their place where they came in as an
    argument, since what goes out of a program is a copy."""
    if frozen is None:
        return state
    return state._replace(model_state={**state.model_state, "frozen": frozen if weights is None else None})


def with_weights(state: TrainState, weights: PyTree) -> TrainState:
    """The way back, outside of the program."""
    rest, frozen = split_state(state)
    absent = isinstance(state.model_state, dict) and "frozen" in state.model_state and frozen is None
    return rest._replace(model_state={**rest.model_state, "frozen": weights}) if absent else state
