"""The diagonal of the Fisher information of a classifier."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cl_zoo.types import Array, Batch, Key, PyTree, check_choice, check_whole

__all__ = ["fisher_diagonal"]

Forward = Callable[[PyTree, Batch, dict[str, Array] | None], tuple[Array, dict[str, tuple[Array, Array]]]]


def fisher_diagonal(
    forward: Forward,
    params: PyTree,
    batches: Batch,
    *,
    labels: str = "expected",
    key: Key | None = None,
    batch_square: bool = False,
    micro_batch: int = 16,
) -> PyTree:
    """F = mean over x of  sum_c q(c|x) (d log p(c|x) / d params)^2, the square of each example's own gradient.

    `labels` says what q is: "expected" the model's p(c|x), summed over all classes (the Fisher itself); "sampled" one
    label drawn from p(c|x) (its one-sample estimate); "observed" the given label (the empirical Fisher, near 0 where
    the model is sure and right).

    For a dense layer z = x W + b with cotangents g_c = d log p(c|x) / d z, one example's squared gradient is
    x_i^2 g_j^2, so F_W = mean (x^2)^T (sum_c q_c g_c^2): exact, one matrix product a batch, for all classes together.
    That path is taken for every two-dimensional kernel whose taps the model records for inputs `[B, in]`; every other
    parameter (convolutions, layers shared over positions, models without taps) takes per-example gradients in
    micro-batches. Both may serve one network.

    Args:
      forward: `(params, batch, perturb) -> (logits [B, C], taps)`, rows independent of each other, masked logits
        very low. It must be the network as it answers: dropout off, normalisation statistics fixed.
      params: where to take it.
      batches: `Batch[M, B, ...]`; rows count as their weight.
      labels: "expected", "sampled" or "observed".
      key: needed for "sampled".
      batch_square: square the gradient of each batch's mean instead, and average over batches. This is a mistake that
        several libraries make (smaller by about 1/B, opposite gradients cancel), kept to reproduce their numbers.
      micro_batch: rows whose gradients the slow path holds at once.

    Returns:
      A tree like `params`, not negative.

    Raises:
      ValueError: unknown `labels`; micro_batch below 1; "sampled" without a key; "observed" without labels;
        `batch_square` with "expected", whose batch means are zero in expectation over the classes.

    Source: Kirkpatrick et al. 2017, arXiv 1612.00796; the choices of labels: van de Ven 2025, arXiv 2502.11756.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from cl_zoo.types import Batch
      >>> x = jnp.array([[[1.0], [3.0]]])
      >>> batches = Batch(x, jnp.zeros((1, 2), int), None, jnp.ones((1, 2)))
      >>> forward = lambda w, batch, perturb: (batch.x * w, {})
      >>> fisher_diagonal(forward, jnp.zeros((1, 2)), batches)  # mean of x^2 p (1 - p) = 5 / 4
      Array([[1.25, 1.25]], dtype=float32)
    """
    check_choice("fisher_diagonal", "labels", labels, ("expected", "sampled", "observed"))
    check_whole("fisher_diagonal", "micro_batch", micro_batch, 1)
    if labels == "sampled" and key is None:
        raise ValueError('fisher_diagonal: labels="sampled" draws labels, so it needs a key')
    if labels == "observed" and batches.y is None:
        raise ValueError('fisher_diagonal: labels="observed" needs labelled batches; use "expected" or "sampled"')
    if batch_square and labels == "expected":
        raise ValueError('fisher_diagonal: batch_square needs labels "sampled" or "observed"')

    first = jax.tree.map(lambda leaf: leaf[0], batches)
    taps = jax.eval_shape(lambda p, b: forward(p, b, None)[1], params, first)
    dense = {} if batch_square else _dense_taps(params, taps, first.weight.shape[0])
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    slow = [i for i, (path, _) in enumerate(leaves) if "/".join(_names(path)[:-1]) not in dense]
    values = [leaf for _, leaf in leaves]

    def with_slow(part: list[Array]) -> PyTree:
        full = list(values)
        for i, leaf in zip(slow, part, strict=True):
            full[i] = leaf
        return jax.tree.unflatten(treedef, full)

    def targets(logits: Array, batch: Batch, key: Key | None) -> tuple[Array, Array]:
        """Classes `[K, B]` and their weights q `[K, B]`."""
        if labels == "expected":
            q = jax.nn.softmax(logits).T
            return jnp.broadcast_to(jnp.arange(q.shape[0])[:, None], q.shape), q
        drawn = batch.y if key is None or labels != "sampled" else jax.random.categorical(key, logits)
        return drawn[None], jnp.ones_like(logits, shape=(1, logits.shape[0]))

    def dense_squares(batch: Batch, key: Key | None) -> dict[str, tuple[Array, Array]]:
        """The fast path: per layer, the sums over rows of squared gradients of its kernel and bias."""
        zeros = {name: jnp.zeros(taps[name][1].shape, taps[name][1].dtype) for name in dense}
        logits, pull, seen = jax.vjp(lambda perturb: forward(params, batch, perturb), zeros, has_aux=True)

        def add_class(g2: dict[str, Array], target: tuple[Array, Array]) -> tuple[dict[str, Array], None]:
            classes, q = target
            (cotangents,) = pull(jnp.sqrt(q * batch.weight)[:, None] * _score(logits, classes))
            return jax.tree.map(lambda total, g: total + jnp.square(g), g2, cotangents), None

        # One class after another: memory stays that of one backward pass.
        g2, _ = jax.lax.scan(add_class, zeros, targets(logits, batch, key))
        squares = {name: (jnp.square(seen[name][0]).T @ g2[name], jnp.sum(g2[name], axis=0)) for name in dense}
        return squares

    def slow_squares(batch: Batch, key: Key | None) -> list[Array]:
        """The slow path: per-example gradients, `micro_batch` rows at a time."""
        part = [values[i] for i in slow]

        def example(row: Batch, classes: Array, q: Array) -> list[Array]:
            one = jax.tree.map(lambda leaf: leaf[None], row)
            logits, pull = jax.vjp(lambda p: forward(with_slow(p), one, None)[0], part)
            (gradients,) = jax.vmap(lambda c: pull(_score(logits, c[None])))(classes)
            return [jnp.tensordot(q * row.weight, jnp.square(g), 1) for g in gradients]

        logits = forward(params, batch, None)[0]
        classes, q = targets(logits, batch, key)
        rows = logits.shape[0]
        size = max(d for d in range(1, min(micro_batch, rows) + 1) if rows % d == 0)

        def split(leaf: Array) -> Array:
            return leaf.reshape((rows // size, size, *leaf.shape[1:]))

        def step(total: list[Array], chunk: tuple[Any, ...]) -> tuple[list[Array], None]:
            return [t + jnp.sum(s, axis=0) for t, s in zip(total, jax.vmap(example)(*chunk), strict=True)], None

        chunks = jax.tree.map(split, (batch, classes.T, q.T))
        return jax.lax.scan(step, [jnp.zeros_like(p) for p in part], chunks)[0]

    def mean_squares(batch: Batch, key: Key | None) -> list[Array]:
        """The mistake: the square of the gradient of the batch's mean."""

        def mean_log_likelihood(p: list[Array]) -> Array:
            logits = forward(with_slow(p), batch, None)[0]
            drawn = targets(jax.lax.stop_gradient(logits), batch, key)[0][0]
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), drawn[:, None], 1)[:, 0]
            return jnp.sum(chosen * batch.weight) / jnp.maximum(jnp.sum(batch.weight), 1e-12)

        return [jnp.square(g) for g in jax.grad(mean_log_likelihood)([values[i] for i in slow])]

    def squares(batch: Batch, key: Key | None) -> PyTree:
        full: list[Array | None] = [None] * len(values)
        if slow:
            for i, leaf in zip(slow, (mean_squares if batch_square else slow_squares)(batch, key), strict=True):
                full[i] = leaf
        if dense:
            fast = dense_squares(batch, key)
            for i, (path, _) in enumerate(leaves):
                *layer, leaf_name = _names(path)
                if "/".join(layer) in dense:
                    full[i] = fast["/".join(layer)][leaf_name == "bias"]
        return jax.tree.unflatten(treedef, full)

    def step(carry: tuple[PyTree, Array], numbered: tuple[Array, Batch]) -> tuple[tuple[PyTree, Array], None]:
        total, count = carry
        index, batch = numbered
        drawn = None if key is None else jax.random.fold_in(key, index)
        weight = jnp.sum(batch.weight)
        count = count + (weight > 0).astype(count.dtype) if batch_square else count + weight
        return (jax.tree.map(jnp.add, total, squares(batch, drawn)), count), None

    number = jnp.arange(batches.weight.shape[0])
    start = (jax.tree.map(jnp.zeros_like, params), jnp.zeros((), batches.weight.dtype))
    (total, count), _ = jax.lax.scan(step, start, (number, batches))
    return jax.tree.map(lambda leaf: leaf / jnp.maximum(count, 1e-12), total)


