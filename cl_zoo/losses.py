"""Losses of outputs against targets, divergences between a teacher and a student, and scores of tokens.

All return one number per example (or token); `weighted_mean` reduces them to one per batch. Legend for shapes:
`B` examples, `C` outputs, `L` tokens, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from cl_zoo.checks import check_choice, check_range

__all__ = [
    "IGNORED",
    "all_tokens_right",
    "cross_entropy",
    "divergence",
    "dynamic_fine_tuning_loss",
    "finite",
    "label_accuracy",
    "mask_outputs",
    "mean_score",
    "next_token_loss",
    "reads_ignored",
    "scored",
    "soft_cross_entropy",
    "squared_error",
    "token_accuracy",
    "token_losses",
    "weighted_mean",
]

Array = jax.Array
PyTree = Any

IGNORED = -1
"""The label of an example, or of a token, that has none: losses and scores that read labels count it as if it had
weight 0. For any other function -1 is a number as others are."""

F = TypeVar("F", bound=Callable[..., Any])


def reads_ignored(function: F) -> F:
    """Marks a loss or score for which `IGNORED` is no target."""
    function.reads_ignored = True  # type: ignore[attr-defined]
    return function


def mask_outputs(outputs: Array, active: Array | None) -> Array:
    """Logits `[B, C]` with the inactive ones so low that they take no part in a softmax and get no gradient.

    They are finite, so that 0 times them is 0.

    Args:
      outputs: `[B, C]`, or of tokens `[B, L, C]`.
      active: `bool[C]`, or `bool[B, C]` of each example's own; None for all.

    Raises:
      ValueError: a mask of another shape.
    """
    if active is None:
        return outputs
    if not isinstance(active, (jax.Array, np.ndarray)) or active.dtype != bool:
        raise ValueError(
            f"mask_outputs: active is {getattr(active, 'dtype', type(active).__name__)}, but it must be an array of"
            " bool, true where an output is open"
        )
    if not jnp.issubdtype(outputs.dtype, jnp.floating):
        raise ValueError(f"mask_outputs: outputs are {outputs.dtype}, but they must be floating point")
    if active.shape not in (outputs.shape[-1:], (outputs.shape[0], outputs.shape[-1])):
        raise ValueError(
            f"mask_outputs: active is {active.shape} and outputs are {outputs.shape}, but it must be [C] or [B, C]"
        )
    if active.ndim == 2:
        active = active.reshape((active.shape[0], *(1,) * (outputs.ndim - 2), active.shape[1]))
    return jnp.where(active, outputs, jnp.finfo(outputs.dtype).min / 2)


def weighted_mean(values: Array, weight: Array) -> Array:
    """sum(w v) / max(sum w, 1e-12): the mean over the examples that count, 0 where none does.

    Args:
      values, weight: `[B]` each, or both with more axes; what has weight 0, or less, may be anything, also nan.

    Raises:
      ValueError: values that are not one for each weight: `[B, 1]` would be compared with everything.
    """
    if jnp.shape(values) != jnp.shape(weight):
        raise ValueError(
            f"weighted_mean: values are {jnp.shape(values)} and weights {jnp.shape(weight)}, but a loss or score must"
            " give one number for each example"
        )
    present = jnp.where(weight > 0, values, jnp.zeros((), jnp.result_type(values)))
    return jnp.sum(present * weight) / jnp.maximum(jnp.sum(jnp.maximum(weight, 0)), 1e-12)


def mean_score(scores: Array, weight: Array) -> Array:
    """`weighted_mean`, and nan where no example counts."""
    return jnp.where(jnp.any(weight > 0), weighted_mean(scores, weight), jnp.nan)


def scored(y: PyTree, weight: Array, function: Any = None) -> Array:
    """The weight, 0 for examples without a target: whose whole numbers are all `IGNORED`, if the function that is to
    read them takes that for none."""
    leaves = jax.tree.leaves(y)
    if function is not None and not getattr(function, "reads_ignored", False):
        return weight
    if len(leaves) != 1 or not jnp.issubdtype(leaves[0].dtype, jnp.signedinteger):
        return weight
    return jnp.where(jnp.any((leaves[0] != IGNORED).reshape((leaves[0].shape[0], -1)), axis=1), weight, 0)


@reads_ignored
def cross_entropy(logits: Array, labels: Array) -> Array:
    """- log softmax(logits)_label for each example: `[B, C]`, `i32[B]` -> `f32[B]`, in float32 at least.

    A label of `IGNORED` (-1) gives 0; another that is not an output, nan.

    Raises:
      ValueError: other shapes, labels that are not whole numbers.
    """
    if jnp.ndim(logits) != 2 or jnp.shape(labels) != logits.shape[:1]:
        raise ValueError(
            f"cross_entropy: outputs are {jnp.shape(logits)} and labels {jnp.shape(labels)}, but must be [B, C] and"
            " [B]; for tokens take supervised(next_token_loss)"
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"cross_entropy: labels are {labels.dtype}, but must be whole numbers")
    labels, logits = labels.astype(jnp.int32), logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(labels, 0)[:, None], axis=1, mode="clip")
    return _of_labels(-chosen[:, 0], labels, logits.shape[-1])


def _of_labels(values: Array, labels: Array, n: int) -> Array:
    """The values where labels are outputs, 0 where they are `IGNORED`, nan elsewhere."""
    known = (labels >= 0) & (labels < n)
    return jnp.where(known, values, jnp.where(labels == IGNORED, 0.0, jnp.nan))


def squared_error(outputs: Array, y: Array) -> Array:
    """mean_d (outputs_bd - y_bd)^2 for each example: `[B, D]`, `[B, D]`, or `[B, 1]`, `[B]`, -> `[B]`. A loss for
    `supervised`.

    Raises:
      ValueError: other shapes.
    """
    wanted = [jnp.shape(outputs)] + ([outputs.shape[:1]] if outputs.shape[1:] == (1,) else [])
    if jnp.ndim(outputs) != 2 or jnp.shape(y) not in wanted:
        raise ValueError(
            f"squared_error: outputs are {jnp.shape(outputs)} and y is {jnp.shape(y)}, but must be [B, D] and [B, D],"
            " or [B, 1] and [B]"
        )
    return jnp.mean(jnp.square(outputs - y.reshape(outputs.shape)), axis=1)


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
      temperature: T > 0. Student and teacher are of one shape.
      student_active, teacher_active: `bool[C]` or `bool[B, C]`, the active outputs; None for all.

    Returns:
      `f32[B]`.

    Source: Hinton et al. 2015, arXiv 1503.02531.

    Example:
      >>> import jax.numpy as jnp
      >>> round(float(soft_cross_entropy(jnp.zeros((1, 2)), jnp.zeros((1, 2)), 2.0)[0]), 4)  # log 2
      0.6931
    """
    check_several("soft_cross_entropy", student)
    _check_alike("soft_cross_entropy", student, teacher)
    check_range("soft_cross_entropy", "temperature", temperature, 0, above=True)
    targets = jax.nn.softmax(mask_outputs(finite(teacher / temperature), teacher_active))
    predicted = jax.nn.log_softmax(mask_outputs(finite(student / temperature), student_active))
    return -jnp.sum(targets * predicted, axis=-1)


