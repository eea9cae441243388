"""Permutation alignment: the hidden units of one network put in the order of another's.

Hidden units have no order of their own: a network computes the same after any permutation of them. `Model.units` states
which axes of which parameters must be permuted together. Everything here runs inside a compiled program.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from optax.assignment import hungarian_algorithm

from cl_zoo.checks import check_whole
from cl_zoo.estimators.units import group_size, parameter
from cl_zoo.types import Array, Batch, Model, PyTree

__all__ = [
    "Permutations",
    "Units",
    "assign",
    "match_activations",
    "match_weights",
    "permute",
    "permute_statistics",
    "readers",
    "unit_correlations",
]

Units = tuple[tuple[tuple[tuple[str, ...], int, str], ...], ...]
"""The wiring of hidden units, see `Model`."""

Permutations = tuple[Array, ...]
"""One `i32[n]` per group of units: unit i of the result is unit permutation[i] of the input."""


def permute(params: PyTree, units: Units, permutations: Permutations) -> PyTree:
    """The same function with its hidden units in another order.

    Args:
      params: nested dicts.
      units: see `Model`.
      permutations: one `i32[n]` per group.

    Returns:
      A tree like `params`.

    Raises:
      ValueError: units name a parameter that does not exist, or an axis that is not a whole number of blocks.

    Example:
      >>> import jax.numpy as jnp
      >>> units = (((("hidden", "bias"), 0, "out"), (("output", "kernel"), 0, "in")),)
      >>> params = {"hidden": {"bias": jnp.array([1, 2])}, "output": {"kernel": jnp.array([[3], [4], [5], [6]])}}
      >>> swapped = permute(params, units, (jnp.array([1, 0]),))
      >>> swapped["hidden"]["bias"].tolist(), swapped["output"]["kernel"].ravel().tolist()  # two blocks of two
      ([2, 1], [4, 3, 6, 5])
    """
    for group, order in zip(units, permutations, strict=True):
        for path, axis, _ in group:
            params = _replace(params, path, _take(parameter(params, path), path, axis, order))
    return params


def permute_statistics(model_state: PyTree, units: Units, permutations: Permutations) -> PyTree:
    """The running statistics of the layers that make the units, in their new order.

    They are the vectors in `model_state` that lie under the path of such a layer (which may have the name of a
    collection before it) and are as long as its group.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(model_state)
    made = [
        (path[:-1], order)
        for group, order in zip(units, permutations, strict=True)
        for path in dict.fromkeys(path for path, _, role in group if role == "out" and len(path) > 1)
    ]
    moved = []
    for keys, leaf in leaves:
        layer = tuple(str(getattr(key, "key", getattr(key, "name", key))) for key in keys)[:-1]
        for path, order in made:
            if layer[-len(path) :] == path and jnp.shape(leaf) == order.shape:
                leaf = leaf[order]
                break
        moved.append(leaf)
    return jax.tree.unflatten(treedef, moved)


def assign(score: Array) -> Array:
    """The permutation p that maximises sum_i score[i, p_i], `i32[n]`, by the Hungarian algorithm.

    Of equal scores (units that are never active) the unit of the same number is taken: a millionth of the largest
    score is added to the diagonal. Scores that are not finite count as 0, so that the search always ends.

    Args:
      score: `[n, n]`.

    Example:
      >>> import jax.numpy as jnp
      >>> assign(jnp.array([[0.9, 0.8, 0.0], [0.8, 0.1, 0.0], [0.0, 0.0, 0.0]])).tolist()
      [1, 0, 2]
    """
    score = jnp.where(jnp.isfinite(score), score, 0).astype(jnp.float32)
    scale = jnp.max(jnp.abs(score))
    score = score / jnp.where(scale > 0, scale, 1) + 1e-6 * jnp.eye(score.shape[0], dtype=score.dtype)
    rows, columns = hungarian_algorithm(-score)
    return jnp.zeros(score.shape[0], jnp.int32).at[rows].set(columns.astype(jnp.int32))


class _Moments(NamedTuple):
    """Of two sets of n units over weighted examples: total weight, means, sums of centred squares and products."""

    total: Array
    first_mean: Array
    second_mean: Array
    first: Array
    second: Array
    product: Array


def _no_rows(size: int) -> _Moments:
    each = jnp.zeros(size)
    return _Moments(jnp.zeros(()), each, each, each, each, jnp.zeros((size, size)))


