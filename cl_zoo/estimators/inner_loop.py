"""Gradient descent inside a loss: what meta-learning differentiates through."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from cl_zoo.types import Array, PyTree

__all__ = ["inner_loop", "movable", "per_parameter_rates"]


def inner_loop(
    loss: Callable[[PyTree, Array], Array],
    params: PyTree,
    optimiser: optax.GradientTransformation,
    steps: int,
    *,
    only: Sequence[str] = (),
    order: int = 2,
    rematerialise: bool = False,
    each: Callable[[PyTree, Array], PyTree] | None = None,
) -> tuple[PyTree, PyTree]:
    """phi_0 = theta;   phi_{i+1} = phi_i + optimiser(grad loss(phi_i, i)),   i = 0 ... steps - 1.

    Args:
      loss: `(phi, i) -> f32[]`, the loss of step i.
      params: theta.
      optimiser: any optax optimiser; it starts afresh, and is differentiated through.
      steps: at least 0.
      only: what is updated: names of paths into `params` ("output", "hidden_0/kernel"), with all that lies under
        them; if empty, everything. No gradient is computed for the rest.
      order: 2 keeps the dependence of the inner gradients on theta; 1 takes them as constants.
      rematerialise: recompute each step in the backward pass, so that memory holds phi of every step, but not the
        activations.
      each: `(phi_{i+1}, i) -> pytree`, called after every step.

    Returns:
      phi after all steps; what `each` returned, with a leading axis `[steps]`, or None.

    Raises:
      ValueError: a name in `only` that is not in `params`.

    Source: Finn et al. 2017, arXiv 1703.03400.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> loss = lambda w, i: w**2 / 2
      >>> after = lambda w, order: inner_loop(loss, w, optax.sgd(0.1), 2, order=order)[0]
      >>> [round(float(jax.grad(after)(jnp.array(1.0), order)), 4) for order in (2, 1)]
      [0.81, 1.0]
    """
    start, whole = movable(params, only)

    def step(carry: tuple[list[Array], PyTree], i: Array) -> tuple[tuple[list[Array], PyTree], PyTree]:
        phi, opt_state = carry
        gradient = jax.grad(lambda p: loss(whole(p), i))(phi)
        if order == 1:
            gradient = jax.lax.stop_gradient(gradient)
        updates, opt_state = optimiser.update(gradient, opt_state, phi)
        phi = optax.apply_updates(phi, updates)
        return (phi, opt_state), None if each is None else each(whole(phi), i)

    carry = (start, optimiser.init(start))
    (phi, _), seen = jax.lax.scan(jax.checkpoint(step) if rematerialise else step, carry, jnp.arange(steps))
    return whole(phi), seen


def movable(params: PyTree, only: Sequence[str] = ()) -> tuple[list[Array], Callable[[list[Array]], PyTree]]:
    """The leaves of `params` that `only` names (all if it is empty), and a function that puts them back in place.

    Raises:
      ValueError: a name that is not in `params`.

    Example:
      >>> moving, whole = movable({"a": {"kernel": 1, "bias": 2}, "b": 3}, ("a/bias",))
      >>> moving, whole([7])
      ([2], {'a': {'bias': 7, 'kernel': 1}, 'b': 3})
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    for name in only:
        if not any(_under(leaf, name) for leaf in names):
            raise ValueError(f"only names {name!r}, but the parameters are {', '.join(names)}")
    moves = [not only or any(_under(leaf, name) for name in only) for leaf in names]
    fixed = [leaf for _, leaf in leaves]

    def whole(moving: list[Array]) -> PyTree:
        rest = iter(moving)
        return jax.tree.unflatten(structure, [next(rest) if m else f for m, f in zip(moves, fixed, strict=True)])

    return [leaf for leaf, m in zip(fixed, moves, strict=True) if m], whole


def _under(leaf: str, name: str) -> bool:
    return leaf == name or leaf.startswith(f"{name}/")


def per_parameter_rates(rates: PyTree, only: Sequence[str] = ()) -> optax.GradientTransformation:
    """Plain gradient descent, p <- p - rates * g, a rate for each number. For `inner_loop` with the same `only`.

    Args:
      rates: a tree like the parameters; the optimiser may be differentiated with respect to them.
      only: see `inner_loop`.
    """
    found = jax.tree_util.tree_flatten_with_path(rates)[0]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in found]
    moving = [
        rate for (_, rate), leaf in zip(found, names, strict=True) if not only or any(_under(leaf, n) for n in only)
    ]
    return optax.stateless(lambda gradient, params: [-rate * g for rate, g in zip(moving, gradient, strict=True)])
