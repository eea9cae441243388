"""Regenerative regularisation: weights are pulled back to their initial values."""

from __future__ import annotations

import optax

from cl_zoo.checks import NonNegative, checked
from cl_zoo.entries import Entry, Null
from cl_zoo.types import Array, Batch, Component, Context, Key, PyTree, TrainState

__all__ = ["ENTRY", "l2_init"]


@checked
def l2_init(strength: NonNegative, *, name: str = "l2_init") -> Component:
    """Keeps the network able to learn: parameters that a task does not need return to their initial values.

        penalty(p) = strength * sum_i (p_i - p_0,i)^2

    Args:
      strength: at least 0.
      name: key in state and metrics.

    Returns:
      A component whose state is p_0; metric `l2_init/penalty`.

    Raises:
      ValueError: negative strength.

    Source: Kumar et al. 2023, arXiv 2308.11958.

    Differences from the paper or its code: none.

    Example:
      >>> import optax
      >>> from cl_zoo import compose, supervised
      >>> from cl_zoo.models import mlp
      >>> learner = compose(mlp((4,), 3), optax.sgd(0.1), supervised(), l2_init(strength=1e-3))
    """

    def init(context: Context, state: TrainState, batch: Batch, key: Key) -> PyTree:
        return state.params

    def penalty(context: Context, state: TrainState, part: PyTree, params: PyTree) -> Array:
        return strength * optax.tree.norm(optax.tree.sub(params, part), squared=True)

    return Component(name, init=init, penalty=penalty)


ENTRY = Entry(
    name="l2_init",
    family="plasticity",
    summary="plasticity, by an L2 penalty towards the initial parameters",
    factory=l2_init,
    arguments={"strength": 0.01},
    numbers=("strength",),
    papers=("kumar2023maintaining",),
    null=Null({"strength": 0.0}, "strength 0"),
    results="l2 init",
)
