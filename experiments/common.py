"""What the studies share: runs that are kept as they finish, tables, result files for the ledger."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm.auto import tqdm

from cl_zoo import Learner, Stream, sweep
from cl_zoo.datasets import LabelledImages, load_digits
from cl_zoo.evaluation.metrics import average_accuracy, statistics
from cl_zoo.evaluation.plots import accuracy_heat_map, seen_task_accuracy
from cl_zoo.training.run_directory import ConfigError, environment, settle_config, write_json

RESULTS = Path(__file__).parent / "results"


class Cell(NamedTuple):
    """One line of a table: a method in a setting, over some seeds.

    Attributes:
      setting, method: names.
      make: `settings -> Learner`; settings is a scalar that it may use.
      stream: what it learns from.
    """

    setting: str
    method: str
    make: Callable[[Any], Learner]
    stream: Stream


def warmed_up_adamw(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW (0.9, 0.95, decay 0.1) of clipped gradients, its rate warmed up over a tenth of the steps, then a cosine
    down to a tenth of it.
    """
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 10, steps, 0.1 * learning_rate)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, 0.9, 0.95, weight_decay=0.1))


def load_images(data_dir: str | None, source: str | None) -> LabelledImages:
    """The digits, or one line that says what is wrong with their files."""
    try:
        return load_digits(data_dir, source)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error


def settle_run(directory: Path, config: dict[str, Any], images: LabelledImages) -> None:
    """A directory holds runs of one configuration on one set of images; more seeds or methods may be added to it."""
    crc = [zlib.crc32(np.ascontiguousarray(array).data) for array in images]
    try:
        settle_config(directory, {**config, "images_crc32": crc})
    except ConfigError as error:
        raise SystemExit(str(error)) from error


def run_cells(
    cells: Sequence[Cell],
    directory: Path,
    seeds: Sequence[int],
    setting: float = 0.0,
    orders: str | None = "per_seed",
    **options: Any,
) -> dict[tuple[str, str], dict[str, Any]]:
    """Runs every cell for every seed, each with a task order of its own, or with orders=None all with the stream's;
    what is finished is kept and not run again.

    On a CPU seeds run one after another by the same program, elsewhere together. To run a finished part again, delete
    its file. Options are those of `run_stream`.

    Returns:
      `{(setting, method): {"accuracy": [S, T + 1, T], "seconds": [S]}}`, and with `evaluate_every` "curve":
      `[S, T, points, T]`.
    """
    folder = directory / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    together = 1 if jax.default_backend() == "cpu" else len(seeds)
    found: dict[tuple[str, str], dict[str, Any]] = {}
    with tqdm(total=len(cells) * len(seeds), unit="run") as bar:
        for cell in cells:
            bar.set_description(f"{cell.setting}, {cell.method}")
            kinds: dict[str, list[Any]] = {"accuracy": [], "curve": []}
            seconds = []
            for i in range(0, len(seeds), together):
                chunk = seeds[i : i + together]
                path = folder / f"{cell.setting}-{cell.method}-{setting:g}-{chunk[0]}-{chunk[-1]}.json".replace(
                    " ", "_"
                )
                if path.exists():
                    kept = json.loads(path.read_text())
                else:
                    keys = jnp.stack([jax.random.key(seed) for seed in chunk])
                    begun = time.perf_counter()
                    result = sweep(cell.make, jnp.full((1,), setting), cell.stream, keys, orders=orders, **options)
                    kept = {"accuracy": np.asarray(result.accuracy)[0].tolist()}
                    if result.curve is not None:
                        kept["curve"] = np.asarray(result.curve)[0].tolist()
                    kept["seconds"] = time.perf_counter() - begun
                    write_json(path, kept)
                for kind in kinds:
                    kinds[kind] += kept.get(kind, [])
                seconds += [kept["seconds"] / len(chunk)] * len(chunk)
                bar.update(len(chunk))
            found[cell.setting, cell.method] = {
                **{kind: np.array(values) for kind, values in kinds.items() if values},
                "seconds": seconds,
            }
    return found


def final_accuracy(cell: dict[str, Any]) -> np.ndarray:
    """Average accuracy after the last task, `[S]`."""
    return average_accuracy(cell["accuracy"])


