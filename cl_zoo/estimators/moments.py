"""Moments of per-example gradients: the basis of the Fisher information and of memory-aware synapses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

from cl_zoo.estimators.averaging import wide
from cl_zoo.types import Array, Batch, Key, PyTree

__all__ = ["Forward", "gradient_moment", "layer_of", "logits_layer", "row_gradient_square", "with_layer"]

Forward = Callable[[PyTree, Batch, dict[str, Array] | None], tuple[Array, dict[str, tuple[Array, Array]]]]


def gradient_moment(
    forward: Forward,
    params: PyTree,
    batches: Batch,
    cotangents: Callable[[Array, Batch, Key | None], Array],
    *,
    moment: Callable[[Array], Array],
    key: Key | None = None,
    micro_batch: int = 16,
) -> PyTree:
    """mean over x of  sum_k moment(d <r_k(x), f(x)> / d params),  r_k held fixed, of each example's own gradient.

    `moment` is `jnp.square` or `jnp.abs`, so moment(a b) = moment(a) moment(b). For a dense layer z = x W + b with
    cotangents g_k = d <r_k, f> / d z, one example's gradient is x_i g_kj, so the moment of W is

        mean moment(x)^T (sum_k moment(g_k)):

    exact, one matrix product per batch, for all k together. That path is taken for every two-dimensional kernel whose
    taps the model records for inputs `[B, in]`; every other parameter (convolutions, layers shared over positions,
    kernels that are also used beside their tap, models without taps) takes per-example gradients in micro-batches. One
    network may use both.

    Args:
      forward: `(params, batch, perturb) -> (outputs [B, C], taps)`, examples independent of each other. It must be
        the network in evaluation mode: dropout off, normalisation statistics fixed.
      params: where to evaluate it.
      batches: `Batch[M, B, ...]`; examples count by their weight.
      cotangents: `(outputs, batch, key) -> [K, B, C]`, the r_k of each example.
      moment: applied element by element.
      key: passed to `cotangents`, folded with the batch's number.
      micro_batch: examples whose gradients the slow path computes at once.

    Returns:
      A tree like `params`, in float32 at least.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from cl_zoo.types import Batch
      >>> batches = Batch(jnp.array([[[1.0], [-3.0]]]), None, None, jnp.ones((1, 2)))
      >>> forward = lambda w, batch, perturb: (batch.x * w, {})
      >>> gradient_moment(forward, jnp.ones((1, 1)), batches, lambda f, b, k: f[None], moment=jnp.abs)  # mean |x^2 w|
      Array([[5.]], dtype=float32)
    """
    first = jax.tree.map(lambda leaf: leaf[0], batches)
    taps = jax.eval_shape(lambda p, b: forward(p, b, None)[1], params, first)
    dense = _dense_taps(params, taps, first.weight.shape[0])
    dense = {name: dense[name] for name in dense if name not in _used_beside_a_tap(forward, params, first, name)}
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    slow = [i for i, (path, _) in enumerate(leaves) if "/".join(_names(path)[:-1]) not in dense]
    values = [leaf for _, leaf in leaves]

    def with_slow(part: list[Array]) -> PyTree:
        full = list(values)
        for i, leaf in zip(slow, part, strict=True):
            full[i] = leaf
        return jax.tree.unflatten(treedef, full)

    def dense_moments(batch: Batch, key: Key | None) -> dict[str, tuple[Array, Array]]:
        """The fast path: per layer, the sums over examples of moments of the gradients of its kernel and bias."""
        zeros = {name: jnp.zeros(taps[name][1].shape, taps[name][1].dtype) for name in dense}
        outputs, pull, seen = jax.vjp(lambda perturb: forward(params, batch, perturb), zeros, has_aux=True)

        def add(total: dict[str, Array], cotangent: Array) -> tuple[dict[str, Array], None]:
            (g,) = pull(cotangent)
            return jax.tree.map(lambda t, leaf: t + moment(wide(leaf)), total, g), None

        # One k after another: memory stays that of one backward pass.
        total, _ = jax.lax.scan(add, wide(zeros), cotangents(outputs, batch, key))
        total = jax.tree.map(lambda leaf: leaf * batch.weight[:, None], total)
        return {name: (moment(wide(seen[name][0])).T @ total[name], jnp.sum(total[name], axis=0)) for name in dense}

    def slow_moments(batch: Batch, key: Key | None) -> list[Array]:
        """The slow path: per-example gradients, `micro_batch` examples at a time."""
        part = [values[i] for i in slow]

        def example(row: Batch, r: Array) -> list[Array]:
            one = jax.tree.map(lambda leaf: leaf[None], row)
            _, pull = jax.vjp(lambda p: forward(with_slow(p), one, None)[0], part)
            (gradients,) = jax.vmap(lambda c: pull(c[None]))(r)
            # As a product: XLA's CPU backend is many times slower at a sum over the first axis.
            return [jnp.tensordot(jnp.full(r.shape[:1], row.weight), moment(wide(g)), 1) for g in gradients]

        r = cotangents(forward(params, batch, None)[0], batch, key)
        rows = batch.weight.shape[0]
        size = max(d for d in range(1, min(micro_batch, rows) + 1) if rows % d == 0)

        def split(leaf: Array) -> Array:
            return leaf.reshape((rows // size, size, *leaf.shape[1:]))

        def step(total: list[Array], chunk: tuple[Any, ...]) -> tuple[list[Array], None]:
            return [t + jnp.sum(s, axis=0) for t, s in zip(total, jax.vmap(example)(*chunk), strict=True)], None

        chunks = jax.tree.map(split, (batch, jnp.swapaxes(r, 0, 1)))
        return jax.lax.scan(step, wide([jnp.zeros_like(p) for p in part]), chunks)[0]

    def moments(batch: Batch, key: Key | None) -> PyTree:
        full: list[Array | None] = [None] * len(values)
        if slow:
            for i, leaf in zip(slow, slow_moments(batch, key), strict=True):
                full[i] = leaf
        if dense:
            fast = dense_moments(batch, key)
            for i, (path, _) in enumerate(leaves):
                *layer, leaf_name = _names(path)
                if "/".join(layer) in dense:
                    full[i] = fast["/".join(layer)][leaf_name == "bias"]
        return jax.tree.unflatten(treedef, full)

    def step(carry: tuple[PyTree, Array], numbered: tuple[Array, Batch]) -> tuple[tuple[PyTree, Array], None]:
        total, count = carry
        index, batch = numbered
        drawn = None if key is None else jax.random.fold_in(key, index)
        return (jax.tree.map(jnp.add, total, moments(batch, drawn)), count + jnp.sum(batch.weight)), None

    start = (wide(jax.tree.map(jnp.zeros_like, params)), jnp.zeros((), batches.weight.dtype))
    (total, count), _ = jax.lax.scan(step, start, (jnp.arange(batches.weight.shape[0]), batches))
    return jax.tree.map(lambda leaf: leaf / jnp.maximum(count, 1e-12), total)


def row_gradient_square(
    loss: Callable[[PyTree, Batch], Array], params: PyTree, batches: Batch, micro_batch: int = 16
) -> PyTree:
    """mean over examples of (d loss(example) / d params)^2, for any loss of a batch of one example.

    Args:
      loss: `(params, Batch[1, ...]) -> f32[]`.
      params: where to evaluate it.
      batches: `Batch[M, B, ...]`; examples count by their weight.
      micro_batch: examples whose gradients are computed at once.

    Returns:
      A tree like `params`.

    Example:
      >>> import jax.numpy as jnp
      >>> batches = Batch(jnp.array([[1.0, -3.0]]), None, None, jnp.ones((1, 2)))
      >>> row_gradient_square(lambda w, row: (w * row.x[0]) ** 2 / 2, jnp.array(1.0), batches)  # mean x^4 w^2
      Array(41., dtype=float32)
    """

    def rows(params: PyTree, batch: Batch, perturb: None) -> tuple[Array, dict[str, tuple[Array, Array]]]:
        return jax.vmap(lambda row: loss(params, jax.tree.map(lambda leaf: leaf[None], row)))(batch)[:, None], {}

    return gradient_moment(
        rows,  # type: ignore[arg-type]
        params,
        batches,
        lambda losses, batch, key: jnp.ones((1, *losses.shape)),
        moment=jnp.square,
        micro_batch=micro_batch,
    )


def _names(path: tuple[Any, ...]) -> list[str]:
    return [str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry)))) for entry in path]


class _Cut:
    """Added to a layer's outputs, it leaves nothing of them."""

    def __radd__(self, z: Array) -> Array:
        return jnp.zeros_like(z)


