"""Omniglot and mini-ImageNet, from files made here."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cl_zoo.datasets import FewShotImages, load_mini_imagenet, load_omniglot
from cl_zoo.streams import few_shot

CHARACTERS = {
    "images_background": [("Greek", 1), ("Greek", 2), ("Latin", 1)],
    "images_evaluation": [("Avesta", 1), ("Avesta", 2)],
}
SPLITS = {"train": ["n01", "n02", "n03"], "val": ["n04"], "test": ["n05", "n06"]}


def drawing(number: int, image: int) -> np.ndarray:
    """105 x 105, black strokes on white: True is white."""
    white = np.ones((105, 105), bool)
    white[10 + 12 * number : 20 + 12 * number, 30 : 60 + 15 * image] = False
    return white


@pytest.fixture
def omniglot(tmp_path: Path) -> Path:
    """Five characters in three alphabets, two images of each."""
    for number, (part, alphabet, character) in enumerate((p, *c) for p, cs in CHARACTERS.items() for c in cs):
        folder = tmp_path / part / alphabet / f"character{character:02d}"
        folder.mkdir(parents=True)
        for image in range(2):
            Image.fromarray(drawing(number, image)).save(folder / f"{number + 1:04d}_{image + 1:02d}.png")
    (tmp_path / "images_background" / ".DS_Store").write_bytes(b"no folder")
    return tmp_path


def colour(name: str, image: int) -> np.ndarray:
    """84 x 84 of one colour."""
    return np.full((84, 84, 3), (40 * int(name[1:]), 100 * image, 200), np.uint8)


@pytest.fixture(params=["folders", "csv"])
def mini(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Six classes, three images of each, in either layout."""
    for split, classes in SPLITS.items():
        lines = ["filename,label"]
        for name in classes:
            folder = tmp_path / (f"{split}/{name}" if request.param == "folders" else "images")
            folder.mkdir(parents=True, exist_ok=True)
            for image in range(3):
                file = f"{name}_{image}.png"
                Image.fromarray(colour(name, image)).save(folder / file)
                lines.append(f"{file},{name}")
        if request.param == "csv":
            (tmp_path / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def refusal(
    load: Callable[..., FewShotImages], *arguments: Any, kind: type[Exception] = ValueError, **options: Any
) -> str:
    """The one line with which it is refused."""
    with pytest.raises(kind) as error:
        load(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_omniglot_of_a_folder(omniglot: Path) -> None:
    found = load_omniglot(omniglot)
    assert found.images.shape == (10, 28, 28) and found.images.dtype == np.uint8
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert [found[i].tolist() for i in (2, 3, 4)] == [[0, 1, 2], [], [3, 4]]
    for row, image in enumerate(found.images):
        assert image.max() > 230 and image[0].max() < 10, "white strokes on black"
        height = np.flatnonzero(image.max(1) > 128).mean() + 0.5
        width = np.sum(image.max(0) > 128)
        assert abs(height - (15 + 12 * (row // 2)) * 28 / 105) < 0.6
        assert abs(width - (30 + 15 * (row % 2)) * 28 / 105) < 1
    same = load_omniglot(str(omniglot), "folder", size=105)
    np.testing.assert_array_equal(same.images[3], 255 * (1 - drawing(1, 1).astype(np.uint8)))


def test_omniglot_with_characters_drawn_at_random(omniglot: Path) -> None:
    whole = load_omniglot(omniglot)
    splits = set()
    for seed in range(5):
        found = load_omniglot(omniglot, drawn=(2, 1), seed=seed)
        np.testing.assert_array_equal(found.images, whole.images)
        assert [len(found[i]) for i in (2, 3, 4)] == [2, 1, 2]
        assert sorted(np.concatenate(found[2:]).tolist()) == [0, 1, 2, 3, 4]
        splits.add(str(found[2:]))
    assert len(splits) > 1
    assert str(load_omniglot(omniglot, drawn=(2, 1), seed=0)[2:]) in splits


def test_files_make_episodes(omniglot: Path) -> None:
    stream = few_shot(load_omniglot(omniglot), n_way=5, queries=1, rotations=True, steps=2)
    assert stream.data.train.tolist() == [[0, 1, 2]] and stream.data.test.tolist() == [[3, 4]]


def test_mini_imagenet_of_either_layout(mini: Path) -> None:
    found = load_mini_imagenet(mini)
    assert found.images.shape == (18, 84, 84, 3) and found.images.dtype == np.uint8
    assert found.labels.tolist() == np.repeat(np.arange(6), 3).tolist()
    assert [found[i].tolist() for i in (2, 3, 4)] == [[0, 1, 2], [3], [4, 5]]
    for row, image in enumerate(found.images):
        np.testing.assert_array_equal(image, colour(f"n{row // 3 + 1:02d}", row % 3))
    small = load_mini_imagenet(str(mini), size=20)
    np.testing.assert_array_equal(small.images, found.images[:, :20, :20])


def test_grey_and_oblong_images_are_brought_to_form(mini: Path) -> None:
    path = next(mini.rglob("n01_0.png"))
    Image.fromarray(np.full((60, 130), 77, np.uint8)).save(path)
    assert (load_mini_imagenet(mini).images[0] == 77).all()


def damaged(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "checksum":
        where = content.index(b"IDAT") + 6
        path.write_bytes(content[:where] + bytes([content[where] ^ 0xFF]) + content[where + 1 :])
    else:
        path.write_bytes({"empty": b"", "text": b"no image\n", "half": content[: len(content) // 2]}[how])


@pytest.mark.parametrize("how", ["empty", "text", "half", "checksum"])
def test_broken_images_are_named(how: str, omniglot: Path, mini: Path) -> None:
    for path, load in (
        (next(omniglot.rglob("0002_01.png")), load_omniglot),
        (next(mini.rglob("n04_1.png")), load_mini_imagenet),
    ):
        damaged(path, how)
        message = refusal(load, omniglot)
        assert str(path) in message and "not an image that can be read" in message and "again" in message


def test_empty_classes_are_named(omniglot: Path) -> None:
    folder = omniglot / "images_evaluation" / "Avesta" / "character02"
    for path in folder.iterdir():
        path.unlink()
    (folder / "notes.txt").write_text("gone")
    message = refusal(load_omniglot, omniglot)
    assert str(folder) in message and "no images in this class" in message


@pytest.mark.parametrize("mini", ["folders"], indirect=True)
def test_empty_folders_are_named(mini: Path) -> None:
    (mini / "val" / "n04").rename(mini / "test" / "n07")
    message = refusal(load_mini_imagenet, mini)
    assert str(mini / "val") in message and "no folders in it" in message
    (mini / "val" / "n04").mkdir()
    assert "no images in this class" in refusal(load_mini_imagenet, mini)


def test_missing_folders_are_named(omniglot: Path, tmp_path: Path) -> None:
    (omniglot / "images_evaluation").rename(omniglot / "elsewhere")
    message = refusal(load_omniglot, omniglot, kind=FileNotFoundError)
    assert str(omniglot / "images_evaluation") in message and "no such folder" in message
    message = refusal(load_mini_imagenet, tmp_path / "none", kind=FileNotFoundError)
    assert str(tmp_path / "none" / "train") in message and "csv" in message


def test_a_class_in_two_splits_is_refused(mini: Path) -> None:
    if (mini / "train").is_dir():
        (mini / "test" / "n05").rename(mini / "test" / "n02")
    else:
        listed = (mini / "test.csv").read_text()
        (mini / "test.csv").write_text(listed.replace(",n05", ",n02"))
    assert "class 'n02' is in two of train, validation and test" in refusal(load_mini_imagenet, mini)


@pytest.mark.parametrize("mini", ["csv"], indirect=True)
@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("file;class\n", ValueError, "its first line must be filename,label"),
        ("", ValueError, "its first line must be filename,label"),
        ("filename,label\n", ValueError, "lists no images"),
        ("filename,label\nn04_0.png\n", ValueError, "line 2: 'n04_0.png', but it must be a file and a class"),
        ("filename,label\nn04_0.png,n04\nn04_9.png,n04\n", FileNotFoundError, "val.csv lists it in line 3"),
        (b"\xff\xfe\x00", ValueError, "not a csv file"),
        (None, FileNotFoundError, "no such file; put train.csv"),
    ],
)
def test_bad_split_files_are_named(text: Any, kind: type[Exception], said: str, mini: Path) -> None:
    path = mini / "val.csv"
    if text is None:
        path.unlink()
    else:
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    message = refusal(load_mini_imagenet, mini, kind=kind)
    assert said in message and str(mini) in message


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"source": "web"}, "source is 'web', but it must be one of 'folder', 'tfds'"),
        ({"size": 0}, "size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"drawn": (1, 1, 3)}, "drawn is (1, 1, 3), but it must be 2 values, each a whole number"),
        ({"drawn": (0, 1)}, "drawn[0] is 0, but it must be in [1, 4]"),
        ({"drawn": (3, 2)}, "drawn[1] is 2, but it must be in [0, 1]"),
    ],
)
def test_impossible_values_are_refused(options: dict[str, Any], said: str, omniglot: Path) -> None:
    assert said in refusal(load_omniglot, omniglot, **options)


def test_no_folder_is_refused() -> None:
    assert "'folder' needs data_dir" in refusal(load_omniglot, None)
    assert "size is 0.5, but it must be a whole number" in refusal(load_mini_imagenet, "here", size=0.5)


def test_without_pillow(mini: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert "pip install 'cl_zoo[images]'" in refusal(load_mini_imagenet, mini)


def test_tfds_set_that_is_not_prepared(tmp_path: Path) -> None:
    pytest.importorskip("tensorflow_datasets")
    message = refusal(load_omniglot, tmp_path, "tfds", kind=FileNotFoundError)
    assert str(tmp_path / "omniglot") in message and "tfds.builder('omniglot'" in message
    assert list(tmp_path.iterdir()) == [], "nothing is downloaded, or left behind"


def test_tfds_set_that_is_prepared(omniglot: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A tiny set of that name, written by TFDS itself, equals the folder's."""
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")
    folder = tmp_path_factory.mktemp("tfds")

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "omniglot"
        VERSION = tfds.builder("omniglot", data_dir=folder).version

        def _info(self) -> Any:
            features = {
                "image": tfds.features.Image(shape=(105, 105, 3), encoding_format="png"),
                "alphabet": tfds.features.ClassLabel(num_classes=50),
                "alphabet_char_id": np.int64,
                "label": tfds.features.ClassLabel(num_classes=1623),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager: Any) -> Any:
            return {"train": self._generate_examples(0, 3), "test": self._generate_examples(3, 5)}

        def _generate_examples(self, start: int, end: int) -> Any:
            for number in range(start, end):
                for image in range(2):
                    file = io.BytesIO()
                    Image.fromarray(drawing(number, image)).convert("RGB").save(file, "PNG")
                    file.seek(0)
                    row = {"image": file, "alphabet": 0, "alphabet_char_id": 0, "label": 100 + number}
                    yield f"{number}_{image}", row

    Tiny(data_dir=folder, file_format="array_record").download_and_prepare()
    found, expected = load_omniglot(folder, "tfds"), load_omniglot(omniglot)
    for a, b in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_array_equal(a, b)
    for label in range(5):
        images = [sorted(image.tobytes() for image in of.images[of.labels == label]) for of in (found, expected)]
        assert images[0] == images[1]
