"""Means of two models, and what their normalisation layers need afterwards."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cl_zoo.types import Array, Batch, Key, Model, PyTree

__all__ = ["as_in", "floating", "interpolate", "recompute_statistics", "wide"]


def wide(tree: PyTree) -> PyTree:
    """Floating-point numbers in float32 at least, for what is summed or averaged: 0.999 a + 0.001 b = a in bfloat16."""
    return jax.tree.map(
        lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) if floating(leaf) else leaf, tree
    )


def as_in(tree: PyTree, like: PyTree) -> PyTree:
    """The tree in the types of another."""
    return jax.tree.map(lambda leaf, own: leaf.astype(own.dtype), tree, like)


def interpolate(new: PyTree, old: PyTree, old_weight: Array | float) -> PyTree:
    """(1 - old_weight) new + old_weight old for all floating-point numbers; integers (counters) are those of `new`.

    Example:
      >>> import jax.numpy as jnp
      >>> new, old = {"count": jnp.array([3]), "w": jnp.array([0.0])}, {"count": jnp.array([2]), "w": jnp.array([4.0])}
      >>> interpolate(new, old, 0.25)
      {'count': Array([3], dtype=int32), 'w': Array([1.], dtype=float32)}
    """

    def mean(a: Array, b: Array) -> Array:
        if not floating(a):
            return a
        kind = jnp.promote_types(a.dtype, jnp.float32)  # bfloat16 cannot represent 0.99
        return ((1 - old_weight) * a.astype(kind) + old_weight * b.astype(kind)).astype(a.dtype)

    return jax.tree.map(mean, new, old)


def floating(leaf: Array) -> bool:
    """Whether it holds numbers that may be averaged."""
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def recompute_statistics(model: Model, params: PyTree, model_state: PyTree, batches: Batch, key: Key) -> PyTree:
    """The running statistics of normalisation layers, recomputed: the mean over batches of the statistics of each.

    A layer in training updates them by s <- m s + (1 - m) s_batch, with a momentum m that only the layer knows (as
    batch normalisation commonly does). One pass from s = 0 therefore leaves (1 - m) s_batch of each batch, and a pass
    from s = c over the same batch m c more, which gives m. So

        s = [mean over batches of pass(0)] / (1 - m),   m = (pass(c) - pass(0)) / c

    is the cumulative mean for any momentum, whatever the statistics were before. Numbers that training does not change
    (frozen weights) stay, and so do counters.

    Args:
      model: whose layers use, in training, the statistics of the batch and not the running ones.
      params, model_state: of the network.
      batches: `Batch[M, B, ...]`; each counts by its sum of weights.
      key: for layers that draw, such as dropout.

    Returns:
      A tree like `model_state`; unchanged if no example has weight.

    Source: the reset of Jordan et al. 2022 (REPAIR), arXiv 2211.08403.
    """
    leaves, treedef = jax.tree.flatten(model_state)
    places = [i for i, leaf in enumerate(leaves) if floating(leaf)]
    current = [leaves[i] for i in places]

    def with_numbers(values: list[Array]) -> PyTree:
        full = list(leaves)
        for i, value in zip(places, values, strict=True):
            full[i] = value
        return jax.tree.unflatten(treedef, full)

    def trained(values: list[Array], batch: Batch) -> list[Array]:
        _, after, _ = model.apply(
            params, with_numbers(values), batch.x, task=batch.task, weight=batch.weight, key=key, train=True
        )
        after = jax.tree.leaves(after)
        return [after[i] for i in places]

    sums = jnp.sum(batches.weight, axis=1)
    fullest = jax.tree.map(lambda leaf: leaf[jnp.argmax(sums)], batches)
    once = trained(current, fullest)
    moves = [jnp.any(after != before) & (jnp.sum(sums) > 0) for before, after in zip(current, once, strict=True)]

    def start(scales: list[Array]) -> list[Array]:
        return [
            jnp.where(move, scale.astype(leaf.dtype), leaf)
            for leaf, move, scale in zip(current, moves, scales, strict=True)
        ]

    zero = start([jnp.zeros(())] * len(current))

    def step(total: list[Array], batch: Batch) -> tuple[list[Array], None]:
        share = jnp.sum(batch.weight) / jnp.maximum(jnp.sum(sums), 1e-12)
        # A batch of padding alone may give statistics that are not numbers.
        added = [jnp.where(share > 0, share * after, 0) for after in trained(zero, batch)]
        return [(t + a).astype(t.dtype) for t, a in zip(total, added, strict=True)], None

    means, _ = jax.lax.scan(step, wide([jnp.zeros_like(leaf) for leaf in current]), batches)

    low = trained(zero, fullest)
    # On the scale of the statistics, so that neither drowns in the other's rounding.
    scales = [jnp.where(jnp.any(leaf != 0), jnp.max(jnp.abs(leaf)), 1) for leaf in low]
    high = trained(start(scales), fullest)
    found = []
    for leaf, move, mean, scale, a, b in zip(current, moves, means, scales, low, high, strict=True):
        momentum = jnp.mean((b - a) / scale)
        found.append(jnp.where(move, mean / jnp.maximum(1 - momentum, 1e-6), leaf).astype(leaf.dtype))
    return with_numbers(found)