def _used_beside_a_tap(forward: Forward, params: PyTree, batch: Batch, name: str, own_input: bool = True) -> set[str]:
    """The layers whose parameters reach a tap's own input (with `own_input`), or the outputs though the tap's outputs
    are taken away."""

    def others(params: PyTree, batch: Batch) -> tuple[Array, ...]:
        outputs, taps = forward(params, batch, {name: _Cut()})  # type: ignore[dict-item]
        return (outputs, taps[name][0]) if own_input else (outputs,)

    closed = jax.make_jaxpr(others)(params, batch)
    _, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.out_avals))
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return {"/".join(_names(path)[:-1]) for path, is_used in zip(paths, used, strict=False) if is_used}


def layer_of(params: PyTree, name: str) -> Any:
    """The parameters of a layer, by the name of its tap; {} where there are none."""
    for level in name.split("/"):
        params = params.get(level, {}) if isinstance(params, dict) else {}
    return params


def with_layer(params: PyTree, name: str, layer: PyTree) -> PyTree:
    """`params` with others for one layer."""
    level, _, rest = name.partition("/")
    return params | {level: with_layer(params[level], rest, layer) if rest else layer}


def logits_layer(forward: Forward, params: PyTree, batch: Batch) -> str | None:
    """The dense layer with taps whose outputs are the network's, or are selected among by a mask; None without one."""
    outputs, taps = jax.eval_shape(lambda p, b: forward(p, b, None), params, batch)
    for name in reversed(list(_dense_taps(params, taps, batch.weight.shape[0]))):
        z = taps[name][1]
        if z.shape != outputs.shape or name in _used_beside_a_tap(forward, params, batch, name):
            continue
        if _used_beside_a_tap(forward, params, batch, name, own_input=False):
            continue
        closed = jax.make_jaxpr(lambda e, name=name: forward(params, batch, {name: e})[0])(jnp.zeros(z.shape, z.dtype))
        return name if _passed_on(closed.jaxpr, [0]) == [0] else None
    return None


