"""Low-rank adapters: frozen kernels, and small trained ones beside them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cl_zoo.checks import Count, NonNegative, checked
from cl_zoo.layers.mixer import linear
from cl_zoo.types import Array, Key, Model, PyTree, Taps

__all__ = ["AdaptedKernel", "lora", "merge_adapters", "unmerge_adapters"]

KERNELS = ("query", "key", "value", "output", "gate", "up", "down")
"""The kernels of a decoder's blocks."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdaptedKernel:
    """Replaces a kernel: x @ it = x W + (x A) B, without ever forming W + A B.

    Attributes:
      kernel: W, `[..., n_in, n_out]`.
      down: A, `[..., n_in, r]`.
      up: B, `[..., r, n_out]`, times its scale.
    """

    kernel: Array
    down: Array
    up: Array

    __array_ufunc__ = None  # NumPy arrays on the left leave the product to it

    def __rmatmul__(self, x: Array) -> Array:
        return x @ self.kernel + (x @ self.down) @ self.up

    def astype(self, dtype: Any) -> AdaptedKernel:
        return AdaptedKernel(*(leaf.astype(dtype) for leaf in (self.kernel, self.down, self.up)))


@checked
def lora(
    model: Model,
    rank: Count,
    *,
    alpha: NonNegative | None = None,
    targets: Sequence[str] = KERNELS,
    merged: bool = False,
) -> Model:
    """The same network with its weights frozen, and a trained low-rank product beside each kernel.

        x W  ->  x W + (alpha / r) (x A) B,     A from N(0, 1 / n_in), B = 0 at the start

    so that at the start it computes exactly what the original model computes.

    Args:
      model: whose kernels are adapted. The weights bound to it are frozen, or else its own initial ones.
      rank: r, at least 1.
      alpha: the product's scale is alpha / r; None is r, the scale 1.
      targets: names of the kernels, as the last key of their path; "kernel" is that of dense layers of NNX and Linen.
      merged: add the product to each kernel before the network uses it, which copies the kernel: for networks whose
        layers do more with a kernel than `x @ kernel`.

    Returns:
      A `Model` with parameters "A" and "B" under the path of each kernel, all that is trained; the weights are bound to
      it (`Model.bind`), or drawn where a run begins. Taps and wiring of units are left out, since the kernels they name
      are frozen.

    Raises:
      ValueError: rank below 1, negative alpha, a model that has adapters already; at the first trace, targets that the
        model does not have (of the default ones, it need not have all), or that are not matrices.

    Source: Hu et al. 2021, arXiv 2106.09685.

    Differences from the paper or its code: the paper adapts the kernels of queries and values alone (`targets=("query",
    "value")`); its code draws A uniformly, with a third of the variance. No dropout.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from cl_zoo.language import decoder
      >>> from cl_zoo.layers import softmax_attention
      >>> net = decoder(256, [(softmax_attention(16, 2), 32, 2)])
      >>> params, _ = lora(net.model, 4).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
      >>> params["blocks"]["block_0"]["mixer"]["query"]["A"].shape
      (2, 16, 4)
    """
    if "embedding" in targets:
        raise ValueError(
            "lora: targets has 'embedding', a table of which rows are looked up, but it must name kernels, which are"
            " multiplied by"
        )
    if model.frozen:
        raise ValueError("lora: the model's weights are frozen already, as in a model that lora made")

    inner = model.bind(None)

    def draw(key: Key, x: PyTree) -> PyTree:
        return inner.init(key, x)[0]

    def init(key: Key, x: PyTree, weights: PyTree) -> tuple[PyTree, PyTree]:
        _, model_state = inner.bind(weights).init(key, x)
        found: list[tuple[list[str], Array]] = []
        there: set[str] = set()
        for path, leaf in jax.tree_util.tree_flatten_with_path(weights)[0]:
            names = [str(getattr(entry, "key", getattr(entry, "name", entry))) for entry in path]
            there.add(names[-1])
            if names[-1] in targets and not {"bias", "convolution"} & set(names[:-1]):
                if leaf.ndim < 2:
                    raise ValueError(f"lora: {'/'.join(names)} has the shape {leaf.shape}, but must be a matrix")
                found.append((names, leaf))
        absent = sorted(set(targets) - {names[-1] for names, _ in found})
        if absent and (not found or targets is not KERNELS):
            kernels = ", ".join(sorted(there & {*KERNELS, "kernel"})) or "none"
            raise ValueError(f"lora: the model has no kernels named {', '.join(absent)}; those that it has: {kernels}")
        params: dict[str, Any] = {}
        for i, (names, leaf) in enumerate(found):
            *stack, n_in, n_out = leaf.shape
            place = params
            for name in names:
                place = place.setdefault(name, {})
            each = jax.random.fold_in(jax.random.fold_in(key, 1), i)
            place["A"] = jnp.stack([linear(k, n_in, rank) for k in jax.random.split(each, math.prod(stack))])
            place["A"] = place["A"].reshape((*stack, n_in, rank)).astype(jnp.float32)
            place["B"] = jnp.zeros((*stack, rank, n_out))
        return params, model_state

    def adapted(params: PyTree, weights: PyTree, how: Any = AdaptedKernel) -> PyTree:
        return _adapt(weights, params, 1.0 if alpha is None else alpha / rank, how)

    def apply(
        params: PyTree,
        model_state: PyTree,
        x: PyTree,
        *,
        weights: PyTree,
        perturb: dict[str, Array] | None = None,
        **options: Any,
    ) -> tuple[PyTree, PyTree, Taps]:
        outputs, model_state, _ = inner.apply(
            adapted(params, weights, _merge if merged else AdaptedKernel), model_state, x, **options
        )
        return outputs, model_state, {}

    return dataclasses.replace(
        model,
        init_function=init,
        apply_function=apply,
        units=(),
        draw_function=draw,
        inner_function=lambda params, weights: inner.inner_params(adapted(params, weights)),
        takes_weights=True,
    )


