"""Averaged gradient episodic memory: no step may raise the loss on the memory, to first order."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cl_zoo.buffers import Reservoir, batch_rows, reservoir_add, reservoir_init, reservoir_sample
from cl_zoo.checks import Count, check_whole, checked
from cl_zoo.entries import Entry
from cl_zoo.estimators.projection import project_conflict
from cl_zoo.types import Batch, Component, Context, Key, PyTree, Record, TrainState

__all__ = ["ENTRY", "AgemState", "agem"]

AgemState = Reservoir
"""The memory: examples of finished tasks, as they came from the stream."""


@checked
def agem(capacity: Count, *, batch_size: int = 128, name: str = "agem") -> Component:
    """Removes the part of the gradient that would raise the loss on examples drawn from finished tasks.

        g_ref = grad L(examples from memory);    g <- g - min(0, g . g_ref) / (g_ref . g_ref) * g_ref

    so that g . g_ref >= 0 afterwards. L is the sum of all losses of the learner, without penalties.

    Args:
      capacity: examples in memory, at least 1.
      batch_size: examples drawn for each step, from 1 to the capacity.
      name: key in state.

    Returns:
      A component with an `AgemState`.

    Raises:
      ValueError: capacity below 1, batch_size below 1 or above the capacity.

    Source: Chaudhry et al. 2019, arXiv 1812.00420.

    Differences from the paper or its code: the paper stores equally many examples per class of each finished task; here
    each finished task offers its sample to one reservoir when it ends, so that tasks share it equally in expectation
    where samples are equally large, and the number of tasks need not be known. An empty memory changes nothing. Van de
    Ven's code adds 1e-7 to the squared norm that it divides by; Mammoth stores one batch of a finished task.

    Example:
      >>> import optax
      >>> from cl_zoo import compose, supervised
      >>> from cl_zoo.models import mlp
      >>> learner = compose(mlp((4,), 3), optax.sgd(0.1), supervised(), agem(capacity=200, batch_size=32))
    """
    check_whole(name, "batch_size", batch_size, 1, capacity)

    def init(context: Context, state: TrainState, batch: Batch, key: Key) -> AgemState:
        return reservoir_init(batch_rows(batch), capacity)

    def transform(
        context: Context, state: TrainState, part: AgemState, record: Record, grads: PyTree, key: Key
    ) -> tuple[PyTree, AgemState]:
        (x, y, task), weight = reservoir_sample(part, batch_size, key)
        memory = Batch(x, y, task, weight)
        reference = jax.grad(lambda params: context.objective(state, params, memory, key))(state.params)
        return project_conflict(grads, reference), part

    def end_task(
        context: Context, state: TrainState, part: AgemState, sample: Batch, key: Key
    ) -> tuple[TrainState, AgemState]:
        def add(memory: AgemState, numbered: tuple[jax.Array, Batch]) -> tuple[AgemState, None]:
            number, batch = numbered
            return reservoir_add(memory, batch_rows(batch), batch.weight, jax.random.fold_in(key, number)), None

        return state, jax.lax.scan(add, part, (jnp.arange(sample.weight.shape[0]), sample))[0]

    return Component(name, frozenset({"boundaries", "end_sample"}), init=init, transform=transform, end_task=end_task)


ENTRY = Entry(
    name="agem",
    family="replay",
    summary="the loss on examples of finished tasks, by projecting each gradient so that it does not rise",
    factory=agem,
    arguments={"capacity": 20, "batch_size": 8},
    papers=("chaudhry2019efficient",),
    results="a-gem",
)
