"""The diagonal of the Fisher information of a classifier."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from cl_zoo.checks import check_choice, check_classes, check_softmax, check_whole
from cl_zoo.estimators.averaging import wide
from cl_zoo.estimators.moments import Forward, gradient_moment, layer_of, logits_layer, with_layer
from cl_zoo.losses import check_several, weighted_mean
from cl_zoo.types import Array, Batch, Key, PyTree, Taps

__all__ = ["fisher_diagonal"]


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

    `labels` chooses q: "expected" the model's p(c|x), summed over all classes (the Fisher itself); "sampled" one label
    drawn from p(c|x) (its one-sample estimate); "observed" the given label (the empirical Fisher, near 0 where the
    model is confident and right).

    With r_c = onehot(c) - p, the gradient of log p(c|x) with respect to the logits, it is the second moment of the
    gradients of sqrt(q_c) r_c . logits: `gradient_moment`, exact and at the cost of a step or two for dense layers.
    For "expected", where the logits are a dense layer h W + b with taps, and perhaps masked,

        sum_c p_c (r_c r_c^T)_jj = p_j (1 - p_j),    d sqrt(p_c) r_c . logits / d h = sqrt(p_c) (W_:c - W p),

    so that time and memory are linear in the number of classes.

    Args:
      forward: `(params, batch, perturb) -> (logits [B, C], taps)`, examples independent of each other, masked logits
        very low. It must be the network in evaluation mode: dropout off, normalisation statistics fixed.
      params: where to evaluate it.
      batches: `Batch[M, B, ...]`; examples count by their weight.
      labels: "expected", "sampled" or "observed".
      key: needed for "sampled".
      batch_square: square the gradient of each batch's mean instead, and average over batches. This is a mistake that
        several libraries make (smaller by about 1/B, opposite gradients cancel), kept to reproduce their numbers.
      micro_batch: examples whose gradients the slow path computes at once.

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
      >>> fisher_diagonal(forward, jnp.zeros((1, 2)), batches).round(3)  # mean of x^2 p (1 - p) = 5 / 4
      Array([[1.25, 1.25]], dtype=float32)
    """
    check_choice("fisher_diagonal", "labels", labels, ("expected", "sampled", "observed"))
    check_whole("fisher_diagonal", "micro_batch", micro_batch, 1)
    if labels == "sampled" and key is None:
        raise ValueError('fisher_diagonal: labels="sampled" draws labels, so it needs a key')
    if labels == "observed":
        y = jax.tree.map(lambda leaf: leaf[0], batches.y)
        check_classes("fisher_diagonal", y, 'labels="observed" needs labels')
    why = f'labels="{labels}" is for classes, by the softmax of the outputs; for other targets give ewc labels="loss"'
    if batch_square and labels == "expected":
        raise ValueError('fisher_diagonal: batch_square needs labels "sampled" or "observed"')

    if batch_square:
        return _square_of_batch_means(forward, params, batches, labels, key)

    def cotangents(logits: Array, batch: Batch, key: Key | None) -> Array:
        if logits.ndim != 2:
            raise ValueError(
                f"fisher_diagonal: labels is {labels!r}, for outputs [B, C], but these are {logits.shape}; for others,"
                ' such as those of tokens, give ewc labels="loss"'
            )
        check_softmax("fisher_diagonal", batch.y, logits, why)
        check_several("fisher_diagonal", logits)
        p = jax.nn.softmax(logits)
        if labels == "expected":
            return jnp.sqrt(p.T)[:, :, None] * (jnp.eye(p.shape[-1], dtype=p.dtype)[:, None] - p)
        return (jax.nn.one_hot(_drawn(logits, batch, labels, key), p.shape[-1], dtype=p.dtype) - p)[None]

    def moment(forward: Forward, cotangents: Callable[[Array, Batch, Key | None], Array]) -> PyTree:
        return gradient_moment(
            forward, params, batches, cotangents, moment=jnp.square, key=key, micro_batch=micro_batch
        )

    first = jax.tree.map(lambda leaf: leaf[0], batches)
    last = logits_layer(forward, params, first) if labels == "expected" else None
    if last is None:
        return moment(forward, cotangents)
    jax.eval_shape(lambda batch: cotangents(forward(params, batch, None)[0], batch, None), first)  # refuses

    def below(params: PyTree, batch: Batch, perturb: dict[str, Array] | None) -> tuple[Array, Taps]:
        taps = dict(forward(params, batch, perturb)[1])
        return taps.pop(last)[0], taps

    def of_inputs(h: Array, batch: Batch, key: Key | None) -> Array:
        p, kernel = jax.nn.softmax(forward(params, batch, None)[0]), layer_of(params, last)["kernel"]
        return jnp.sqrt(p.T)[:, :, None] * (kernel.T[:, None] - p @ kernel.T)

    def of_logits(logits: Array, batch: Batch, key: Key | None) -> Array:
        p = jax.nn.softmax(logits)
        return jnp.sqrt(p * (1 - p))[None]

    return with_layer(moment(below, of_inputs), last, layer_of(moment(forward, of_logits), last))


def _drawn(logits: Array, batch: Batch, labels: str, key: Key | None) -> Array:
    if labels == "sampled" and key is not None:
        return jax.random.categorical(key, logits)
    return batch.y


def _square_of_batch_means(forward: Forward, params: PyTree, batches: Batch, labels: str, key: Key | None) -> PyTree:
    """The mistake: the mean over batches of the square of the gradient of the batch's mean."""

    def step(carry: tuple[PyTree, Array], numbered: tuple[Array, Batch]) -> tuple[tuple[PyTree, Array], None]:
        total, count = carry
        index, batch = numbered

        def mean_log_likelihood(p: PyTree) -> Array:
            logits = forward(p, batch, None)[0]
            drawn = _drawn(
                jax.lax.stop_gradient(logits), batch, labels, None if key is None else jax.random.fold_in(key, index)
            )
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), drawn[:, None], 1)[:, 0]
            return weighted_mean(chosen, batch.weight)

        gradient = jax.grad(mean_log_likelihood)(params)
        count = count + jnp.any(batch.weight > 0).astype(count.dtype)
        return (jax.tree.map(lambda t, g: t + jnp.square(wide(g)), total, gradient), count), None

    start = (wide(jax.tree.map(jnp.zeros_like, params)), jnp.zeros((), batches.weight.dtype))
    (total, count), _ = jax.lax.scan(step, start, (jnp.arange(batches.weight.shape[0]), batches))
    return jax.tree.map(lambda leaf: leaf / jnp.maximum(count, 1e-12), total)