def _passed_on(jaxpr: Any, given: list[int]) -> list[int] | None:
    """Which outputs of a program are its inputs `given`, but for a mask and added terms; None if there is more."""
    same = {jaxpr.invars[i] for i in given}
    for eqn in jaxpr.eqns:
        used = [i for i, v in enumerate(eqn.invars) if not hasattr(v, "val") and v in same]
        inner = next((eqn.params[n] for n in ("jaxpr", "call_jaxpr", "fun_jaxpr") if n in eqn.params), None)
        if not used:
            continue
        if eqn.primitive.name in ("add", "add_any", "convert_element_type", "copy", "select_n"):
            if len(used) > 1 or (eqn.primitive.name == "select_n" and used == [0]):
                return None
            same.add(eqn.outvars[0])
        elif inner is not None and eqn.primitive.name in ("jit", "pjit", "closed_call", "custom_jvp_call"):
            out = _passed_on(getattr(inner, "jaxpr", inner), used)
            if out is None:
                return None
            same |= {eqn.outvars[i] for i in out}
        else:
            return None
    return [i for i, v in enumerate(jaxpr.outvars) if not hasattr(v, "val") and v in same]


def _dense_taps(params: PyTree, taps: dict[str, tuple[Any, Any]], rows: int) -> dict[str, PyTree]:
    """Layers for which x^2 and g^2 suffice: `kernel` `[in, out]` (and `bias`) over inputs `[B, in]`."""
    found = {}
    for name, (inputs, outputs) in taps.items():
        layer = layer_of(params, name)
        shapes = {leaf: value.shape for leaf, value in layer.items()} if isinstance(layer, dict) else {}
        kernel = (inputs.shape[-1], outputs.shape[-1])
        expected = [{"kernel": kernel}, {"kernel": kernel, "bias": kernel[1:]}]
        one_row_each = inputs.ndim == outputs.ndim == 2 and inputs.shape[0] == outputs.shape[0] == rows
        if one_row_each and shapes in expected:
            found[name] = layer
    return found
