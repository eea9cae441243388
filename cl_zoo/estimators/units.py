"""Hidden units: how active they are, how strongly they are read, and how they are re-initialised.

A group of units is one tuple of `Model.units`: `(path, axis, role)` of every parameter that makes the units ("out") or
reads them ("in"). An axis k times as long as its group is k blocks of it, channels last.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from cl_zoo.types import Array, Batch, Context, Key, PyTree, TrainState

__all__ = [
    "check_units",
    "group_size",
    "lowest",
    "parameter",
    "reset_moments",
    "reset_units",
    "row_mean",
    "unit_activations",
    "unit_masks",
    "weight_magnitude",
]

Group = tuple[tuple[tuple[str, ...], int, str], ...]


def check_units(owner: str, context: Context, state: TrainState, batch: Batch) -> None:
    """Refuses a model whose units are not described, or whose activations no tap records.

    Raises:
      ValueError: no units; no taps of a layer that reads a group.
    """
    if not context.model.units:
        raise ValueError(f"{owner}: the model has no units, but {owner} resets single units; give it Model.units")
    _, _, taps = jax.eval_shape(
        lambda p, s, b: context.model.apply(p, s, b.x, task=b.task, weight=b.weight),
        state.params,
        state.model_state,
        batch,
    )
    for group in context.model.units:
        _reader(owner, group, taps)


def _reader(owner: str, group: Group, taps: dict[str, Any]) -> str:
    """The first tapped layer that reads a group."""
    readers = ["/".join(path[:-1]) for path, _, role in group if role == "in"]
    for layer in readers:
        if layer in taps:
            return layer
    raise ValueError(
        f"{owner}: none of the layers that read a group of units ({', '.join(readers) or 'there are none'}) has taps"
        f" here; there are taps of {', '.join(taps) or 'none'}. A group's activations are the input of such a layer"
        " in the forward pass that the losses share"
    )


def parameter(params: PyTree, path: tuple[str, ...]) -> Array:
    """The parameter at a path of `Model.units`.

    Raises:
      ValueError: there is none.
    """
    for name in path:
        if not isinstance(params, dict) or name not in params:
            raise ValueError(f"the model's units name the parameters {'/'.join(path)!r}, which it does not have")
        params = params[name]
    return params


def group_size(params: PyTree, group: Group) -> int:
    """How many units a group has: the length of its shortest axis."""
    return min(parameter(params, path).shape[axis] for path, axis, _ in group)


def unit_activations(
    owner: str, units: tuple[Group, ...], params: PyTree, taps: dict[str, tuple[Array, Array]]
) -> tuple[Array, ...]:
    """The activations of each unit, `[B, P, n]` for each group: P positions of a feature map, or 1.

    Args:
      owner: for the error.
      units: see `Model`.
      params: of the model, for sizes.
      taps: of one pass.

    Raises:
      ValueError: no layer that reads a group has taps.
    """
    found = []
    for group in units:
        h = taps[_reader(owner, group, taps)][0]
        found.append(h.reshape((h.shape[0], -1, group_size(params, group))))
    return tuple(found)


def row_mean(values: Array, weight: Array) -> Array:
    """sum_b w_b mean_p v_bp / sum_b w_b: `[B, P, n]`, `[B]` -> `[n]`; 0 where no example counts."""
    return weight @ jnp.mean(values, axis=1) / jnp.maximum(jnp.sum(weight), 1e-12)


def weight_magnitude(params: PyTree, group: Group, role: str) -> tuple[Array, int]:
    """sum |w| over the weights that make ("out") or read ("in") each unit, `[n]`, and their number per unit.

    Biases, parameters of one axis, are left out.

    Example:
      >>> import jax.numpy as jnp
      >>> kernels = jnp.array([[1.0, -2.0]]), jnp.array([[3.0], [4.0], [-5.0], [6.0]])
      >>> params = {"a": {"kernel": kernels[0]}, "b": {"kernel": kernels[1]}}
      >>> group = ((("a", "kernel"), 1, "out"), (("b", "kernel"), 0, "in"))  # "b" reads two blocks of two units
      >>> weight_magnitude(params, group, "in")
      (Array([ 8., 10.], dtype=float32), 2)
    """
    n = group_size(params, group)
    total, count = jnp.zeros(n), 0
    for path, axis, its_role in group:
        weights = parameter(params, path)
        if its_role == role and weights.ndim > 1:
            flat = jnp.moveaxis(jnp.abs(weights), axis, -1).reshape((-1, n))
            total, count = total + jnp.sum(flat, axis=0), count + flat.shape[0]
    return total, count


def lowest(values: Array, eligible: Array, count: Array) -> Array:
    """A mask of the `count` lowest of the eligible values, `bool[n]`; of equal ones the first."""
    order = jnp.argsort(jnp.where(eligible, values, jnp.inf))
    rank = jnp.zeros(values.shape, jnp.int32).at[order].set(jnp.arange(values.shape[0], dtype=jnp.int32))
    return eligible & (rank < count)


def unit_masks(params: PyTree, units: tuple[Group, ...], chosen: tuple[Array, ...]) -> tuple[PyTree, PyTree]:
    """Which weights make the chosen units, and which read them.

    Args:
      params: of the model.
      units: see `Model`.
      chosen: `bool[n]` for each group.

    Returns:
      Two trees like `params`; each leaf is a boolean array that broadcasts to the parameter's shape.
    """
    masks: dict[str, dict[str, Array]] = {"out": {}, "in": {}}
    for group, mask in zip(units, chosen, strict=True):
        for path, axis, role in group:
            shape = parameter(params, path).shape
            along = jnp.tile(mask, shape[axis] // mask.shape[0])
            along = along.reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))])
            name = "/".join(path)
            masks[role][name] = along | masks[role].get(name, jnp.zeros((), bool))

    def tree(found: dict[str, Array]) -> PyTree:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: found.get(jax.tree_util.keystr(path, simple=True, separator="/"), jnp.zeros((), bool)),
            params,
        )

    return tree(masks["out"]), tree(masks["in"])


def reset_units(
    context: Context, params: PyTree, opt_state: PyTree, chosen: tuple[Array, ...], x: PyTree, key: Key
) -> tuple[PyTree, PyTree]:
    """Re-initialises the chosen units: nothing that they learned is left, and nothing reads them yet.

    Weights and biases that make a chosen unit are those of a fresh `context.model.init`; weights that read one are 0,
    also where they make another chosen one; the optimiser's moments of all these are as at the start. So the network
    loses what the units contributed, and the new units contribute nothing before they learn.

    Args:
      context: the model and the optimiser.
      params, opt_state: the current ones.
      chosen: `bool[n]` for each group of `context.model.units`.
      x: inputs for `model.init`.
      key: for `model.init`.

    Returns:
      Parameters and optimiser's state. Where none is chosen, nothing is drawn.
    """

    def reset(params: PyTree, opt_state: PyTree) -> tuple[PyTree, PyTree]:
        fresh, _ = context.model.init(key, x)
        made, read = unit_masks(params, context.model.units, chosen)
        new = jax.tree.map(
            lambda now, drawn, m, r: jnp.where(r, jnp.zeros_like(now), jnp.where(m, drawn, now)),
            params,
            fresh,
            made,
            read,
        )
        return new, reset_moments(context.optimiser, opt_state, new, jax.tree.map(jnp.logical_or, made, read))

    # A loop of at most one round and not a conditional: XLA copies what passes through a conditional unchanged, which
    # for parameters and moments is as much as a step of Adam writes, but a loop without rounds leaves them in place.
    some = jnp.any(jnp.stack([jnp.any(mask) for mask in chosen]))
    _, params, opt_state = jax.lax.while_loop(
        lambda carry: carry[0], lambda carry: (jnp.zeros_like(some), *reset(*carry[1:])), (some, params, opt_state)
    )
    return params, opt_state


def reset_moments(
    optimiser: optax.GradientTransformation, opt_state: PyTree, params: PyTree, touched: PyTree
) -> PyTree:
    """The optimiser's numbers of the touched parameters become those of `optimiser.init(params)`.

    Counts that all parameters share stay; so does what does not have its parameter's shape (Adafactor's factors).

    Args:
      optimiser: any optax optimiser.
      opt_state: its state.
      params: as they are now.
      touched: a tree like `params` of masks that broadcast to its leaves.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> params = {"w": jnp.ones(3)}
      >>> optimiser = optax.sgd(0.1, momentum=0.9)
      >>> _, moving = optimiser.update({"w": jnp.ones(3)}, optimiser.init(params))
      >>> reset_moments(optimiser, moving, params, {"w": jnp.array([False, True, False])})[0].trace["w"]
      Array([1., 0., 1.], dtype=float32)
    """

    def mask(moment: Any, parameter: Array, its: Array) -> Any:
        if isinstance(moment, optax.MaskedNode):  # a parameter that the optimiser leaves out
            return moment
        return its if moment.shape == parameter.shape else False

    masks = optax.tree_utils.tree_map_params(
        optimiser,
        mask,
        opt_state,
        params,
        touched,
        transform_non_params=lambda leaf: False,
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )
    return jax.tree.map(
        lambda its, now, start: now if its is False else jnp.where(its, start, now),
        masks,
        opt_state,
        optimiser.init(params),
    )
