"""Batches of one size from arrays of any."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cl_zoo.checks import Count, check_whole, checked
from cl_zoo.types import Batch, PyTree

__all__ = ["as_batch"]


@checked
def as_batch(x: Any, y: Any = None, *, size: Count | None = None, task: int | None = None) -> Batch:
    """Arrays of examples, from a data loader say, as a `Batch`; filled up with examples of weight 0, so that an
    incomplete batch compiles nothing.

    Args:
      x, y: pytrees of `[n, ...]` arrays; y may be None.
      size: examples of the batch, at least n; None is n.
      task: of these examples, where the scenario tells it.

    Raises:
      ValueError: more examples than `size`, arrays of different lengths, no examples.

    Example:
      >>> as_batch([[1.0, 2.0]], [3], size=2).weight.tolist()
      [1.0, 0.0]
    """
    is_leaf = lambda node: isinstance(node, list) or hasattr(node, "__array__")  # noqa: E731
    x, y = jax.tree.map(np.asarray, (x, y), is_leaf=is_leaf)
    lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves((x, y))}
    if len(lengths) != 1 or lengths <= {(), (0,)}:
        raise ValueError(f"as_batch: x and y begin with {sorted(lengths)}, but must be of the same examples")
    n = lengths.pop()[0]
    size = n if size is None else size
    check_whole("as_batch", "size", size, n)

    def filled(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: jnp.asarray(np.pad(leaf, [(0, size - n)] + [(0, 0)] * (leaf.ndim - 1))), tree)

    told = None if task is None else jnp.full(size, task, jnp.int32)
    return Batch(filled(x), filled(y), told, jnp.asarray(np.arange(size) < n, jnp.float32))
