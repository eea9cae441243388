"""Where labelled images come from: the embedded digits, idx files, TensorFlow Datasets."""

from __future__ import annotations

import gzip
import math
import os
import struct
import warnings
import zlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from cl_zoo.checks import checked

__all__ = ["LabelledImages", "check_images", "check_labels", "check_pixels", "load_digits", "read_idx"]


class LabelledImages(NamedTuple):
    """Attributes:
    train_images, test_images: `uint8[N, height, width]` or with channels last; or floating point, scaled already.
    train_labels, test_labels: `[N]` whole numbers from 0, each class with training images.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def check_images(owner: str, images: LabelledImages) -> None:
    """Refuses arrays that are not as `LabelledImages` describes them.

    Raises:
      ValueError: names the field, what it is, and what is allowed.
    """
    parts = {}
    for split in ("train", "test"):
        pixels, labels = (np.asarray(getattr(images, f"{split}_{field}")) for field in ("images", "labels"))
        check_pixels(owner, f"{split}_images", pixels)
        check_labels(owner, f"{split}_labels", labels, f"{split}_images", len(pixels))
        parts[split] = pixels, labels
    (train, known), (test, asked) = parts["train"], parts["test"]
    if train.shape[1:] != test.shape[1:] or train.dtype != test.dtype:
        raise ValueError(
            f"{owner}: test_images are {test.dtype}{list(test.shape[1:])}, but they must be as train_images,"
            f" {train.dtype}{list(train.shape[1:])}"
        )
    count = np.bincount(known, minlength=int(asked.max()) + 1)
    if not count.all():
        raise ValueError(
            f"{owner}: train_labels has no {int(np.argmin(count))}, but the classes must be 0 to K - 1, each with"
            f" training images; the largest label is {len(count) - 1}"
        )


def check_pixels(owner: str, field: str, pixels: np.ndarray) -> None:
    """Refuses what is not `uint8[N, height, width]`, with channels last, or finite floating point of a usual scale."""
    if pixels.ndim not in (3, 4) or 0 in pixels.shape:
        raise ValueError(
            f"{owner}: {field} has the shape {pixels.shape}, but it must be [N, height, width] or with channels last,"
            " none of them 0"
        )
    if pixels.ndim == 4 and pixels.shape[1] in (1, 3, 4) and pixels.shape[3] not in (1, 2, 3, 4):
        raise ValueError(
            f"{owner}: {field} has the shape {pixels.shape}, channels first, but they must be last: take"
            " images.transpose(0, 2, 3, 1)"
        )
    if pixels.dtype == np.uint8:
        if pixels.max() <= 1:
            warnings.warn(
                f"{owner}: {field} is uint8 from {pixels.min()} to {pixels.max()}, of 255: were they scaled before they"
                " became whole numbers?",
                stacklevel=3,
            )
        return
    if not np.issubdtype(pixels.dtype, np.floating):
        raise ValueError(f"{owner}: {field} is {pixels.dtype}, but it must be uint8, or floating point in [0, 1]")
    low, high = float(pixels.min()), float(pixels.max())
    if not -LARGEST_PIXEL <= low <= high <= LARGEST_PIXEL:  # nan compares as false
        raise ValueError(
            f"{owner}: {field} is {pixels.dtype} from {low:g} to {high:g}, which is not scaled; it must be uint8, or"
            " floating point in [0, 1], or standardised"
        )


LARGEST_PIXEL = 32.0
"""More standard deviations than a standardised image has, and fewer than the 255 of one that is not scaled."""


def check_labels(owner: str, field: str, labels: np.ndarray, of: str, n: int) -> None:
    """Refuses what is not one whole number from 0 for each of n examples."""
    if labels.shape != (n,):
        raise ValueError(f"{owner}: {field} has the shape {labels.shape}, but it must be ({n},), one for each of {of}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{owner}: {field} is {labels.dtype}, but it must be whole numbers from 0")
    if labels.min() < 0:
        raise ValueError(f"{owner}: {field} has {labels.min()}, but it must be whole numbers from 0")
    if labels.max() > LARGEST_LABEL:
        raise ValueError(f"{owner}: {field} has {labels.max()}, but it must be whole numbers from 0 to {LARGEST_LABEL}")


LARGEST_LABEL = 10**6


@checked
def load_digits(
    data_dir: str | os.PathLike[str] | None = None, source: Literal["embedded", "idx", "tfds"] | None = None
) -> LabelledImages:
    """Handwritten digits, 28 x 28.

    Args:
      data_dir: folder of the four MNIST files (`train-images-idx3-ubyte`, ..., plain or .gz), or with source="tfds"
        the TFDS data folder (None: its own default).
      source: "embedded", 10 000 + 2 000 digits of MNIST that come with the package, balanced over the classes; "idx",
        the files in `data_dir`; "tfds", the prepared set "mnist". None: "idx" with a `data_dir`, else "embedded".

    Returns:
      `LabelledImages`, labels 0 to 9.

    Raises:
      ValueError, FileNotFoundError: one line that names the file, what is wrong, and what to do.

    Source: LeCun, Cortes and Burges, MNIST, CC BY-SA 3.0.

    Example:
      >>> load_digits().train_images.shape
      (10000, 28, 28)
    """
    source = source or ("embedded" if data_dir is None else "idx")
    if source == "embedded":
        if data_dir is not None:
            raise ValueError("load_digits: source='embedded' reads no data_dir; leave one of the two out")
        file = resources.files("cl_zoo") / "data" / "mnist_subset.npz"
        with resources.as_file(file) as path, np.load(path, allow_pickle=False) as arrays:
            return LabelledImages(*(arrays[field] for field in LabelledImages._fields))
    if source == "tfds":
        return _load_tfds(data_dir)
    if data_dir is None:
        raise ValueError("load_digits: source='idx' needs data_dir, the folder of the four MNIST files")
    parts = []
    for split in ("train", "t10k"):
        image_path, images = _read_named(Path(data_dir), f"{split}-images-idx3-ubyte", 3)
        label_path, labels = _read_named(Path(data_dir), f"{split}-labels-idx1-ubyte", 1)
        if images.shape[1:] != (28, 28):
            raise ValueError(
                f"{image_path}: images of {images.shape[1]} x {images.shape[2]} pixels, but they must be 28 x 28;"
                " give other images as LabelledImages"
            )
        if len(images) != len(labels):
            raise ValueError(
                f"{label_path}: {len(labels)} labels for the {len(images)} images of {image_path.name};"
                " take both of one set"
            )
        if labels.max() > 9:
            raise ValueError(
                f"{label_path}: label {labels.max()} in row {labels.argmax()}, but labels must be 0 to 9;"
                " use MNIST's own file"
            )
        parts += [images, labels]
    return LabelledImages(*parts)


def _read_named(folder: Path, name: str, dimensions: int) -> tuple[Path, np.ndarray]:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path, read_idx(path, dimensions)
    raise FileNotFoundError(f"{folder / name}: no such file, nor with .gz; put the four MNIST idx files in that folder")


LARGEST_FILE = 2**30
"""Bytes of an idx file: a small gzip file may unpack to anything."""


def read_idx(path: str | os.PathLike[str], dimensions: int) -> np.ndarray:
    """An idx file of unsigned bytes, plain or gzip: magic number, one big-endian u32 per dimension, then the bytes.

    Args:
      path: the file; gzip where it ends in .gz.
      dimensions: how many it must have.

    Returns:
      `uint8` array.

    Raises:
      ValueError: wrong magic number, truncated or damaged file, more bytes than announced.
    """
    path = Path(path)
    again = "copy or download it again"
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            header = file.read(4 + 4 * dimensions)
            magic = int.from_bytes(header[:4], "big")
            if magic != 0x0800 + dimensions:
                raise ValueError(
                    f"{path}: magic number 0x{magic:08x}, but an idx file of {dimensions}-dimensional bytes has"
                    f" 0x{0x0800 + dimensions:08x}; this is another kind of file"
                )
            if len(header) < 4 + 4 * dimensions:
                raise ValueError(f"{path}: truncated within its header; {again}")
            shape = struct.unpack(f">{dimensions}I", header[4:])
            expected = math.prod(shape)
            if expected == 0:
                raise ValueError(f"{path}: its header announces an array of shape {shape}, with nothing in it; {again}")
            if expected > LARGEST_FILE:
                raise ValueError(f"{path}: its header announces {expected} bytes, but at most {LARGEST_FILE} are read")
            chunks, length = [], 0
            while length <= expected and (chunk := file.read(1 << 20)):  # a false header allocates nothing
                chunks.append(chunk)
                length += len(chunk)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: truncated or damaged gzip file ({error}); {again}") from error
    if length != expected:
        more = "more" if length > expected else f"only {length}"
        raise ValueError(f"{path}: its header announces {expected} bytes of data, but there are {more}; {again}")
    return np.frombuffer(b"".join(chunks), np.uint8).reshape(shape)


def tfds_splits(name: str, data_dir: str | os.PathLike[str] | None) -> tuple[Sequence[Any], Sequence[Any]]:
    """The examples of "train" and "test" of a set that TensorFlow Datasets has prepared, each a dict of arrays.

    Raises:
      ValueError: TensorFlow Datasets is not installed.
      FileNotFoundError: the set is not prepared; one line that says how to.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ValueError("source 'tfds' needs TensorFlow Datasets: pip install 'cl_zoo[tfds]'") from error
    options = {"data_dir": data_dir, "builder_kwargs": {"file_format": "array_record"}}
    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    if not builder.is_prepared():
        where = "" if data_dir is None else f", data_dir={os.fspath(data_dir)!r}"
        raise FileNotFoundError(
            f"{builder.data_dir}: the TFDS set '{name}' is not prepared there; with a network, and TensorFlow"
            ' installed, run: python -c "import tensorflow_datasets as tfds;'
            f" tfds.builder('{name}', file_format='array_record'{where}).download_and_prepare()\""
        )
    return tfds.data_source(name, split="train", **options), tfds.data_source(name, split="test", **options)


def _load_tfds(data_dir: str | os.PathLike[str] | None) -> LabelledImages:
    parts = []
    for source in tfds_splits("mnist", data_dir):
        rows = source.__getitems__(range(len(source)))  # type: ignore[attr-defined]
        parts.append(np.stack([row["image"][..., 0] for row in rows]))
        parts.append(np.array([row["label"] for row in rows]))
    return LabelledImages(*parts)
