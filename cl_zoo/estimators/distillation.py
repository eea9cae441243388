"""Divergences between the answers of a teacher and a student."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cl_zoo.types import Array, check_choice, mask_outputs

__all__ = ["divergence", "soft_cross_entropy"]


def soft_cross_entropy(
    student: Array,
    teacher: Array,
    temperature: Array | float,
    student_active: Array | None = None,
    teacher_active: Array | None = None,
) -> Array:
    """- sum_c softmax(teacher / T)_c log softmax(student / T)_c for each row, not multiplied by T^2.

    An output that only the student has open gets target 0 but stays in its normaliser.

    Args:
      student, teacher: logits `[B, C]`.
      temperature: T > 0.
      student_active, teacher_active: `bool[C]` or `bool[B, C]`, the outputs that compete; None for all.

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
