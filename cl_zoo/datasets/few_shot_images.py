"""Images of many classes, some of them for testing only: Omniglot and mini-ImageNet from local files."""

from __future__ import annotations

import csv
import math
import os
import struct
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from cl_zoo.checks import Count, Whole, check_whole, checked
from cl_zoo.datasets.images import tfds_splits

__all__ = ["FewShotImages", "folders", "images_in", "load_mini_imagenet", "load_omniglot", "read_images"]


class FewShotImages(NamedTuple):
    """Labelled images whose classes are split, not their examples.

    Attributes:
      images: `uint8[N, height, width]` or with channels last.
      labels: `[N]` whole numbers from 0.
      train_classes, validation_classes, test_classes: whole numbers `[K]`, disjoint; validation may be empty.
    """

    images: np.ndarray
    labels: np.ndarray
    train_classes: np.ndarray
    validation_classes: np.ndarray
    test_classes: np.ndarray


@checked
def load_omniglot(
    data_dir: str | os.PathLike[str] | None,
    source: Literal["folder", "tfds"] | None = None,
    *,
    drawn: tuple[int, int] | None = None,
    seed: Whole = 0,
    size: Count = 28,
) -> FewShotImages:
    """Handwritten characters of 50 alphabets, 20 images of each, white on black.

    Args:
      data_dir: the folder of `images_background/ALPHABET/characterNN/*.png` and `images_evaluation/...`, or with
        source="tfds" the TFDS data folder (None: its own default).
      source: "folder", which None stands for; or "tfds", the prepared set "omniglot".
      drawn: None keeps the split by alphabets: background for training, evaluation for testing, nothing for validation.
        Or two numbers, of characters for training and for validation, drawn at random from all alphabets; the others
        are for testing. (1200, 0) is usual in few-shot learning.
      seed: of that draw, at least 0.
      size: pixels of a side, to which the files' 105 are reduced (Lanczos), at least 1.

    Returns:
      `FewShotImages` of `uint8[N, size, size]`.

    Raises:
      ValueError, FileNotFoundError: one line that names the file or field, what is wrong, and what to do.

    Source: Lake, Salakhutdinov and Tenenbaum 2015, doi 10.1126/science.aab3050; 1200 drawn characters: Santoro et al.
    2016, arXiv 1605.06065.

    Example:
      >>> load_omniglot("omniglot", drawn=(1200, 0)).images.shape  # doctest: +SKIP
      (32460, 28, 28)
    """
    owner = "load_omniglot"
    source = source or "folder"
    names: list[list[Hashable]] = [[], [], []]
    if source == "tfds":
        pieces = []
        for split, rows in zip((names[0], names[2]), tfds_splits("omniglot", data_dir), strict=True):
            found = [(row["label"], _resized(_pillow().fromarray(row["image"][..., 0]), size)) for row in rows]
            found.sort(key=lambda pair: pair[0])
            split += [int(label) for label, _ in found]
            pieces += [image for _, image in found]
        images = np.stack(pieces)
    else:
        if data_dir is None:
            raise ValueError(f"{owner}: source='folder' needs data_dir, the folder of images_background")
        paths: list[Path] = []
        for split, folder in ((names[0], "images_background"), (names[2], "images_evaluation")):
            for alphabet in folders(Path(data_dir) / folder, "Omniglot's folder"):
                for character in folders(alphabet, "an alphabet"):
                    files = images_in(character)
                    paths += files
                    split += [f"{alphabet.name}/{character.name}"] * len(files)
        images = read_images(paths, "L", size)
    found_images = _labelled(names, 255 - images, owner)
    return found_images if drawn is None else _drawn(found_images, drawn, seed, owner)


def _drawn(images: FewShotImages, drawn: tuple[int, int], seed: int, owner: str) -> FewShotImages:
    """The classes split again, at random."""
    n_classes = len(images.train_classes) + len(images.test_classes)
    if len(drawn) != 2:
        raise ValueError(f"{owner}: drawn is {drawn}, but it must be two numbers, of training and validation classes")
    check_whole(owner, "drawn[0]", drawn[0], 1, n_classes - 1)
    check_whole(owner, "drawn[1]", drawn[1], 0, n_classes - 1 - drawn[0])  # at least one is left for testing
    order = np.random.default_rng(seed).permutation(n_classes)
    train, validation, test = np.split(order, [drawn[0], drawn[0] + drawn[1]])
    return images._replace(
        train_classes=np.sort(train), validation_classes=np.sort(validation), test_classes=np.sort(test)
    )


