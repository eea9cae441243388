"""Classes to distinguish from a few images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cl_zoo.checks import Count, Range, check_range, check_whole, checked
from cl_zoo.datasets.few_shot_images import FewShotImages
from cl_zoo.datasets.images import LabelledImages, check_labels, check_pixels, load_digits
from cl_zoo.losses import label_accuracy, reads_ignored
from cl_zoo.shuffle import shuffled_index
from cl_zoo.streams.episodes import episode_stream
from cl_zoo.types import Array, Batch, Episode, Key, Stream

__all__ = ["FewShotData", "few_shot", "trajectories"]


class FewShotData(NamedTuple):
    """Attributes:
    images: `uint8[N, height, width]` or with channels last, sorted by class.
    start, count: `i32[K]`, where each class begins, and how many images it has.
    train, validation, test: `i32[T, k]`, the classes of each task.
    """

    images: Array
    start: Array
    count: Array  # type: ignore[assignment]
    train: Array
    validation: Array
    test: Array


@checked
def few_shot(
    images: LabelledImages | FewShotImages | None = None,
    *,
    n_tasks: Count = 1,
    steps: int = 60_000,
    n_way: Annotated[int, Range(2)] = 5,
    shots: Count = 1,
    queries: Count = 15,
    batch_size: int = 4,
    train_classes: Sequence[int] | None = None,
    validation_classes: Sequence[int] | float | None = None,
    test_classes: Sequence[int] | float | None = None,
    rotations: bool = False,
    key: Key | None = None,
    **options: Any,
) -> Stream:
    """Every example is an episode: N classes, K images of each to learn from, Q to classify. Tests use other classes.

    The classes of an episode are drawn from those of its split and task, and the images of a class from all that it
    has, both without replacement. The order of the draw gives the labels 0, ..., N - 1; support and query are in
    random order.

    Args:
      images: any labelled images; training and test images of a class are put together. None takes the embedded
        digits.
      n_tasks: `T`. The classes of each split are dealt out to the tasks in equal numbers; what is left over is unused.
      steps: batches per task.
      n_way: N, at least 2.
      shots: K, at least 1.
      queries: Q, for each class, at least 1.
      batch_size: episodes per batch (the meta-batch).
      train_classes: which ones; None takes the image set's own, or all, less those of validation and test.
      validation_classes: which ones, or what fraction of all classes: the last of those not for testing. None
        takes the image set's own, or none.
      test_classes: which ones, or what fraction of all classes: the last. None takes the image set's own, or half.
      rotations: each class becomes four, its images rotated by 0, 90, 180 and 270 degrees as they are fetched. All four
        stay in one split and task.
      key: draws which task gets which classes of a split; None deals them out in order.
      **options: `task_ids`, `sample_size`, `evaluation_size` and `evaluation_batch`, see `episode_stream`.

    Returns:
      A `Stream` with x an `Episode` of `uint8[B, N K, ...]`, `i32[B, N K]` and `uint8[B, N Q, ...]`, y `i32[B, N Q]`,
      and N outputs. The score is the accuracy on an episode's queries.

    Raises:
      ValueError: an impossible value, named; or, when it is asked for, a validation split without classes.

    Source: Vinyals et al. 2016, arXiv 1606.04080; steps, queries and batches: Finn, Abbeel and Levine 2017, arXiv
    1703.03400, for mini-ImageNet; rotated characters as classes: Santoro et al. 2016, arXiv 1605.06065.

    Example:
      >>> import jax
      >>> stream = few_shot(steps=100, shots=2, queries=3)
      >>> batch, cursor = stream.next(stream.init(jax.random.key(0)))
      >>> batch.x.support_x.shape, batch.x.support_y.shape, batch.y.shape
      ((4, 10, 28, 28), (4, 10), (4, 15))
    """
    owner = "few_shot"
    turns = 4 if rotations else 1
    pixels, labels, own = _pooled(load_digits() if images is None else images)
    if rotations and pixels.shape[1] != pixels.shape[2]:
        raise ValueError(f"{owner}: rotations is True, but images of {pixels.shape[1:3]} pixels are not square")
    splits = _class_splits(owner, np.unique(labels), own, train_classes, validation_classes, test_classes)
    count = np.bincount(labels)
    for split, classes in splits.items():
        each = turns * (len(classes) // n_tasks)
        if each < n_way and not (split == "validation" and len(classes) == 0):
            raise ValueError(
                f"{owner}: n_way is {n_way}, but each of {n_tasks} tasks has {each} {split} classes, of"
                f" {turns * len(classes)} in all; give more in {split}_classes, or a smaller n_way or n_tasks"
            )
        for label in classes:
            if count[label] < shots + queries:
                raise ValueError(
                    f"{owner}: shots is {shots} and queries is {queries}, but class {label} has only {count[label]}"
                    f" images; together they must be at most {count[label]}"
                )

    def deal(data: FewShotData, key: Key | None) -> FewShotData:
        def groups(classes: np.ndarray, key: Key | None) -> Array:
            order = jnp.asarray(classes, jnp.int32) if key is None else jax.random.permutation(key, classes)
            each = len(classes) // n_tasks
            return order[: n_tasks * each].reshape(n_tasks, each).astype(jnp.int32)

        keys = [None] * 3 if key is None else jax.random.split(key, 3)
        return data._replace(**{split: groups(splits[split], k) for split, k in zip(splits, keys, strict=True)})

    def draw(data: FewShotData, split: str, task: Array, key: Key) -> tuple[Episode, Array]:
        group = getattr(data, split)[task]
        if group.shape[0] == 0:
            raise ValueError(f"{owner}: there are no {split} classes; hold some out with {split}_classes")
        picked = shuffled_index(key, jnp.arange(n_way), turns * group.shape[0], 0)
        classes = group[picked // turns]
        drawn = jnp.arange(shots + queries)
        rows = jax.vmap(lambda c, p: shuffled_index(key, drawn, data.count[c], 3 + p))(classes, picked)
        rows = rows + data.start[classes][:, None]

        def part(first: int, each: int, salt: int) -> tuple[Array, Array]:
            """`each` images of every class, from the `first` on, and their labels."""
            place = shuffled_index(key, jnp.arange(n_way * each), n_way * each, salt)
            label, image = place // each, data.images[rows[place // each, first + place % each]]
            return (jax.vmap(_turn)(image, picked[label] % turns) if rotations else image), label

        support_x, support_y = part(0, shots, 1)
        query_x, query_y = part(shots, queries, 2)
        return Episode(support_x, support_y, query_x), query_y

    @reads_ignored
    def score(outputs: Array, batch: Batch) -> Array:
        return jnp.mean(label_accuracy(outputs, batch.y), axis=1)

    order = np.argsort(labels, kind="stable")
    start = np.cumsum(count) - count
    data = deal(FewShotData(jnp.asarray(pixels[order]), *_i32(start, count), *[jnp.zeros((), jnp.int32)] * 3), key)
    sizes: dict[str, Any] = {"n_tasks": n_tasks, "steps": steps, "batch_size": batch_size}
    return episode_stream(owner, data, draw, n_outputs=n_way, score=score, reorder=deal, **sizes, **options)


@checked
def trajectories(
    images: LabelledImages | FewShotImages | None = None,
    *,
    steps: int = 20_000,
    n_way: Count = 1,
    shots: Count = 20,
    remembered: Count = 64,
    test_way: int | None = None,
    queries: Count = 5,
    batch_size: int = 1,
    train_classes: Sequence[int] | None = None,
    validation_classes: Sequence[int] | float | None = None,
    test_classes: Sequence[int] | float | None = None,
    **options: Any,
) -> Stream:
    """Every example is a trajectory, image after image of one class and then of the next, and queries after it.

    In training the support goes through `n_way` classes, `shots` images of each, and the query holds these images and
    `remembered` random ones of all training classes. In tests it goes through `test_way` unseen classes, and the query
    holds other images of them. A label is the place of its class among those of the split.

    Args:
      images: see `few_shot`.
      steps: batches.
      n_way: classes of a trajectory, at least 1.
      shots: images of each, at least 1.
      remembered: random images in the query of training, at least 1.
      test_way: classes of a test trajectory; None takes all of the split.
      queries: new images of each class in tests, at least 1.
      batch_size: trajectories per batch.
      train_classes, validation_classes, test_classes: see `few_shot`.
      **options: see `episode_stream`.

    Returns:
      A `Stream` of one task with x an `Episode` of `uint8[B, n_way shots, ...]`, `i32[B, n_way shots]` and
      `uint8[B, n_way shots + remembered, ...]`, and as many outputs as the largest split has classes. The score is the
      accuracy on a trajectory's queries.

    Raises:
      ValueError: an impossible value, named; or, when it is asked for, a validation split without classes.

    Source: Javed and White 2019, arXiv 1905.12588.

    Example:
      >>> import jax
      >>> stream = trajectories(steps=100, shots=3, remembered=4)
      >>> batch, cursor = stream.next(stream.init(jax.random.key(0)))
      >>> batch.x.support_x.shape, batch.x.support_y.shape, batch.y.shape
      ((1, 3, 28, 28), (1, 3), (1, 7))
    """
    owner = "trajectories"
    pixels, labels, own = _pooled(load_digits() if images is None else images)
    splits = _class_splits(owner, np.unique(labels), own, train_classes, validation_classes, test_classes)
    tested = len(splits["test"]) if test_way is None else test_way
    check_whole(owner, "n_way", n_way, 1, len(splits["train"]))
    check_whole(owner, "test_way", tested, 1, len(splits["test"]))
    count = np.bincount(labels)
    for split, needed in (("train", shots), ("validation", shots + queries), ("test", shots + queries)):
        for label in splits[split]:
            if count[label] < needed:
                raise ValueError(
                    f"{owner}: a trajectory needs {needed} images of a {split} class, but class {label} has only"
                    f" {count[label]}; take fewer shots" + (" or queries" if split != "train" else "")
                )

    def draw(data: FewShotData, split: str, task: Array, key: Key) -> tuple[Episode, Array]:
        group = getattr(data, split)[task]
        if group.shape[0] == 0:
            raise ValueError(f"{owner}: there are no {split} classes; hold some out with {split}_classes")
        way = n_way if split == "train" else min(tested, group.shape[0])
        new = 0 if split == "train" else queries
        places = shuffled_index(key, jnp.arange(way), group.shape[0], 0)
        drawn = jnp.arange(shots + new)
        rows = jax.vmap(lambda p: data.start[group[p]] + shuffled_index(key, drawn, data.count[group[p]], 1 + p))(
            places
        )
        walked, walked_y = rows[:, :shots].ravel(), jnp.repeat(places, shots)
        if split == "train":
            which = jax.random.randint(jax.random.fold_in(key, 0), (remembered,), 0, group.shape[0])
            image = jax.random.randint(jax.random.fold_in(key, 1), (remembered,), 0, data.count[group[which]])
            asked = jnp.concatenate([walked, data.start[group[which]] + image])
            asked_y = jnp.concatenate([walked_y, which])
        else:
            asked, asked_y = rows[:, shots:].ravel(), jnp.repeat(places, queries)
        return Episode(data.images[walked], walked_y, data.images[asked]), asked_y

    @reads_ignored
    def score(outputs: Array, batch: Batch) -> Array:
        return jnp.mean(label_accuracy(outputs, batch.y), axis=1)

    order = np.argsort(labels, kind="stable")
    groups = [jnp.asarray(splits[split], jnp.int32)[None] for split in ("train", "validation", "test")]
    data = FewShotData(jnp.asarray(pixels[order]), *_i32(np.cumsum(count) - count, count), *groups)
    return episode_stream(
        owner,
        data,
        draw,
        n_tasks=1,
        n_outputs=max(len(classes) for classes in splits.values()),
        score=score,
        reorder=lambda data, key: data,
        steps=steps,
        batch_size=batch_size,
        **options,
    )


def _i32(*values: np.ndarray) -> list[Array]:
    return [jnp.asarray(value, jnp.int32) for value in values]


def _turn(image: Array, quarters: Array) -> Array:
    """Rotated anticlockwise by `quarters` times 90 degrees."""
    return jnp.stack([jnp.rot90(image, k) for k in range(4)])[quarters]


def _pooled(images: LabelledImages | FewShotImages) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Images, labels, and the classes of each split where the set has such a split."""
    if isinstance(images, FewShotImages):
        own = {split: getattr(images, f"{split}_classes") for split in ("train", "validation", "test")}
        pixels, labels = images.images, images.labels
    else:
        pixels, own = np.concatenate([images.train_images, images.test_images]), {}
        labels = np.concatenate([images.train_labels, images.test_labels])
    pixels, labels = np.asarray(pixels), np.asarray(labels)
    check_pixels("few_shot", "images", pixels)
    check_labels("few_shot", "labels", labels, "images", len(pixels))
    return pixels, labels.astype(np.int64), own


