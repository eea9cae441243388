"""The folder of a run: configuration, environment, metrics, accuracy matrix, checkpoints."""

from __future__ import annotations

import csv
import json
import os
import platform
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cl_zoo.files import write_json
from cl_zoo.types import Array, Stream

__all__ = [
    *("ConfigError", "MetricsLog", "environment", "read_histories", "read_metrics", "settle_config"),
    "settle_run",
    *("write_array", "write_json"),
]


class ConfigError(ValueError):
    """A run directory holds a run of another configuration."""


def environment() -> dict[str, Any]:
    """What a result depends on besides its configuration."""
    versions = {}
    for package in ("cl_zoo", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    device = jax.devices()[0]
    return {
        "device": f"{device.device_kind}" if device.platform != "cpu" else f"cpu, {os.cpu_count()} cores",
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": versions,
    }


def settle_run(
    directory: Path, config: Any, stream: Stream, before: Callable[[int], dict[str, Any]], now: dict[str, Any]
) -> list[int]:
    """Writes what a run is into config.json, or compares; a run of the first tasks of the stream may grow.

    Args:
      config: the user's.
      before: `(n) -> run`, what it was when there were n tasks.
      now: what it is.

    Returns:
      Numbers of tasks that it had before, of which there may be checkpoints.

    Raises:
      ConfigError: see `settle_config`; another number of outputs.
    """
    try:
        found = json.loads((directory / "config.json").read_text())["run"]
        n, sizes, outputs = found["n_tasks"], list(found.get("n_tasks_before", [])), found["outputs"]
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        n, sizes, outputs = stream.n_tasks, [], now["outputs"]  # what is wrong is told below
    sizes = [size for size in sizes if isinstance(size, int) and 0 < size < stream.n_tasks]
    kept = {"n_tasks_before": sizes} if sizes else {}
    if isinstance(n, int) and n > stream.n_tasks:
        raise ConfigError(f"cannot go on in {directory}: the run has {n} tasks, and now there are {stream.n_tasks}")
    if outputs != now["outputs"]:
        raise ConfigError(
            f"cannot go on in {directory}: the run began with {outputs} outputs, and now there are {now['outputs']};"
            " fix them from the start (task_stream(classes=...)), or begin another run from grow_outputs(...)"
        )
    if not isinstance(n, int) or n >= stream.n_tasks or stream.first_function is None:
        settle_config(directory, {"config": config, "run": now | kept})
        return sizes
    grown = [*sizes, n]
    settle_config(
        directory,
        {"config": config, "run": before(n) | kept},
        {"config": config, "run": now | {"n_tasks_before": grown}},
    )
    return grown


def settle_config(directory: Path, config: Mapping[str, Any], grown: Mapping[str, Any] | None = None) -> None:
    """Writes config.json, or compares with the one that is there.

    Args:
      directory: of the run; made if missing.
      config: a mapping of values that JSON can hold.
      grown: what is written in its place where the one that is there is the same.

    Raises:
      ConfigError: the directory's run has another value somewhere; names the field and both values.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "config.json"
    try:
        now = json.loads(json.dumps(config, default=_plain, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the configuration holds what JSON cannot: {error}") from error
    if not path.exists():
        if any((directory / "checkpoints").glob("[0-9]*")):
            raise ConfigError(f"{path}: missing, but there are checkpoints; restore it, or use another directory")
        write_json(path, now)
        write_json(directory / "environment.json", environment())
        return
    try:
        before = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as JSON ({error}); use another directory") from error
    old, new = dict(_flat(before)), dict(_flat(now))
    same = _same_environment(directory)
    for field in sorted(old.keys() | new.keys()):
        if old.get(field) != new.get(field) or (field in old) != (field in new):
            if field == PROGRAM and not same:
                continue  # other versions trace other programs
            if field == PROGRAM:
                raise ConfigError(
                    f"cannot resume {directory}: the learner or the stream is another: a number (a rate, a strength),"
                    " a component or a function is not what it was; restore it, or use another directory"
                )
            written = field.encode("unicode_escape").decode()  # one line, whatever the file holds
            raise ConfigError(
                f"cannot resume {directory}: {written} was {old.get(field, 'absent')!r}, now it is"
                f" {new.get(field, 'absent')!r}; restore it, or use another directory"
            )
    if grown is not None:
        write_json(path, json.loads(json.dumps(grown, default=_plain, allow_nan=False)))


PROGRAM = "run.program_crc32"


def _same_environment(directory: Path) -> bool:
    """Whether the run began with these versions on such a device; warns where it did not."""
    path, now = directory / "environment.json", environment()
    try:
        before = json.loads(path.read_text())
        old = {**before["versions"], "device": before["device"], "python": before["python"]}
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        warnings.warn(f"{path}: not readable, so it is not known what the run began with", stacklevel=4)
        return False
    new = {**now["versions"], "device": now["device"], "python": now["python"]}
    for name in sorted(new):
        if old.get(name) != new[name]:
            warnings.warn(
                f"{directory}: the run began with {name} {old.get(name)}, and continues with {new[name]}: it may end in"
                " other bytes",
                stacklevel=4,
            )
            return False
    return True


def _plain(value: Any) -> Any:
    """Arrays as lists, paths as text."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return np.asarray(value).tolist()
    raise TypeError(f"{value!r}")


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for field, inner in value.items():
            yield from _flat(inner, f"{prefix}.{field}" if prefix else str(field))
    else:
        yield prefix, value


class MetricsLog:
    """metrics.csv: step, phase, task, metric, value; appended to, and cut back to a checkpoint on resume."""

    _HEADER = "step,phase,task,metric,value\n"

    def __init__(self, directory: Path):
        self.path = directory / "metrics.csv"
        self.crc = 0
        """Checksum of all that it holds."""

    def rewind(self, length: int, crc: int = 0) -> None:
        """Keeps the first `length` bytes, of this checksum; 0 starts again."""
        if length and (not self.path.exists() or self.length() < length):
            raise ConfigError(f"{self.path}: shorter than when the checkpoint was written; restore it, or start again")
        self.crc = 0
        if length:
            with open(self.path, "rb") as file:
                while length > (place := file.tell()):
                    self.crc = zlib.crc32(file.read(min(length - place, 1 << 20)), self.crc)
            if self.crc != crc:
                raise ConfigError(
                    f"{self.path}: its first {length} bytes are not those that were written; restore it, or start again"
                )
        with open(self.path, "ab") as file:
            file.truncate(length)
        if length == 0:
            self._append(self._HEADER)

    def _append(self, text: str) -> None:
        with open(self.path, "ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        self.crc = zlib.crc32(text.encode(), self.crc)

    def length(self) -> int:
        """In bytes."""
        return self.path.stat().st_size

    def updates(self, first_step: int, task: int, metrics: Mapping[str, Mapping[int, float]]) -> None:
        """Metrics of consecutive updates, each by its number from the first on."""
        lines = [
            (i, name, f"{first_step + i},train,{task},{name},{value!r}\n")
            for name, values in metrics.items()
            for i, value in values.items()
        ]
        self._append("".join(line for _, _, line in sorted(lines)))

    def scores(self, step: int, name: str, scores: np.ndarray) -> None:
        """A measure's score on each task after `step` updates."""
        self._append("".join(f"{step},measure,{i},{name},{float(score)!r}\n" for i, score in enumerate(scores)))


def read_metrics(directory: str | os.PathLike[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Metrics of the updates of a run: `{name: (steps i64[n], values f32[n])}`, the steps counted from 0."""
    found: dict[str, list[tuple[int, float]]] = {}
    path = Path(directory) / "metrics.csv"
    try:
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                if row["phase"] == "train":
                    found.setdefault(row["metric"], []).append((int(row["step"]), float(row["value"])))
    except (ValueError, KeyError, TypeError, OverflowError, csv.Error) as error:
        raise ValueError(f"{path}: not a log of metrics: {type(error).__name__} {error}") from error
    return {
        name: (np.array([step for step, _ in rows], np.int64), np.array([value for _, value in rows], np.float32))
        for name, rows in found.items()
    }


def read_histories(
    directory: Path, chosen: tuple[tuple[str, int], ...] | None, starts: np.ndarray, steps: int
) -> dict[str, Array]:
    """The metrics that a run has logged, as `run_stream` gives them."""
    found = {}
    for name, (at_step, values) in read_metrics(directory).items():
        stride = 1 if chosen is None else dict(chosen)[name]
        task = np.searchsorted(starts, at_step, side="right") - 1
        history = np.full((len(starts), steps // stride), np.nan, np.float32)
        history[task, (at_step - starts[task]) // stride] = values
        found[name] = jnp.asarray(history)
    return found
