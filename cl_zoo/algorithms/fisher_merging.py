"""Fisher merging: the models of all tasks are averaged, each parameter weighted by its Fisher information."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from cl_zoo.checks import Count, Fraction, Positive, checked
from cl_zoo.counters import counted
from cl_zoo.entries import Entry, Null
from cl_zoo.estimators.averaging import interpolate, wide
from cl_zoo.estimators.fisher import fisher_diagonal
from cl_zoo.types import Array, Batch, Component, Context, Key, PyTree, TrainState

__all__ = ["ENTRY", "FisherMergingState", "fisher_merging"]


class FisherMergingState(NamedTuple):
    """Attributes:
    params, model_state: the merged model of the finished tasks.
    fisher: F_old, a tree like `params`.
    finished: `i32[]`, tasks so far.
    """

    params: PyTree
    model_state: PyTree
    fisher: PyTree
    finished: Array


@checked
def fisher_merging(
    balance: Fraction = 0.5,
    *,
    decay: Fraction = 1.0,
    epsilon: Positive = 1e-8,
    labels: Literal["expected", "sampled", "observed"] = "expected",
    micro_batch: Count = 16,
    name: str = "fisher_merging",
) -> Component:
    """At each task's end from the second on, the new weights are averaged with the merged ones from before.

        f_new = balance (F_new + epsilon),   f_old = (1 - balance) (F_old + epsilon)
        theta = (f_old theta_old + f_new theta_new) / (f_old + f_new);   F_old <- decay F_old + F_new

    F_new is the diagonal Fisher of the task at theta_new, before merging. With balance 1/2 and decay 1, theta is
    sum_k F_k theta_k / sum_k F_k over all finished tasks k, up to epsilon.

    Args:
      balance: lambda in [0, 1], weighs the NEW model.
      decay: of the old Fisher, in [0, 1]; 1 keeps the sum of all tasks, 0 the last task's alone.
      epsilon: above 0, added to the Fishers, which are means over examples; a parameter that neither model needs
        becomes the plain mean.
      labels: "expected" | "sampled" | "observed", see `fisher_diagonal`.
      micro_batch: examples whose gradients are computed at once where no fast path exists.
      name: key in state.

    Returns:
      A component with a `FisherMergingState`.

    Raises:
      ValueError: a number outside its range, unknown labels, micro_batch below 1.

    Source: Matena and Raffel 2022, arXiv 2111.09832; task by task, with balance and decay 0: CoFiMA, Marouf et al.
    2024, arXiv 2312.08977.

    Differences from the paper or its code: the paper merges models that were fine-tuned separately from one
    initialisation; here each task goes on from the merged model. Running statistics of normalisation layers are
    averaged by `balance` alone. The optimiser keeps its state; `reset_optimiser` drops it.

    Example:
      >>> import optax
      >>> from cl_zoo import compose, supervised
      >>> from cl_zoo.models import mlp
      >>> learner = compose(mlp((4,), 3), optax.sgd(0.1), supervised(), fisher_merging(balance=0.5))
    """

    def init(context: Context, state: TrainState, batch: Batch, key: Key) -> FisherMergingState:
        nothing = wide(jax.tree.map(jnp.zeros_like, state.params))
        return FisherMergingState(state.params, state.model_state, nothing, jnp.zeros((), jnp.int32))

    def end_task(
        context: Context, state: TrainState, part: FisherMergingState, sample: Batch, key: Key
    ) -> tuple[TrainState, FisherMergingState]:
        fisher = fisher_diagonal(
            lambda params, batch, perturb: context.logits(state, params, batch, perturb),
            state.params,
            sample,
            labels=labels,
            key=key,
            micro_batch=micro_batch,
        )
        later = part.finished > 0  # the first model has nothing to be merged with

        def merge(new: Array, old: Array, f_new: Array, f_old: Array) -> Array:
            f_new, f_old = balance * (f_new + epsilon), (1 - balance) * (f_old + epsilon)
            share = f_old / (f_new + f_old)
            return jnp.where(later, (1 - share) * new + share * old, new).astype(new.dtype)

        params = jax.tree.map(merge, state.params, part.params, fisher, part.fisher)
        mean = interpolate(state.model_state, part.model_state, 1 - balance)
        model_state = jax.tree.map(lambda a, b: jnp.where(later, a, b), mean, state.model_state)
        total = jax.tree.map(lambda old, new: (decay * old + new).astype(new.dtype), part.fisher, fisher)
        state = state._replace(params=params, model_state=model_state)
        return state, FisherMergingState(params, model_state, total, counted(part.finished, 1))

    return Component(name, frozenset({"boundaries", "end_sample"}), init=init, end_task=end_task)


ENTRY = Entry(
    name="fisher_merging",
    family="weight averaging",
    summary="the models of all tasks, averaged with their Fisher information as weights",
    factory=fisher_merging,
    arguments={"balance": 0.5, "decay": 1.0},
    numbers=("balance", "decay"),
    papers=("matena2022merging",),
    null=Null({"balance": 1.0}, "balance 1"),
    results="fisher merging",
)