def check_several(owner: str, outputs: Array) -> None:
    """Refuses outputs whose softmax is always 1."""
    if outputs.shape[-1] == 1:
        raise ValueError(
            f"{owner}: there is one output, of shape {outputs.shape}, whose softmax is always 1; for regression take"
            " what does not need a softmax, as ewc(labels='loss'), mas or synaptic_intelligence"
        )


def _check_alike(owner: str, student: Array, teacher: Array) -> None:
    if jnp.shape(student) != jnp.shape(teacher):
        raise ValueError(
            f"{owner}: student is {jnp.shape(student)} and teacher {jnp.shape(teacher)}, but they must be of one shape"
        )


def finite(logits: Array) -> Array:
    """Logits of -inf as low as `mask_outputs` makes them: a probability of 0, and 0 log 0 = 0, also in gradients."""
    return jnp.maximum(logits, jnp.finfo(logits.dtype).min / 2)


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
      ValueError: an unknown direction, student and teacher of different shapes.

    Source: Agarwal et al. 2023, arXiv 2306.13649.

    Example:
      >>> import jax.numpy as jnp
      >>> float(divergence(jnp.zeros((1, 4)), jnp.zeros((1, 4)), "reverse")[0])
      0.0
    """
    check_choice("divergence", "direction", direction, ("forward", "reverse", "jsd"))
    _check_alike("divergence", student, teacher)
    wide = jnp.promote_types(student.dtype, jnp.float32)
    p, q = (jax.nn.log_softmax(finite(logits.astype(wide))) for logits in (student, teacher))

    def kl(a: Array, b: Array) -> Array:
        return jnp.sum(jnp.exp(a) * (a - b), axis=-1)

    if direction == "jsd":
        m = jnp.logaddexp(p, q) - jnp.log(2.0)
        return (kl(p, m) + kl(q, m)) / 2
    return kl(q, p) if direction == "forward" else kl(p, q)


@reads_ignored
def token_losses(outputs: Array, y: Array) -> Array:
    """- log softmax(outputs_bl)_{y_bl} in nats at each position, 0 where y is `IGNORED` (-1), and nan where it is
    another number that is no output.

    Args:
      outputs: logits `[B, L, V]`; the softmax is taken in float32 at least.
      y: `i32[B, L]`, the target at each position; -1 where none is scored.

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
    outputs, y = outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32)), y.astype(jnp.int32)
    chosen = jnp.take_along_axis(outputs, jnp.maximum(y, 0)[..., None], axis=-1, mode="clip")[..., 0]
    return _of_labels(jax.nn.logsumexp(outputs, axis=-1) - chosen, y, outputs.shape[-1])