@checked
def load_mini_imagenet(data_dir: str | os.PathLike[str], *, size: Count = 84) -> FewShotImages:
    """A hundred classes of ImageNet, 600 images of each, in colour.

    Args:
      data_dir: a folder of `train/CLASS/*.jpg`, `val/...` and `test/...` (or .png, .jpeg); or of `train.csv`, `val.csv`
        and `test.csv`, each with the columns filename and label, and all files in `images/`.
      size: pixels of a side, at least 1; images of another size are resized to it (Lanczos), whatever their shape.

    Returns:
      `FewShotImages` of `uint8[N, size, size, 3]`.

    Raises:
      ValueError, FileNotFoundError: one line that names the file or field, what is wrong, and what to do.

    Source: Vinyals et al. 2016, arXiv 1606.04080; the split files in use: Ravi and Larochelle 2017.

    Example:
      >>> load_mini_imagenet("mini_imagenet").images.shape  # doctest: +SKIP
      (60000, 84, 84, 3)
    """
    folder = Path(data_dir)
    names: list[list[Hashable]] = [[], [], []]
    paths: list[Path] = []
    listed = (folder / "train.csv").is_file() and not (folder / "train").is_dir()
    for rows, split in zip(names, ("train", "val", "test"), strict=True):
        if listed:
            found = _listed(folder / f"{split}.csv", folder / "images")
        else:
            classes = folders(folder / split, "mini-ImageNet's folder, with train, val and test or their csv files")
            found = [(mine.name, path) for mine in classes for path in images_in(mine)]
        rows += [name for name, _ in found]
        paths += [path for _, path in found]
    return _labelled(names, read_images(paths, "RGB", size), "load_mini_imagenet")


def _listed(path: Path, folder: Path) -> list[tuple[str, Path]]:
    """Class and file of each line of a split file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; put train.csv, val.csv and test.csv side by side")
    try:
        with open(path, newline="", encoding="utf-8") as file:
            lines = list(csv.reader(file))
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{path}: not a csv file ({error}); copy or download it again") from error
    if not lines or lines[0] != ["filename", "label"]:
        raise ValueError(f"{path}: its first line must be filename,label; this is another kind of file")
    found = []
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != 2 or not all(line):
            raise ValueError(f"{path}, line {number}: {','.join(line)!r}, but it must be a file and a class")
        if not (folder / line[0]).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{path}, line {number}: {line[0]!r} lies outside of {folder.name}/")
        if not (folder / line[0]).is_file():
            raise FileNotFoundError(f"{folder / line[0]}: no such file, but {path.name} lists it in line {number}")
        found.append((line[1], folder / line[0]))
    if not found:
        raise ValueError(f"{path}: it lists no images; copy or download it again")
    return found


def folders(parent: Path, what: str) -> list[Path]:
    if not parent.is_dir():
        raise FileNotFoundError(f"{parent}: no such folder; data_dir must be {what}")
    found = sorted(path for path in parent.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not found:
        raise ValueError(f"{parent}: no folders in it, but there must be one for each of its parts; unpack it again")
    return found


def images_in(folder: Path) -> list[Path]:
    found = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in (".png", ".jpg", ".jpeg") and not path.name.startswith(".")
    )
    if not found:
        raise ValueError(f"{folder}: no images in this class (.png, .jpg or .jpeg); unpack it again, or remove it")
    return found


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ValueError("reading image files needs Pillow: pip install 'cl_zoo[images]'") from error
    return Image


def _resized(image: Any, size: int) -> np.ndarray:
    return np.asarray(image if image.size == (size, size) else image.resize((size, size), _pillow().LANCZOS))


LARGEST_IMAGE = 2**25
"""Pixels: a small file may announce, and unpack to, gigabytes."""


def read_images(paths: Sequence[Path], mode: str, size: int) -> np.ndarray:
    pillow = _pillow()
    images = np.empty((len(paths), size, size, 3) if mode == "RGB" else (len(paths), size, size), np.uint8)
    # What a damaged file makes Pillow raise depends on its format, and on the place of the damage.
    unreadable = (OSError, SyntaxError, ValueError, EOFError, struct.error, pillow.DecompressionBombError)
    for i, path in enumerate(paths):
        try:
            # By no other format, whatever a file is called: some start programs.
            with pillow.open(path, formats=("PNG", "JPEG")) as image:
                if math.prod(image.size) > LARGEST_IMAGE:
                    raise ValueError(f"{image.size[0]} x {image.size[1]} pixels, more than {LARGEST_IMAGE}")
                images[i] = _resized(image.convert(mode), size)
        except unreadable as error:
            said = " ".join(str(error).split())
            raise ValueError(f"{path}: not an image that can be read ({said}); copy or download it again") from error
    return images


def _labelled(names: Sequence[Sequence[Hashable]], images: np.ndarray, owner: str) -> FewShotImages:
    """Classes numbered in the order in which they come: those of training, of validation, of testing."""
    numbers: dict[Hashable, int] = {}
    classes = []
    for split in names:
        first = len(numbers)
        for name in split:
            if numbers.setdefault(name, len(numbers)) < first:
                raise ValueError(f"{owner}: class {name!r} is in two of train, validation and test; keep it in one")
        classes.append(np.arange(first, len(numbers)))
    labels = np.array([numbers[name] for split in names for name in split], np.int32)
    return FewShotImages(images, labels, *classes)