def table(
    found: dict[tuple[str, str], dict[str, Any]],
    score: Callable[[dict[str, Any]], np.ndarray] = final_accuracy,
    said: str = "after the last task",
) -> str:
    """Accuracy in percent, a row per method, a column per setting: mean and standard deviation over seeds."""
    settings = list(dict.fromkeys(setting for setting, _ in found))
    methods = list(dict.fromkeys(method for _, method in found))
    wide = max(map(len, ["accuracy (%)", *methods])) + 2
    lines = [f"{'accuracy (%)':{wide}s}" + "".join(f"{setting:>22s}" for setting in settings)]
    for method in methods:
        row = f"{method:{wide}s}"
        for setting in settings:
            if (setting, method) not in found:
                row += f"{'':>22s}"
                continue
            s = statistics(100 * score(found[setting, method]))
            row += f"{s.mean:>14.2f} ± {s.sd:5.2f}" if s.n > 1 else f"{s.mean:>14.2f}        "
        lines.append(row)
    n = len(next(iter(found.values()))["seconds"])
    return "\n".join(lines) + f"\nmean ± standard deviation over {n} seed{'s' if n > 1 else ''}, {said}, test set"


def shown_command(module: str, arguments: Sequence[str]) -> str:
    """The command of this run, without the paths of one machine."""
    shown = list(arguments)
    for flag, stand_in in (("--data-dir", "DATA"), ("--directory", "RUN")):
        if flag in shown[:-1]:
            shown[shown.index(flag) + 1] = stand_in
    return " ".join(["python -m", module, *shown])


def accuracy_figures(found: dict[tuple[str, str], dict[str, Any]], directory: Path, title: str = "{}") -> list[Path]:
    """Accuracy against tasks seen, a panel per setting under `title`, and every accuracy matrix: the two files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings = list(dict.fromkeys(setting for setting, _ in found))
    methods = list(dict.fromkeys(method for _, method in found))
    paths = [directory / "accuracy_by_task.png", directory / "accuracy_matrices.png"]

    figure, axes = plt.subplots(1, len(settings), figsize=(4 * len(settings), 3.4), squeeze=False, layout="constrained")
    for column, setting in zip(axes[0], settings, strict=True):
        seen_task_accuracy(column, {m: found[setting, m]["accuracy"] for m in methods}, title.format(setting))
    axes[0, 0].legend(fontsize=8, loc="lower left")
    figure.savefig(paths[0], dpi=150)

    shape = (len(settings), len(methods))
    figure, axes = plt.subplots(*shape, figsize=(3.4 * shape[1], 3 * shape[0]), squeeze=False, layout="constrained")
    for row, setting in zip(axes, settings, strict=True):
        for place, method in zip(row, methods, strict=True):
            accuracy_heat_map(place, found[setting, method]["accuracy"], f"{setting}: {method}")
    figure.savefig(paths[1], dpi=110)
    plt.close("all")
    return paths


def record(
    name: str,
    benchmark: str,
    command: str,
    found: dict[tuple[str, str], dict[str, Any]],
    published: dict[tuple[str, str], list[dict[str, Any]]],
    notes: dict[tuple[str, str], str],
    path: Path,
    score: Callable[[dict[str, Any]], np.ndarray] = final_accuracy,
    lower_is_better: bool = False,
    not_attempted: Sequence[tuple[str, str]] = (),
    remarks: Sequence[str] = (),
) -> None:
    """Writes the result file that the ledger is made from: of "scores" `[S]` where a cell has them, else of `score` in
    percent. Where lower is better, scores are errors. Published cells that are not attempted get rows without ours.
    Remarks stand below the table.
    """
    rows = []
    for (setting, method), cell in found.items():
        s = statistics(cell["scores"] if "scores" in cell else 100 * score(cell))
        rows.append(
            {
                "algorithm": method,
                "setting": setting,
                "ours": {"mean": s.mean, "sd": s.sd if s.n > 1 else None, "sem": s.sem if s.n > 1 else None, "n": s.n},
                "published": published.get((setting, method), []),
                "seconds_per_seed": float(np.median(cell["seconds"])),
                "note": notes.get((setting, method), ""),
            }
        )
    rows += [
        {"algorithm": method, "setting": setting, "ours": None, "published": published[setting, method]}
        for setting, method in not_attempted
    ]
    result = {"name": name, "benchmark": benchmark, "command": command, "environment": environment(), "rows": rows}
    result |= {"lower_is_better": True} if lower_is_better else {}
    write_json(path, result | ({"remarks": list(remarks)} if remarks else {}))
