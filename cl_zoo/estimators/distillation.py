"""Divergences between the answers of a teacher and a student."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cl_zoo.types import Array, mask_outputs

__all__ = ["soft_cross_entropy"]


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
