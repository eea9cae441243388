"""A whole stream, or many, as one compiled program."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cl_zoo.checks import check_choice, check_whole
from cl_zoo.compilation import jit
from cl_zoo.evaluation.measures import evaluate
from cl_zoo.frozen import learner_with, split_state, with_weights, without_weights
from cl_zoo.training.loop import (
    Result,
    begin,
    check_arrays,
    check_finite,
    check_needs,
    finish,
    start,
    stream_functions,
    train_steps,
)
from cl_zoo.types import Array, Key, Learner, PyTree, Stream, TaskInfo, TrainState

__all__ = ["run_stream", "stream_program", "sweep"]


def run_stream(
    learner: Learner,
    stream: Stream,
    key: Key,
    *,
    split: str = "test",
    within_task: bool = False,
    evaluate_every: int | None = None,
    evaluation_batches: int = 1,
    evaluate_at: str = "tasks",
    weights: PyTree = None,
) -> Result:
    """Trains on every task in turn and evaluates on all after each: a `scan` over tasks, one compiled program.

    Programs of the last learners and streams are kept: a second call with the same two, and any key, compiles nothing.

    Args:
      learner, stream: what learns, and from what.
      key: of the whole run.
      split: what R is measured on, "test" or "validation".
      within_task: also measure R with answers restricted to each task's own labels.
      evaluate_every: updates between points of the curve within tasks; None for no curve. It must divide
        `stream.steps`.
      evaluation_batches: batches per task for a point of the curve.
      evaluate_at: "tasks", after each task; "end", after the last alone: all other rows of R are then not numbers. For
        streams so long that scoring every task after every task takes longer than training.
      weights: what the model begins from, if it does not draw its first weights (a published checkpoint): a pytree of
        arrays.

    Returns:
      A `Result`.

    Raises:
      ValueError: the learner needs what the stream lacks; `evaluate_every` does not divide the steps; unknown
        `evaluate_at`; weights that are not those of the model.
      NonFiniteError: a loss or penalty was not finite; names task, step and likely cause.

    Example:
      >>> import jax, optax
      >>> from cl_zoo import compose, replay, supervised
      >>> from cl_zoo.models import mlp
      >>> from cl_zoo.streams import split_mnist
      >>> stream = split_mnist(scenario="class", steps=20)
      >>> learner = compose(mlp((28, 28), 10), optax.adam(1e-3), supervised(), replay(200), tasks=stream.tasks)
      >>> run_stream(learner, stream, jax.random.key(0)).metrics["loss"].shape
      (5, 20)
    """
    program = stream_program(
        learner,
        stream,
        split=split,
        within_task=within_task,
        evaluate_every=evaluate_every,
        evaluation_batches=evaluation_batches,
        evaluate_at=evaluate_at,
    )
    check_arrays(weights)
    result = program(stream.tasks, stream.data, key, weights)
    check_finite(result.metrics, result.state.params, stream.steps)
    return result._replace(state=with_weights(result.state, weights))


def stream_program(
    learner: Learner,
    stream: Stream,
    *,
    split: str = "test",
    within_task: bool = False,
    evaluate_every: int | None = None,
    evaluation_batches: int = 1,
    evaluate_at: str = "tasks",
) -> Callable[..., Result]:
    """The jitted program behind `run_stream`, to lower, compile and time: `(stream.tasks, stream.data, key, weights) ->
    Result`.

    Args and errors are those of `run_stream`, except that a loss that is not finite raises nothing, and that weights
    which stayed frozen are not given back.
    """
    check_needs(learner, stream)
    _check_options(stream, evaluate_every, evaluate_at)
    return _program(
        learner, stream_functions(stream), split, within_task, evaluate_every, evaluation_batches, evaluate_at
    )


def _check_options(stream: Stream, evaluate_every: int | None = None, evaluate_at: str = "tasks", **_: Any) -> None:
    check_choice("run_stream", "evaluate_at", evaluate_at, ("tasks", "end"))
    if evaluate_every is not None and (evaluate_every < 1 or stream.steps % evaluate_every):
        raise ValueError(f"evaluate_every is {evaluate_every}, but it must divide the {stream.steps} steps of a task")


@functools.lru_cache(maxsize=64)
def _program(learner: Learner, stream: Stream, *options: Any) -> Callable[..., Result]:
    return jit(lambda tasks, data, key, weights=None: _run(learner, stream, tasks, data, key, weights, *options))


def _run(
    learner: Learner,
    stream: Stream,
    tasks: TaskInfo,
    data: PyTree,
    key: Key,
    weights: PyTree = None,
    split: str = "test",
    within_task: bool = False,
    evaluate_every: int | None = None,
    evaluation_batches: int = 1,
    evaluate_at: str = "tasks",
) -> Result:
    state, cursor = start(learner, stream, data, key, weights)
    state, frozen = split_state(state)
    learner = learner_with(learner, frozen)

    def score(state: TrainState) -> tuple[Array, Array | None]:
        within = evaluate(learner, stream, data, state, split, within_task=True) if within_task else None
        return evaluate(learner, stream, data, state, split), within

    @jax.jit  # traced once, though its shapes are asked for before it is used
    def train(carry: tuple[TrainState, PyTree], t: Array) -> tuple[tuple[TrainState, PyTree], Any]:
        state, cursor = carry
        carry = begin(learner, stream, tasks, data, key, state, t), cursor
        curve = None
        if evaluate_every is None:
            carry, metrics = train_steps(learner, stream, data, carry, stream.steps)
        else:

            def chunk(carry: tuple[TrainState, PyTree], _: Any) -> tuple[tuple[TrainState, PyTree], Any]:
                carry, metrics = train_steps(learner, stream, data, carry, evaluate_every)
                return carry, (metrics, evaluate(learner, stream, data, carry[0], split, batches=evaluation_batches))

            carry, points = jax.lax.scan(chunk, carry, length=stream.steps // evaluate_every)
            metrics, curve = jax.tree.map(jnp.ravel, points[0]), points[1]
        state = finish(learner, stream, data, key, carry[0], t)
        return (state, carry[1]), (metrics, curve)

    def score_then_train(carry: tuple[TrainState, PyTree], t: Array) -> tuple[tuple[TrainState, PyTree], Any]:
        """One more round than tasks, the last without training: evaluation is compiled once, not twice."""
        if evaluate_at == "tasks":
            scores = score(carry[0])
        else:
            unknown = jax.tree.map(lambda leaf: jnp.full(leaf.shape, jnp.nan), jax.eval_shape(score, carry[0]))
            scores = jax.lax.cond(t == stream.n_tasks, score, lambda _: unknown, carry[0])
        shapes = jax.eval_shape(train, carry, t)[1]
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        carry, outputs = jax.lax.cond(t < stream.n_tasks, lambda c: train(c, t), lambda c: (c, nothing), carry)
        return carry, (scores, outputs)

    carry = state, cursor
    rounds = jnp.arange(stream.n_tasks + 1, dtype=jnp.int32)
    (state, _), ((accuracy, within), outputs) = jax.lax.scan(score_then_train, carry, rounds)
    metrics, curve = jax.tree.map(lambda leaf: leaf[:-1], outputs)
    return Result(without_weights(state, frozen, weights), metrics, accuracy, within, curve)


def sweep(
    make: Callable[[Any], Learner],
    settings: PyTree,
    stream: Stream,
    keys: Key,
    *,
    orders: Key | str | None = None,
    batch_size: int | None = None,
    keep_states: bool = False,
    weights: PyTree = None,
    **options: Any,
) -> Result:
    """Every setting x every seed x every task order, as one compiled program.

    Args:
      make: `settings -> Learner`, called inside the program: numbers of a setting may be used wherever a factory takes
        one, and no new value compiles anew.
      settings: a pytree of arrays with one leading axis `[H]`.
      stream: what to learn from; all runs share its images.
      keys: `[S]` keys, one per seed.
      orders: None, the stream's own tasks for all; "per_seed", each seed with an order drawn from its key; or `[O]`
        keys, one per order, each met by every setting and seed.
      batch_size: runs that are vmapped at once; the rest follow one batch after another. None takes 1 on a CPU, where
        batching gains nothing, and elsewhere as many as half the device's memory holds.
      keep_states: also return the final states, without frozen weights, of which there is one copy for all.
      weights: see `run_stream`; all runs share them.
      **options: see `run_stream`.

    Returns:
      A `Result` whose leaves have leading axes `[H, S]`, or `[H, S, O]` with keys for orders. Runs that diverged give
      numbers that are not finite, and no error.

    Raises:
      ValueError: as `run_stream`; settings without a common leading axis.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from cl_zoo import compose, ewc, supervised
      >>> from cl_zoo.models import mlp
      >>> from cl_zoo.streams import split_mnist
      >>> stream = split_mnist(scenario="domain", steps=10)
      >>> make = lambda strength: compose(mlp((28, 28), 2), optax.adam(1e-3), supervised(), ewc(strength))
      >>> result = sweep(make, jnp.array([0.0, 1e3, 1e6]), stream, jax.random.split(jax.random.key(0), 2))
      >>> result.accuracy.shape
      (3, 2, 6, 5)
    """
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(settings)}
    if len(lengths) != 1 or lengths == {()}:
        raise ValueError(f"sweep: settings need one common leading axis, but their leaves begin with {sorted(lengths)}")
    _check_options(stream, **options)
    paired = isinstance(orders, str)
    if paired and orders != "per_seed":
        raise ValueError(f"sweep: orders is {orders!r}, but it must be None, 'per_seed' or an array of keys")
    check_needs(jax.eval_shape(lambda s: _Held(make(jax.tree.map(lambda leaf: leaf[0], s))), settings).learner, stream)
    check_arrays(weights)
    shape = (*lengths.pop(), len(keys), *(() if orders is None or paired else (len(orders),)))
    if batch_size is None:
        batch_size = _runs_that_fit(make, settings, stream, keys, shape, weights)
    check_whole("sweep", "batch_size", batch_size, 1)
    names = tuple(sorted(options.items()))
    program = _sweep_program(make, stream_functions(stream), shape, batch_size, paired, keep_states, names)
    return program(stream.tasks, stream.data, settings, keys, None if paired else orders, weights)


@jax.tree_util.register_static
class _Held:
    """Carries a learner out of `eval_shape`."""

    def __init__(self, learner: Learner):
        self.learner = learner


@functools.lru_cache(maxsize=16)
def _sweep_program(
    make: Callable[[Any], Learner],
    stream: Stream,
    shape: tuple[int, ...],
    batch_size: int,
    paired: bool,
    keep_states: bool,
    options: tuple[tuple[str, Any], ...],
) -> Callable[..., Result]:
    @jit
    def program(
        tasks: TaskInfo, data: PyTree, settings: PyTree, keys: Key, orders: Key | None, weights: PyTree
    ) -> Result:
        def one(index: Array) -> Result:
            place = jnp.unravel_index(index, shape)
            key = keys[place[1]]
            reordered = data
            if paired:
                reordered = stream.reorder(data, jax.random.fold_in(key, 3))
            elif orders is not None:
                reordered = stream.reorder(data, orders[place[2]])
            learner = make(jax.tree.map(lambda leaf: leaf[place[0]], settings))
            result = _run(learner, stream, tasks, reordered, key, weights, **dict(options))
            return result._replace(state=split_state(result.state)[0] if keep_states else None)

        flat = jax.lax.map(one, jnp.arange(math.prod(shape)), batch_size=batch_size if batch_size > 1 else None)
        return jax.tree.map(lambda leaf: leaf.reshape(shape + leaf.shape[1:]), flat)

    return program


def _runs_that_fit(
    make: Callable[[Any], Learner], settings: PyTree, stream: Stream, keys: Key, shape: tuple[int, ...], weights: PyTree
) -> int:
    """How many runs half the device's memory holds, at four states and one stack of metrics each."""
    total = math.prod(shape)
    device = jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if device.platform == "cpu" or limit is None:
        return 1
    first = jax.tree.map(lambda leaf: leaf[0], settings)
    result = jax.eval_shape(
        lambda s, d, k, w: _run(make(s), stream_functions(stream), stream.tasks, d, k, w),
        first,
        stream.data,
        keys[0],
        weights,
    )
    state = sum(leaf.size * 4 for leaf in jax.tree.leaves(split_state(result.state)[0]))
    metrics = sum(leaf.size * 4 for leaf in jax.tree.leaves(result._replace(state=None)))
    return int(max(1, min(total, limit // 2 // (4 * state + metrics))))