def _class_splits(
    owner: str,
    present: np.ndarray,
    own: dict[str, np.ndarray],
    train: Sequence[int] | None,
    validation: Sequence[int] | float | None,
    test: Sequence[int] | float | None,
) -> dict[str, np.ndarray]:
    """The classes of each split: as named, as a fraction of all, as the image set has them, or by default."""
    found: dict[str, np.ndarray] = {}
    for split, given, default in (("test", test, 0.5), ("validation", validation, 0.0), ("train", train, present)):
        field = f"{split}_classes"
        held_out = np.array([label for classes in found.values() for label in classes], np.int64)
        value: Any = own.get(split, default) if given is None else given
        if np.ndim(value) == 0 and split == "train":
            raise ValueError(f"{owner}: {field} is {value!r}, but it must be a sequence of classes, or None")
        if np.ndim(value) == 0:
            check_range(owner, field, value, 0, 1)
            left = np.setdiff1d(present, held_out)
            value = left[max(len(left) - round(float(value) * len(present)), 0) :]
        elif given is None:
            value = np.setdiff1d(value, held_out)
        for label in value:
            if label not in present:
                raise ValueError(
                    f"{owner}: {field} has {label}, but there are images of {len(present)} classes, from {present[0]}"
                    f" to {present[-1]}; it must be one of them"
                )
            if label in held_out or np.sum(np.asarray(value) == label) > 1:
                raise ValueError(f"{owner}: {field} has {label}, but a class must be in one split only, and once")
        found[split] = np.asarray(value).astype(np.int64)
    return {split: found[split] for split in ("train", "validation", "test")}
