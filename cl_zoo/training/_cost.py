"""What a run will cost, before anything compiles."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cl_zoo._learner import Learner
from cl_zoo.compilation import told_bytes, tree_bytes
from cl_zoo.evaluation.measures import Measures, settled
from cl_zoo.evaluation.operations import operations
from cl_zoo.training._run_stream import stream_program
from cl_zoo.training.loop import Metrics, begin, check_run, finish, measured, slots, start, task_lengths, update
from cl_zoo.types import Key, PyTree, Stream

__all__ = ["Cost", "cost"]


class Cost(NamedTuple):
    """What a run keeps, and what it computes.

    Attributes:
      bytes: of "params", "model_state", "opt_state", each component's part under its name, frozen "weights", the
        stream's "data", one "batch" and one "sample" (if the stream gives any), "metrics" and "measures" of the run.
      grows: what each of them grows with, in words.
      operations: floating-point operations of one "update", "begin_task" and "end_task", and of each measure each time
        that it is taken; loops whose rounds are only known as they run count once.
      run: floating-point operations of the whole run.
    """

    bytes: dict[str, int]
    grows: dict[str, str]
    operations: dict[str, float]
    run: float

    def __str__(self) -> str:
        rows = [f"{name:24s} {told_bytes(n):>10s}  {self.grows.get(name, '')}" for name, n in self.bytes.items() if n]
        rows += [f"{name:24s} {n:10.3g} operations" for name, n in self.operations.items() if n]
        return "\n".join([*rows, f"{'the whole run':24s} {self.run:10.3g} operations"])


def cost(learner: Learner, stream: Stream, *, measure: Measures | None = None, metrics: Metrics | None = None) -> Cost:
    """Bytes and operations of `run_stream` with the same arguments. Nothing is compiled, and nothing is allocated.

    Activations are not counted: with gradients, a step also keeps what each layer gives for each example of a batch.

    Raises:
      ValueError: as `run_stream`.

    Example:
      >>> import jax, optax
      >>> from cl_zoo import compose, ewc, replay, supervised
      >>> from cl_zoo.models import mlp
      >>> from cl_zoo.streams import split_mnist
      >>> stream = split_mnist(scenario="class", steps=20)
      >>> parts = supervised(), replay(200), ewc(1.0)
      >>> found = cost(compose(mlp((28, 28), 10), optax.adam(1e-3), *parts, tasks=stream.tasks), stream)
      >>> found.bytes["params"], found.bytes["replay"], found.grows["replay"]
      (1077288, 157604, 'examples kept: 200')
    """
    check_run("cost", learner, stream, None)
    key = jax.eval_shape(lambda: jax.random.key(0))
    measures = settled(measure, stream)
    program: Any = stream_program(learner, stream, measure=measure, metrics=metrics)
    result = program.eval_shape(learner, stream, key)
    learner, carry = jax.eval_shape(start, learner, stream, key)
    state, first = carry[0], jnp.int32(0)

    def sampled(stream: Stream, key: Key) -> PyTree:
        return stream.sample(0, key) if stream.sample_function else None

    given = {
        "params": state.params,
        "model_state": state.model_state,
        "opt_state": state.opt_state,
        **state.parts,
        "weights": learner.model.weights,
        "data": (stream.data, stream.tasks),
        "batch": jax.eval_shape(lambda one, s, c: s.next(c[1], one.agent(c[0]))[0], learner, stream, carry),
        "sample": jax.eval_shape(sampled, stream, key),
        "metrics": result.metrics,
        "measures": result.measures,
    }
    grows = {name: _grows(tree, state.params) for name, tree in given.items()}
    grows |= {"data": "examples of the stream", "batch": "examples of a batch", "sample": "examples of a sample"}
    grows |= {"metrics": "updates", "measures": "how often each is taken, and what it gives"}

    def counted(function: Callable[..., Any]) -> float:
        return operations(function, learner, stream, key, carry)

    found = {
        "update": counted(lambda one, s, k, c: update(one, s, c)),
        "begin_task": counted(lambda one, s, k, c: begin(one, s, k, c[0], first)),
        "end_task": counted(lambda one, s, k, c: finish(one, s, k, c[0], first)),
    }
    updates = int(np.sum(task_lengths(stream)))
    run = updates * found["update"] + stream.n_tasks * (found["begin_task"] + found["end_task"])
    for name, one in measures:
        found[name] = counted(lambda a, s, k, c, name=name, one=one: measured(name, one, a, s, k, c[0], 0))
        run += found[name] * math.prod(slots(one, stream))
    return Cost({name: tree_bytes(tree) for name, tree in given.items()}, grows, found, run)


def _grows(tree: PyTree, params: PyTree) -> str:
    """How many parameters, or examples, a part keeps."""
    shapes = {leaf.shape for leaf in jax.tree.leaves(params)}
    like = sum(leaf.size for leaf in jax.tree.leaves(tree) if leaf.shape in shapes)
    n = sum(leaf.size for leaf in jax.tree.leaves(params))
    if like:
        return f"parameters: {like / n:.3g} of each" if tree is not params else f"parameters: {n}"
    lengths = [leaf.shape[0] for leaf in jax.tree.leaves(tree) if leaf.ndim]
    return f"examples kept: {max(set(lengths), key=lengths.count)}" if lengths else ""
