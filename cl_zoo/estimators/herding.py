"""Herding: a few examples of each class whose mean is close to that of all."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cl_zoo.types import Array

__all__ = ["herding_ranks", "unit_rows"]


def unit_rows(features: Array) -> Array:
    """Vectors `[..., F]` divided by their Euclidean norm; a vector of zeros stays."""
    squared = jnp.sum(features**2, axis=-1, keepdims=True)
    return features / jnp.sqrt(jnp.where(squared > 0, squared, 1))


def herding_ranks(features: Array, labels: Array, weight: Array, n_classes: int, steps: Array | int) -> Array:
    """The order in which herding picks examples, for all classes at once.

    With unit features phi and the unit class mean mu, the k-th pick of a class is

        argmin_i || mu - (s + phi_i) / k ||,   s the sum of the picks before;   the first of several equal ones

    among its examples that were not picked before.

    Args:
      features: `[N, F]`, of any norm; they are normalised here.
      labels: `i32[N]`, in `[0, n_classes)`.
      weight: `f32[N]`; examples of weight 0 are neither picked nor in the mean.
      n_classes: `C`.
      steps: picks per class; may be traced.

    Returns:
      `i32[N]`: 0 for the first pick of a class, 1 for the second, ...; N for examples that were not picked.

    Source: Rebuffi et al. 2017, arXiv 1611.07725, algorithm 4; Welling 2009, "Herding dynamical weights to learn".

    Example:
      >>> import jax.numpy as jnp
      >>> features = jnp.array([[1.0, 0.0], [0.0, 1.0], [3.0, 4.0]])
      >>> herding_ranks(features, jnp.zeros(3, int), jnp.ones(3), 1, 2).tolist()
      [1, 3, 0]
    """
    n = features.shape[0]
    unit = unit_rows(features)
    member = (labels[:, None] == jnp.arange(n_classes)) & (weight > 0)[:, None]
    # By default accelerators round the factors of a product to ten bits: too coarse to distinguish examples.
    with jax.default_matmul_precision("highest"):
        mean = unit_rows(member.astype(unit.dtype).T @ unit)  # normalised, so sums serve as means
    length = jnp.sum(unit**2, axis=1)

    def pick(k: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        ranks, total = carry
        # k^2 times the squared distance, without what is the same for all examples of a class.
        with jax.default_matmul_precision("highest"):
            distance = 2 * unit @ (total - (k + 1) * mean).T + length[:, None]
        free = member & (ranks == n)[:, None]
        chosen = jnp.argmin(jnp.where(free, distance, jnp.inf), axis=0)
        found = jnp.any(free, axis=0)
        ranks = ranks.at[jnp.where(found, chosen, n)].set(k, mode="drop")
        return ranks, total + jnp.where(found[:, None], unit[chosen], 0)

    start = (jnp.full(n, n, jnp.int32), jnp.zeros_like(mean))
    ranks, _ = jax.lax.fori_loop(jnp.int32(0), jnp.asarray(steps, jnp.int32), pick, start)
    return ranks
