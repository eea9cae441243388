"""The result file of a study, from which the ledger is made: what was found, by which code, from which data."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cl_zoo.evaluation.metrics import statistics
from cl_zoo.training.run_directory import environment

RESULTS = Path(__file__).parent / "results"
PLACES = {"data_dir": "DATA", "directory": "RUN", "text_dir": "TEXTS", "corrupted_dir": "CORRUPTED", "model": "MODEL"}
"""Settings that are places on one machine, and what stands for them in result files."""
Found = dict[tuple[str, str], dict[str, Any]]
"""What was found of each setting and method: arrays by name, whose first axis are the seeds `[S]`."""


class Report(NamedTuple):
    """What is told of a study.

    Attributes:
      text: the tables that are printed.
      benchmark: headline in the ledger.
      rows: "scores" and "seconds" `[S]` of each row of the ledger.
      notes: of a row.
      remarks: they stand below the rows.
      lower_is_better: scores are errors.
      name: of the result file; None is that of the study.
    """

    text: str
    benchmark: str
    rows: Found
    notes: Mapping[tuple[str, str], str] = {}
    remarks: Sequence[str] = ()
    lower_is_better: bool = False
    name: str | None = None


def checksums(data: Any) -> Any:
    """Checksums of bytes, of arrays and of files, and of all that is in a mapping, a sequence or a folder."""
    if isinstance(data, Mapping):
        return {name: checksums(value) for name, value in data.items()}
    if isinstance(data, (tuple, list)):
        return [checksums(value) for value in data]
    if isinstance(data, Path) and data.is_dir():
        return {path.name: checksums(path) for path in sorted(data.iterdir()) if path.is_file()}
    if isinstance(data, Path):
        crc = 0
        with open(data, "rb") as file:
            while block := file.read(1 << 24):
                crc = zlib.crc32(block, crc)
        return crc
    return zlib.crc32(data if isinstance(data, bytes) else np.ascontiguousarray(data).data)


def shown_command(name: str, arguments: Sequence[str]) -> str:
    """The command of this run, without the places of one machine."""
    shown = list(arguments)
    for field, stand_in in PLACES.items():
        flag = f"--{field.replace('_', '-')}"
        if flag in shown[:-1]:
            shown[shown.index(flag) + 1] = stand_in
    return " ".join([f"python -m experiments.{name}", *shown])


def commit() -> str | None:
    """Of this code, with "-dirty" where it was changed since; None where git does not know it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"]
    options: dict[str, Any] = {"cwd": RESULTS.parent, "capture_output": True, "text": True, "check": True}
    try:
        return subprocess.run(command, env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"}, **options).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def result_file(name: str, config: Any, report: Report, sums: dict[str, Any]) -> dict[str, Any]:
    """What the ledger is made from, and by which code and from which data it came. A row has the scores of all seeds;
    of no single ones where they are of other things than seeds."""
    rows: list[dict[str, Any]] = []
    for (setting, method), cell in report.rows.items():
        scores, seconds = np.asarray(cell["scores"]), np.asarray(cell["seconds"])
        s = statistics(scores)
        spread = {"sd": s.sd, "sem": s.sem} if s.n > 1 else {"sd": None, "sem": None}
        rows.append(
            {
                "algorithm": method,
                "setting": setting,
                "ours": {"mean": s.mean, "n": s.n, **spread},
                "seconds_per_seed": float(np.median(seconds)),
                "note": report.notes.get((setting, method), ""),
                **({"scores": scores.tolist()} if scores.shape == seconds.shape else {}),
            }
        )
    settings = dataclasses.asdict(config)
    return {
        "name": report.name or name,
        "benchmark": report.benchmark,
        "command": shown_command(name, sys.argv[1:]),
        "environment": environment(),
        "configuration": settings | {field: PLACES[field] for field in PLACES if settings.get(field)},
        "data": sums,
        "commit": commit(),
        "rows": rows,
        **({"lower_is_better": True} if report.lower_is_better else {}),
        **({"remarks": list(report.remarks)} if report.remarks else {}),
    }
