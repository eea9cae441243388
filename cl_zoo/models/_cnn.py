"""A small convolutional network."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flax import nnx

from cl_zoo.checks import Count, checked
from cl_zoo.models.adapters import from_nnx
from cl_zoo.models.normalisation import check_norm, normalise, normalising
from cl_zoo.models.pooling import max_pool
from cl_zoo.models.preprocess import scale_images
from cl_zoo.types import Array, Model, PyTree

__all__ = ["cnn"]


class Cnn(nnx.Module):
    """3x3 convolutions `conv_0`, `conv_1`, ..., each with ReLU and 2x2 max-pooling; `hidden`; `output`.

    With a norm, `norm_0`, ... stand before each ReLU, that of `hidden` last.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        channels: Sequence[Count],
        hidden: Count,
        outputs: Count,
        rngs: nnx.Rngs,
        norm: str | None,
        groups: int,
    ):
        height, width, depth = shape
        self.shape = shape
        for i, features in enumerate(channels):
            # A bias before batch normalisation does nothing.
            setattr(self, f"conv_{i}", nnx.Conv(depth, features, (3, 3), use_bias=norm != "batch", rngs=rngs))
            height, width, depth = height // 2, width // 2, features
        self.layers = len(channels)
        self.hidden = nnx.Linear(height * width * depth, hidden, use_bias=norm != "batch", rngs=rngs)
        self.output = nnx.Linear(hidden, outputs, rngs=rngs)
        self.normed = norm is not None
        if norm is not None:
            for i, features in enumerate((*channels, hidden)):
                setattr(self, f"norm_{i}", normalising(norm, features, groups, rngs))

    def __call__(
        self,
        x: Array,
        *,
        tap: Callable[[str, Callable[[Array], Array], Array], Array],
        weight: Array | None = None,
    ) -> Array:
        def activate(i: int, x: Array) -> Array:
            return nnx.relu(normalise(getattr(self, f"norm_{i}"), x, weight) if self.normed else x)

        x = x.reshape((x.shape[0], *self.shape))
        for i in range(self.layers):
            x = max_pool(activate(i, tap(f"conv_{i}", getattr(self, f"conv_{i}"), x)))
        x = x.reshape((x.shape[0], -1))
        x = activate(self.layers, tap("hidden", self.hidden, x))
        return tap("output", self.output, x)


@checked
def cnn(
    input_shape: Sequence[Count],
    outputs: Count,
    *,
    channels: Sequence[Count] = (16, 32),
    hidden: Count = 128,
    norm: str | None = None,
    groups: Count = 8,
    preprocess: Callable[[PyTree], PyTree] = scale_images,
) -> Model:
    """Convolutions, then two dense layers, with taps and units of every layer.

    Args:
      input_shape: of one example, `(height, width)` or `(height, width, channels)`.
      outputs: `C`.
      channels: of each convolution; every one halves height and width.
      hidden: width of the dense layer before the last.
      norm: of each hidden pre-activation, before the ReLU: "batch", with running statistics in `model_state`; "group";
        or None.
      groups: of channels, for norm="group".
      preprocess: of x; by default uint8 images become floats in [0, 1] and floats stay.

    Returns:
      A `Model`; parameters `{"conv_0": {"kernel": [3, 3, in, out], "bias": [out]}, ..., "hidden": ..., "output": ...}`,
      and with a norm `"norm_0": {"scale": [out], "bias": [out]}` for each convolution and `hidden`, which have no
      bias of their own before "batch". With several groups it names no units: those of different groups cannot be
      permuted.

    Raises:
      ValueError: sizes below 1, images too small for so many halvings, an unknown norm, channels (or `hidden`) that
        are no multiple of `groups`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> model = cnn((28, 28), 10)
      >>> params, _ = model.init(jax.random.key(0), jnp.zeros((1, 28, 28), jnp.uint8))
      >>> params["hidden"]["kernel"].shape
      (1568, 128)
    """
    check_norm("cnn", norm, (None, "batch", "group"), groups, *channels, hidden)
    if len(input_shape) not in (2, 3):
        raise ValueError(f"cnn: input_shape is {tuple(input_shape)}, but it must be (height, width) or with channels")
    height, width, *depth = input_shape
    if min(height, width) < 2 ** len(channels):
        raise ValueError(
            f"cnn: input_shape is {tuple(input_shape)}, too small to be halved {len(channels)} times (one per channel)"
        )
    layers = [f"conv_{i}" for i in range(len(channels))] + ["hidden", "output"]
    # The dense layer reads the flattened map as blocks of channels, channels last.
    units = tuple(
        (
            ((here, "kernel"), 3 if here.startswith("conv") else 1, "out"),
            *(((here, "bias"), 0, "out") for _ in range(norm != "batch")),
            *(((f"norm_{i}", leaf), 0, "out") for leaf in ("scale", "bias") if norm),
            ((after, "kernel"), 2 if after.startswith("conv") else 0, "in"),
        )
        for i, (here, after) in enumerate(zip(layers, layers[1:], strict=False))
        if norm != "group" or groups == 1
    )
    shape = (height, width, depth[0] if depth else 1)
    return from_nnx(
        lambda rngs: Cnn(shape, channels, hidden, outputs, rngs, norm, groups),
        preprocess=preprocess,
        input_shape=tuple(input_shape),
        units=units,
    )
