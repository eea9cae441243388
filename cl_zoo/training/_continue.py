"""How a run goes on: with tasks that did not exist when it began, from a state, with more outputs."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cl_zoo._learner import Learner
from cl_zoo.evaluation.measures import Measure
from cl_zoo.training.loop import Result, start
from cl_zoo.types import Array, Batch, Key, PyTree, Stream, TrainState

__all__ = ["check_begun", "first_tasks", "grow_outputs", "joined", "placed", "rows_of"]


def first_tasks(learner: Learner, stream: Stream, n: int) -> tuple[Learner, Stream]:
    """The learner and the stream as they were when there were n tasks."""
    fewer = stream.first(n)
    return learner if learner.tasks is None else dataclasses.replace(learner, tasks=fewer.tasks), fewer


def check_begun(
    owner: str, learner: Learner, stream: Stream, key: Key, state: TrainState | None, after: Result | None
) -> tuple[int, tuple[TrainState, PyTree] | None]:
    """The task to begin with, and state and cursor to begin from: None for those that the run itself makes.

    Raises:
      ValueError: both are given; a result of as many tasks or more, or of a sweep; another key than that of the run; a
        state of other names, shapes or types than the learner's.
    """
    if state is None and after is None:
        return 0, None
    if state is not None and after is not None:
        raise ValueError(f"{owner}: state and after are given, but only one of them may be; after has a state")
    first = 0
    if after is not None:
        if not isinstance(after, Result) or after.state is None or jnp.ndim(after.finite) != 1:
            raise ValueError(f"{owner}: after is {type(after).__name__}, but it must be the Result of one run")
        state, first = after.state, len(after.finite)
        if first >= stream.n_tasks:
            raise ValueError(
                f"{owner}: after has {first} tasks and stream {stream.n_tasks}, but stream must have those and new ones"
            )
        wanted = jax.random.key_data(jax.random.split(key)[0])
        if not np.array_equal(wanted, jax.random.key_data(state.key)):
            raise ValueError(f"{owner}: key is not that of the run before; give the same, which names all draws")
    if not isinstance(state, TrainState):
        raise ValueError(f"{owner}: state is {type(state).__name__}, but it must be a TrainState")
    _check_like(owner, state, jax.eval_shape(lambda: start(learner, stream, key)[1][0]))
    return first, (state, None if after is None else after.cursor)


def _check_like(owner: str, state: TrainState, wanted: TrainState) -> None:
    """Refuses a state that is not of a learner's kind; names the first leaf that differs."""
    have, want = (
        {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in _leaves(tree)}
        for tree in (state, wanted)
    )
    for name in sorted(have.keys() | want.keys(), key=lambda name: (name not in want, name)):
        if have.get(name) != want.get(name):
            raise ValueError(
                f"{owner}: state{name} is {have.get(name, 'absent')}, but this learner has {want.get(name, 'none')};"
                " where there are more outputs than before, grow_outputs makes room for them"
            )


def _leaves(tree: PyTree) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree)


def placed(room: PyTree, old: PyTree) -> PyTree:
    """The results of fewer tasks in the room for those of more: at its beginning along every axis."""

    def place(all_: Any, some: Any) -> Any:
        if all_.ndim != np.ndim(some) or any(n > m for n, m in zip(np.shape(some), all_.shape, strict=True)):
            raise ValueError(f"what was measured has the shape {np.shape(some)}, but there is room for {all_.shape}")
        found = np.array(all_)
        found[tuple(slice(n) for n in np.shape(some))] = some
        return found

    return jax.tree.map(place, room, old)


