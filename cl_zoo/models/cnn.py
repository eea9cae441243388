"""A small convolutional network."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flax import nnx

from cl_zoo.models.adapters import from_nnx
from cl_zoo.models.preprocess import scale_images
from cl_zoo.types import Array, Model, PyTree, check_whole

__all__ = ["cnn"]


class Cnn(nnx.Module):
    """3x3 convolutions `conv_0`, `conv_1`, ..., each with ReLU and 2x2 max-pooling; `hidden`; `output`."""

    def __init__(self, shape: tuple[int, int, int], channels: Sequence[int], hidden: int, outputs: int, rngs: nnx.Rngs):
        height, width, depth = shape
        self.shape = shape
        for i, features in enumerate(channels):
            setattr(self, f"conv_{i}", nnx.Conv(depth, features, (3, 3), rngs=rngs))
            height, width, depth = height // 2, width // 2, features
        self.layers = len(channels)
        self.hidden = nnx.Linear(height * width * depth, hidden, rngs=rngs)
        self.output = nnx.Linear(hidden, outputs, rngs=rngs)

    def __call__(self, x: Array, *, tap: Callable[[str, Callable[[Array], Array], Array], Array]) -> Array:
        x = x.reshape((x.shape[0], *self.shape))
        for i in range(self.layers):
            x = nnx.relu(tap(f"conv_{i}", getattr(self, f"conv_{i}"), x))
            x = nnx.max_pool(x, (2, 2), (2, 2))
        x = x.reshape((x.shape[0], -1))
        x = nnx.relu(tap("hidden", self.hidden, x))
        return tap("output", self.output, x)


def cnn(
    input_shape: Sequence[int],
    outputs: int,
    *,
    channels: Sequence[int] = (16, 32),
    hidden: int = 128,
    preprocess: Callable[[PyTree], PyTree] = scale_images,
) -> Model:
    """Convolutions, then two dense layers, with taps and units of every layer.

    Args:
      input_shape: of one row, `(height, width)` or `(height, width, channels)`.
      outputs: `C`.
      channels: of each convolution; every one halves height and width.
      hidden: width of the dense layer before the last.
      preprocess: of x; by default uint8 images become floats in [0, 1] and floats stay.

    Returns:
      A `Model`; parameters `{"conv_0": {"kernel": [3, 3, in, out], "bias": [out]}, ..., "hidden": ..., "output": ...}`.

    Raises:
      ValueError: sizes below 1, images too small for so many halvings.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> model = cnn((28, 28), 10)
      >>> params, _ = model.init(jax.random.key(0), jnp.zeros((1, 28, 28), jnp.uint8))
      >>> params["hidden"]["kernel"].shape
      (1568, 128)
    """
    for field, value in (("outputs", outputs), ("hidden", hidden), *(("channels", value) for value in channels)):
        check_whole("cnn", field, value, 1)
    if len(input_shape) not in (2, 3):
        raise ValueError(f"cnn: input_shape is {tuple(input_shape)}, but it must be (height, width) or with channels")
    for length in input_shape:
        check_whole("cnn", "input_shape", length, 1)
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
            ((here, "bias"), 0, "out"),
            ((after, "kernel"), 2 if after.startswith("conv") else 0, "in"),
        )
        for here, after in zip(layers, layers[1:], strict=False)
    )
    shape = (height, width, depth[0] if depth else 1)
    return from_nnx(
        lambda rngs: Cnn(shape, channels, hidden, outputs, rngs),
        preprocess=preprocess,
        input_shape=tuple(input_shape),
        units=units,
    )
