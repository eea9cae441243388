"""A teacher that follows its student: an exponential moving average of parameters."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cl_zoo.estimators.averaging import as_in, interpolate
from cl_zoo.types import Array, Batch, PyTree

__all__ = ["moved_teacher"]


def moved_teacher(teacher: PyTree, student: PyTree, decay: Array | float, batch: Batch) -> PyTree:
    """teacher <- decay teacher + (1 - decay) student, if any example of the batch has weight > 0.

    Whole numbers (counters) are those of the student.

    Args:
      teacher: in float32 at least, see `wide`.
      student: a tree of the same structure.
      decay: in [0, 1]; 1 leaves the teacher as it is, 0 makes it the student.
      batch: the one just learned from.

    Returns:
      A tree like `teacher`.

    Source: Tarvainen and Valpola 2017, arXiv 1703.01780.

    Example:
      >>> import jax.numpy as jnp
      >>> from cl_zoo import Batch
      >>> batch = Batch(jnp.zeros((1, 2)), None, None, jnp.ones(1))
      >>> float(moved_teacher(jnp.array(1.0), jnp.array(0.0), 0.75, batch))
      0.75
    """
    moved = interpolate(as_in(student, teacher), teacher, decay)
    learned = jnp.any(batch.weight > 0)
    return jax.tree.map(lambda new, old: jnp.where(learned, new, old), moved, teacher)