def joined(after: Result, new: Result, stream: Stream, measures: tuple[tuple[str, Measure], ...]) -> Result:
    """The results of the tasks before, and those of the tasks since, as of one run: nan where a score on a later task
    was not measured then."""
    first = len(after.finite)

    def rows(old: PyTree, found: PyTree) -> PyTree:
        """Those of `old` before those of `found`, which are as wide."""
        return jax.tree.map(lambda a, b: jnp.concatenate([_widened(a, b, first), b]), old, found)

    metrics = {
        name: rows(after.metrics.get(name, _nothing(found, first)), found) for name, found in new.metrics.items()
    }
    kept = {}
    for name, one in measures:
        found = new.measures[name]
        empty = jax.tree.map(lambda leaf: _nothing(leaf, first), found)
        kept[name] = found if one.when == "end" else rows(after.measures.get(name, empty), found)
    finite = jnp.concatenate([after.finite, new.finite])
    updated = jnp.concatenate([_widened(after.updated, new.updated, first), new.updated])
    return Result(new.state, metrics, kept, updated, finite, new.cursor)


def rows_of(after: Result, name: str) -> dict[int, PyTree]:
    """What a measure's report made at the end of each task before, by number; nothing where it was not made."""
    found = after.measures.get(name)
    return (
        {} if found is None else {i: jax.tree.map(lambda leaf, i=i: leaf[i], found) for i in range(len(after.finite))}
    )


def _nothing(like: Array, rows: int) -> Array:
    fill = jnp.nan if jnp.issubdtype(like.dtype, jnp.inexact) else 0
    return jnp.full((rows, *like.shape[1:]), fill, like.dtype)


def _widened(old: Array, like: Array, rows: int) -> Array:
    """The first rows of `old`, as wide as those of `like`."""
    return jnp.asarray(placed(np.asarray(_nothing(like, rows)), np.asarray(old)[:rows]))


def grow_outputs(learner: Learner, state: TrainState, batch: Batch) -> TrainState:
    """A state with more outputs, for a learner whose model and tasks have them.

    Every array of the new learner's first state that is longer along an axis than that of `state` begins with what
    `state` has; the rest is as `learner.init` makes it: new outputs begin as those of a new network, their moments and
    importance at 0, and in a memory that keeps logits, the old examples' logits for them are 0.

    Args:
      learner: with more outputs, otherwise as the one before.
      state: of the one before.
      batch: any batch of the stream.

    Returns:
      A state of `learner`: `run_stream(learner, stream, key, state=...)`.

    Raises:
      ValueError: the state is not a smaller one of this learner.

    Example:
      >>> import jax, optax
      >>> from cl_zoo import compose, supervised
      >>> from cl_zoo.models import mlp
      >>> from cl_zoo.streams import split_mnist
      >>> batch, _ = (stream := split_mnist(2, "domain", steps=1)).next(stream.init(jax.random.key(0)))
      >>> small, large = (compose(mlp((28, 28), n), optax.adam(1e-3), supervised()) for n in (5, 8))
      >>> state = small.init(jax.random.key(0), batch)
      >>> grow_outputs(large, state, batch).params["output"]["kernel"].shape
      (256, 8)
    """
    if not isinstance(learner, Learner):
        raise ValueError(f"grow_outputs: learner is {type(learner).__name__}, but it must be what compose returns")
    if not isinstance(state, TrainState):
        raise ValueError(f"grow_outputs: state is {type(state).__name__}, but it must be a TrainState")
    new = jax.jit(learner.init)(state.key, batch)
    if str(jax.tree.structure(new)) != str(jax.tree.structure(state)):
        raise ValueError("grow_outputs: state is of another model, optimiser or components than the learner")

    def grow(path: Any, whole: Array, some: Array) -> Array:
        fits = whole.ndim == some.ndim and all(n <= m for n, m in zip(some.shape, whole.shape, strict=True))
        if not fits or whole.dtype != some.dtype:
            raise ValueError(
                f"grow_outputs: state{jax.tree_util.keystr(path)} is {some.dtype}{list(some.shape)}, which is not part"
                f" of this learner's {whole.dtype}{list(whole.shape)}"
            )
        if whole.shape == some.shape:
            return some
        return whole.at[tuple(slice(n) for n in some.shape)].set(some)

    return jax.tree_util.tree_map_with_path(grow, new, state)
