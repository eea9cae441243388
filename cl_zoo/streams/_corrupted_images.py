"""Streams of corrupted test images, for adapting at test time."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from cl_zoo.checks import Count, check_choice, check_range, check_whole, checked
from cl_zoo.datasets.cifar import load_cifar10_c
from cl_zoo.datasets.corruptions import CORRUPTIONS, NOISES, corrupt
from cl_zoo.datasets.images import LabelledImages, check_labels, check_pixels, load_digits
from cl_zoo.streams.arrays import array_stream, scenario_tasks
from cl_zoo.types import Array, Key, PyTree, Stream

__all__ = ["CorruptedData", "conditions", "corrupted_images"]

_AT_ONCE = 100  # images corrupted together


class CorruptedData(NamedTuple):
    """The images under every condition, and which condition each task is.

    Attributes:
      images: `uint8[K, examples, height, width]` or with channels last, K different conditions.
      labels: `i32[examples]`.
      condition: `i32[T]`, the condition of each task.
    """

    images: Array
    labels: Array
    condition: Array


@checked
def conditions(
    corruptions: Sequence[str] = CORRUPTIONS,
    severities: Sequence[int] = (1, 2, 3, 4, 5),
    schedule: str = "grid",
    *,
    clean_first: bool = False,
) -> tuple[tuple[str, int], ...]:
    """Corruption and severity of each task of `corrupted_images`.

    Args:
      corruptions: names, all different.
      severities: 1 to 5, all different.
      schedule: "grid" or "gradual", see `corrupted_images`.
      clean_first: begin with ("clean", 0).

    Returns:
      One pair per task.

    Raises:
      ValueError: an impossible value, named.

    Example:
      >>> conditions(["fog"], [1, 2, 3], "gradual", clean_first=True)
      (('clean', 0), ('fog', 1), ('fog', 2), ('fog', 3), ('fog', 2), ('fog', 1))
    """
    owner = "corrupted_images"
    check_choice(owner, "schedule", schedule, ("grid", "gradual"))
    for field, values in {"corruptions": corruptions, "severities": severities}.items():
        if isinstance(values, str) or len(values) == 0 or len(set(values)) < len(values):
            raise ValueError(
                f"{owner}: {field} is {values!r}, but it must be a sequence of different values, at least one"
            )
    for severity in severities:
        check_choice(owner, "each of severities", severity, (1, 2, 3, 4, 5))
    turns = list(severities)
    if schedule == "gradual":
        rising = sorted(severities)
        turns = rising + rising[-2::-1]
    clean = (("clean", 0),) if clean_first else ()
    return (*clean, *((name, severity) for name in corruptions for severity in turns))


@checked
def corrupted_images(
    images: LabelledImages | None = None,
    *,
    corruptions: Sequence[str] = CORRUPTIONS,
    severities: Sequence[int] = (1, 2, 3, 4, 5),
    schedule: str = "grid",
    clean_first: bool = False,
    examples: int = 1000,
    key: Key | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    batch_size: Count = 100,
    epochs: Count = 1,
    validation: float = 0.0,
    sample_size: int | None = None,
    sample_batch: int = 500,
    evaluation_batch: int = 1000,
    progress: bool | None = None,
) -> Stream:
    """Every task is one condition, a corruption at a severity, of the same test images; all classes come in all tasks.

        task t hands out f_(c_t, s_t)(image_i), label_i, each image i once an epoch, in random order

    The stream is the test set: `next` hands out the same images as `evaluation(..., "test")`. So a learner that reads
    the labels of the batches is trained on the test set; one that is tested while it adapts must read only the images.
    Images are corrupted once, when the stream is made, and lie on the device: `K examples` images for K different
    conditions, at CIFAR-10's size 3 MB for each condition of 1000 images.

    Args:
      images: a data set, of which the test images are corrupted; None takes the embedded digits.
      corruptions: of `CORRUPTIONS` or `NOISES`, all different.
      severities: 1 to 5, all different.
      schedule: "grid", every corruption at every severity, one corruption after the other; or "gradual", for every
        corruption its severities rising to the strongest and falling back, 1, 2, ..., 5, ..., 2, 1.
      clean_first: begin with the images as they are.
      examples: how many test images, drawn without replacement by `key`; the same for all conditions.
      key: draws the images, and the noise of each condition; None is key 0. A condition that comes twice has the same
        images both times.
      data_dir: None corrupts `images`; or the folder of CIFAR-10-C's own files, whose images are taken instead, also of
        its extra corruptions, see `load_cifar10_c`. Then `images` serves for `clean_first` alone, and is CIFAR-10.
      batch_size: examples per batch, a divisor of the examples of a task.
      epochs: passes over each task.
      validation: fraction of `examples` that the stream leaves out, to choose strengths on, in [0, 0.999].
      sample_size, sample_batch, evaluation_batch: see `array_stream`.
      progress: whether to show a bar while images are made; None where there are more than ten conditions.

    Returns:
      A `Stream` of `uint8` images, domain-incremental. `reorder` shuffles the corruptions, each with its severities in
      their order; clean images stay first.

    Raises:
      ValueError, FileNotFoundError: an impossible value, named; a file that is missing or damaged.

    Source: Hendrycks and Dietterich 2019, arXiv 1903.12261; the gradual schedule: Wang et al. 2022, arXiv 2203.13591.

    Differences from the paper or its code: see `corrupt`. The gradual schedule of the paper shuffles the corruptions,
    as `reorder` does.

    Example:
      >>> stream = corrupted_images(corruptions=["contrast"], severities=[1, 5], examples=200)
      >>> stream.n_tasks, stream.steps, stream.data.images.shape
      (2, 2, (2, 200, 28, 28))
    """
    owner = "corrupted_images"
    order = conditions(corruptions, severities, schedule, clean_first=clean_first)
    different = list(dict.fromkeys(order))
    if data_dir is not None and clean_first and images is None:
        raise ValueError(f"{owner}: clean_first with a data_dir needs images, CIFAR-10's own, see load_cifar10")
    key = jax.random.key(0) if key is None else key
    if data_dir is None:
        for name in corruptions:
            check_choice(owner, "each of corruptions", name, tuple(dict.fromkeys(CORRUPTIONS + NOISES)))
        if images is not None:
            check_pixels(owner, "test_images", np.asarray(images.test_images))
            check_labels(owner, "test_labels", images.test_labels, "test_images", len(images.test_images))
        images = load_digits() if images is None else images
        labels = np.asarray(images.test_labels)
    else:
        labels = load_cifar10_c(data_dir, *next(pair for pair in different if pair[1] > 0))[1]
        if images is not None and not np.array_equal(images.test_labels, labels):
            raise ValueError(f"{owner}: images have other test labels than {data_dir}, so they are not CIFAR-10's")
    check_whole(owner, "examples", examples, 1, len(labels))
    check_range(owner, "validation", validation, 0, 0.999)
    held_out = round(validation * examples)
    kept = examples - held_out
    if kept % batch_size:
        raise ValueError(
            f"{owner}: batch_size is {batch_size}, but a task has {kept} examples, each of which comes once an epoch;"
            f" it must divide {kept}"
        )
    row_key, noise_key = jax.random.split(key)
    chosen = np.asarray(jax.random.permutation(row_key, len(labels))[:examples])

    def under(name: str, severity: int) -> Array:
        if severity > 0 and data_dir is not None:
            return jnp.asarray(load_cifar10_c(data_dir, name, severity)[0][chosen])
        plain = jnp.asarray(images.test_images[chosen])  # type: ignore[union-attr]
        if severity == 0:
            return plain
        mine = jax.random.fold_in(noise_key, zlib.crc32(f"{name}/{severity}".encode()))
        return _corrupted(plain, name, severity, jax.random.split(mine, examples))

    hidden = len(different) <= 10 if progress is None else not progress
    made = [under(*pair) for pair in tqdm(different, "corruptions", disable=hidden, unit="condition")]
    data = CorruptedData(
        jnp.stack(made),
        jnp.asarray(labels[chosen], jnp.int32),
        jnp.asarray([different.index(pair) for pair in order], jnp.int32),
    )
    n_tasks = len(order)

    def size(data: CorruptedData, split: str) -> Array:
        return jnp.full(n_tasks, held_out if split == "validation" else kept)

    def fetch(data: CorruptedData, split: str, task: Array, index: Array) -> tuple[Array, Array]:
        row = index + kept * (split == "validation")
        return data.images[data.condition[task], row], data.labels[row]

    def reorder(data: CorruptedData, key: Key) -> CorruptedData:
        clean, rest = jnp.split(data.condition, [int(clean_first)])
        shuffled = jax.random.permutation(key, rest.reshape(len(corruptions), -1))
        return data._replace(condition=jnp.concatenate([clean, shuffled.ravel()]))

    return array_stream(
        data,
        scenario_tasks("domain", n_tasks, int(labels.max()) + 1),
        size=size,
        fetch=fetch,
        largest={"train": kept, "validation": held_out, "test": kept},
        smallest=kept,
        steps=epochs * (kept // batch_size),
        batch_size=batch_size,
        task_ids=False,
        reorder=reorder,
        sample_size=sample_size,
        sample_batch=sample_batch,
        evaluation_batch=evaluation_batch,
    )


@partial(jax.jit, static_argnames=("name", "severity"))
def _corrupted(images: Array, name: str, severity: int, keys: PyTree) -> Array:
    def one(pair: tuple[Array, Key]) -> Array:
        image, key = pair
        return corrupt(image[None], name, severity, key)[0]

    return jax.lax.map(one, (images, keys), batch_size=min(_AT_ONCE, images.shape[0]))
