"""Losses and accuracy of next tokens, where some positions are not scored."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cl_zoo.types import Array

__all__ = ["all_tokens_right", "dynamic_fine_tuning_loss", "next_token_loss", "token_accuracy", "token_losses"]


def token_losses(outputs: Array, y: Array) -> Array:
    """- log softmax(outputs_bl)_{y_bl} in nats at each position, and 0 where y is negative.

    Args:
      outputs: logits `[B, L, V]`; the softmax is taken in float32, whatever their type.
      y: `i32[B, L]`, what should come at each position; negative (-1) where it is not scored.

    Returns:
      `f32[B, L]`.

    Raises:
      ValueError: outputs and y of different B or L.

    Example:
      >>> import jax.numpy as jnp
      >>> token_losses(jnp.zeros((1, 2, 1)), jnp.array([[0, -1]])).tolist()  # one token is no choice
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
      `f32[B]`, nats per scored token; 0 for a row without any.

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

    Each token's loss is weighted by its own probability, through which no gradient goes: what the model would hardly
    have said itself moves it little. A loss for `supervised`, `dft`.

    Args:
      outputs, y: see `token_losses`.

    Returns:
      `f32[B]`; 0 for a row without any scored token.

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
    """1 for a row at whose scored positions the largest output is always the right one, else 0: whether the answer
    that greedy decoding gives is y.

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
    """The share of a row's scored positions at which the largest output is the right one.

    Args:
      outputs, y: see `token_losses`.

    Returns:
      `f32[B]`; 0 for a row without any.

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
