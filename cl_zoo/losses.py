"""Losses of outputs against targets, divergences between a teacher and a student, and scores of tokens.

All return one number per example (or token); `weighted_mean` reduces them to one per batch. Legend for shapes:
`B` examples, `C` outputs, `L` tokens, `V` vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cl_zoo.checks import check_choice

__all__ = [
    "all_tokens_right",
    "cross_entropy",
    "divergence",
    "dynamic_fine_tuning_loss",
    "mask_outputs",
    "next_token_loss",
    "soft_cross_entropy",
    "squared_error",
    "token_accuracy",
    "token_losses",
    "weighted_mean",
]

Array = jax.Array


def mask_outputs(outputs: Array, active: Array | None) -> Array:
    """Logits `[B, C]` with the inactive ones so low that they take no part in a softmax and get no gradient.

    They are finite, so that 0 times them is 0.
    """
    if active is None:
        return outputs
    return jnp.where(active, outputs, jnp.finfo(outputs.dtype).min / 2)


def weighted_mean(values: Array, weight: Array) -> Array:
    """sum(w v) / max(sum w, 1e-12): the mean over the examples that count, 0 where none does."""
    return jnp.sum(values * weight) / jnp.maximum(jnp.sum(weight), 1e-12)


def cross_entropy(logits: Array, labels: Array) -> Array:
    """- log softmax(logits)_label for each example: `[B, C]`, `i32[B]` -> `f32[B]`.

    Raises:
      ValueError: other shapes.
    """
    if jnp.ndim(logits) != 2 or jnp.shape(labels) != logits.shape[:1]:
        raise ValueError(
            f"cross_entropy: outputs are {jnp.shape(logits)} and labels {jnp.shape(labels)}, but must be [B, C] and"
            " [B]; for tokens take supervised(next_token_loss)"
        )
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]


def squared_error(outputs: Array, y: Array) -> Array:
    """(outputs - y)^2 for each example: `[B, 1]`, `[B]` -> `[B]`. A loss for `supervised`."""
    return jnp.square(outputs[:, 0] - y)


def soft_cross_entropy(
    student: Array,
    teacher: Array,
    temperature: Array | float,
    student_active: Array | None = None,
    teacher_active: Array | None = None,
) -> Array:
    """- sum_c softmax(teacher / T)_c log softmax(student / T)_c for each example, not multiplied by T^2.

    An output that is active for the student alone gets target 0 but stays in its normaliser.

    Args:
      student, teacher: logits `[B, C]`.
      temperature: T > 0.
      student_active, teacher_active: `bool[C]` or `bool[B, C]`, the active outputs; None for all.

    Returns:
      `f32[B]`.

    Source: Hinton et al. 2015, arXiv 1503.02531.

    Example:
      >>> import jax.numpy as jnp
      >>> round(float(soft_cross_entropy(jnp.zeros((1, 2)), jnp.zeros((1, 2)), 2.0)[0]), 4)  # log 2
      0.6931
    """
    targets = jax.nn.softmax(mask_outputs(teacher / temperature, teacher_active))
    predicted = jax.nn.log_softmax(mask_outputs(student / temperature, student_active))
    return -jnp.sum(targets * predicted, axis=-1)


def divergence(student: Array, teacher: Array, direction: str) -> Array:
    """How far the student's distribution p is from the teacher's q, both softmax over the last axis, in nats.

        "forward":  KL(q || p) = sum_v q_v log(q_v / p_v)
        "reverse":  KL(p || q)
        "jsd":      (KL(p || m) + KL(q || m)) / 2,   m = (p + q) / 2

    Args:
      student, teacher: logits `[..., V]`; computed in float32 at least.
      direction: one of these.

    Returns:
      `[...]`, at least 0 up to rounding.

    Raises:
      ValueError: an unknown direction.

    Source: Agarwal et al. 2023, arXiv 2306.13649.

    Example:
      >>> import jax.numpy as jnp
      >>> float(divergence(jnp.zeros((1, 4)), jnp.zeros((1, 4)), "reverse")[0])
      0.0
    """
    check_choice("divergence", "direction", direction, ("forward", "reverse", "jsd"))
    wide = jnp.promote_types(student.dtype, jnp.float32)
    p, q = (jax.nn.log_softmax(logits.astype(wide)) for logits in (student, teacher))

    def kl(a: Array, b: Array) -> Array:
        return jnp.sum(jnp.exp(a) * (a - b), axis=-1)

    if direction == "jsd":
        m = jnp.logaddexp(p, q) - jnp.log(2.0)
        return (kl(p, m) + kl(q, m)) / 2
    return kl(q, p) if direction == "forward" else kl(p, q)


def token_losses(outputs: Array, y: Array) -> Array:
    """- log softmax(outputs_bl)_{y_bl} in nats at each position, and 0 where y is negative.

    Args:
      outputs: logits `[B, L, V]`; the softmax is taken in float32, whatever their type.
      y: `i32[B, L]`, the target at each position; negative (-1) where none is scored.

    Returns:
      `f32[B, L]`.

    Raises:
      ValueError: outputs and y of different B or L.

    Example:
      >>> import jax.numpy as jnp
      >>> token_losses(jnp.zeros((1, 2, 1)), jnp.array([[0, -1]])).tolist()  # a vocabulary of one
      [[0.0, 0.0]]
    """
    _check(outputs, y)
    outputs = outputs.astype(jnp.float32)
    chosen = jnp.take_along_axis(outputs, jnp.maximum(y, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(y >= 0, jax.nn.logsumexp(outputs, axis=-1) - chosen, 0.0)


def next_token_loss(outputs: Array, y: Array) -> Array:
    """sum_l [y_bl >= 0] (- log softmax(outputs_bl)_{y_bl}) / sum_l [y_bl >= 0]. A loss for `supervised`.

    Args:
      outputs, y: see `token_losses`.

    Returns:
      `f32[B]`, nats per scored token; 0 for an example without any.

    Raises:
      ValueError: outputs and y of different B or L.

    Example:
      >>> import jax.numpy as jnp
      >>> round(float(next_token_loss(jnp.zeros((1, 3, 256)), jnp.array([[0, -1, 65]]))[0]), 3)  # log 256
      5.545
    """
    return _mean(token_losses(outputs, y), y)


def dynamic_fine_tuning_loss(outputs: Array, y: Array) -> Array:
    """sum_l [y_bl >= 0] (- stop(p_bl) log p_bl) / sum_l [y_bl >= 0],   p_bl = softmax(outputs_bl)_{y_bl}.

    Each token's loss is weighted by its own probability, through which no gradient goes: tokens that the model finds
    unlikely change it little. A loss for `supervised`, `dft`.

    Args:
      outputs, y: see `token_losses`.

    Returns:
      `f32[B]`; 0 for an example without any scored token.

    Raises:
      ValueError: outputs and y of different B or L.

    Source: Wu et al. 2025, arXiv 2508.05629.

    Example:
      >>> import jax.numpy as jnp
      >>> round(float(dynamic_fine_tuning_loss(jnp.zeros((1, 2, 2)), jnp.array([[1, -1]]))[0]), 4)  # log(2) / 2
      0.3466
    """
    losses = token_losses(outputs, y)
    return _mean(jax.lax.stop_gradient(jnp.exp(-losses)) * losses, y)


def all_tokens_right(outputs: Array, y: Array) -> Array:
    """1 for an example whose largest output is right at every scored position, else 0: whether greedy decoding gives
    y.

    Args:
      outputs, y: see `token_losses`.

    Returns:
      `f32[B]`.

    Raises:
      ValueError: outputs and y of different B or L.

    Example:
      >>> import jax.numpy as jnp
      >>> all_tokens_right(jnp.array([[[0.0, 1.0], [1.0, 0.0]]] * 2), jnp.array([[1, 1], [1, -1]])).tolist()
      [0.0, 1.0]
    """
    _check(outputs, y)
    return jnp.all((jnp.argmax(outputs, axis=-1) == y) | (y < 0), axis=-1).astype(jnp.float32)


def token_accuracy(outputs: Array, y: Array) -> Array:
    """The fraction of an example's scored positions at which the largest output is right.

    Args:
      outputs, y: see `token_losses`.

    Returns:
      `f32[B]`; 0 for an example without any.

    Raises:
      ValueError: outputs and y of different B or L.

    Example:
      >>> import jax.numpy as jnp
      >>> token_accuracy(jnp.array([[[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]]), jnp.array([[1, 1, -1]])).tolist()
      [0.5]
    """
    _check(outputs, y)
    return _mean((jnp.argmax(outputs, axis=-1) == y).astype(jnp.float32), y)


def _mean(values: Array, y: Array) -> Array:
    scored = y >= 0
    return jnp.sum(jnp.where(scored, values, 0.0), axis=-1) / jnp.maximum(jnp.sum(scored, axis=-1), 1)


def _check(outputs: Array, y: Array) -> None:
    if outputs.shape[:-1] != y.shape or y.ndim != 2:
        raise ValueError(f"tokens: outputs are {outputs.shape} and y is {y.shape}, but must be [B, L, V] and [B, L]")
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise ValueError(f"tokens: y is {y.dtype}, but it must be whole numbers")
