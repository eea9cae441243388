"""Every pair of six methods on split MNIST: which help each other, and which stand in each other's way.

Command                                                   hardware       time       expected
python -m experiments.pairs                               2 CPU cores               replay helps each of the others
python -m experiments.pairs --data-dir DATA --record      2 CPU cores    8 min      replay + DER++ or LwF: 94 %,
                                                                                    alone 89, 91 and 21 (class)

Domain- and class-incremental, 5 tasks, MLP 256-256, Adam, 300 batches of 64 a task. The diagonal of the figure is a
method alone, the naive learner is printed beside. Components that edit parameters stand before those that anchor them,
as listed.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optax
import tyro

from cl_zoo import (
    Component,
    compose,
    continual_backprop,
    der,
    enable_compilation_cache,
    ewc,
    lwf,
    replay,
    supervised,
    weight_interpolation,
)
from cl_zoo.evaluation.metrics import average_accuracy
from cl_zoo.models import mlp
from cl_zoo.streams import split_mnist
from experiments.common import RESULTS, Cell, load_images, record, run_cells, settle_run, shown_command, table

METHODS: dict[str, Component] = {
    "replay": replay(500, batch_size=64),
    "der++": der(500, alpha=0.5, beta=0.5, batch_size=64),
    "lwf": lwf(),
    "continual backprop": continual_backprop(1e-4),
    "weight interpolation": weight_interpolation(0.3),
    "ewc": ewc(1e3),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run. Unknown or impossible values are refused before anything compiles."""

    data_dir: str | None = None
    """Folder of the MNIST files; without it, the embedded digits."""
    source: Literal["embedded", "idx", "tfds"] | None = None
    scenarios: tuple[Literal["task", "domain", "class"], ...] = ("domain", "class")
    steps: int = 300
    hidden: tuple[int, ...] = (256, 256)
    batch_size: int = 64
    seeds: int = 3
    directory: str = "runs/pairs"
    record: bool = False
    """Write the result file that the ledger is made from."""


def main(config: Config) -> None:
    """Runs the study, prints its table, draws its figure."""
    if config.seeds < 1:
        raise SystemExit(f"seeds is {config.seeds}, but it must be at least 1")
    enable_compilation_cache()
    directory = Path(config.directory)
    images = load_images(config.data_dir, config.source)
    changing = {"data_dir", "source", "scenarios", "seeds", "directory", "record"}
    settle_run(directory, {k: v for k, v in dataclasses.asdict(config).items() if k not in changing}, images)
    chosen = [(), *((name,) for name in METHODS), *itertools.combinations(METHODS, 2)]
    found = run_cells(
        [cell for scenario in config.scenarios for cell in cells(config, images, scenario, chosen)],
        directory,
        range(config.seeds),
    )
    print(f"\nSplit MNIST, pairs of methods\n{table(found)}\n")
    print(f"figure: {figure(found, directory)}")
    path = RESULTS / "pairs.json" if config.record else directory / "results.json"
    command = shown_command("experiments.pairs", sys.argv[1:])
    record("pairs", "split MNIST, pairs of methods", command, found, {}, {}, path)
    print(f"results: {path}")


def cells(config: Config, images: Any, scenario: str, chosen: list[tuple[str, ...]]) -> list[Cell]:
    """One for each set of methods."""
    stream = split_mnist(
        scenario=scenario, images=images, batch_size=config.batch_size, steps=config.steps, sample_size=1000
    )
    model = mlp((28, 28), stream.tasks.active.shape[-1], hidden=config.hidden)

    def cell(names: tuple[str, ...]) -> Cell:
        components = [METHODS[name] for name in METHODS if name in names]
        learner = compose(model, optax.adam(1e-3), supervised(), *components, tasks=stream.tasks)
        return Cell(scenario, " + ".join(names) or "none", lambda _: learner, stream)

    return [cell(names) for names in chosen]


def figure(found: dict[tuple[str, str], dict[str, Any]], directory: Path) -> Path:
    """Final accuracy of every pair, and of each method alone on the diagonal; a panel per scenario."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names, scenarios = list(METHODS), list(dict.fromkeys(scenario for scenario, _ in found))
    accuracy = {key: 100 * np.mean(average_accuracy(cell["accuracy"])) for key, cell in found.items()}
    drawn, panels = plt.subplots(
        1, len(scenarios), figsize=(6 * len(scenarios), 5.2), squeeze=False, layout="constrained"
    )
    for axes, scenario in zip(panels[0], scenarios, strict=True):
        grid = np.full((len(names), len(names)), np.nan)
        for i, row in enumerate(names):
            for j in range(i + 1):
                grid[i, j] = accuracy[scenario, row if i == j else f"{names[j]} + {row}"]
        image = axes.imshow(grid, vmin=0, vmax=100, cmap="viridis")
        for (i, j), value in np.ndenumerate(grid):
            if np.isfinite(value):
                axes.text(j, i, f"{value:.0f}", ha="center", va="center", color="white" if value < 60 else "black")
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axes.set_yticks(range(len(names)), names)
        axes.set_title(f"split MNIST, {scenario}-incremental; naive: {accuracy[scenario, 'none']:.0f} %")
    drawn.colorbar(image, ax=panels, label="accuracy on all tasks (%)")
    path = directory / "pairs.png"
    drawn.savefig(path, dpi=150)
    plt.close(drawn)
    return path


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
