"""Tables, folders of images and sets by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cl_zoo.datasets import load_tfds, read_image_folder, read_table

CSV = "\ufeffwidth, height,kind,year\n1,2.5,cat,2024\n3,-4e1,dog,2025\n\n5,6,cat,2025\n"
JSONL = '{"at": [1, 2], "w": 3, "y": 7}\n{"at": [4, 5], "w": 6.5, "y": 3}\n'


def test_csv(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(CSV)
    table = read_table(tmp_path / "a.csv", target="kind", task="year")
    np.testing.assert_array_equal(table.x, np.array([[1, 2.5], [3, -40], [5, 6]], np.float32))
    assert table.y.tolist() == [0, 1, 0] and table.classes == ("cat", "dog") and table.features == ("width", "height")
    assert table.task.tolist() == ["2024", "2025", "2025"] and table.x.dtype == np.float32
    years = read_table(tmp_path / "a.csv", target="year", features=["height"], kind="numbers")
    assert years.y.tolist() == [2024, 2025, 2025] and years.y.dtype == np.float32 and years.x.shape == (3, 1)
    assert read_table(tmp_path / "a.csv", target="year", features=["height"]).classes == ("2024", "2025")
    assert read_table(tmp_path / "a.csv", features=["height"]).y is None


def test_jsonl(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(JSONL)
    table = read_table(tmp_path / "a.jsonl", target="y")
    assert table.features == ("at[0]", "at[1]", "w") and table.x.tolist() == [[1, 2, 3], [4, 5, 6.5]]
    assert table.y.tolist() == [1, 0] and table.classes == ("3", "7")


@pytest.mark.parametrize(
    ("name", "text", "options", "message"),
    [
        ("a.csv", CSV, {"target": "color"}, "target is 'color', but .*a.csv has the columns width, height, kind, year"),
        ("a.csv", CSV, {"task": "day"}, "task is 'day'"),
        ("a.csv", CSV, {"features": ["kind"]}, "line 2: kind is 'cat', but a feature must be a finite number"),
        ("a.csv", CSV.replace("6", "nan"), {"target": "kind"}, "line 5: height is 'nan'"),
        ("a.csv", CSV.replace("6", ""), {"target": "kind"}, "line 5: height is ''"),
        ("a.csv", CSV.replace("6", "1e39"), {"target": "kind"}, "line 5: height is '1e39'"),
        ("a.csv", CSV.replace("5,6,", "6,"), {}, "line 5: 3 values, but there are 4 columns"),
        ("a.csv", CSV.replace("height", "width"), {}, "two columns of its head line"),
        ("a.csv", "a,b\n", {}, "must have a head line and rows"),
        ("a.csv", CSV, {"target": "height", "features": ["width"]}, "numbers with fractions.*kind='numbers'"),
        (
            "a.csv",
            CSV,
            {"target": "kind", "features": ["width"], "kind": "numbers"},
            "kind has what is no finite number",
        ),
        ("a.csv", CSV, {"kind": "word"}, "kind is 'word'"),
        ("a.csv", CSV.replace("cat", ""), {"target": "kind", "task": "year"}, "line 2: kind is ''"),
        ("a.jsonl", JSONL + "{", {}, "line 3: not JSON"),
        ("a.jsonl", JSONL + '{"at": 1}', {}, "line 3: every line must be an object with the fields of the first"),
        ("a.jsonl", JSONL.replace("[4, 5]", "[[4, 5]]"), {}, "line 2: at is"),
        ("a.jsonl", JSONL.replace("[4, 5]", "[4]"), {}, "line 2: at has 1 numbers, but 2 in the first"),
        ("a.jsonl", "[" * 100000, {}, "not JSON"),
        ("a.jsonl", "", {}, "it has no rows"),
    ],
)
def test_careless_tables(tmp_path: Path, name: str, text: str, options: Any, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / name, **options)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none.csv: no such file"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_image_folder(tmp_path / "none", 8)


def test_image_folder(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 6, 3)).astype(np.uint8)
    for i, name in enumerate(("b/2", "a/1", "b/1", "b/3", "a/0")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        image.fromarray(pixels[i]).save(tmp_path / f"{name}.png")
    found = read_image_folder(tmp_path, 6)
    assert found.classes == ("a", "b") and found.y.tolist() == [0, 0, 1, 1, 1]
    np.testing.assert_array_equal(found.x, pixels[[4, 1, 2, 0, 3]])
    few = read_image_folder(tmp_path, 3, mode="L", most=1)
    assert few.x.shape == (2, 3, 3) and few.y.tolist() == [0, 1]
    (tmp_path / "a" / "x.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="x.png: not an image"):
        read_image_folder(tmp_path, 6)
    with pytest.raises(ValueError, match="size is 1000000, which makes"):
        read_image_folder(tmp_path, 10**6)


class Source(list):
    def __getitems__(self, places: Any) -> Any:
        return [self[i] for i in places]


def test_tfds_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"image": np.full((4, 4, 1), 40 * i, np.uint8), "label": i % 2, "id": i} for i in range(6)]
    monkeypatch.setattr("cl_zoo.datasets.own.tfds_splits", lambda name, data_dir: (Source(rows[:4]), Source(rows[4:])))
    images = load_tfds("tiny")
    assert images.train_images.shape == (4, 4, 4) and images.test_labels.tolist() == [0, 1]
    assert images.test_images[1, 0, 0] == 200
    with pytest.raises(ValueError, match="an example of tiny has no 'fine_label', but id, image, label"):
        load_tfds("tiny", label="fine_label")
    rows[1]["image"] = np.zeros((3, 4, 1), np.uint8)
    with pytest.raises(ValueError, match="tiny has images of 2 sizes"):
        load_tfds("tiny")


def test_json_is_what_json_writes(tmp_path: Path) -> None:
    rows = [{"x": [i, 0.5], "y": "ab"[i % 2]} for i in range(4)]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_table(tmp_path / "b.jsonl", target="y").y.tolist() == [0, 1, 0, 1]
