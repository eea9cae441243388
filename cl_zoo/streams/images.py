"""Split, permuted and rotated digits (or any labelled images) as task-, domain- and class-incremental streams."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cl_zoo.checks import Count, NonNegative, check_range, check_whole, checked
from cl_zoo.datasets.images import LabelledImages, check_images, load_digits
from cl_zoo.streams._blurry import Mixing
from cl_zoo.streams.arrays import Joint, Outputs, Scenario, array_stream, locate, scenario_tasks
from cl_zoo.types import Array, Key, PyTree, Stream

__all__ = ["ImageData", "permuted_mnist", "rotated_mnist", "split_mnist"]

_SPLITS = ("train", "validation", "test")


class ImageData(NamedTuple):
    """One copy of the images, and what makes tasks of them.

    Attributes:
      images: `uint8[N, height, width]`, sorted by split and class.
      start, count: `i32[3, K]`, where each class of each split begins, and how many there are.
      classes: `i32[T, k]`, the classes of each task; an example's label within its task is its class's place there.
      permutations: `i32[T, pixels]`, or None.
      angles: `f32[T]` in degrees, anticlockwise, or None.
      mixing: numbers of the `Mixing`, or None.
    """

    images: Array
    start: Array
    count: Array  # type: ignore[assignment]
    classes: Array
    permutations: Any
    angles: Any
    mixing: Any = None


@checked
def split_mnist(
    n_tasks: int = 5,
    scenario: Scenario = "task",
    *,
    images: LabelledImages | None = None,
    key: Key | None = None,
    outputs: Outputs = "seen",
    **options: Any,
) -> Stream:
    """The classes are dealt out to tasks: {0, 1}, {2, 3}, ... or, with a key, in random order.

    Labels are numbered in the order in which classes come: task t has labels t k, ..., t k + k - 1, or 0, ..., k - 1
    if domain-incremental. If `n_tasks` does not divide the number of classes, the last classes are left out.

    Args:
      n_tasks: `T`, from 1 to the number of classes.
      scenario: "task", "domain" or "class", see `scenario_tasks`.
      images: any labelled images; None takes the embedded digits.
      key: draws the class order; None keeps 0, 1, 2, ...
      outputs: "seen" or "all", see `scenario_tasks`.
      **options: see `image_stream`.

    Returns:
      A `Stream` of `uint8` images.

    Raises:
      ValueError: an impossible value, named.

    Source: Zenke et al. 2017, arXiv 1703.04200; the three scenarios: van de Ven et al. 2022.

    Example:
      >>> stream = split_mnist(scenario="class", steps=10)
      >>> stream.n_tasks, stream.tasks.active.shape
      (5, (5, 10))
    """
    images = _images("split_mnist", images)
    n_classes = _n_classes(images)
    check_whole("split_mnist", "n_tasks", n_tasks, 1, n_classes)
    per_task = n_classes // n_tasks

    def deal(data: ImageData, key: Key) -> ImageData:
        order = jax.random.permutation(key, n_classes)[: n_tasks * per_task]
        return data._replace(classes=order.reshape(n_tasks, per_task).astype(jnp.int32))

    classes = np.arange(n_tasks * per_task, dtype=np.int32).reshape(n_tasks, per_task)
    return image_stream(
        images,
        classes,
        scenario,
        draw=deal,
        key=key,
        outputs=outputs,
        pixels=lambda data, task, image: image,
        **options,
    )


@checked
def permuted_mnist(
    n_tasks: Count = 10,
    scenario: Scenario = "domain",
    *,
    images: LabelledImages | None = None,
    key: Key | None = None,
    outputs: Outputs = "seen",
    **options: Any,
) -> Stream:
    """Every task has all classes, its pixels in a random order of its own, applied as images are fetched.

    Args:
      n_tasks: `T`, at least 1.
      scenario: "task", "domain" or "class", see `scenario_tasks`.
      images: any labelled images; None takes the embedded digits.
      key: draws the permutations; None is key 0. All tasks are permuted, the first too.
      outputs: "seen" or "all", see `scenario_tasks`.
      **options: see `image_stream`.

    Returns:
      A `Stream` of `uint8` images.

    Raises:
      ValueError: an impossible value, named.

    Source: Goodfellow et al. 2013, arXiv 1312.6211; Kirkpatrick et al. 2017, arXiv 1612.00796.

    Example:
      >>> permuted_mnist(n_tasks=3, steps=10).tasks.active.shape
      (3, 10)
    """
    images = _images("permuted_mnist", images)
    n_pixels = math.prod(images.train_images.shape[1:3])

    def draw(data: ImageData, key: Key) -> ImageData:
        keys = jax.vmap(lambda task: jax.random.fold_in(key, task))(jnp.arange(n_tasks))
        return data._replace(
            permutations=jax.vmap(lambda k: jax.random.permutation(k, n_pixels))(keys).astype(jnp.int32)
        )

    def permute(data: ImageData, task: Array, image: Array) -> Array:
        flat = image.reshape((n_pixels, *image.shape[2:]))
        return flat[data.permutations[task]].reshape(image.shape)

    return image_stream(
        images,
        np.tile(np.arange(_n_classes(images), dtype=np.int32), (n_tasks, 1)),
        scenario,
        draw=draw,
        key=jax.random.key(0) if key is None else key,
        outputs=outputs,
        pixels=permute,
        **options,
    )


@checked
def rotated_mnist(
    n_tasks: Count = 10,
    scenario: Scenario = "domain",
    *,
    images: LabelledImages | None = None,
    key: Key | None = None,
    angles: Sequence[float] | None = None,
    largest_angle: NonNegative = 180.0,
    outputs: Outputs = "seen",
    **options: Any,
) -> Stream:
    """Every task has all classes, its images rotated by an angle of its own (bilinear), as they are fetched.

    Args:
      n_tasks: `T`, at least 1.
      scenario: "task", "domain" or "class", see `scenario_tasks`.
      images: any labelled images; None takes the embedded digits.
      key: draws the angles; None is key 0.
      angles: degrees anticlockwise, one per task; None draws them from U(0, largest_angle).
      largest_angle: in degrees.
      outputs: "seen" or "all", see `scenario_tasks`.
      **options: see `image_stream`.

    Returns:
      A `Stream` of images as given. With given `angles`, `reorder` shuffles them over the tasks.

    Raises:
      ValueError: an impossible value, named.

    Source: Lopez-Paz and Ranzato 2017, arXiv 1706.08840.

    Example:
      >>> rotated_mnist(n_tasks=2, angles=[0.0, 90.0], steps=10).data.angles.tolist()
      [0.0, 90.0]
    """
    images = _images("rotated_mnist", images)
    if angles is not None and len(angles) != n_tasks:
        raise ValueError(f"rotated_mnist: angles has {len(angles)} values, but there are {n_tasks} tasks")
    given = None if angles is None else np.asarray(angles, np.float32)

    def draw(data: ImageData, key: Key) -> ImageData:
        if given is not None:
            return data._replace(angles=jax.random.permutation(key, jnp.asarray(given)))
        return data._replace(angles=jax.random.uniform(key, (n_tasks,), maxval=largest_angle))

    stream = image_stream(
        images,
        np.tile(np.arange(_n_classes(images), dtype=np.int32), (n_tasks, 1)),
        scenario,
        draw=draw,
        key=jax.random.key(0) if key is None else key,
        outputs=outputs,
        pixels=lambda data, task, image: rotate(image, data.angles[task]),
        **options,
    )
    if given is None:
        return stream
    return dataclasses.replace(stream, data=stream.data._replace(angles=jnp.asarray(given)))


def rotate(image: Array, degrees: Array) -> Array:
    """`[height, width]` (channels may follow) rotated anticlockwise about its centre, bilinear, 0 outside. Pixels that
    are whole numbers stay whole."""
    if image.ndim == 3:
        return jax.vmap(lambda channel: rotate(channel, degrees), in_axes=2, out_axes=2)(image)
    height, width = image.shape
    row, column = jnp.meshgrid(
        jnp.arange(height) - (height - 1) / 2, jnp.arange(width) - (width - 1) / 2, indexing="ij"
    )
    sin, cos = jnp.sin(jnp.deg2rad(degrees)), jnp.cos(jnp.deg2rad(degrees))
    source = [cos * row + sin * column + (height - 1) / 2, cos * column - sin * row + (width - 1) / 2]
    rotated = jax.scipy.ndimage.map_coordinates(image.astype(jnp.float32), source, order=1, mode="constant")
    whole = jnp.issubdtype(image.dtype, jnp.integer)
    return (jnp.round(rotated) if whole else rotated).astype(image.dtype)


def image_stream(
    images: LabelledImages,
    classes: np.ndarray,
    scenario: Scenario,
    *,
    draw: Callable[[ImageData, Key], ImageData],
    key: Key | None,
    pixels: Callable[[ImageData, Array, Array], Array],
    outputs: Outputs = "seen",
    batch_size: int = 128,
    steps: int | None = None,
    epochs: int = 1,
    updates_per_batch: int = 1,
    validation: float = 0.0,
    joint: Joint | None = None,
    mixing: Mixing | None = None,
    sample_size: int | None = None,
    sample_batch: int = 500,
    evaluation_batch: int = 1000,
) -> Stream:
    """What split, permuted and rotated streams share.

    Args:
      images: labelled images.
      classes: `i32[T, k]`.
      scenario, outputs: see `scenario_tasks`.
      draw: `(data, key) -> data`, the tasks drawn again.
      key: for a first draw; None keeps `classes`.
      pixels: `(data, task, image) -> image`.
      batch_size: examples per training batch.
      steps: batches per task; None takes as many as `epochs` have, for tasks of average size.
      epochs: passes over each task where `steps` is None.
      updates_per_batch: how often in a row each batch is handed out. `steps` counts all of them, so it must be a
        multiple, and the same epochs take so many times as many.
      mixing: None, one task after another; or `blurry(...)` or `drifting(...)`, a stream without task boundaries,
        for scenario "domain", or "class" with outputs="all". Where `steps` is None, a blurry one has as many as its
        examples suffice for.
      validation: fraction of each class's training images that is held out, in [0, 0.999].
      joint, sample_size, sample_batch, evaluation_batch: see `array_stream`.

    Returns:
      A `Stream`.

    Raises:
      ValueError: an impossible value, named.
    """
    check_range("stream", "validation", validation, 0, 0.999)
    check_whole("stream", "epochs", epochs, 1)
    check_whole("stream", "updates_per_batch", updates_per_batch, 1)
    check_whole("stream", "batch_size", batch_size, 1)
    n_tasks, per_task = classes.shape
    n_classes = _n_classes(images)
    sorted_images, start, count = _sort(images, n_classes, validation)
    data = ImageData(
        jnp.asarray(sorted_images), jnp.asarray(start), jnp.asarray(count), jnp.asarray(classes), None, None
    )
    empty = np.flatnonzero(count[2][classes].sum(axis=1) == 0)
    if key is None and len(empty):
        warnings.warn(f"stream: task {empty[0]} has no test examples, so its score will be nan", stacklevel=4)
    if key is not None:
        data = jax.jit(draw)(data, key)
    by_size = np.sort(count, axis=1)
    average = int(count[0].sum()) * per_task // n_classes
    per_epoch = max(average // batch_size, 1)
    if epochs > 1 and steps is not None:
        raise ValueError(f"stream: epochs is {epochs} and steps is {steps}, but only one of them may be given")
    n_steps = epochs * per_epoch * updates_per_batch if steps is None else steps
    if mixing is not None:
        data = data._replace(mixing=mixing.numbers(n_tasks, per_task))
    if mixing is not None and mixing.most_steps is not None:
        most = mixing.most_steps(count[0], n_tasks, per_task, batch_size) * updates_per_batch
        if epochs > 1 or (steps is not None and steps > most):
            raise ValueError(
                f"stream: epochs is {epochs} and steps is {steps}, but every example of a blurry stream comes at most"
                f" once: epochs must be 1, and steps at most {most}"
            )
        n_steps = most if steps is None else steps

    def size(data: ImageData, split: str) -> Array:
        return jnp.sum(data.count[_SPLITS.index(split)][data.classes], axis=1)

    def fetch(data: ImageData, split: str, task: Array, index: Array) -> tuple[Array, Array]:
        mine = data.classes[task]
        place, offset = locate(data.count[_SPLITS.index(split)][mine], index)
        image = data.images[data.start[_SPLITS.index(split)][mine[place]] + offset]
        label = place if scenario == "domain" else task * per_task + place
        return pixels(data, task, image), label.astype(jnp.int32)

    def rows(data: ImageData, cursor: PyTree) -> tuple[Array, Array, PyTree]:
        sizes = data.count[0][data.classes]
        part, row, cursor = mixing.draw(data.mixing, sizes, cursor, n_steps // updates_per_batch, batch_size)  # type: ignore[union-attr]
        first = jnp.cumsum(sizes, axis=1) - sizes
        return part // per_task, jnp.ravel(first)[part] + row, cursor

    return array_stream(
        data,
        scenario_tasks(scenario, n_tasks, per_task, outputs),
        size=size,
        fetch=fetch,
        largest={split: int(by_size[i, -per_task:].sum()) for i, split in enumerate(_SPLITS)},
        smallest=int(by_size[0, :per_task].sum()),
        steps=n_steps,
        batch_size=batch_size,
        task_ids=scenario == "task",
        reorder=draw,
        joint=joint,
        order=None if mixing is None else (lambda key: mixing.init(key, n_tasks * per_task), rows),
        updates_per_batch=updates_per_batch,
        sample_size=sample_size,
        sample_batch=sample_batch,
        evaluation_batch=evaluation_batch,
    )


def _images(owner: str, images: LabelledImages | None) -> LabelledImages:
    """The embedded digits where none are given; others are checked."""
    if images is None:
        return load_digits()
    images = LabelledImages(*(np.asarray(part) for part in images))
    check_images(owner, images)
    return images


def _n_classes(images: LabelledImages) -> int:
    return int(max(images.train_labels.max(), images.test_labels.max())) + 1


def _sort(images: LabelledImages, n_classes: int, validation: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images by split and class, and where each class begins: `[N, ...]`, `[3, K]`, `[3, K]`."""
    train, test = images.train_images, images.test_images
    rows: list[list[np.ndarray]] = [[], [], []]
    for label in range(n_classes):
        mine = np.flatnonzero(images.train_labels == label)
        held_out = round(validation * len(mine))
        rows[0].append(mine[: len(mine) - held_out])
        rows[1].append(mine[len(mine) - held_out :])
        rows[2].append(len(train) + np.flatnonzero(images.test_labels == label))
    count = np.array([[len(r) for r in split] for split in rows], np.int32)
    start = (np.cumsum(count) - count.ravel()).reshape(count.shape).astype(np.int32)
    order = np.concatenate([np.concatenate(split) for split in rows])
    return np.concatenate([train, test])[order], start, count
