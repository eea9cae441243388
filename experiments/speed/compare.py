"""EWC and DER++ side by side: cl_zoo, Avalanche 0.6 and a plain PyTorch loop, all else being the same.

    bash experiments/speed/make_peer_env.sh PEER            once: the peers' own environment
    python -m experiments.speed.compare --peer PEER         with nothing else running

Every number is the median of `repeats` fresh processes, taken in turn so that a slow minute of the machine hits all.
Peers run with 1 and with 2 threads, and the better counts. "warm" compares the run alone (training, Fisher,
evaluation) of a compiled program with the peer's run; "cached" and "cold" compare whole processes, from their launch
to their exit, with a full and with an empty compilation cache.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from cl_zoo.datasets import load_digits
from cl_zoo.training.run_directory import environment, write_json

HERE = Path(__file__).parent
SIZES = {"permuted": (5, 10_000), "online": (10, 2_000)}
LABELS = {"ewc": ("observed", "expected"), "der++": ("observed",)}


@dataclasses.dataclass(frozen=True)
class Config:
    """What is compared."""

    peer: Path
    """Folder of the peers' environment."""
    repeats: int = 5
    settings: tuple[str, ...] = ("permuted", "online", "online der++")
    record: bool = False
    """Write experiments/speed/results/peers_cpu.json."""


def write_data(path: Path, n_tasks: int, n_train: int) -> None:
    """The embedded digits (a class-balanced part of them) and a permutation for each task."""
    images = load_digits()
    every = len(images.train_labels) // n_train
    random = np.random.default_rng(0)
    np.savez(
        path,
        train_images=images.train_images[::every],
        train_labels=images.train_labels[::every],
        test_images=images.test_images,
        test_labels=images.test_labels,
        permutations=np.stack([random.permutation(784) for _ in range(n_tasks)]).astype(np.int32),
    )


def run(command: list[str], **variables: str) -> dict[str, Any]:
    """The JSON line of a fresh process, and how long the process took."""
    start = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=HERE, env={**os.environ, **variables}, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    report = json.loads(done.stdout.strip().splitlines()[-1])
    return {**report, "seconds_process": time.perf_counter() - start}


def medians(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of every number of seconds, and the accuracy of the first."""
    names = [name for name, value in reports[0].items() if name.startswith("seconds") and isinstance(value, float)]
    return {name: statistics.median(r[name] for r in reports) for name in names} | {
        "mean_accuracy": reports[0]["mean_accuracy"],
        "n": len(reports),
    }


def compare(setting: str, config: Config, folder: Path) -> dict[str, Any]:
    """All programs on one setting, "SIZE" or "SIZE METHOD"."""
    size, method = (setting.split() + ["ewc"])[:2]
    data = folder / f"{size}.npz"
    write_data(data, *SIZES[size])
    peer = str(config.peer.resolve() / "bin" / "python")
    common = ["--data", str(data), "--setting", size]
    ours = [sys.executable, str(HERE / "cl_zoo_run.py"), *common, "--method", method]
    rivals: dict[str, list[str]] = {
        f"avalanche, {dataset}": ["avalanche_run.py", "--method", method, "--dataset", dataset]
        for dataset in ("classic", "tensors", "rows")
    }
    if method == "ewc":
        rivals |= {f"torch loop, {labels}": ["torch_loop.py", "--labels", labels] for labels in LABELS[method]}
    else:
        rivals["torch loop, observed"] = ["torch_der.py"]
    reports: dict[str, list[dict[str, Any]]] = {}
    for i in range(config.repeats):
        for labels in LABELS[method]:
            cache = folder / f"cache-{setting}-{labels}-{i}"
            label = [*ours, "--labels", labels, "--cache", str(cache)]
            reports.setdefault(f"cl_zoo, {labels}, cold", []).append(run(label))
            reports.setdefault(f"cl_zoo, {labels}, cached", []).append(run(label))
            reports.setdefault(f"cl_zoo, {labels}, warm", []).append(run([*label, "--repeats", "5"]))
        for name, (script, *options) in rivals.items():
            for threads in ("1", "2"):
                command = [peer, script, *common, *options, "--threads", threads]
                report = run(command, OMP_WAIT_POLICY="passive")
                reports.setdefault(f"{name}, {threads} threads", []).append(report)
        print(f"{setting}: round {i + 1} of {config.repeats}", flush=True)
    return {name: medians(found) for name, found in reports.items()}


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """How many times longer the peer takes."""

    def best(rival: str, field: str) -> float:
        return min(value[field] for name, value in found.items() if name.startswith(rival))

    whole, alone = "seconds_process", "seconds_run"
    lines = {}
    for rival in sorted({name.rsplit(",", 1)[0] for name in found if not name.startswith("cl_zoo")}):
        labels = "expected" if rival.endswith("expected") else "observed"
        lines[f"{rival}: warm"] = best(rival, alone) / found[f"cl_zoo, {labels}, warm"][alone]
        lines[f"{rival}: cached"] = best(rival, whole) / found[f"cl_zoo, {labels}, cached"][whole]
        lines[f"{rival}: cold"] = best(rival, whole) / found[f"cl_zoo, {labels}, cold"][whole]
    return lines


def main(config: Config) -> None:
    """Measures, prints medians and ratios."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for setting in config.settings:
            found = compare(setting, config, Path(folder))
            results[setting] = {"seconds": found, "ratios": ratios(found)}
            print(f"\n{setting}\n{'':34s}{'run s':>8s}{'process s':>11s}{'accuracy':>10s}")
            for name, value in sorted(found.items()):
                print(
                    f"{name:34s}{value['seconds_run']:8.2f}{value['seconds_process']:11.2f}"
                    f"{value['mean_accuracy']:10.3f}"
                )
            for name, value in results[setting]["ratios"].items():
                print(f"{name:34s}{value:8.2f} times")
    if config.record:
        path = HERE / "results" / "peers_cpu.json"
        kept = json.loads(path.read_text())["results"] if path.exists() else {}
        write_json(path, {"environment": environment(), "results": {**kept, **results}})


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
