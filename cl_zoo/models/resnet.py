"""Residual networks for small images, and their last part as a branch of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from cl_zoo.checks import check_whole, checked
from cl_zoo.models.adapters import from_nnx
from cl_zoo.models.normalisation import check_norm, normalise, normalising
from cl_zoo.models.pooling import mean_pool
from cl_zoo.models.preprocess import scale_images
from cl_zoo.types import Array, Model, PyTree

__all__ = ["resnet26", "resnet_tail"]

Tap = Callable[[str, Callable[[Array], Array], Array], Array]
KINDS = ("group", "batch")


def _convolution(n_in: int, n_out: int, stride: int, rngs: nnx.Rngs) -> nnx.Conv:
    """3x3 without bias, with a padding of one pixel, drawn from N(0, 2 / (9 n_out))."""
    draw = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
    return nnx.Conv(n_in, n_out, (3, 3), stride, padding=1, use_bias=False, kernel_init=draw, rngs=rngs)


class Block(nnx.Module):
    """y = shortcut(x) + conv_1(relu(norm_1(conv_0(relu(norm_0(x))))))."""

    def __init__(self, n_in: int, n_out: int, stride: int, norm: str, groups: int, rngs: nnx.Rngs):
        self.stride, self.more = stride, n_out - n_in
        self.norm_0, self.norm_1 = normalising(norm, n_in, groups, rngs), normalising(norm, n_out, groups, rngs)
        self.conv_0, self.conv_1 = _convolution(n_in, n_out, stride, rngs), _convolution(n_out, n_out, 1, rngs)

    def __call__(self, x: Array, *, tap: Tap, weight: Array | None, path: str) -> Array:
        h = tap(f"{path}/conv_0", self.conv_0, nnx.relu(normalise(self.norm_0, x, weight)))
        h = tap(f"{path}/conv_1", self.conv_1, nnx.relu(normalise(self.norm_1, h, weight)))
        if self.stride > 1:
            x = mean_pool(x, (self.stride, self.stride))
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, self.more))) + h


class Group(nnx.Module):
    """`block_0`, `block_1`, ...; the first changes size."""

    def __init__(self, blocks: int, n_in: int, n_out: int, stride: int, norm: str, groups: int, rngs: nnx.Rngs):
        self.blocks = blocks
        for i in range(blocks):
            block = Block(n_in if i == 0 else n_out, n_out, stride if i == 0 else 1, norm, groups, rngs)
            setattr(self, f"block_{i}", block)

    def __call__(self, x: Array, *, tap: Tap, weight: Array | None, path: str) -> Array:
        for i in range(self.blocks):
            x = getattr(self, f"block_{i}")(x, tap=tap, weight=weight, path=f"{path}/block_{i}")
        return x


class Tail(nnx.Module):
    """`group_3`, `norm`, ReLU, the mean over positions, `output`."""

    def __init__(self, blocks: int, width: int, outputs: int, norm: str, groups: int, rngs: nnx.Rngs):
        self.group_3 = Group(blocks, 32 * width, 64 * width, 2, norm, groups, rngs)
        self.norm = normalising(norm, 64 * width, groups, rngs)
        self.output = nnx.Linear(64 * width, outputs, rngs=rngs)

    def __call__(self, x: Array, *, tap: Tap, weight: Array | None = None) -> Array:
        x = tap("group_3", lambda x: self.group_3(x, tap=tap, weight=weight, path="group_3"), x)
        x = jnp.mean(nnx.relu(normalise(self.norm, x, weight)), axis=(1, 2))
        return tap("output", self.output, x)


class ResNet(Tail):
    """`conv`, `group_1`, `group_2`, and the tail."""

    def __init__(self, shape: tuple[int, int, int], blocks: int, width: int, outputs: int, norm: str, groups: int,
                 rngs: nnx.Rngs):  # fmt: skip
        super().__init__(blocks, width, outputs, norm, groups, rngs)
        self.shape = shape
        self.conv = _convolution(shape[-1], 16, 1, rngs)
        self.group_1 = Group(blocks, 16, 16 * width, 1, norm, groups, rngs)
        self.group_2 = Group(blocks, 16 * width, 32 * width, 2, norm, groups, rngs)

    def __call__(self, x: Array, *, tap: Tap, weight: Array | None = None) -> Array:
        x = tap("conv", self.conv, x.reshape((x.shape[0], *self.shape)))
        x = tap("group_1", lambda x: self.group_1(x, tap=tap, weight=weight, path="group_1"), x)
        x = tap("group_2", lambda x: self.group_2(x, tap=tap, weight=weight, path="group_2"), x)
        return super().__call__(x, tap=tap, weight=weight)


def _blocks(owner: str, depth: int, **sizes: int) -> int:
    check_whole(owner, "depth", depth, 8)
    if (depth - 2) % 6:
        raise ValueError(f"{owner}: depth is {depth}, but it must be 6 n + 2, for n blocks in each of three groups")
    for field, value in sizes.items():
        check_whole(owner, field, value, 1)
    return (depth - 2) // 6


@checked
def resnet26(
    input_shape: Sequence[int],
    outputs: int,
    *,
    norm: str = "group",
    width: int = 1,
    groups: int = 8,
    depth: int = 26,
    preprocess: Callable[[PyTree], PyTree] = scale_images,
) -> Model:
    """A residual network of pre-activation blocks: three groups of 16, 32 and 64 channels times `width`.

        x_{i+1} = shortcut(x_i) + conv(relu(norm(conv(relu(norm(x_i))))))

    The second and the third group halve height and width; their shortcuts are average pooling, and channels of zeros.

    Args:
      input_shape: of one example, `(height, width)` or `(height, width, channels)`, both lengths multiples of 4.
      outputs: `C`.
      norm: "group", or "batch" with running statistics in `model_state`.
      width: factor of the channels.
      groups: of channels, for norm="group".
      depth: 6 n + 2 layers, n blocks in each group; 26 has n = 4.
      preprocess: of x; by default uint8 images become floats in [0, 1] and floats stay.

    Returns:
      A `Model` without units (residual streams tie them), with taps of `conv`, of `group_1/block_0/conv_0` and its
      like, of `output`, and of the whole of `group_1`, `group_2` and `group_3`, so that `taps["group_3"][0]` is where a
      branch beside the last group begins.

    Raises:
      ValueError: sizes below 1, an unknown norm, another depth, channels that are no multiple of `groups`, lengths that
        cannot be halved twice.

    Source: the ResNet-26 of Sun et al. 2020, arXiv 1909.13231; He et al. 2016, arXiv 1603.05027.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> model = resnet26((8, 8, 3), 10, depth=8)
      >>> params, _ = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3), jnp.uint8))
      >>> params["group_3"]["block_0"]["conv_0"]["kernel"].shape
      (3, 3, 32, 64)
    """
    blocks = _blocks("resnet26", depth, outputs=outputs, width=width, groups=groups)
    check_norm("resnet26", norm, KINDS, groups, 16)
    if len(input_shape) not in (2, 3):
        raise ValueError(
            f"resnet26: input_shape is {tuple(input_shape)}, but it must be (height, width) or with channels"
        )
    for length in input_shape:
        check_whole("resnet26", "input_shape", length, 1)
    height, wide, *channels = input_shape
    if height % 4 or wide % 4:
        raise ValueError(f"resnet26: input_shape is {tuple(input_shape)}, but both lengths must be multiples of 4")
    shape = (height, wide, channels[0] if channels else 1)
    return from_nnx(
        lambda rngs: ResNet(shape, blocks, width, outputs, norm, groups, rngs),
        preprocess=preprocess,
        input_shape=tuple(input_shape),
    )


@checked
def resnet_tail(outputs: int, *, norm: str = "group", width: int = 1, groups: int = 8, depth: int = 26) -> Model:
    """The part of `resnet26` from its last group on, for the input that `taps["group_3"]` of such a network holds.

    Args:
      outputs, norm, width, groups, depth: see `resnet26`.

    Returns:
      A `Model` for inputs `[height / 2, width / 2, 32 width]`.

    Raises:
      ValueError: see `resnet26`.

    Source: the branch for self-supervision of Sun et al. 2020, arXiv 1909.13231.

    Example:
      >>> from cl_zoo.models import resnet26
      >>> from cl_zoo.wrappers import with_rotation_head
      >>> model = with_rotation_head(resnet26((32, 32, 3), 10), resnet_tail(4), reads="group_3")
    """
    blocks = _blocks("resnet_tail", depth, outputs=outputs, width=width, groups=groups)
    check_norm("resnet_tail", norm, KINDS, groups, 16)

    def make(rngs: nnx.Rngs) -> Any:
        return Tail(blocks, width, outputs, norm, groups, rngs)

    return from_nnx(make)
