"""CIFAR-10 and CIFAR-10-C from local files."""

from __future__ import annotations

import os
import tokenize
from pathlib import Path
from typing import Literal

import numpy as np

from cl_zoo.checks import check_choice, checked
from cl_zoo.datasets.corruptions import CORRUPTIONS
from cl_zoo.datasets.images import LabelledImages, tfds_splits

__all__ = ["load_cifar10", "load_cifar10_c"]

_AGAIN = "copy or download it again"
_RECORD = 1 + 3 * 32 * 32
_ROWS = 10_000
# The set has four corruptions more, which its paper keeps for validation.
_FILES = (*CORRUPTIONS, "speckle_noise", "gaussian_blur", "spatter", "saturate")


@checked
def load_cifar10(
    data_dir: str | os.PathLike[str] | None, source: Literal["binary", "tfds"] | None = None
) -> LabelledImages:
    """Photographs of ten classes of things, 32 x 32, in colour.

    Args:
      data_dir: the folder of `data_batch_1.bin` to `data_batch_5.bin` and `test_batch.bin`, CIFAR-10's "binary
        version", or the folder above, in which it is called `cifar-10-batches-bin`; or with source="tfds" the TFDS
        data folder (None: its own default).
      source: "binary", which None stands for; or "tfds", the prepared set "cifar10".

    Returns:
      `LabelledImages` of `uint8[50000, 32, 32, 3]` and `uint8[10000, 32, 32, 3]`, labels 0 to 9.

    Raises:
      ValueError, FileNotFoundError: one line that names the file, what is wrong, and what to do. The Python version of
        the set is refused, as it is pickled.

    Source: Krizhevsky 2009, Learning multiple layers of features from tiny images.

    Example:
      >>> load_cifar10("cifar-10-batches-bin").train_images.shape  # doctest: +SKIP
      (50000, 32, 32, 3)
    """
    source = source or "binary"
    if source == "tfds":
        parts = []
        for split in tfds_splits("cifar10", data_dir):
            rows = split.__getitems__(range(len(split)))  # type: ignore[attr-defined]
            parts += [np.stack([row["image"] for row in rows]), np.array([row["label"] for row in rows])]
        return LabelledImages(*parts)
    if data_dir is None:
        raise ValueError("load_cifar10: source='binary' needs data_dir, the folder of data_batch_1.bin")
    folder = Path(data_dir)
    if (folder / "cifar-10-batches-bin").is_dir():
        folder = folder / "cifar-10-batches-bin"
    train = [_read_binary(folder / f"data_batch_{i}.bin") for i in range(1, 6)]
    images, labels = zip(*train, strict=True)
    return LabelledImages(np.concatenate(images), np.concatenate(labels), *_read_binary(folder / "test_batch.bin"))


def _read_binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Records of a label and three planes, red, green and blue."""
    if not path.is_file():
        pickled = [path.with_suffix(""), path.parent / "cifar-10-batches-py"]
        if found := [str(other) for other in pickled if other.exists()]:
            raise ValueError(
                f"{found[0]}: this is CIFAR-10's Python version, which is pickled, and nothing is unpickled here; take"
                " its binary version (cifar-10-binary.tar.gz)"
            )
        raise FileNotFoundError(
            f"{path}: no such file; put data_batch_1.bin to data_batch_5.bin and test_batch.bin of CIFAR-10's binary"
            " version in that folder"
        )
    if (size := path.stat().st_size) != _ROWS * _RECORD:
        raise ValueError(
            f"{path}: {size} bytes, but a file of {_ROWS} images of CIFAR-10's binary version has {_ROWS * _RECORD};"
            f" {_AGAIN}"
        )
    rows = np.fromfile(path, np.uint8).reshape(_ROWS, _RECORD)
    labels = rows[:, 0].copy()
    _check_labels(path, labels)
    return np.ascontiguousarray(rows[:, 1:].reshape(_ROWS, 3, 32, 32).transpose(0, 2, 3, 1)), labels


@checked
def load_cifar10_c(data_dir: str | os.PathLike[str], corruption: str, severity: int) -> tuple[np.ndarray, np.ndarray]:
    """CIFAR-10's test images after one corruption, as its authors publish them.

    Args:
      data_dir: the folder of `labels.npy`, `gaussian_noise.npy`, ...
      corruption: one of `CORRUPTIONS`, or of the extra set: "speckle_noise", "gaussian_blur", "spatter", "saturate".
      severity: 1 to 5; their images follow each other in a file, 10 000 each.

    Returns:
      Images `uint8[10000, 32, 32, 3]`, memory-mapped, so that only what is used is read; labels
      `[10000]`, 0 to 9.

    Raises:
      ValueError, FileNotFoundError: one line that names the file, what is wrong, and what to do.

    Source: Hendrycks and Dietterich 2019, arXiv 1903.12261; the files: doi 10.5281/zenodo.2535967.

    Example:
      >>> images, labels = load_cifar10_c("CIFAR-10-C", "fog", 5)  # doctest: +SKIP
    """
    check_choice("load_cifar10_c", "severity", severity, (1, 2, 3, 4, 5))
    check_choice("load_cifar10_c", "corruption", corruption, _FILES)
    mine = slice(_ROWS * (severity - 1), _ROWS * severity)
    images = _mapped(Path(data_dir) / f"{corruption}.npy", (5 * _ROWS, 32, 32, 3))
    label_path = Path(data_dir) / "labels.npy"
    labels = _mapped(label_path, (5 * _ROWS,))
    _check_labels(label_path, labels)
    return images[mine], np.array(labels[mine])


def _mapped(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; data_dir must be the folder of CIFAR-10-C's files")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError, TypeError, OverflowError, tokenize.TokenError) as error:
        said = " ".join(str(error).split())
        raise ValueError(
            f"{path}: not an array that can be mapped: truncated, pickled or damaged ({said}); {_AGAIN}"
        ) from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path}: an archive, but it must be one array; {_AGAIN}")
    images = len(shape) > 1
    if array.shape != shape or not (array.dtype == np.uint8 if images else np.issubdtype(array.dtype, np.integer)):
        kind = "uint8" if images else "whole numbers"
        raise ValueError(
            f"{path}: {array.dtype} of shape {array.shape}, but in CIFAR-10-C it is {kind} of shape {shape}; take its"
            " own file"
        )
    return array


def _check_labels(path: Path, labels: np.ndarray) -> None:
    wrong = (labels < 0) | (labels > 9)
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(f"{path}: label {labels[row]} in row {row}, but labels must be 0 to 9; {_AGAIN}")
