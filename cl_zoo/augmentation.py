"""Random changes of examples as they are learned from; memories keep them as they came."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from cl_zoo.checks import Count, checked
from cl_zoo.types import Array, Batch, Component, Context, Key, PyTree, TrainState

__all__ = ["augment", "cut", "random_crop", "random_flip"]


@checked
def augment(function: Callable[[Key, PyTree], PyTree], *, name: str = "augment") -> Component:
    """x_b <- f(key_b, x_b) before the forward pass, a new draw for every example in every update.

    Components that keep examples (`replay`, `icarl`) keep them as they came. It changes what stands before it: after
    `replay` in `compose`, replayed examples too; before it, incoming ones alone.

    Args:
      function: `(key, x) -> x` of one example, of the same shape and type: `random_crop(4)`, say.
      name: of the component.

    Returns:
      A component without state of its own.

    Raises:
      ValueError: at the trace, where the function gives another shape or type.

    Example:
      >>> import optax
      >>> from cl_zoo import compose, replay, supervised
      >>> from cl_zoo.models import cnn
      >>> model = cnn((32, 32, 3), 10)
      >>> learner = compose(model, optax.adam(1e-3), supervised(), replay(500), augment(random_crop(4)))
    """

    def prepare(context: Context, state: TrainState, part: None, batch: Batch, key: Key) -> tuple[Batch, None]:
        keys = jax.random.split(key, batch.weight.shape[0])
        x = jax.vmap(function)(keys, batch.x)
        told = [f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(x)]
        wanted = [f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(batch.x)]
        if told != wanted:
            raise ValueError(
                f"{name}: function makes {', '.join(told)} of {', '.join(wanted)}, but it must keep the kind"
            )
        return batch._replace(x=x), None

    return Component(name, prepare=prepare)


@checked
def random_crop(padding: Count) -> Callable[[Key, Array], Array]:
    """`(key, image) -> image`: `[height, width, ...]` moved by up to `padding` pixels in both directions, uniformly,
    zeros coming in at its edges."""

    return lambda key, image: cut(image, jax.random.randint(key, (2,), 0, 2 * padding + 1), padding)


def cut(image: Array, corner: Array, padding: int) -> Array:
    """What of `[height, width, ...]`, padded with zeros, begins at a corner, `i32[2]` from 0 to 2 padding."""
    rest = [(0, 0)] * (image.ndim - 2)
    start = [corner[0], corner[1], *(jnp.zeros_like(corner[0]) for _ in rest)]
    return jax.lax.dynamic_slice(jnp.pad(image, [(padding, padding)] * 2 + rest), start, image.shape)


def random_flip() -> Callable[[Key, Array], Array]:
    """`(key, image) -> image`: mirrored left to right with probability 1/2."""

    def flip(key: Key, image: Array) -> Array:
        return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)

    return flip
