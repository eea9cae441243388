"""What lies in a run directory, damaged in every way: refused by name, passed over with a warning, or of no
consequence. Two processes in one directory."""

from __future__ import annotations

import shutil
import subprocess
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cl_zoo import fit, supervised
from tests.tiny import same_bytes, tiny_learner, tiny_stream
from tests.training.test_running import KEY, final_bytes, start_process


def flipped(content: bytes, at: int, bit: int = 0x10) -> bytes:
    return content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :] if content else b"\0"


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "deleted": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "without its last byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "a byte in the middle": lambda path: path.write_bytes(flipped(path.read_bytes(), path.stat().st_size // 2)),
    "the first byte": lambda path: path.write_bytes(flipped(path.read_bytes(), 0)),
    "the last byte": lambda path: path.write_bytes(flipped(path.read_bytes(), -1 % max(path.stat().st_size, 1), 1)),
    "more at the end": lambda path: path.write_bytes(path.read_bytes() + b"\n0,0,0\n"),
    "noise": lambda path: path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size)),
    "a folder": _folder,
}


@pytest.fixture(scope="module")
def resumed(tiny_images: Any, tmp_path_factory: Any) -> tuple[Any, Path, Any]:
    """A run that stopped halfway through its last task, and what it ends in."""
    stream = tiny_stream(tiny_images)
    learner = tiny_learner(stream, supervised())

    def run(directory: Path) -> Any:
        return fit(
            learner, stream, KEY, directory, checkpoint_every=3, checkpoint_seconds=0, progress=False, tensorboard=True
        )

    folder = tmp_path_factory.mktemp("damage")
    result = run(folder / "whole")
    shutil.copytree(folder / "whole", folder / "stopped")
    shutil.rmtree(folder / "stopped" / "checkpoints" / "18")
    return run, folder, result


def outcome(run: Any, directory: Path, result: Any, wanted: Path) -> str:
    """What came of it; fails where a wrong result came without a word."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            found = run(directory)
        except (ValueError, OSError) as error:
            assert "\n" not in str(error) and str(directory) in str(error), repr(error)
            return f"refused: {type(error).__name__}"
    same_bytes(found, result)
    assert (directory / "metrics.csv").read_bytes() == (wanted / "metrics.csv").read_bytes()
    assert (directory / "accuracy.npy").read_bytes() == (wanted / "accuracy.npy").read_bytes()
    return "warned" if any("damaged" in str(one.message) for one in told) else "the same bytes"


@pytest.mark.long
def test_no_damage_is_silent(resumed: tuple[Any, Path, Any]) -> None:
    run, folder, result = resumed
    found: dict[str, str] = {}
    for state in ("whole", "stopped"):
        paths = sorted(path.relative_to(folder / state) for path in (folder / state).rglob("*") if path.is_file())
        for path in paths:
            for name, hurt in DAMAGES.items():
                directory = folder / "hurt"
                shutil.rmtree(directory, ignore_errors=True)
                shutil.copytree(folder / state, directory)
                hurt(directory / path)
                found[f"{state}: {path}: {name}"] = outcome(run, directory, result, folder / "whole")
    counted = {kind: list(found.values()).count(kind) for kind in sorted(set(found.values()))}
    print(len(found), counted)
    assert len(found) >= 100
    assert counted["warned"] > 40


@pytest.mark.long
def test_forty_pairs_of_processes(tmp_path: Path) -> None:
    """Started at once, or one while the other runs: one gets the directory, and it ends in the same bytes."""
    assert start_process(tmp_path / "once").wait(timeout=600) == 0
    wanted, random, refused = final_bytes(tmp_path / "once"), np.random.default_rng(0), 0
    for i in range(40):
        directory = tmp_path / f"pair-{i}"
        first = start_process(directory, errors=subprocess.PIPE)
        time.sleep(random.choice([0.0, random.uniform(0, 6)]))
        second = start_process(directory, errors=subprocess.PIPE)
        said = [process.communicate(timeout=600)[1] for process in (first, second)]
        codes = [first.returncode, second.returncode]
        assert 0 in codes, said
        for code, text in zip(codes, said, strict=True):
            if code:
                refused += 1
                assert "InUseError" in text, text
        assert final_bytes(directory) == wanted
        shutil.rmtree(directory)
    assert refused >= 10
