"""Optimisers that are memories of gradients themselves, as optax transformations: nested learning's deep optimisers.

Kernels are `[..., n_in, n_out]`, as everywhere here; what is said of matrices holds for the last two axes of a leaf.
Leaves of fewer axes take plain momentum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cl_zoo.checks import Count, Fraction, NonNegative, check_whole, checked
from cl_zoo.layers._lact import newton_schulz
from cl_zoo.types import Array, PyTree

__all__ = [
    "M3State",
    "MlpMomentumState",
    "clocks",
    "orthogonalised",
    "scale_by_delta_momentum",
    "scale_by_m3",
    "scale_by_mlp_momentum",
]


@checked
def clocks(optimiser: Any, period: Callable[[str], int]) -> optax.GradientTransformation:
    """Every part of a network takes a step of its own optimiser after every C updates, with the sum of its gradients.

    This is a continuum memory system by optimiser steps: levels of a network that move at their own frequencies, over
    the loss that all of it is trained on.

    Args:
      optimiser: of each part; its state counts that part's steps.
      period: `path -> C`, at least 1, by the path of a leaf ("blocks/block_0/ffn/up").

    Returns:
      An optax transformation. Within a period a part's parameters do not change, to the bit.

    Raises:
      ValueError: at `init`, a period that is not a whole number of at least 1.

    Source: Behrouz et al. 2025, arXiv 2512.24695, section 7 (equation 71, by the task's loss; its sum as printed
    has one gradient too many).

    Example:
      >>> import jax.numpy as jnp, optax
      >>> slow = clocks(optax.sgd(0.1), lambda path: 2 if path == "slow" else 1)
      >>> params = {"slow": jnp.zeros(()), "fast": jnp.zeros(())}
      >>> state = slow.init(params)
      >>> for _ in range(2):
      ...     updates, state = slow.update({"slow": jnp.ones(()), "fast": jnp.ones(())}, state, params)
      >>> round(float(updates["slow"]), 3), round(float(updates["fast"]), 3)
      (-0.2, -0.1)
    """
    if not hasattr(optimiser, "update"):
        raise ValueError(f"clocks: optimiser is {type(optimiser).__name__}, but it must be an optax transformation")

    def labels(params: PyTree) -> PyTree:
        def of(path: Any, leaf: Any) -> int:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            check_whole("clocks", f"the period of {name!r}", period(name), 1)
            return period(name)

        return jax.tree_util.tree_map_with_path(of, params)

    def parts(params: PyTree) -> optax.GradientTransformation:
        found = labels(params)
        every = {
            c: optax.MultiSteps(optimiser, c, use_grad_mean=False).gradient_transformation()
            for c in sorted(set(jax.tree.leaves(found)))
        }
        return optax.partition(every, found)

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        return parts(updates).update(updates, state, params)

    return optax.GradientTransformation(lambda params: parts(params).init(params), update)


@checked
def orthogonalised(steps: Count = 5) -> optax.GradientTransformation:
    """Matrices by the nearest orthogonal one, up to a few Newton-Schulz steps; other leaves as they are.

    After momentum, a linear memory of gradients, it is Muon: `optax.chain(optax.trace(0.95), orthogonalised())`.

    Args:
      steps: of Muon's iteration.

    Source: Jordan et al. 2024, Muon, kellerjordan.github.io/posts/muon.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> g = {"kernel": jax.random.normal(jax.random.key(0), (3, 3))}
      >>> found, _ = orthogonalised(10).update(g, orthogonalised().init(g))
      >>> bool((abs(jnp.linalg.svd(found["kernel"])[1] - 1) < 0.4).all())
      True
    """
    return optax.stateless(lambda updates, params: jax.tree.map(lambda g: _orthogonal(g, steps), updates))


@checked
def scale_by_delta_momentum(decay: Fraction = 0.9, *, rate: NonNegative = 1.0) -> optax.GradientTransformation:
    """Momentum that makes room for what it writes: the memory is corrected along the inputs of the new gradient.

        m <- (decay I - rate g g^T) m + g

    where plain momentum has m <- decay m + g.

    Args:
      decay: alpha, in [0, 1].
      rate: of the correction, at least 0. It is stable while rate ||g||^2 is below 1 + alpha: clip gradients first.

    Returns:
      An optax transformation, to be followed by a learning rate.

    Source: Behrouz et al. 2025, arXiv 2512.24695, equation 49 (which multiplies by the right: kernels there are
    transposed).

    Differences from the paper or its code: the paper has no rate; its preconditioner is what stands before this in a
    chain.

    Example:
      >>> import jax.numpy as jnp
      >>> g = jnp.array([[0.5], [0.0]])
      >>> momentum = scale_by_delta_momentum(0.9)
      >>> state = momentum.init(g)
      >>> for _ in range(2):
      ...     m, state = momentum.update(g, state)
      >>> round(float(m[0, 0]), 3)  # (0.9 - 0.25) 0.5 + 0.5
      0.825
    """

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        def one(g: Array, m: Array) -> Array:
            corrected = rate * (g @ (jnp.swapaxes(g, -1, -2) @ m)) if g.ndim > 1 else 0.0
            return decay * m - corrected + g

        new = jax.tree.map(one, updates, state)
        return new, new

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


class MlpMomentumState(NamedTuple):
    """Attributes:
    first, second: kernels of the memories, `[..., n_out, h]` and `[..., h, n_out]`, of each matrix; plain momentum
      (and an empty array) of other leaves.
    """

    first: PyTree
    second: PyTree


@checked
def scale_by_mlp_momentum(
    decay: Fraction = 0.9, *, rate: NonNegative = 0.1, hidden: Count = 16, seed: int = 0
) -> optax.GradientTransformation:
    """A network with one hidden layer in the place of momentum: it learns gradients, and adds what it knows of them.

        m(g) = silu(g A) B,   of each row of g;      u ~ g + m(g),   as long as g
        (A, B) <- decay (A, B) - rate grad mean_rows 1/2 ||m(g) - g||^2

    What comes again and again it can give back, and noise it cannot. B begins at 0, so the first steps are those of
    gradient descent; A decays towards where it began. With a linear memory and the dot product as objective it would be
    plain momentum.

    Args:
      decay: alpha, in [0, 1].
      rate: of the memory's own steps, for gradients scaled to a root mean square of 1 and divided by the number of
        units that a kernel reads; at least 0, stable below about 2.
      hidden: h.
      seed: of A.

    Returns:
      An optax transformation, to be followed by a learning rate.

    Source: Behrouz et al. 2025, arXiv 2512.24695 (deep momentum gradient descent).

    Differences from the paper or its code: the paper leaves the network, its inputs and its objective open; scales and
    the residual are choices made here. With the dot product, a network's memory grows without bound.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> g = {"kernel": jax.random.normal(jax.random.key(0), (4, 3)), "bias": jnp.ones(3)}
      >>> momentum = scale_by_mlp_momentum()
      >>> updates, state = momentum.update(g, momentum.init(g))
      >>> updates["kernel"].shape
      (4, 3)
    """

    def start(path: Any, p: Array) -> Array:
        """A, scaled so that hidden units are about as large as what they read."""
        if p.ndim < 2:
            return jnp.zeros_like(p)
        key = jax.random.key(seed)
        for entry in jax.tree_util.keystr(path, simple=True, separator="/").encode():
            key = jax.random.fold_in(key, entry)
        return jax.random.normal(key, (*p.shape[:-2], p.shape[-1], hidden), p.dtype) / p.shape[-1] ** 0.5

    def init(params: PyTree) -> MlpMomentumState:
        first = jax.tree_util.tree_map_with_path(start, params)
        second = jax.tree.map(
            lambda p: jnp.zeros((*p.shape[:-2], hidden, p.shape[-1]) if p.ndim > 1 else 0, p.dtype), params
        )
        return MlpMomentumState(first, second)

    def update(updates: PyTree, state: MlpMomentumState, params: PyTree = None) -> tuple[PyTree, MlpMomentumState]:
        def one(path: Any, g: Array, a: Array, b: Array) -> tuple[Array, Array, Array]:
            if g.ndim < 2:
                m = decay * a + g
                return m, m, b
            size = jnp.sqrt(jnp.mean(jnp.square(g), axis=(-1, -2), keepdims=True))
            unit = g / jnp.maximum(size, 1e-30)

            def memory(a: Array, b: Array) -> Array:
                return jax.nn.silu(unit @ a) @ b

            def objective(a: Array, b: Array) -> Array:
                return 0.5 * jnp.sum(jnp.square(memory(a, b) - unit)) / unit.shape[-2]

            of_a, of_b = jax.grad(objective, (0, 1))(a, b)
            begin = start(path, g)  # drawn again rather than kept: it is small beside the products
            a = begin + decay * (a - begin) - rate / a.shape[-2] * of_a
            b = decay * b - rate / b.shape[-2] * of_b
            m = unit + memory(a, b)
            length = jnp.sqrt(jnp.mean(jnp.square(m), axis=(-1, -2), keepdims=True))
            return size * m / jnp.maximum(length, 1e-30), a, b

        found = jax.tree_util.tree_map_with_path(one, updates, state.first, state.second)
        outer = jax.tree.structure(updates)
        new, first, second = jax.tree.transpose(outer, jax.tree.structure((0, 0, 0)), found)
        return new, MlpMomentumState(first, second)

    return optax.GradientTransformation(init, update)


class M3State(NamedTuple):
    """Attributes:
    done: `i32[]`, steps.
    fast, slow: M1 and M2.
    total: of the gradients of this period.
    squares: V.
    direction: O2, that of the slow memory, fixed for a period.
    """

    done: Array
    fast: PyTree
    slow: PyTree
    total: PyTree
    squares: PyTree
    direction: PyTree


@checked
def scale_by_m3(
    *,
    period: Count = 16,
    fast: Fraction = 0.9,
    squares: Fraction = 0.99,
    slow: Fraction = 0.9,
    weight: NonNegative = 0.5,
    form: Literal["normalised", "literal"] = "normalised",
    steps: Count = 5,
    epsilon: NonNegative = 1e-8,
) -> optax.GradientTransformation:
    """Multi-scale momentum with orthogonalised memories: one moves at every step, one at every f steps.

        literal:      M1 += b1 g;   V += b2 g^2;   after f steps:  M2 += b3 sum g,  O2 = NS(M2)
                      u = (NS(M1) + alpha O2) / sqrt(V + epsilon)
        normalised:   M1 <- b1 M1 + (1 - b1) g;   V <- b2 V + (1 - b2) g^2;   M2 <- b3 M2 + (1 - b3) sum g;
                      u as above, over its root mean square

    The slow direction lags: it is that of the periods before this one. Without decay, as printed, V only grows, and
    steps shrink as with AdaGrad; before that they are far too long, as NS(M1) has singular values of 1 whatever g is.
    With alpha 0 and b2 to 0 the literal form is proportional to Muon with decay 1.

    Args:
      period: f, at least 1.
      fast, squares, slow: b1, b2 and b3, in [0, 1].
      weight: alpha, at least 0.
      form: which.
      steps: Newton-Schulz iterations.
      epsilon: at least 0.

    Returns:
      An optax transformation, to be followed by a learning rate. Leaves of fewer than two axes are not orthogonalised.

    Source: Behrouz et al. 2025, arXiv 2512.24695, algorithm 1.

    Differences from the paper or its code: "normalised" is ours; the sum of a period as printed holds one gradient too
    many; the iteration's polynomial is Muon's.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> g = {"kernel": jax.random.normal(jax.random.key(0), (4, 3))}
      >>> m3 = scale_by_m3()
      >>> updates, state = m3.update(g, m3.init(g))
      >>> round(float(jnp.sqrt(jnp.mean(updates["kernel"] ** 2))), 3)
      1.0
    """
    literal = form == "literal"

    def init(params: PyTree) -> M3State:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return M3State(jnp.zeros((), jnp.int32), zeros, zeros, zeros, zeros, zeros)

    def kept(old: PyTree, new: PyTree, b: Array | float) -> PyTree:
        return jax.tree.map(lambda m, g: m + b * g if literal else b * m + (1 - b) * g, old, new)

    def update(updates: PyTree, state: M3State, params: PyTree = None) -> tuple[PyTree, M3State]:
        due = (state.done > 0) & (state.done % period == 0)  # at the start of a period, from those before

        def moved() -> tuple[PyTree, PyTree, PyTree]:
            new = kept(state.slow, state.total, slow)
            return new, jax.tree.map(jnp.zeros_like, state.total), jax.tree.map(lambda m: _orthogonal(m, steps), new)

        second, total, direction = jax.lax.cond(due, moved, lambda: (state.slow, state.total, state.direction))
        first = kept(state.fast, updates, fast)
        v = kept(state.squares, jax.tree.map(jnp.square, updates), squares)

        def one(m: Array, o: Array, v: Array) -> Array:
            u = (_orthogonal(m, steps) + weight * o) / jnp.sqrt(v + epsilon)
            return u if literal else u / jnp.maximum(jnp.sqrt(jnp.mean(jnp.square(u))), 1e-30)

        new = jax.tree.map(one, first, direction, v)
        total = jax.tree.map(jnp.add, total, updates)
        return new, M3State(state.done + 1, first, second, total, v, direction)

    return optax.GradientTransformation(init, update)


def _orthogonal(g: Array, steps: int) -> Array:
    return newton_schulz(g, steps) if g.ndim > 1 else g