@reads_ignored
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


@reads_ignored
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


@reads_ignored
def all_tokens_right(outputs: Array, y: Array) -> Array:
    """1 for an example whose largest output is right at every scored position, else 0: whether greedy decoding gives
    y. Nan where an output is.

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
    y = y.astype(jnp.int32)
    return jnp.min(jnp.where(y == IGNORED, 1.0, label_accuracy(outputs, y)), axis=-1)


@reads_ignored
def token_accuracy(outputs: Array, y: Array) -> Array:
    """The fraction of an example's scored positions at which the largest output is right; nan where an output is.

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
    return _mean(label_accuracy(outputs, y), y)


@reads_ignored
def label_accuracy(outputs: Array, labels: Array) -> Array:
    """1 where the largest output is that of the label, else 0: `[..., C]`, `i32[...]` -> `f32[...]`. Nan where one of
    the outputs is (what has diverged predicts nothing, not class 0), and for labels that are neither outputs nor
    `IGNORED`.

    Raises:
      ValueError: labels that are not whole numbers.
    """
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"label_accuracy: labels are {labels.dtype}, but must be whole numbers; give another score")
    labels = labels.astype(jnp.int32)
    right = _of_labels(jnp.argmax(outputs, axis=-1) == labels, labels, outputs.shape[-1]).astype(jnp.float32)
    return jnp.where(jnp.any(jnp.isnan(outputs), axis=-1), jnp.nan, right)


def _mean(values: Array, y: Array) -> Array:
    given = y.astype(jnp.int32) != IGNORED  # which unsigned numbers do not have
    return jnp.sum(jnp.where(given, values, 0.0), axis=-1) / jnp.maximum(jnp.sum(given, axis=-1), 1)


def _check(outputs: Array, y: Array) -> None:
    if outputs.shape[:-1] != y.shape or y.ndim != 2:
        raise ValueError(f"tokens: outputs are {outputs.shape} and y is {y.shape}, but must be [B, L, V] and [B, L]")
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise ValueError(f"tokens: y is {y.dtype}, but it must be whole numbers")