def _add(moments: _Moments, a: Array, b: Array, weight: Array) -> _Moments:
    """One more batch, centred before it is summed: E[ab] - E[a] E[b] would cancel in float32."""
    total = jnp.sum(weight)
    mean_a, mean_b = (weight @ values / jnp.maximum(total, 1e-12) for values in (a, b))
    centred_a, centred_b = a - mean_a, b - mean_b
    step_a, step_b = mean_a - moments.first_mean, mean_b - moments.second_mean
    after = moments.total + total
    share = total / jnp.maximum(after, 1e-12)
    between = moments.total * share
    return _Moments(
        after,
        moments.first_mean + share * step_a,
        moments.second_mean + share * step_b,
        moments.first + weight @ jnp.square(centred_a) + between * jnp.square(step_a),
        moments.second + weight @ jnp.square(centred_b) + between * jnp.square(step_b),
        moments.product + (centred_a * weight[:, None]).T @ centred_b + between * jnp.outer(step_a, step_b),
    )


def _correlation(moments: _Moments) -> Array:
    """product / sqrt(first second); 0 for units whose variance is 0, or within rounding of a constant."""

    def deviation(squares: Array, mean: Array) -> Array:
        varies = squares > 1e-12 * moments.total * jnp.square(mean)
        return jnp.where(varies, jnp.sqrt(squares), 0)

    scale = jnp.outer(deviation(moments.first, moments.first_mean), deviation(moments.second, moments.second_mean))
    return jnp.where(scale > 0, moments.product / jnp.where(scale > 0, scale, 1), 0)


def readers(units: Units, taps: PyTree) -> tuple[tuple[str, ...], ...]:
    """For each group the layers that read its units and have taps.

    Raises:
      ValueError: a group without any.
    """
    found = []
    for group in units:
        reading = dict.fromkeys("/".join(path[:-1]) for path, _, role in group if role == "in")
        found.append(tuple(name for name in reading if name in taps))
        if not found[-1]:
            raise ValueError(
                f"the model records no taps of the layers that read the units of {'/'.join(group[0][0])!r}"
                f" ({', '.join(reading) or 'there are none'})"
            )
    return tuple(found)


