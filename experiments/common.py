"""How a study is written: cells that are kept as they finish, and a report of them.

`study` does what all have in common: it settles the directory of the run, runs the cells that are not finished, prints
the tables, draws the figures, and writes the result file that the ledger is made from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from cl_zoo import Learner, Result, Stream, accuracy, at, enable_compilation_cache, sweep
from cl_zoo.datasets import LabelledImages, load_digits
from cl_zoo.evaluation.metrics import average_accuracy, statistics
from cl_zoo.evaluation.plots import accuracy_heat_map, label_lines, seen_task_accuracy
from cl_zoo.training.run_directory import ConfigError, settle_config, write_json
from experiments.result_file import PLACES, RESULTS, Found, Report, checksums, result_file

AT_THE_END = {"accuracy": at("end", accuracy())}
"""The measure of a study that reads only the last row of R."""


class Cell(NamedTuple):
    """One line of a table: a method in a setting, over some seeds.

    Attributes:
      setting, method: names.
      file: with what the names of its files begin.
      run: `seed -> {name: value}`, as JSON can hold it; "seconds" are added where it does not tell them.
      at_once: None, or how many seeds `run` takes at once, as a sequence; its values are `[S, ...]` then.
    """

    setting: str
    method: str
    file: str
    run: Callable[[Any], dict[str, Any]]
    at_once: int | None = None


def study(
    name: str,
    config: Any,
    cells: Sequence[Cell] | Callable[[Path], Sequence[Cell]],
    report: Callable[[Found], Report],
    figures: Callable[[Found, Path], Iterable[Path]],
    *,
    settled: Mapping[str, Any],
    data: Mapping[str, Any] | None = None,
    seeds: Sequence[int] | None = None,
    directory: str | Path | None = None,
) -> None:
    """Runs what is not finished, prints, draws, and writes the result file.

    Args:
      name: of the script.
      config: its settings; `directory` and `record` are read, and `seeds`, `first_seed` and `protocol` where they are
        needed.
      cells: what is run; or `directory -> cells`, where something is to be chosen first.
      report: of what was found.
      figures: `(found, directory) -> paths` of what it draws there.
      settled: the settings that all cells of a directory share; more seeds or methods may be added to it later.
      data: by name, what is learned from: images, texts or files. Their checksums are settled, and recorded.
      seeds: None is as many as `config.seeds`, from `config.first_seed` or 0 on.
      directory: of the run; None is `config.directory`, or runs/NAME-PROTOCOL.
    """
    enable_compilation_cache()
    folder = Path(directory or config.directory or f"runs/{name}-{config.protocol}")
    sums = {f"{kind}_crc32": checksums(value) for kind, value in (data or {}).items()}
    try:
        settle_config(folder, {**settled, **sums})
    except ConfigError as error:
        raise SystemExit(str(error)) from error
    if seeds is None:
        first = getattr(config, "first_seed", 0)
        seeds = range(first, first + config.seeds)
    found = run_cells(cells(folder) if callable(cells) else cells, folder, seeds)
    told = report(found)
    print(told.text)
    for path in figures(found, folder):
        print(f"figure: {path}")
    path = RESULTS / f"{told.name or name}.json" if config.record else folder / "results.json"
    write_json(path, result_file(name, config, told, sums))
    print(f"results: {path}")


def run_cells(cells: Sequence[Cell], directory: Path, seeds: Sequence[int]) -> Found:
    """Runs every cell for every seed; what is finished is kept and not run again. To run a finished part again, delete
    its file."""
    folder = directory / "cells"
    parts = [(cell, [seed]) for seed in seeds for cell in cells if cell.at_once is None]  # what seeds share comes first
    for cell in cells:
        n = cell.at_once or 0
        parts += [(cell, list(seeds[i : i + n])) for i in range(0, len(seeds), n)] if n else []
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {(cell.setting, cell.method): [] for cell in cells}
    with tqdm(total=len(cells) * len(seeds), unit="run") as bar:
        for cell, some in parts:
            bar.set_description(f"{cell.setting}, {cell.method}")
            place = str(some[0]) if cell.at_once is None else f"{some[0]}-{some[-1]}"
            path = folder / f"{cell.file}-{place}.json".replace(" ", "_")
            part = kept(path, partial(cell.run, some[0] if cell.at_once is None else some))
            runs[cell.setting, cell.method] += [part] if cell.at_once is None else _apart(part, len(some))
            bar.update(len(some))
    return {key: _together(each) for key, each in runs.items()}


def kept(path: Path, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a finished part found; or it is run, timed and written."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        begun = time.perf_counter()
        new = run()
        write_json(path, {"seconds": time.perf_counter() - begun, **new})
    return json.loads(path.read_text())


def sweep_cell(
    setting: str,
    method: str,
    make: Callable[[Any], Learner] | Learner,
    stream: Stream,
    value: float = 0.0,
    *,
    orders: str | None = "per_seed",
    at_once: int | None = None,
    keep: Callable[[Result], dict[str, Any]] = lambda result: dict(result.measures),
    **options: Any,
) -> Cell:
    """A cell of learners, all of whose seeds one program runs.

    Args:
      setting, method: names.
      make: `value -> Learner`, or a learner.
      stream: what it learns from.
      value: a strength, say.
      orders: "per_seed", each with a task order of its own; None, all with the stream's.
      at_once: seeds that are run together; None is one on a CPU, and all elsewhere.
      keep: what of the result is kept, by default all that was measured.
      **options: of `sweep`.

    Returns:
      A `Cell`. R is `[S, T + 1, T]` also where accuracy is measured at the end alone; its other rows are no numbers.
    """
    maker = (lambda _: make) if isinstance(make, Learner) else make

    def run(seeds: Sequence[int]) -> dict[str, Any]:
        keys = jnp.stack([jax.random.key(seed) for seed in seeds])
        result = sweep(maker, jnp.full((1,), value), stream, keys, orders=orders, progress=False, **options)
        arrays = jax.tree.map(lambda leaf: np.asarray(leaf)[0], keep(result))
        if "accuracy" in arrays and arrays["accuracy"].ndim == 2:
            last = arrays["accuracy"][:, None]
            arrays["accuracy"] = np.pad(last, ((0, 0), (last.shape[-1], 0), (0, 0)), constant_values=np.nan)
        return jax.tree.map(np.ndarray.tolist, arrays)

    every = 1 if jax.default_backend() == "cpu" else sys.maxsize
    return Cell(setting, method, f"{setting}-{method}-{value:g}", run, at_once or every)


def held_out(
    make: Callable[[Any], Learner], values: Any, stream: Stream, seeds: int = 1, *, when: str = "task", **options: Any
) -> np.ndarray:
    """R on the validation split, `[H, S, T + 1, T]`, of every value and of the first seeds, by one program; with
    when="end" its last row, `[H, S, T]`. Options are those of `sweep`."""
    keys = jnp.stack([jax.random.key(seed) for seed in range(seeds)])
    measure = {"accuracy": at(when, accuracy("validation"))}
    return np.asarray(sweep(make, jnp.asarray(values), stream, keys, measure=measure, **options).accuracy)


def _apart(part: dict[str, Any], n: int) -> list[dict[str, Any]]:
    """What was kept of several seeds, of each."""
    arrays = {name: values for name, values in part.items() if name != "seconds"}

    def of(i: int) -> dict[str, Any]:
        return jax.tree.map(lambda values: values[i], arrays, is_leaf=lambda values: isinstance(values, list))

    return [of(i) | {"seconds": part["seconds"] / n} for i in range(n)]


def _together(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of each name the values of all seeds, as an array; as a list where their lengths differ."""

    def stack(*values: Any) -> Any:
        try:
            array = np.array(values)
        except ValueError:
            return list(values)
        return array.astype(float) if array.dtype == object else array  # None is no number

    return jax.tree.map(stack, *runs, is_leaf=lambda value: not isinstance(value, dict))


