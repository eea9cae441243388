"""TensorBoard's event files, beside metrics.csv and with the same numbers."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["EventLog", "read_events"]


def _tensorboardx() -> tuple[Any, Any]:
    """`Event` and `RecordWriter` of the package for TensorBoard's formats."""
    try:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import RecordWriter
    except ImportError as error:
        raise ImportError(
            'fit: tensorboard=True needs the package tensorboardX; install it with pip install "cl_zoo[tensorboard]"'
        ) from error
    return Event, RecordWriter


class EventLog:
    """Event files in the folder `tensorboard` of a run: scalars `train/METRIC` and `MEASURE/task_I`.

    A run that continues from a checkpoint cuts its old files back to it, and writes a new one from there: no step is in
    them twice, however often a run was killed, and a running TensorBoard finds the new file by itself.

    Args:
      directory: of the run.

    Raises:
      ImportError: tensorboardX is not installed.
    """

    def __init__(self, directory: Path):
        self._event, self._record_writer = _tensorboardx()
        self.folder = directory / "tensorboard"
        self._writer: Any = None

    def rewind(self, done: int | None) -> None:
        """Keeps what was written up to `done` updates; None starts again. Opens a new file."""
        self.folder.mkdir(exist_ok=True)
        old = [path for path in sorted(self.folder.glob("events.out.tfevents.*")) if path.suffix[1:].isdigit()]
        for path in old:
            length, scalars = 0, 0
            for end, event in [] if done is None else _records(path, self._event):
                if _is_later(event, done):
                    break
                length, scalars = end, scalars + len(event.summary.value)
            if scalars:
                with open(path, "ab") as file:
                    file.truncate(length)
            else:
                path.unlink()
        # TensorBoard reads a folder's files in the order of their names, and moves on when a later one appears.
        number = 1 + max((int(path.name.rsplit(".", 1)[1]) for path in old), default=0)
        self._writer = self._record_writer(
            str(self.folder / f"events.out.tfevents.{int(time.time()):010d}.{number:06d}")
        )
        self._write([self._event(wall_time=time.time(), file_version="brain.Event:2")])

    def _write(self, events: list[Any]) -> None:
        for event in events:
            self._writer.write(event.SerializeToString())
        self._writer.flush()  # to the disk, so before the checkpoint

    def _scalars(self, step: int, values: Mapping[str, float]) -> Any:
        event = self._event(wall_time=time.time(), step=step)
        for tag, value in values.items():
            event.summary.value.add(tag=tag, simple_value=value)
        return event

    def updates(self, first_step: int, metrics: Mapping[str, Mapping[int, float]]) -> None:
        """Metrics of consecutive updates, each by its number from the first on."""
        by_number: dict[int, dict[str, float]] = {}
        for name in sorted(metrics):
            for i, value in metrics[name].items():
                by_number.setdefault(i, {})[f"train/{name}"] = value
        self._write([self._scalars(first_step + i, by_number[i]) for i in sorted(by_number)])

    def scores(self, step: int, name: str, scores: np.ndarray) -> None:
        """A measure's score on each task after `step` updates."""
        self._write([self._scalars(step, {f"{name}/task_{i}": float(score) for i, score in enumerate(scores)})])

    def close(self) -> None:
        """The file is complete after every call; this releases it."""
        if self._writer is not None:
            self._writer.close()


def _is_later(event: Any, done: int | None) -> bool:
    """Whether an event was written after the checkpoint of `done` updates: step s is the update after s others, the
    scores at step s are those after s updates."""
    trained = any(value.tag.startswith("train/") for value in event.summary.value)
    return done is None or event.step >= done + (0 if trained else 1)


def _records(path: Path, event: Any) -> Iterator[tuple[int, Any]]:
    """Events of a file, each with the place where it ends; what a kill left half-written is not one.

    A record is its length (u64), a checksum of it (u32), the bytes, a checksum of them (u32).
    """
    content = path.read_bytes()
    end = 0
    while len(content) >= end + 12:
        (length,) = struct.unpack_from("<Q", content, end)
        begin, end = end + 12, end + 12 + length + 4
        if len(content) < end:
            return
        try:
            found = event.FromString(content[begin : begin + length])
        except Exception:  # a damaged record, and no more can be found behind it
            return
        yield end, found


def read_events(directory: Path) -> list[tuple[int, str, float]]:
    """All scalars of a run directory's event files, in order: `(step, tag, value)`."""
    event, _ = _tensorboardx()
    return [
        (found.step, value.tag, value.simple_value)
        for path in sorted((Path(directory) / "tensorboard").glob("events.out.tfevents.*"))
        for _, found in _records(path, event)
        for value in found.summary.value
    ]
