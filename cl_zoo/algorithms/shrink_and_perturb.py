"""Shrink and perturb: parameters are shrunk towards 0 and perturbed with noise."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from cl_zoo.checks import Fraction, NonNegative, checked
from cl_zoo.entries import Entry, Null
from cl_zoo.types import Batch, Component, Context, Key, PyTree, Record, TaskInfo, TrainState

__all__ = ["ENTRY", "shrink_and_perturb"]


@checked
def shrink_and_perturb(
    shrink: Fraction,
    noise: NonNegative,
    *,
    source: Literal["normal", "init"] = "normal",
    when: Literal["step", "task"] = "step",
    name: str = "shrink_and_perturb",
) -> Component:
    """All parameters are shrunk and perturbed with noise, after each step or before each task but the first.

        p = (1 - shrink) * p + noise * xi
        source "normal":   xi ~ N(0, 1) for every number
        source "init":     xi a fresh draw of the model's own initialisation

    Args:
      shrink: in [0, 1].
      noise: at least 0: a standard deviation, or with source "init" a fraction of a freshly initialised network.
      source: as above.
      when: "step" | "task"; "task" needs task boundaries.
      name: of the component.

    Returns:
      A component without state of its own. Place it before components that anchor parameters.

    Raises:
      ValueError: a number outside its range, unknown source or when.

    Source: Ash and Adams 2020, "On warm-starting neural network training", arXiv 1910.08475 (before each new portion of
    data: "task"); Dohare et al. 2024, doi 10.1038/s41586-024-07711-7 (after each step).

    Differences from the paper or its code: Ash and Adams write lambda for the factor that is kept, 1 - shrink. Dohare
    et al. shrink by a weight decay d in the loss, which under SGD with rate r is shrink = r d; here it does not pass
    through the optimiser. The optimiser's state stays: add `reset_optimiser` to begin each task with a new one. Under
    SGD the step of the same update is shrunk too: (1 - s)(p - r g).

    Example:
      >>> import optax
      >>> from cl_zoo import compose, supervised
      >>> from cl_zoo.models import mlp
      >>> learner = compose(mlp((4,), 3), optax.sgd(0.1), supervised(), shrink_and_perturb(1e-6, 1e-5))
    """

    def moved(context: Context, state: TrainState, x: PyTree, key: Key) -> PyTree:
        leaves, structure = jax.tree.flatten(state.params)
        if source == "init":
            draws = jax.tree.leaves(context.model.init(key, x)[0])
        else:
            keys = [jax.random.fold_in(key, i) for i in range(len(leaves))]
            draws = [jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
        new = [((1 - shrink) * leaf + noise * xi).astype(leaf.dtype) for leaf, xi in zip(leaves, draws, strict=True)]
        return jax.tree.unflatten(structure, new)

    def observe(context: Context, state: TrainState, part: None, record: Record, key: Key) -> tuple[TrainState, None]:
        present = jnp.any(record.batch.weight > 0)
        new = moved(context, state, record.batch.x, key)
        return state._replace(params=jax.tree.map(lambda a, b: jnp.where(present, a, b), new, state.params)), None

    def begin_task(
        context: Context, state: TrainState, part: None, task: TaskInfo, sample: Batch | None, key: Key
    ) -> tuple[TrainState, None]:
        x = None if sample is None else jax.tree.map(lambda leaf: leaf[0], sample.x)
        # Before the first update there is nothing to leave behind.
        new = jax.lax.cond(state.step > 0, lambda: moved(context, state, x, key), lambda: state.params)
        return state._replace(params=new), None

    if when == "step":
        return Component(name, observe=observe)
    needs = {"boundaries", "begin_sample"} if source == "init" else {"boundaries"}
    return Component(name, frozenset(needs), begin_task=begin_task)


ENTRY = Entry(
    name="shrink_and_perturb",
    family="plasticity",
    summary="plasticity, by shrinking parameters and perturbing them with noise",
    factory=shrink_and_perturb,
    arguments={"shrink": 0.01, "noise": 0.01},
    numbers=("shrink", "noise"),
    papers=("ash2020warm",),
    null=Null({"shrink": 0.0, "noise": 0.0}, "nothing shrunk, no noise"),
    results="shrink and perturb",
)
