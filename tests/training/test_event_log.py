"""TensorBoard's event files: the numbers of metrics.csv, and no step twice."""

from __future__ import annotations

import csv
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from cl_zoo import ewc, fit, supervised
from cl_zoo.training.checkpoint import Checkpoints
from cl_zoo.training.event_log import read_events
from tests.tiny import STEPS, same_bytes, tiny_learner, tiny_stream

pytest.importorskip("tensorboardX")
KEY = jax.random.key(2)


@pytest.fixture(scope="module")
def run(tiny_images: Any) -> Any:
    stream = tiny_stream(tiny_images)
    learner = tiny_learner(stream, supervised(), ewc(10.0))

    def start(directory: Path, **options: Any) -> Any:
        settings = {"checkpoint_every": 3, "checkpoint_seconds": 0, "progress": False, "tensorboard": True, **options}
        return fit(learner, stream, KEY, directory, **settings)

    return start


def logged(directory: Path) -> dict[tuple[int, str], float]:
    """What the event files should hold, from metrics.csv."""
    with open(directory / "metrics.csv", newline="") as file:
        return {
            (
                int(row["step"]),
                f"train/{row['metric']}" if row["phase"] == "train" else f"{row['metric']}/task_{row['task']}",
            ): float(row["value"])
            for row in csv.DictReader(file)
        }


def told(directory: Path) -> dict[tuple[int, str], float]:
    """What they hold; no step twice."""
    events = read_events(directory)
    found = {(step, tag): value for step, tag, value in events}
    assert len(found) == len(events)
    return found


def event_files(directory: Path) -> list[Path]:
    return sorted((directory / "tensorboard").iterdir())


def killed(run: Any, directory: Path, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after metrics were written, before the checkpoint of `at` was."""
    save = Checkpoints.save
    with monkeypatch.context() as patch:

        def die(self: Any, step: int, tree: Any) -> None:
            if step == at:
                raise SystemExit("killed")
            save(self, step, tree)

        patch.setattr(Checkpoints, "save", die)
        with pytest.raises(SystemExit):
            run(directory)


def test_events_hold_the_numbers_of_the_log(run: Any, tmp_path: Path) -> None:
    result = run(tmp_path)
    found = told(tmp_path)
    assert found == logged(tmp_path)
    assert len(found) == 2 * 3 * STEPS + 4 * 3
    assert found[STEPS, "train/ewc/penalty"] == float(result.metrics["ewc/penalty"][1, 0])
    assert found[2 * STEPS, "accuracy/task_1"] == float(result.accuracy[2, 1])
    assert len(event_files(tmp_path)) == 1


@pytest.mark.parametrize("kills", [[9], [0], [STEPS], [3, 9, 9, 15]])
def test_no_step_stands_twice_after_kills(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kills: list[int]
) -> None:
    for at in kills:
        killed(run, tmp_path, at, monkeypatch)
        assert max(step for step, _ in told(tmp_path)) >= at - 1, "written, but not in a checkpoint"
    result = run(tmp_path)
    assert told(tmp_path) == logged(tmp_path)
    names = [path.name for path in event_files(tmp_path)]
    assert len({name.rsplit(".", 1)[1] for name in names}) == len(names)
    same_bytes(run(tmp_path), result)
    assert told(tmp_path) == logged(tmp_path)


def test_half_a_record_is_cut_off(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed(run, tmp_path, 9, monkeypatch)
    (path,) = event_files(tmp_path)
    for lost in (1, 30):
        shutil.copytree(tmp_path, tmp_path.parent / f"torn-{tmp_path.name}-{lost}")
        torn = tmp_path.parent / f"torn-{tmp_path.name}-{lost}"
        with open(torn / "tensorboard" / path.name, "ab") as file:
            file.truncate(path.stat().st_size - lost)
        run(torn)
        assert told(torn) == logged(torn)


def test_events_go_back_with_a_damaged_checkpoint(run: Any, tmp_path: Path) -> None:
    run(tmp_path)
    for path in (tmp_path / "checkpoints" / "18" / "tree").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.warns(UserWarning, match="continuing from step 15"):
        run(tmp_path)
    assert told(tmp_path) == logged(tmp_path)
    assert len(event_files(tmp_path)) == 2


def test_events_turned_on_later_begin_at_the_checkpoint(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(lambda directory: run(directory, tensorboard=False), tmp_path, 9, monkeypatch)
    assert not (tmp_path / "tensorboard").exists()
    run(tmp_path)
    wanted = {
        (step, tag): value
        for (step, tag), value in logged(tmp_path).items()
        if step > 6 or (step == 6 and "train" in tag)
    }
    assert told(tmp_path) == wanted


def test_without_the_package_there_is_a_clear_error(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX.record_writer", None)
    with pytest.raises(ImportError, match=r'needs the package tensorboardX; install it with pip install "cl_zoo\['):
        run(tmp_path)
    assert not (tmp_path / "config.json").exists(), "refused before anything is written"
