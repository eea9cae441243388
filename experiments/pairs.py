"""Every pair of six methods on split MNIST: which help each other, and which stand in each other's way.

Command                                                   hardware       time       expected
python -m experiments.pairs                               2 CPU cores    not timed  replay helps each of the others

Class-incremental, 5 tasks, MLP 256-256, Adam, 300 batches of 64 a task. The diagonal of the figure is a method alone,
the naive learner is printed beside. Components that edit parameters stand before those that anchor them, as listed.
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
    mlp,
    replay,
    split_mnist,
    supervised,
    weight_interpolation,
)
from cl_zoo.evaluation.metrics import average_accuracy
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
    scenario: Literal["class", "domain", "task"] = "class"
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
    changing = {"data_dir", "source", "seeds", "directory", "record"}
    settle_run(directory, {k: v for k, v in dataclasses.asdict(config).items() if k not in changing}, images)
    stream = split_mnist(
        scenario=config.scenario, images=images, batch_size=config.batch_size, steps=config.steps, sample_size=1000
    )
    model = mlp((28, 28), stream.tasks.active.shape[-1], hidden=config.hidden)

    def cell(*names: str) -> Cell:
        components = [METHODS[name] for name in METHODS if name in names]

        def make(_: Any) -> Any:
            return compose(model, optax.adam(1e-3), supervised(), *components, tasks=stream.tasks)

        return Cell(config.scenario, " + ".join(names) or "none", make, stream)

    alone = [(), *((name,) for name in METHODS)]
    found = run_cells(
        [cell(*names) for names in [*alone, *itertools.combinations(METHODS, 2)]], directory, range(config.seeds)
    )
    print(f"\nSplit MNIST, {config.scenario}-incremental\n{table(found)}\n")
    print(f"figure: {figure(config.scenario, found, directory)}")
    path = RESULTS / "pairs.json" if config.record else directory / "results.json"
    command = shown_command("experiments.pairs", sys.argv[1:])
    record("pairs", "split MNIST, pairs of methods", command, found, {}, {}, path)
    print(f"results: {path}")


def figure(scenario: str, found: dict[tuple[str, str], dict[str, Any]], directory: Path) -> Path:
    """Final accuracy of every pair, and of each method alone on the diagonal."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(METHODS)
    grid = np.full((len(names), len(names)), np.nan)
    for i, row in enumerate(names):
        for j in range(i + 1):
            key = row if i == j else f"{names[j]} + {row}"
            grid[i, j] = 100 * np.mean(average_accuracy(found[scenario, key]["accuracy"]))
    naive = 100 * np.mean(average_accuracy(found[scenario, "none"]["accuracy"]))
    drawn, axes = plt.subplots(figsize=(6.4, 5.2), layout="constrained")
    image = axes.imshow(grid, vmin=0, vmax=100, cmap="viridis")
    for (i, j), value in np.ndenumerate(grid):
        if np.isfinite(value):
            axes.text(j, i, f"{value:.0f}", ha="center", va="center", color="white" if value < 60 else "black")
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_title(f"split MNIST, {scenario}-incremental; naive: {naive:.0f} %")
    drawn.colorbar(image, label="accuracy on all tasks (%)")
    path = directory / "pairs.png"
    drawn.savefig(path, dpi=150)
    plt.close(drawn)
    return path


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
