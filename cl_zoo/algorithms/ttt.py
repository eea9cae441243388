"""Test-time training: before it classifies an image, the network learns to predict its rotation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from cl_zoo.augmentation import cut
from cl_zoo.checks import Count, Fraction, NonNegative, Whole, check_whole, checked
from cl_zoo.entries import Entry, Null
from cl_zoo.estimators.inner_loop import inner_loop
from cl_zoo.losses import cross_entropy, weighted_mean
from cl_zoo.types import Array, Batch, Component, Context, Key, PyTree, TrainState

__all__ = ["ENTRY", "TttState", "crop_and_flip", "quarter_turns", "ttt"]


class TttState(NamedTuple):
    """Attributes:
    calls: `i32[]`, test batches learned from so far, so that each draws afresh.
    """

    calls: Array


def quarter_turns(owner: str, images: Array) -> Array:
    """Square images `[B, H, H]` or `[B, H, H, C]` rotated by 0, 90, 180, 270 degrees, `[4, B, ...]`.

    Raises:
      ValueError: anything but one array of square images.

    Example:
      >>> import jax.numpy as jnp
      >>> quarter_turns("ttt", jnp.array([[[1, 2], [3, 4]]]))[1].tolist()
      [[[2, 4], [1, 3]]]
    """
    shape = getattr(images, "shape", None)
    if shape is None or len(shape) not in (3, 4) or shape[1] != shape[2]:
        raise ValueError(
            f"{owner}: x is {'a pytree' if shape is None else f'of shape {shape}'}, but it must be square images to be"
            " rotated, [B, H, H] or [B, H, H, C]"
        )
    return jnp.stack([jnp.rot90(images, turns, axes=(1, 2)) for turns in range(4)])


def crop_and_flip(pad: int = 4, flip: bool = True) -> Callable[[Array, Key], Array]:
    """Shifts each image by up to `pad` pixels, filled with zeros, and mirrors it or not: the usual augmentation of
    natural images. `(images [N, H, W] or [N, H, W, C], key) -> images`.

    Args:
      pad: in pixels, at least 0.
      flip: whether half of them are mirrored; not for digits, which mirroring changes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> crop_and_flip(1)(jnp.ones((2, 4, 4, 3), jnp.uint8), jax.random.key(0)).shape
      (2, 4, 4, 3)
    """
    check_whole("crop_and_flip", "pad", pad, 0)

    def one(image: Array, corner: Array, mirror: Array) -> Array:
        found = cut(image, corner, pad)
        return jnp.where(mirror, found[:, ::-1], found)

    def augment(images: Array, key: Key) -> Array:
        corner_key, mirror_key = jax.random.split(key)
        corners = jax.random.randint(corner_key, (images.shape[0], 2), 0, 2 * pad + 1)
        mirrors = jax.random.bernoulli(mirror_key, 0.5, (images.shape[0],)) & flip
        return jax.vmap(one)(images, corners, mirrors)

    return augment


@checked
def ttt(
    learning_rate: NonNegative = 1e-3,
    *,
    steps: Whole = 10,
    views: Count = 32,
    augment: Callable[[Array, Key], Array] | None = None,
    joint: NonNegative = 1.0,
    threshold: Fraction | None = None,
    name: str = "ttt",
) -> Component:
    """In training the rotation head learns beside the main head; at test time it and the trunk learn from test images.

        R(p; x, r) = CE(rotation logits of x rotated by 90 r degrees at p, r),   r = 0, 1, 2, 3
        training:   L(p) = L_main(p) + joint * mean over b, r of R(p; x_b, r)
        test time:  p_0 = p;   p_{i+1} = p_i - learning_rate * grad mean over b, v of R(p_i; augment(x_b), r_bv)
                    outputs: main(x_b; p_steps)

    In every step each of the B test images has `views` new views, augmented and then rotated, with r_bv random. With
    B = 1 it is the paper's single image. The main branch gets no gradient. The updated weights stay in the state:
    `evaluate_adapting(reset=)` decides whether they are kept for the next test batch (online, with steps=1) or not.

    Args:
      learning_rate: of plain gradient descent at test time, at least 0.
      steps: at test time, at least 0.
      views: of each test image in each step, at least 1.
      augment: `(images, key) -> images`, of views before they are rotated; None leaves them as they are.
        `crop_and_flip()` for natural images.
      joint: weight of the rotation loss in training, at least 0.
      threshold: in [0, 1]; an image that the head predicts to be upright with at least this probability is not
        learned from. None learns from all.
      name: key in state and metrics.

    Returns:
      A component with a `TttState`, beside `supervised`, for models from `with_rotation_head`; the metric `rotation`,
      its loss in training.

    Raises:
      ValueError: a number outside its range; at the first trace, a model without a rotation head, x that is not square
        images.

    Source: Sun et al. 2020, "Test-time training with self-supervision for generalization under distribution shifts",
    arXiv 1909.13231.

    Differences from the paper or its code: the code's head begins as a copy of the main branch, values included, here
    it is initialised on its own. The code takes the confidence for the threshold from one view and skips the image;
    here each image of a batch is skipped on its own. At test time the network runs in evaluation mode, so batch
    normalisation uses its running statistics; theirs are of the 32 views, unless an option fixes them. In training the
    four rotations are a forward pass of their own, which leaves running statistics as they are. A batch of B images
    takes the mean over all their views; the paper has B = 1. With batch normalisation, their default also predicts with
    running statistics that the views have moved.

    Example:
      >>> import optax
      >>> from cl_zoo import compose, supervised, ttt
      >>> from cl_zoo.models import mlp
      >>> from cl_zoo.wrappers import with_rotation_head
      >>> model = with_rotation_head(mlp((28, 28), 10, hidden=(64,)), mlp((64,), 4, hidden=()), reads="output")
      >>> learner = compose(model, optax.sgd(0.1), supervised(), ttt(learning_rate=1e-3))
    """

    def logits(context: Context, state: TrainState, params: PyTree, batch: Batch, **options: object) -> Array:
        """The rotation head's logits, `[B, 4]`."""
        _, _, taps = context.model.apply(
            params, state.model_state, batch.x, task=batch.task, weight=batch.weight, **options
        )
        told = [z for layer, (_, z) in taps.items() if layer.startswith("rotation_head/")]
        if not told:
            raise ValueError(f"{name}: the model has no rotation head; wrap it with with_rotation_head")
        return told[-1]

    def repeated(batch: Batch, times: int, x: PyTree) -> Batch:
        """Examples in blocks, each the whole batch."""
        again = lambda leaf: jnp.tile(leaf, times)  # noqa: E731
        return Batch(x, None, None if batch.task is None else again(batch.task), again(batch.weight))

    def init(context: Context, state: TrainState, batch: Batch, key: Key) -> TttState:
        return TttState(jnp.zeros((), jnp.int32))

    def loss(
        context: Context,
        state: TrainState,
        part: TttState,
        params: PyTree,
        forward: Callable[[], PyTree],
        batch: Batch,
        key: Key,
    ) -> tuple[Array, dict[str, PyTree]]:
        turned = quarter_turns(name, batch.x)
        rows = repeated(batch, 4, turned.reshape((-1, *turned.shape[2:])))
        turns = jnp.repeat(jnp.arange(4), batch.weight.shape[0])
        found = weighted_mean(
            cross_entropy(logits(context, state, params, rows, key=key, train=True), turns), rows.weight
        )
        return joint * found, {"rotation": found}

    def adapt(
        context: Context, state: TrainState, part: TttState, batch: Batch, key: Key
    ) -> tuple[TrainState, TttState, None]:
        key, size = jax.random.fold_in(key, part.calls), batch.weight.shape[0]
        quarter_turns(name, batch.x)  # refuses what cannot be rotated
        learnt_from = batch
        if threshold is not None:
            upright = jax.nn.softmax(logits(context, state, state.params, batch))[:, 0]
            learnt_from = batch._replace(weight=jnp.where(upright < threshold, batch.weight, 0.0))

        def step_loss(params: PyTree, i: Array) -> Array:
            augment_key, turn_key = jax.random.split(jax.random.fold_in(key, i))
            x = jnp.broadcast_to(batch.x, (views, *batch.x.shape)).reshape((-1, *batch.x.shape[1:]))
            x = x if augment is None else augment(x, augment_key)
            turns = jax.random.randint(turn_key, (views * size,), 0, 4)
            x = quarter_turns(name, x)[turns, jnp.arange(views * size)]
            rows = repeated(learnt_from, views, x)
            return weighted_mean(cross_entropy(logits(context, state, params, rows), turns), rows.weight)

        params, _ = inner_loop(step_loss, state.params, optax.sgd(learning_rate), steps)
        calls = part.calls + jnp.any(batch.weight > 0).astype(jnp.int32)
        return state._replace(params=params), TttState(calls), None

    return Component(name, init=init, loss=loss, adapt=adapt)


ENTRY = Entry(
    name="ttt",
    family="test-time training",
    summary="nothing; the trunk first learns to predict the rotation (0, 90, 180, 270 degrees) of each test image",
    factory=ttt,
    arguments={"learning_rate": 0.1, "joint": 1.0, "steps": 2, "views": 4},
    numbers=("learning_rate", "joint"),
    papers=("sun2020test",),
    null=Null({"joint": 0.0, "learning_rate": 0.0}, "rotation loss of weight 0, test-time steps of size 0"),
    results="ttt",
)
