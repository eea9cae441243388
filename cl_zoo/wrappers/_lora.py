"""Low-rank adapters: frozen kernels, and small trained ones beside them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cl_zoo.checks import check_range, check_whole
from cl_zoo.layers.mixer import linear
from cl_zoo.types import Array, Key, Model, PyTree

__all__ = ["AdaptedKernel", "lora", "merge_adapters", "unmerge_adapters"]

KERNELS = ("query", "key", "value", "output", "gate", "up", "down")
"""Of a decoder's blocks."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdaptedKernel:
    """Stands where a kernel stood: x @ it = x W + (x A) B, without W + A B ever being there.

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


def lora(
    model: Model,
    rank: int,
    *,
    alpha: Array | float | None = None,
    targets: Sequence[str] = KERNELS,
    merged: bool = False,
) -> Model:
    """The same network with its weights frozen, and a trained product of low rank beside each kernel.

        x W  ->  x W + (alpha / r) (x A) B,     A from N(0, 1 / n_in), B = 0 at the start

    so that it begins as the function it was made from, exactly.

    Args:
      model: whose kernels are adapted. If it is given weights to begin from, these are frozen, else its own first ones.
      rank: r, at least 1.
      alpha: the product's scale is alpha / r; None is r, the scale 1.
      targets: names of the kernels, as the last key of their path; "kernel" is that of dense layers of NNX and Linen.
      merged: add the product to each kernel before the network sees it, which takes a copy of it: for networks whose
        layers do more with a kernel than `x @ kernel`.

    Returns:
      A `Model` with parameters "A" and "B" under the path of each kernel, all that is trained; `model_state` is
      `{"frozen": the weights, "scale": alpha / r, "model": that of the model}`. Taps and wiring of units are left out,
      since the kernels they name are frozen.

    Raises:
      ValueError: rank below 1, negative alpha; at the first trace, targets that the model does not have (of the default
        ones, it need not have all), or that are no matrices.

    Source: Hu et al. 2021, arXiv 2106.09685.

    Differences from the paper or its code: the paper adapts the kernels of queries and values alone
    (`targets=("query", "value")`); its code draws A uniformly, with a third of the variance. No dropout.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from cl_zoo.language import decoder
      >>> from cl_zoo.layers import softmax_attention
      >>> net = decoder(256, [softmax_attention(16, 2)], layers=2, hidden=32)
      >>> params, _ = lora(net.model, 4).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
      >>> params["blocks"]["block_0"]["mixer"]["query"]["A"].shape
      (2, 16, 4)
    """
    if not isinstance(model, Model):
        raise ValueError(f"lora: model is {type(model).__name__}, but it must be a Model, as answering(decoder) is")
    check_whole("lora", "rank", rank, 1)
    if isinstance(targets, str):
        raise ValueError(f"lora: targets is {targets!r}, but it must be a sequence of names")
    if alpha is not None:
        check_range("lora", "alpha", alpha, 0)

    def init(key: Key, x: PyTree, *weights: PyTree) -> tuple[PyTree, PyTree]:
        frozen, inner = model.init(key, x, *weights)
        found: list[tuple[list[str], Array]] = []
        there: set[str] = set()
        for path, leaf in jax.tree_util.tree_flatten_with_path(frozen)[0]:
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
        scale = jnp.asarray(1.0 if alpha is None else alpha / rank, jnp.float32)
        return params, {"frozen": frozen, "scale": scale, "model": inner}

    def parameters(params: PyTree, model_state: PyTree) -> PyTree:
        if merged:
            return merge_adapters(params, model_state)
        return _adapt(model_state["frozen"], params, model_state["scale"], AdaptedKernel)

    def apply(
        params: PyTree, model_state: PyTree, x: PyTree, *, perturb: dict[str, Array] | None = None, **options: Any
    ) -> tuple[PyTree, PyTree, dict[str, tuple[Array, Array]]]:
        full = parameters(params, model_state)
        outputs, inner, _ = model.apply(full, model_state["model"], x, **options)
        return outputs, {**model_state, "model": inner}, {}

    def innermost(params: PyTree, model_state: PyTree) -> PyTree:
        full = parameters(params, model_state)
        return full if model.parameters is None else model.parameters(full, model_state["model"])

    return Model(init, apply, parameters=innermost)


def _adapt(weights: PyTree, adapters: PyTree, scale: Array, how: Any) -> PyTree:
    """Weights with `how(kernel, A, scale B)` in the place of every kernel that has adapters."""
    if isinstance(adapters, dict) and set(adapters) == {"A", "B"} and not isinstance(weights, dict):
        return how(weights, adapters["A"], scale * adapters["B"])
    return {
        name: _adapt(value, adapters[name], scale, how) if name in adapters else value
        for name, value in weights.items()
    }


def merge_adapters(params: PyTree, model_state: PyTree) -> PyTree:
    """W + (alpha / r) A B in the place of each kernel: the parameters of the model that was adapted.

    Args:
      params, model_state: of a model that `lora` made.

    Raises:
      ValueError: they are of another model.
    """
    if not isinstance(model_state, dict) or not {"frozen", "scale"} <= set(model_state):
        raise ValueError("merge_adapters: model_state is not that of a model which lora made")
    return _adapt(model_state["frozen"], params, model_state["scale"], lambda w, a, b: w + (a @ b).astype(w.dtype))


def unmerge_adapters(merged: PyTree, params: PyTree, model_state: PyTree) -> PyTree:
    """The way back from `merge_adapters`: W from W + (alpha / r) A B, to rounding.

    Args:
      merged: parameters of the adapted model.
      params, model_state: as they were merged.
    """
    return _adapt(merged, params, model_state["scale"], lambda w, a, b: w - (a @ b).astype(w.dtype))