def unit_correlations(
    model: Model, first: tuple[PyTree, PyTree], second: tuple[PyTree, PyTree], batches: Batch
) -> tuple[Array, ...]:
    """Pearson correlations of the hidden units of two networks over examples, `[n, n]` for each group of units.

        r_ij = cov(a_i, b_j) / sqrt(var(a_i) var(b_j))

    with a, b the activations as the next layer reads them. The positions of a feature map, or the blocks of a
    flattened one, count as examples; where several layers read a group, their correlations are averaged.

    Args:
      model: with `units`, and taps of the layers that read them.
      first, second: `(params, model_state)` of each network; both in evaluation mode.
      batches: `Batch[M, B, ...]`; examples count by their weight.

    Returns:
      One matrix per group, row i for unit i of `first`, column j for unit j of `second`; 0 for constant units.

    Raises:
      ValueError: a group whose readers have no taps.

    Source: Li et al. 2016, arXiv 1511.07543.
    """
    sizes = [group_size(first[0], group) for group in model.units]

    def activations(network: tuple[PyTree, PyTree], batch: Batch) -> list[list[Array]]:
        _, _, taps = model.apply(*network, batch.x, task=batch.task, weight=batch.weight)
        return [
            [taps[name][0].reshape((-1, size)) for name in names]
            for names, size in zip(readers(model.units, taps), sizes, strict=True)
        ]

    def step(carry: list[list[_Moments]], batch: Batch) -> tuple[list[list[_Moments]], None]:
        a, b = activations(first, batch), activations(second, batch)
        rows = batch.weight.shape[0]

        def add(moments: _Moments, a: Array, b: Array) -> _Moments:
            return _add(moments, a, b, jnp.repeat(batch.weight, a.shape[0] // rows))

        return [[add(*layer) for layer in zip(*group, strict=True)] for group in zip(carry, a, b, strict=True)], None

    shapes = jax.eval_shape(lambda: activations(first, jax.tree.map(lambda leaf: leaf[0], batches)))
    start = [[_no_rows(size)] * len(group) for group, size in zip(shapes, sizes, strict=True)]
    moments, _ = jax.lax.scan(step, start, batches)
    return tuple(sum(_correlation(m) for m in group) / len(group) for group in moments)  # type: ignore[misc]


def match_activations(
    model: Model, new: tuple[PyTree, PyTree], old: tuple[PyTree, PyTree], batches: Batch
) -> Permutations:
    """The order of the old network's units in which they correlate best with the new one's, over examples.

        p = argmax_p sum_i r_{i p_i}     for each group of units separately

    Groups can be matched separately, from activations of the old network as it is: how its units correlate with others
    does not depend on the order of the units before them.

    Args:
      model, batches: see `unit_correlations`.
      new, old: `(params, model_state)`.

    Returns:
      Permutations for `permute(old_params, model.units, ...)`.

    Raises:
      ValueError: a group whose readers have no taps.

    Source: Li et al. 2016, arXiv 1511.07543; Ainsworth et al. 2022, arXiv 2209.04836, section 3.1.
    """
    return tuple(assign(r) for r in unit_correlations(model, new, old, batches))


def match_weights(
    units: Units, new: PyTree, old: PyTree, *, sweeps: int = 20, key: Array | None = None
) -> Permutations:
    """The order of the old network's units in which its weights are nearest to the new one's; needs no data.

        p = argmin_p || new - P(old) ||^2

    by coordinate descent: one group after another, all others fixed, is a linear assignment problem with
    score[i, j] = the inner product of all weights into and out of unit i of the new and unit j of the old network.

    Args:
      units: see `Model`.
      new, old: parameters.
      sweeps: at most so many over all groups; it ends when one changes nothing.
      key: draws the order of the groups in each sweep; None takes them as they come.

    Returns:
      Permutations for `permute(old, units, ...)`: a local optimum.

    Raises:
      ValueError: sweeps below 1; see `permute`.

    Source: Ainsworth et al. 2022, arXiv 2209.04836, algorithm 1.
    """
    check_whole("match_weights", "sweeps", sweeps, 1)
    sizes = [group_size(old, group) for group in units]

    def improve(g: int, permutations: Permutations) -> Permutations:
        score = jnp.zeros((sizes[g], sizes[g]))
        for path, axis, _ in units[g]:
            leaf = parameter(old, path)
            for h, group in enumerate(units):
                for other, other_axis, _ in group:
                    if other == path and other_axis != axis:
                        leaf = _take(leaf, path, other_axis, permutations[h])
            score += _by_unit(parameter(new, path), axis, sizes[g]) @ _by_unit(leaf, axis, sizes[g]).T
        return (*permutations[:g], assign(score), *permutations[g + 1 :])

    branches = [lambda permutations, g=g: improve(g, permutations) for g in range(len(units))]

    def sweep(carry: tuple[Permutations, Array, Array]) -> tuple[Permutations, Array, Array]:
        before, _, number = carry
        order = jnp.arange(len(units))
        if key is not None:
            order = jax.random.permutation(jax.random.fold_in(key, number), order)
        after = jax.lax.fori_loop(0, len(units), lambda i, p: jax.lax.switch(order[i], branches, p), before)
        changed = jnp.any(jnp.array([jnp.any(a != b) for a, b in zip(before, after, strict=True)]))
        return after, changed, number + 1

    start = (tuple(jnp.arange(size, dtype=jnp.int32) for size in sizes), jnp.array(True), jnp.array(0, jnp.int32))
    return jax.lax.while_loop(lambda carry: carry[1] & (carry[2] < sweeps), sweep, start)[0]


def _replace(params: PyTree, path: tuple[str, ...], leaf: Array) -> PyTree:
    if not path:
        return leaf
    return {**params, path[0]: _replace(params[path[0]], path[1:], leaf)}


def _take(leaf: Array, path: tuple[str, ...], axis: int, order: Array) -> Array:
    """`leaf` with every block of its axis in the order given."""
    return jnp.take(leaf, (_blocks(leaf, path, axis, order.shape[0])[:, None] + order).ravel(), axis=axis)


def _blocks(leaf: Array, path: tuple[str, ...], axis: int, size: int) -> Array:
    """Where the blocks of an axis begin."""
    if leaf.shape[axis] % size:
        raise ValueError(
            f"axis {axis} of {'/'.join(path)!r} is {leaf.shape[axis]} long, but it must be a multiple of the"
            f" {size} units of its group"
        )
    return jnp.arange(leaf.shape[axis] // size) * size


def _by_unit(leaf: Array, axis: int, size: int) -> Array:
    """`[size, ...]`: for each unit all its weights, from all blocks."""
    leaf = jnp.moveaxis(leaf, axis, 0)
    return jnp.moveaxis(leaf.reshape((-1, size, *leaf.shape[1:])), 1, 0).reshape((size, -1))