def _score(logits: Array, classes: Array) -> Array:
    """d log p(c|x) / d logits = onehot(c) - p, `[B, C]`."""
    return jax.nn.one_hot(classes, logits.shape[-1], dtype=logits.dtype) - jax.nn.softmax(logits)


def _names(path: tuple[Any, ...]) -> list[str]:
    return [str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry)))) for entry in path]


def _dense_taps(params: PyTree, taps: dict[str, tuple[Any, Any]], rows: int) -> dict[str, PyTree]:
    """Layers for which x^2 and g^2 suffice: `kernel` `[in, out]` (and `bias`) over inputs `[B, in]`, one row each."""
    found = {}
    for name, (inputs, outputs) in taps.items():
        layer = params
        for level in name.split("/"):
            layer = layer.get(level, {}) if isinstance(layer, dict) else {}
        shapes = {leaf: value.shape for leaf, value in layer.items()} if isinstance(layer, dict) else {}
        kernel = (inputs.shape[-1], outputs.shape[-1])
        expected = [{"kernel": kernel}, {"kernel": kernel, "bias": kernel[1:]}]
        one_row_each = inputs.ndim == outputs.ndim == 2 and inputs.shape[0] == outputs.shape[0] == rows
        if one_row_each and shapes in expected:
            found[name] = layer
    return found
