"""Every parser of a file, fed with damaged ones: one ValueError (or a file that reads), in time, without memory, and
nothing executed, read or written outside.

A mutation flips, cuts, repeats or overwrites bytes; numbers that are lengths are what it often hits, as headers come
first. `python -m pytest tests/test_fuzz.py` takes a quarter of an hour; `make test` tries a few of each.
"""

from __future__ import annotations

import gzip
import io
import os
import resource
import shutil
import struct
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cl_zoo.datasets import load_omniglot, read_table
from cl_zoo.datasets.cifar import _mapped
from cl_zoo.datasets.few_shot_images import _listed, read_images
from cl_zoo.datasets.images import read_idx
from cl_zoo.language import load_pretrained, load_tokenizer
from cl_zoo.language.gguf_files import read_gguf
from cl_zoo.training.run_directory import read_metrics, settle_config

PRETRAINED = Path(__file__).parent / "data" / "pretrained"
TRIES = int(os.environ.get("CL_ZOO_FUZZ", "0"))


def idx() -> bytes:
    return struct.pack(">IIII", 0x0803, 3, 8, 8) + bytes(range(192))


def npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.arange(60, dtype=np.uint8).reshape(5, 3, 4))
    return buffer.getvalue()


def picture(kind: str) -> bytes:
    image = pytest.importorskip("PIL.Image")
    buffer = io.BytesIO()
    image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 12, 3)).astype(np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def gguf(path: Path) -> bytes:
    pytest.importorskip("gguf")
    from tests.language.test_gguf import write

    return write(path, "llama").read_bytes()


def whole(folder: Path) -> None:
    found = load_pretrained(folder)
    if found.tokenizer is not None:
        found.tokenizer.decode(found.tokenizer.encode("some text"))


def opened(path: Path) -> None:
    file = read_gguf(path)
    file.tokenizer()
    for name in sorted(file.tensors.names)[:3]:
        file.tensors.shape(name)


def in_folder(name: str, use: Callable[[Path], Any], base: Path) -> Callable[[Path, bytes], Any]:
    """The file `name` of a good folder is replaced."""

    def run(place: Path, content: bytes) -> Any:
        if not (place / "folder").exists():
            shutil.copytree(base, place / "folder")
        (place / "folder" / name).write_bytes(content)
        return use(place / "folder")

    return run


def alone(name: str, use: Callable[[Path], Any]) -> Callable[[Path, bytes], Any]:
    def run(place: Path, content: bytes) -> Any:
        (place / name).write_bytes(content)
        return use(place / name)

    return run


LLAMA = PRETRAINED / "llama"
PARSERS: dict[str, tuple[Callable[[Path], bytes], Callable[[Path, bytes], Any]]] = {
    "idx": (lambda _: idx(), alone("a-idx3-ubyte", lambda path: read_idx(path, 3))),
    "idx.gz": (lambda _: gzip.compress(idx()), alone("a.gz", lambda path: read_idx(path, 3))),
    "npy": (lambda _: npy(), alone("a.npy", lambda path: _mapped(path, (5, 3, 4)))),
    "png": (lambda _: picture("png"), alone("a.png", lambda path: read_images([path], "RGB", 12))),
    "jpeg": (lambda _: picture("jpeg"), alone("a.jpg", lambda path: read_images([path], "RGB", 12))),
    "csv": (lambda _: b"filename,label\na.png,x\n", alone("train.csv", lambda path: _listed(path, path.parent))),
    "table.csv": (
        lambda _: b"width,kind,year\n1,cat,2024\n2.5,dog,2025\n-3e2,cat,2025\n",
        alone("table.csv", lambda path: read_table(path, target="kind", task="year")),
    ),
    "table.jsonl": (
        lambda _: b'{"at": [1, 2], "y": "cat"}\n{"at": [3, 4.5], "y": "dog"}\n',
        alone("table.jsonl", lambda path: read_table(path, target="y")),
    ),
    "gguf": (lambda place: gguf(place / "good.gguf"), alone("a.gguf", opened)),
    "tokenizer.json": (
        lambda _: (LLAMA / "tokenizer.json").read_bytes(),
        in_folder("tokenizer.json", lambda folder: load_tokenizer(folder).encode("some text"), LLAMA),
    ),
    "config.json": (lambda _: (LLAMA / "config.json").read_bytes(), in_folder("config.json", whole, LLAMA)),
    "safetensors": (lambda _: (LLAMA / "model.safetensors").read_bytes(), in_folder("model.safetensors", whole, LLAMA)),
    "index.json": (
        lambda _: b'{"weight_map": {"model.norm.weight": "model-1.safetensors", "a": "model-2.safetensors"}}',
        in_folder("model.safetensors.index.json", whole, PRETRAINED / "qwen2"),
    ),
    "metrics.csv": (
        lambda _: b"step,phase,task,metric,value\n0,train,0,loss,1.5\n1,train,0,loss,1.25\n",
        alone("metrics.csv", lambda path: read_metrics(path.parent)),
    ),
    "run config.json": (
        lambda _: b'{"config": {"rate": 0.1}, "run": {"steps": 3, "key": [0, 1]}}',
        alone("config.json", lambda path: settle_config(path.parent, {"config": {"rate": 0.1}})),
    ),
}


LENGTHS = (0, 1, 255, 2**31, 2**32 - 1, 2**60, 2**64 - 1)


def mutated(content: bytes, random: np.random.Generator) -> bytes:
    data = bytearray(content)
    for _ in range(random.integers(1, 4)):
        # Most of what is fragile stands at the beginning.
        place = int(min(random.exponential(len(data) / 6), max(len(data) - 1, 0)))
        match int(random.integers(0, 7)):
            case 0:
                data[place : place + 1] = bytes([random.integers(0, 256)])
            case 1:
                del data[place:]
            case 2:
                del data[place : place + int(random.integers(1, 9))]
            case 3:
                data[place:place] = data[place : place + int(random.integers(1, 65))]
            case 4:
                data[place : place + 8] = struct.pack("<Q", LENGTHS[random.integers(len(LENGTHS))])
            case 5:
                data[place : place + 4] = struct.pack(">I", LENGTHS[random.integers(len(LENGTHS))] % 2**32)
            case 6 if data:
                data[place] ^= 1 << int(random.integers(0, 8))
    return bytes(data)


def tried(name: str, place: Path, n: int) -> dict[str, int]:
    """What became of n damaged files."""
    make, read = PARSERS[name]
    good = make(place)
    work = place / "work"
    work.mkdir()
    outside = {path: path.stat().st_mtime_ns for path in place.rglob("*") if work not in path.parents and path != work}
    random = np.random.default_rng(sum(name.encode()))
    found = {"read": 0, "refused": 0}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(n):
        content = mutated(good, random)
        begun = time.monotonic()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read(work, content)
            found["read"] += 1
        except (ValueError, FileNotFoundError) as error:
            assert "\n" not in str(error), f"{name}, mutation {i}: {error}"
            found["refused"] += 1
        took = time.monotonic() - begun
        assert took < 10, f"{name}, mutation {i}: {took:.0f} s"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 2**20
    assert grown < 1, f"{name}: {grown:.1f} GB"
    after = {path: path.stat().st_mtime_ns for path in place.rglob("*") if work not in path.parents and path != work}
    assert after == outside, "something was written outside"
    return found


@pytest.mark.parametrize("name", PARSERS)
def test_damaged_files_give_one_error(name: str, tmp_path: Path) -> None:
    found = tried(name, tmp_path, TRIES or 60)
    print(f"{name}: {found}")
    assert found["refused"] > 0


def test_images_by_another_name_are_not_opened(tmp_path: Path) -> None:
    """An EPS file called .png would start a program."""
    pytest.importorskip("PIL")
    for folder in ("images_background/a/b", "images_evaluation/a/c"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "0.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    with pytest.raises(ValueError, match=r"0.png: not an image that can be read"):
        load_omniglot(tmp_path)


def test_image_bombs(tmp_path: Path) -> None:
    """A small file of very many pixels."""
    image = pytest.importorskip("PIL.Image")
    path = tmp_path / "a.png"
    image.new("1", (9000, 9000)).save(path)
    assert path.stat().st_size < 20_000
    with pytest.raises(ValueError, match="9000 x 9000 pixels"):
        read_images([path], "L", 28)


def test_gzip_bombs(tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    with gzip.open(path, "wb") as file:
        file.write(struct.pack(">IIII", 0x0803, 10, 8, 8))
        for _ in range(300):
            file.write(bytes(1 << 20))
    with pytest.raises(ValueError, match="announces 640 bytes of data, but there are more"):
        read_idx(path, 3)


def test_a_list_that_leaves_its_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"x")
    (tmp_path / "images").mkdir()
    (tmp_path / "train.csv").write_text("filename,label\n../secret.png,x\n")
    with pytest.raises(ValueError, match="lies outside of images/"):
        _listed(tmp_path / "train.csv", tmp_path / "images")
