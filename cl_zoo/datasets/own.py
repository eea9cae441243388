"""Examples of one's own, as arrays: tables (csv, JSONL), folders of images, sets of TensorFlow Datasets by name."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from cl_zoo.checks import Count, checked
from cl_zoo.datasets.few_shot_images import folders, images_in, read_images
from cl_zoo.datasets.images import LARGEST_FILE, LabelledImages, check_images, tfds_splits

__all__ = ["Folder", "Table", "load_tfds", "read_image_folder", "read_table"]


class Table(NamedTuple):
    """Attributes:
    x: `f32[N, F]`, the features.
    y: `i32[N]` labels, or `f32[N]` numbers; None without a target.
    task: `[N]` words, what each row says of its task; None where no column was named.
    features: names of the columns of x.
    classes: names of the labels, in the order of their numbers; empty where y is numbers.
    """

    x: np.ndarray
    y: Any
    task: Any
    features: tuple[str, ...]
    classes: tuple[str, ...]


class Folder(NamedTuple):
    """Attributes:
    x: `uint8[N, height, width]`, or with 3 channels last.
    y: `i32[N]` labels.
    classes: names of the folders, in the order of their labels.
    """

    x: np.ndarray
    y: np.ndarray
    classes: tuple[str, ...]


@checked
def read_table(
    path: str | os.PathLike[str],
    *,
    target: str | None = None,
    features: Sequence[str] | None = None,
    task: str | None = None,
    kind: Literal["labels", "numbers"] = "labels",
) -> Table:
    """A csv file with a head line, or a JSONL file of one object a line.

        table = read_table("sales.csv", target="kind", task="year")
        stream = task_stream([(table.x[table.task == name], table.y[table.task == name]) for name in ("2024", "2025")])

    Args:
      path: the file; JSONL where it ends in .jsonl, else csv. UTF-8.
      target: the column of targets.
      features: columns of numbers; None takes all others. A feature may be a list of numbers in JSONL.
      task: a column that says which task a row is of.
      kind: "labels": the different words, or whole numbers, of the target become labels 0, 1, ... in their order.
        "numbers": the target stays as it is.

    Returns:
      A `Table`.

    Raises:
      ValueError: a column that is not there, a row of another length, what is no finite number where one is needed: it
        names file, line, column and value.
      FileNotFoundError: no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, but at most {LARGEST_FILE} are read")
    names, rows = (_jsonl if path.suffix.lower() == ".jsonl" else _csv)(path)
    for field, column in (("target", target), ("task", task), *(("features", name) for name in features or ())):
        if column is not None and column not in names:
            raise ValueError(f"read_table: {field} is {column!r}, but {path} has the columns {', '.join(names)}")
    chosen = [name for name in names if name not in (target, task)] if features is None else list(features)
    if not chosen:
        raise ValueError(f"read_table: {path} has no columns beside target and task, but there must be a feature")
    columns = {name: _column(path, name, rows) for name in chosen}
    x = np.concatenate([values.reshape(len(rows), -1) for values in columns.values()], axis=1).astype(np.float32)
    width = {name: values.size // len(rows) for name, values in columns.items()}
    told = tuple(name if width[name] == 1 else f"{name}[{i}]" for name in chosen for i in range(width[name]))
    y, classes = (None, ()) if target is None else _targets(path, target, rows, kind)
    return Table(x, y, None if task is None else np.array([str(row[task]) for _, row in rows]), told, classes)


Rows = list[tuple[int, dict[str, Any]]]


def _csv(path: Path) -> tuple[list[str], Rows]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            lines = [(reader.line_num, line) for line in reader if line]
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{path}: not a csv file ({error})") from error
    if len(lines) < 2:
        raise ValueError(f"{path}: it has {len(lines)} lines, but must have a head line and rows")
    names = [name.strip() for name in lines[0][1]]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: two columns of its head line have one name: {', '.join(names)}")
    for number, line in lines[1:]:
        if len(line) != len(names):
            raise ValueError(f"{path}, line {number}: {len(line)} values, but there are {len(names)} columns")
    return names, [(number, dict(zip(names, map(str.strip, line), strict=True))) for number, line in lines[1:]]


def _jsonl(path: Path) -> tuple[list[str], Rows]:
    rows: Rows = []
    with open(path, encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    rows.append((number, json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {len(rows) + 1}: not JSON ({error})") from error
    if not rows:
        raise ValueError(f"{path}: it has no rows")
    for number, row in rows:
        if not isinstance(row, dict) or row.keys() != rows[0][1].keys():
            raise ValueError(f"{path}, line {number}: every line must be an object with the fields of the first")
    return list(rows[0][1]), rows


def _column(path: Path, name: str, rows: Rows) -> np.ndarray:
    """`[N]`, or `[N, k]` of lists."""
    values = [_numbers(path, line, name, row[name]) for line, row in rows]
    for (line, _), value in zip(rows, values, strict=True):
        if value.shape != values[0].shape:
            raise ValueError(f"{path}, line {line}: {name} has {value.size} numbers, but {values[0].size} in the first")
    return np.array(values)


def _numbers(path: Path, line: int, name: str, value: Any) -> np.ndarray:
    """A number, or a list of numbers."""
    try:
        found = np.asarray(value, np.float64) if value is not None and value != "" else None
    except (ValueError, TypeError):
        found = None
    if found is None or not np.isfinite(found).all() or not np.abs(found).max(initial=0) < 3e38 or found.ndim > 1:
        raise ValueError(f"{path}, line {line}: {name} is {value!r:.60}, but a feature must be a finite number")
    return found


def _targets(path: Path, name: str, rows: Rows, kind: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels and their names, or numbers."""
    values = [row[name] for _, row in rows]
    for (line, _), value in zip(rows, values, strict=True):
        if value is None or value == "" or isinstance(value, (list, dict, bool)):
            raise ValueError(f"{path}, line {line}: {name} is {value!r:.60}, but a target must be a word or a number")
    try:
        numbers = np.array([float(value) for value in values])
    except (ValueError, OverflowError):
        numbers = None
    if kind == "numbers":
        if numbers is None or not (np.abs(numbers) < 3e38).all():
            raise ValueError(f"{path}: {name} has what is no finite number, but kind is 'numbers'")
        return numbers.astype(np.float32), ()
    if numbers is None:
        words, labels = np.unique([str(value) for value in values], return_inverse=True)
        return labels.astype(np.int32), tuple(words.tolist())
    if not (np.isfinite(numbers) & (numbers == np.round(numbers))).all():
        raise ValueError(f"{path}: {name} has numbers with fractions, which are no labels; give kind='numbers'")
    found, labels = np.unique(numbers, return_inverse=True)
    return labels.astype(np.int32), tuple(f"{number:.0f}" for number in found)


@checked
def read_image_folder(
    folder: str | os.PathLike[str], size: Count, *, mode: Literal["RGB", "L"] = "RGB", most: Count | None = None
) -> Folder:
    """One folder for each class, with PNG and JPEG files in it: FOLDER/CLASS/NAME.png.

    Args:
      folder: of the classes.
      size: height and width to which every image is resized.
      mode: "RGB" for colours, "L" for shades of grey.
      most: images of each class, the first by name; None takes all.

    Returns:
      A `Folder`: labels 0, 1, ... of the classes by their names.

    Raises:
      ValueError: Pillow is missing, a class without images, a file that is no image: named.
      FileNotFoundError: no such folder.
    """
    found = {path.name: images_in(path)[:most] for path in folders(Path(folder), "a folder of one folder per class")}
    total = sum(map(len, found.values())) * size * size * (3 if mode == "RGB" else 1)
    if total > 16 * LARGEST_FILE:
        raise ValueError(
            f"read_image_folder: size is {size}, which makes {total:.2g} bytes of all images, but at most"
            f" {16 * LARGEST_FILE:.2g} are read; give a smaller size, or most"
        )
    x = read_images([path for paths in found.values() for path in paths], mode, size)
    return Folder(x, np.repeat(np.arange(len(found), dtype=np.int32), [*map(len, found.values())]), tuple(found))


@checked
def load_tfds(
    name: str, data_dir: str | os.PathLike[str] | None = None, *, image: str = "image", label: str = "label"
) -> LabelledImages:
    """The splits "train" and "test" of a set of labelled images that TensorFlow Datasets has prepared.

    Args:
      name: as TensorFlow Datasets calls it, "fashion_mnist" say.
      data_dir: its folder; None is its own default.
      image, label: the features of an example that are read.

    Returns:
      `LabelledImages`; one channel is dropped.

    Raises:
      ValueError: TensorFlow Datasets is missing; a feature that is not there; images of different sizes.
      FileNotFoundError: the set is not prepared; one line that says how to.
    """
    parts: list[np.ndarray] = []
    for source in tfds_splits(name, data_dir):
        rows: Any = source.__getitems__(range(len(source)))  # type: ignore[attr-defined]
        for field in (image, label):
            if field not in rows[0]:
                raise ValueError(f"load_tfds: an example of {name} has no {field!r}, but {', '.join(sorted(rows[0]))}")
        shapes = {np.shape(row[image]) for row in rows}
        if len(shapes) > 1:
            raise ValueError(f"load_tfds: {name} has images of {len(shapes)} sizes, but they must have one")
        pixels = np.stack([row[image] for row in rows])
        parts += [pixels[..., 0] if pixels.shape[-1] == 1 and pixels.ndim == 4 else pixels]
        parts += [np.array([row[label] for row in rows], np.int32)]
    images = LabelledImages(*parts)
    check_images("load_tfds", images)
    return images
