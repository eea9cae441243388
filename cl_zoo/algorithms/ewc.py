"""Elastic weight consolidation, separate and online."""

from __future__ import annotations

from typing import Literal

import jax

from cl_zoo.checks import Count, Fraction, NonNegative, checked
from cl_zoo.entries import Entry, Null
from cl_zoo.estimators.fisher import fisher_diagonal
from cl_zoo.estimators.moments import row_gradient_square
from cl_zoo.estimators.quadratic import Quadratic, add_quadratic, quadratic, quadratic_penalty, zero_quadratic
from cl_zoo.types import Array, Batch, Component, Context, Key, PyTree, TrainState

__all__ = ["ENTRY", "EwcState", "ewc"]

EwcState = Quadratic
"""The penalty of all finished tasks as one quadratic: Fisher, anchor, residual."""


@checked
def ewc(
    strength: NonNegative,
    *,
    decay: Fraction | None = None,
    labels: Literal["expected", "sampled", "observed", "loss"] = "expected",
    batch_square: bool = False,
    micro_batch: Count = 16,
    name: str = "ewc",
) -> Component:
    """Keeps parameters near those of finished tasks, each in proportion to its Fisher information.

    Separate (`decay=None`), one quadratic for each finished task k with its own parameters p_k:

        penalty(p) = strength / 2 * sum_k sum_i F_ki (p_i - p_ki)^2

    Online (`decay` a number), one quadratic in all:

        F <- decay * F + F_t;   penalty(p) = strength / 2 * sum_i F_i (p_i - p_ti)^2

    F_k is the diagonal Fisher at the task's end: the mean over the task's sample of squared per-example gradients of
    log p(c|x). Both forms keep three numbers per parameter at most, however many tasks there are: a sum of quadratics
    is a quadratic.

    Args:
      strength: lambda, at least 0. It multiplies a mean over examples, so it depends on neither sample nor batch size.
        F falls towards 0 as a task is fitted: useful strengths reach from 1e2 to 1e10, search on a log scale.
      decay: None, or gamma in [0, 1].
      labels: "expected" | "sampled" | "observed", see `fisher_diagonal`; or "loss", for models that are not
        classifiers: in place of log p, the learner's own loss of each example (a meta-loss of each episode, say).
      batch_square: square the batch means, which is wrong, to reproduce other libraries.
      micro_batch: examples whose gradients are computed at once where no fast path exists.
      name: key in state and metrics.

    Returns:
      A component with an `EwcState`; metric `ewc/penalty`.

    Raises:
      ValueError: negative strength, decay outside [0, 1], unknown labels, batch_square with labels
        "expected" or "loss", micro_batch below 1.

    Source: Kirkpatrick et al. 2017, arXiv 1612.00796; online: Schwarz et al. 2018, arXiv 1805.06370.

    Differences from the paper or its code: Kirkpatrick et al. do not say which labels; "expected" is what van de Ven
    (arXiv 2502.11756) found best; "loss" is the empirical Fisher where the loss is minus a log-likelihood. Schwarz et
    al. also normalise each task's Fisher, which is left out here as in the code of van de Ven and Mammoth. Van de Ven's
    code multiplies the online penalty by decay once more (here: strength * decay); Mammoth's has no 1/2 (here: strength
    * 2). Fishers elsewhere may be sums, or divided by n - 1. Mammoth's Fisher is the mean over examples of p(y given x)
    g^2, which no choice of labels gives. Avalanche has no 1/2 either (here: strength * 2).

    Example:
      >>> import optax
      >>> from cl_zoo import compose, supervised
      >>> from cl_zoo.models import mlp
      >>> learner = compose(mlp((4,), 3), optax.sgd(0.1), supervised(), ewc(strength=100.0))
      >>> sorted(learner.needs)
      [('compose(tasks=None)', 'open_outputs'), ('ewc', 'boundaries'), ('ewc', 'end_sample')]
    """
    if batch_square and labels in ("expected", "loss"):
        raise ValueError(f'{name}: batch_square needs labels "sampled" or "observed"')

    def init(context: Context, state: TrainState, batch: Batch, key: Key) -> EwcState:
        return zero_quadratic(state.params)

    def penalty(context: Context, state: TrainState, part: EwcState, params: PyTree) -> Array:
        return strength / 2 * quadratic_penalty(part, params)

    def end_task(
        context: Context, state: TrainState, part: EwcState, sample: Batch, key: Key
    ) -> tuple[TrainState, EwcState]:
        if labels == "loss":
            fisher = row_gradient_square(
                lambda params, row: context.objective(state, params, row, key, train=False),
                state.params,
                sample,
                micro_batch,
            )
        else:
            fisher = fisher_diagonal(
                lambda params, batch, perturb: context.logits(state, params, batch, perturb),
                state.params,
                sample,
                labels=labels,
                key=key,
                batch_square=batch_square,
                micro_batch=micro_batch,
            )
        if decay is None:
            return state, add_quadratic(part, fisher, state.params)
        faded = jax.tree.map(lambda old, new: decay * old + new, part.precision, fisher)
        return state, quadratic(faded, state.params)

    return Component(name, frozenset({"boundaries", "end_sample"}), init=init, penalty=penalty, end_task=end_task)


ENTRY = (
    Entry(
        name="ewc",
        family="regularisation",
        summary="parameters of finished tasks, by a quadratic penalty weighted with the Fisher information",
        factory=ewc,
        arguments={"strength": 1e3},
        numbers=("strength",),
        papers=("kirkpatrick2017overcoming",),
        null=Null({"strength": 0.0}, "strength 0"),
        results="ewc",
    ),
    Entry(
        name="online_ewc",
        family="regularisation",
        summary="parameters of the last task, by a penalty weighted with a decaying sum of Fisher information",
        factory=ewc,
        arguments={"strength": 1e3, "decay": 0.9},
        numbers=("strength", "decay"),
        papers=("schwarz2018progress",),
        null=Null({"strength": 0.0}, "strength 0"),
        results="online ewc",
    ),
)