def _adapt(weights: PyTree, adapters: PyTree, scale: Array | float, how: Any) -> PyTree:
    """Weights with `how(kernel, A, scale B)` in the place of every kernel that has adapters."""
    if isinstance(adapters, dict) and set(adapters) == {"A", "B"} and not isinstance(weights, dict):
        return how(weights, adapters["A"], scale * adapters["B"])
    return {
        name: _adapt(value, adapters[name], scale, how) if name in adapters else value
        for name, value in weights.items()
    }


def _merge(kernel: Array, down: Array, up: Array) -> Array:
    return kernel + (down @ up).astype(kernel.dtype)


@checked
def merge_adapters(model: Model, params: PyTree, weights: PyTree) -> PyTree:
    """W + (alpha / r) A B in the place of each kernel: the parameters of the model that was adapted.

    Args:
      model: a model that `lora` made.
      params: its adapters.
      weights: the frozen weights.

    Raises:
      ValueError: a model that `lora` did not make.
    """
    return _merged(model, params, weights, _merge)


@checked
def unmerge_adapters(model: Model, params: PyTree, merged: PyTree) -> PyTree:
    """The inverse of `merge_adapters`: W from W + (alpha / r) A B, up to rounding.

    Args:
      model, params: as they were merged.
      merged: the merged parameters.

    Raises:
      ValueError: a model that `lora` did not make.
    """
    return _merged(model, params, merged, lambda w, a, b: w - (a @ b).astype(w.dtype))


def _merged(model: Model, params: PyTree, weights: PyTree, how: Any) -> PyTree:
    if not model.frozen:
        raise ValueError("merge_adapters: the model is not one that lora made")
    inner = model.bind(weights).inner_params(params)
    found = jax.tree.leaves(inner, is_leaf=lambda leaf: isinstance(leaf, AdaptedKernel))
    adapted = sum(isinstance(leaf, AdaptedKernel) for leaf in found)
    given = len(jax.tree.leaves(params))
    if adapted == 0 or given != 2 * adapted:
        raise ValueError(
            f"merge_adapters: params has {given} arrays, of which {2 * adapted} are adapters of this model, but it must"
            " be the model's parameters, as result.state.params"
        )
    return jax.tree.map(
        lambda leaf: how(leaf.kernel, leaf.down, leaf.up) if isinstance(leaf, AdaptedKernel) else leaf,
        inner,
        is_leaf=lambda leaf: isinstance(leaf, AdaptedKernel),
    )