def all_but(config: Any, *free: str) -> dict[str, Any]:
    """The settings that the cells of a directory share: all but places, seeds and those that are named."""
    never = {*PLACES, "source", "record", "seeds", *free} - {"model"}
    return {field: value for field, value in dataclasses.asdict(config).items() if field not in never}


def check_numbers(config: Any, *fields: str, least: int = 1) -> None:
    """Refuses settings that are below the least."""
    for field in fields:
        if getattr(config, field) < least:
            raise SystemExit(f"{field} is {getattr(config, field)}, but it must be at least {least}")


def check_names(config: Any, **known: Iterable[str]) -> None:
    """Refuses settings that name what there is not."""
    for field, names in known.items():
        if unknown := set(getattr(config, field)) - set(names):
            raise SystemExit(f"{field} names {', '.join(sorted(unknown))}, but there are {', '.join(names)}")


def load_images(config: Any) -> LabelledImages:
    """The digits, or one line that says what is wrong with their files."""
    try:
        return load_digits(config.data_dir, config.source)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error


def warmed_up_adamw(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW (0.9, 0.95, decay 0.1) of clipped gradients, its rate warmed up over a tenth of the steps, then a cosine
    down to a tenth of it.
    """
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 10, steps, 0.1 * learning_rate)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, 0.9, 0.95, weight_decay=0.1))


def warmed_up_adam(learning_rate: Any, steps: int) -> optax.GradientTransformation:
    """Adam (0.9, 0.95) of clipped gradients, its rate, which may be traced, warmed up over a tenth of the steps, then a
    cosine down to 0."""
    course = optax.warmup_cosine_decay_schedule(0.0, 1.0, steps // 10, steps, 0.0)
    adam = optax.adam(lambda step: learning_rate * course(step), 0.9, 0.95)
    return optax.chain(optax.clip_by_global_norm(1.0), adam)


def final_accuracy(cell: dict[str, Any]) -> np.ndarray:
    """Average accuracy after the last task, `[S]`."""
    return average_accuracy(cell["accuracy"])


def scored(found: Found, score: Callable[[dict[str, Any]], Any] = final_accuracy, scale: float = 100) -> Found:
    """Rows of the ledger, one for each cell, by a score of each seed; in percent where the scale is 100."""
    return {key: {"scores": scale * np.asarray(score(cell)), "seconds": cell["seconds"]} for key, cell in found.items()}


def mean_and_spread(values: Any, digits: int = 3) -> str:
    """The mean, and the standard deviation where there are several values."""
    s = statistics(values)
    return f"{s.mean:.{digits}f} ± {s.sd:.{digits}f}" if s.n > 1 else f"{s.mean:.{digits}f}"


def table(
    found: Found,
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


@contextlib.contextmanager
def drawing(
    path: Path, rows: int = 1, columns: int = 1, *, size: tuple[float, float] = (4, 3.4), dpi: int = 150, **options: Any
) -> Iterator[np.ndarray]:
    """Axes `[rows, columns]`, each of that size in inches, which become a file in the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    inches = (size[0] * columns, size[1] * rows)
    figure, axes = plt.subplots(rows, columns, figsize=inches, squeeze=False, layout="constrained", **options)
    yield axes
    figure.savefig(path, dpi=dpi)
    plt.close(figure)


def accuracy_figures(
    found: Found, directory: Path, title: str = "{}", matrices: Sequence[str] | None = None
) -> list[Path]:
    """Accuracy against tasks seen, a panel per setting under `title`, and the accuracy matrices of these methods, or of
    all: the two files."""
    settings = list(dict.fromkeys(setting for setting, _ in found))
    methods = list(dict.fromkeys(method for _, method in found))
    paths = [directory / "accuracy_by_task.png", directory / "accuracy_matrices.png"]
    n = len(next(iter(found.values()))["seconds"])
    caption = f"mean over {n} seed{'s' if n > 1 else ''}" + (", band: one standard deviation" if n > 1 else "")
    with drawing(paths[0], 1, len(settings)) as axes:
        for column, setting in zip(axes[0], settings, strict=True):
            seen_task_accuracy(column, {m: found[setting, m]["accuracy"] for m in methods}, title.format(setting))
            label_lines(column)
        axes[0, 0].figure.supxlabel(caption, fontsize=8)
    shown = [method for method in matrices or methods if method in methods] or methods
    with drawing(paths[1], len(settings), len(shown), size=(3.0, 2.7), dpi=110) as axes:
        for row, setting in zip(axes, settings, strict=True):
            for place, method in zip(row, shown, strict=True):
                accuracy_heat_map(place, found[setting, method]["accuracy"], f"{title.format(setting)}: {method}")
        axes[0, 0].figure.supxlabel(caption.split(",")[0], fontsize=8)
    return paths
