"""Many runs, of settings, seeds and task orders, by one compiled program."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from cl_zoo._learner import Learner
from cl_zoo.checks import check_key, check_whole
from cl_zoo.compilation import jit
from cl_zoo.evaluation.measures import Measures, settled
from cl_zoo.training._run_stream import run_one, with_reports
from cl_zoo.training.loop import Metrics, Result, check_bound, check_run, chosen_metrics
from cl_zoo.types import Array, Key, PyTree, Stream

__all__ = ["sweep"]


def sweep(
    make: Callable[[Any], Learner] | Learner,
    settings: PyTree,
    stream: Stream,
    keys: Key,
    *,
    orders: Key | str | None = None,
    batch_size: int | None = None,
    keep_states: bool = False,
    weights: PyTree = None,
    measure: Measures | None = None,
    metrics: Metrics | None = None,
    progress: bool = True,
) -> Result:
    """Every setting x every seed x every task order, by one compiled program.

    Args:
      make: `settings -> Learner`, called inside the program: numbers of a setting may be used wherever a factory takes
        one, and new values compile nothing. Without settings, the learner itself.
      settings: a pytree of arrays with one leading axis `[H]`; None for seeds (and orders) alone.
      stream: what to learn from; all runs share its images.
      keys: `[S]` keys, one per seed.
      orders: None, the stream's own tasks for all; "per_seed", each seed with an order drawn from its key; or `[O]`
        keys, one per order, each used with every setting and seed.
      batch_size: runs that are vmapped at once; the rest follow one batch after another. None takes 1 on a CPU, where
        batching gains nothing, and elsewhere as many as half the device's memory holds.
      keep_states: also return the final states.
      weights: bound to the learner of each run, one copy for all: inside `make` they would be constants of the program.
      measure, metrics: see `run_stream`.
      progress: show a bar: runs that are done.

    Returns:
      A `Result` whose leaves have leading axes `[H, S]`, or `[H, S, O]` with keys for orders; `H` is missing without
      settings. Runs that diverged give
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
    if isinstance(make, Learner) != (settings is None):
        wanted = "without settings it must be the learner" if settings is None else "it must be a function of a setting"
        raise ValueError(f"sweep: make is {type(make).__name__}, but {wanted}")
    if isinstance(make, Learner):
        weights = make.model.weights if weights is None else weights
        result = sweep(
            _maker(make), jnp.zeros(1), stream, keys, orders=orders, batch_size=batch_size,
            keep_states=keep_states, weights=weights, measure=measure, metrics=metrics, progress=progress,
        )  # fmt: skip
        return jax.tree.map(lambda leaf: leaf[0], result)
    if not callable(make):
        raise ValueError(f"sweep: make is {type(make).__name__}, but it must be a function of a setting")
    check_key("sweep", "keys", keys, 1)
    if orders is not None and not isinstance(orders, str):
        check_key("sweep", "orders", orders, 1)
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(settings)}
    if len(lengths) != 1 or lengths == {()}:
        raise ValueError(f"sweep: settings need one common leading axis, but their leaves begin with {sorted(lengths)}")
    options = settled(measure, stream), chosen_metrics(metrics)
    paired = isinstance(orders, str)
    if paired and orders != "per_seed":
        raise ValueError(f"sweep: orders is {orders!r}, but it must be None, 'per_seed' or an array of keys")
    for i in range(next(iter(lengths))[0]):  # numbers that factories refuse are only seen outside of programs
        check_run("sweep", make(jax.tree.map(lambda leaf, i=i: leaf[i], settings)), stream, None)
    check_bound(weights)
    shape = (*lengths.pop(), len(keys), *(() if orders is None or paired else (len(orders),)))
    if batch_size is None:
        batch_size = _runs_that_fit(make, settings, stream, keys, shape, weights, options)
    check_whole("sweep", "batch_size", batch_size, 1)
    total = math.prod(shape)
    batch_size = min(batch_size, total)
    program = _sweep_program(make, jax.tree.structure(stream), shape, batch_size, paired, keep_states, *options)
    found = []
    with tqdm(total=total, disable=not progress, unit="run", desc="sweep") as bar:
        for first in range(0, total, batch_size):
            index = np.minimum(np.arange(first, first + batch_size), total - 1)  # the last batch is filled up
            found.append(program(jnp.asarray(index), stream, settings, keys, None if paired else orders, weights))
            jax.block_until_ready(found[-1])
            bar.update(min(batch_size, total - first))
    result = jax.tree.map(lambda *leaves: _joined(leaves, shape), *found)
    return with_reports(result, options[0], stream, len(shape))


def _joined(leaves: tuple[Array, ...], shape: tuple[int, ...]) -> Array:
    """The results of all runs, along the axes of a sweep."""
    flat = jnp.concatenate(leaves) if len(leaves) > 1 else leaves[0]
    return flat[: math.prod(shape)].reshape(shape + flat.shape[1:])


@functools.lru_cache(maxsize=16)
def _maker(learner: Learner) -> Callable[[Any], Learner]:
    """The same function for the same learner, so that its program is found again."""
    return lambda settings: learner.bind(None)


@functools.lru_cache(maxsize=16)
def _sweep_program(
    make: Callable[[Any], Learner],
    structure: Any,
    shape: tuple[int, ...],
    batch_size: int,
    paired: bool,
    keep_states: bool,
    *options: Any,
) -> Callable[..., Result]:
    """`(index i32[batch_size], ...) -> Result` of so many runs at once."""

    @jit
    def program(
        index: Array, stream: Stream, settings: PyTree, keys: Key, orders: Key | None, weights: PyTree
    ) -> Result:
        def one(index: Array) -> Result:
            place = jnp.unravel_index(index, shape)
            key = keys[place[1]]
            own = stream
            if paired:
                own = stream.reorder(jax.random.fold_in(key, 3))
            elif orders is not None:
                own = stream.reorder(orders[place[2]])
            learner = _bound(make(jax.tree.map(lambda leaf: leaf[place[0]], settings)), weights)
            result = run_one(learner, own, key, None, *options)._replace(cursor=None)
            return result if keep_states else result._replace(state=None)

        return jax.lax.map(one, index, batch_size=batch_size if batch_size > 1 else None)

    return program


def _bound(learner: Learner, weights: PyTree) -> Learner:
    return learner if weights is None else learner.bind(weights)


def _runs_that_fit(
    make: Callable[[Any], Learner],
    settings: PyTree,
    stream: Stream,
    keys: Key,
    shape: tuple[int, ...],
    weights: PyTree,
    options: tuple[Any, ...],
) -> int:
    """How many runs half the device's memory holds, at four states and one stack of metrics each."""
    total = math.prod(shape)
    device = jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if device.platform == "cpu" or limit is None:
        return 1
    first = jax.tree.map(lambda leaf: leaf[0], settings)
    result = jax.eval_shape(
        lambda s, d, k, w: run_one(_bound(make(s), w), d, k, None, *options), first, stream, keys[0], weights
    )
    state = sum(leaf.size * 4 for leaf in jax.tree.leaves(result.state))
    metrics = sum(leaf.size * 4 for leaf in jax.tree.leaves(result._replace(state=None)))
    return int(max(1, min(total, limit // 2 // (4 * state + metrics))))
