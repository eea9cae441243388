"""A multi-layer perceptron."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
from flax import nnx

from cl_zoo.checks import Count, checked
from cl_zoo.models.adapters import from_nnx
from cl_zoo.models.normalisation import check_norm, normalise, normalising
from cl_zoo.models.preprocess import scale_images
from cl_zoo.types import Array, Model, PyTree

__all__ = ["fan_in_uniform", "mlp"]

Initialiser = Callable[..., Array]


def fan_in_uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any = None, *, fan_in: int | None = None) -> Array:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's default for kernels and biases of dense layers."""
    bound = 1 / math.sqrt(math.prod(shape[:-1]) if fan_in is None else fan_in)
    return jax.random.uniform(key, shape, dtype or "float32", -bound, bound)


class Mlp(nnx.Module):
    """Dense layers `hidden_0`, `hidden_1`, ..., `output` with ReLU between, after `norm_0`, ... if there is a norm."""

    def __init__(self, sizes: Sequence[int], *, initialiser: str, norm: str | None, rngs: nnx.Rngs):
        names = [f"hidden_{i}" for i in range(len(sizes) - 2)] + ["output"]
        for name, n_in, n_out in zip(names, sizes, sizes[1:], strict=False):
            options: dict[str, Any] = {}
            if initialiser == "fan_in_uniform":
                options["kernel_init"] = fan_in_uniform
                options["bias_init"] = lambda key, shape, dtype=None, *, n=n_in: fan_in_uniform(
                    key, shape, dtype, fan_in=n
                )
            elif initialiser == "truncated_normal":
                options["kernel_init"] = nnx.initializers.truncated_normal(0.01)
            elif initialiser == "xavier_uniform":
                options["kernel_init"] = nnx.initializers.xavier_uniform()
            # A bias before batch normalisation does nothing: its gradient is rounding, which Adam would scale up.
            options["use_bias"] = name == "output" or norm != "batch"
            setattr(self, name, nnx.Linear(n_in, n_out, rngs=rngs, **options))
        self.names = tuple(names)
        self.normed = norm is not None
        if norm is not None:
            for i, width in enumerate(sizes[1:-1]):
                setattr(self, f"norm_{i}", normalising(norm, width, 1, rngs))

    def __call__(
        self,
        x: Array,
        *,
        tap: Callable[[str, Callable[[Array], Array], Array], Array],
        weight: Array | None = None,
    ) -> Array:
        x = x.reshape((x.shape[0], -1))
        for i, name in enumerate(self.names[:-1]):
            x = tap(name, getattr(self, name), x)
            x = nnx.relu(normalise(getattr(self, f"norm_{i}"), x, weight) if self.normed else x)
        return tap("output", getattr(self, self.names[-1]), x)


@checked
def mlp(
    input_shape: Sequence[Count],
    outputs: Count,
    *,
    hidden: Sequence[Count] = (256, 256),
    initialiser: Literal["lecun_normal", "fan_in_uniform", "truncated_normal", "xavier_uniform"] = "lecun_normal",
    norm: str | None = None,
    preprocess: Callable[[PyTree], PyTree] = scale_images,
) -> Model:
    """logits = W_n relu(... relu(W_0 x + b_0)) + b_n, with taps of every layer and units of every hidden layer.

    Args:
      input_shape: of one example; flattened.
      outputs: `C`.
      hidden: widths.
      initialiser: "lecun_normal" with biases 0; "fan_in_uniform", PyTorch's default, for kernels and biases;
        "truncated_normal" of standard deviation 0.01 with biases 0, as for MAML's sinusoids; or "xavier_uniform" with
        biases 0, as in Mammoth.
      norm: of each hidden pre-activation, before the ReLU: "batch", with running statistics in `model_state`; "layer";
        or None.
      preprocess: of x; by default uint8 images become floats in [0, 1] and floats stay.

    Returns:
      A `Model`; parameters `{"hidden_0": {"kernel": [in, out], "bias": [out]}, ..., "output": ...}`, and with a norm
      `"norm_0": {"scale": [out], "bias": [out]}` for each hidden layer, which has no bias of its own before "batch".

    Raises:
      ValueError: sizes below 1, an unknown initialiser or norm.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> model = mlp((28, 28), 10, hidden=(32,))
      >>> params, _ = model.init(jax.random.key(0), jnp.zeros((1, 28, 28), jnp.uint8))
      >>> params["hidden_0"]["kernel"].shape
      (784, 32)
    """
    check_norm("mlp", norm, (None, "batch", "layer"))
    sizes = (math.prod(input_shape), *hidden, outputs)
    layers = [f"hidden_{i}" for i in range(len(hidden))] + ["output"]
    units = tuple(
        (
            ((here, "kernel"), 1, "out"),
            *(((here, "bias"), 0, "out") for _ in range(norm != "batch")),
            *(((f"norm_{i}", leaf), 0, "out") for leaf in ("scale", "bias") if norm),
            ((after, "kernel"), 0, "in"),
        )
        for i, (here, after) in enumerate(zip(layers, layers[1:], strict=False))
    )
    return from_nnx(
        lambda rngs: Mlp(sizes, initialiser=initialiser, norm=norm, rngs=rngs),
        preprocess=preprocess,
        input_shape=tuple(input_shape),
        units=units,
    )
