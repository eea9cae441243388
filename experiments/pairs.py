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
    ewc,
    lwf,
    replay,
    supervised,
    weight_interpolation,
)
from cl_zoo.evaluation.metrics import average_accuracy
from cl_zoo.models import mlp
from cl_zoo.streams import split_mnist
from experiments.common import (
    Cell,
    Found,
    Report,
    all_but,
    check_numbers,
    drawing,
    load_images,
    scored,
    study,
    sweep_cell,
    table,
)

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
    check_numbers(config, "seeds")
    images = load_images(config)
    chosen = [(), *((name,) for name in METHODS), *itertools.combinations(METHODS, 2)]

    def report(found: Found) -> Report:
        text = f"\nSplit MNIST, pairs of methods\n{table(found)}\n"
        return Report(text, "split MNIST, pairs of methods", scored(found))

    every = [cell for scenario in config.scenarios for cell in cells(config, images, scenario, chosen)]
    study("pairs", config, every, report, figures, settled=all_but(config, "scenarios"), data={"images": images})


def cells(config: Config, images: Any, scenario: str, chosen: list[tuple[str, ...]]) -> list[Cell]:
    """One for each set of methods."""
    stream = split_mnist(
        scenario=scenario, images=images, batch_size=config.batch_size, steps=config.steps, sample_size=1000
    )
    model = mlp((28, 28), stream.tasks.active.shape[-1], hidden=config.hidden)

    def cell(names: tuple[str, ...]) -> Cell:
        components = [METHODS[name] for name in METHODS if name in names]
        learner = compose(model, optax.adam(1e-3), supervised(), *components, tasks=stream.tasks)
        return sweep_cell(scenario, " + ".join(names) or "none", learner, stream)

    return [cell(names) for names in chosen]


def figures(found: Found, directory: Path) -> list[Path]:
    """Final accuracy of every pair, and of each method alone on the diagonal; a panel per scenario."""
    names, scenarios = list(METHODS), list(dict.fromkeys(scenario for scenario, _ in found))
    accuracy = {key: 100 * np.mean(average_accuracy(cell["accuracy"])) for key, cell in found.items()}
    path = directory / "pairs.png"
    with drawing(path, 1, len(scenarios), size=(6, 5.2)) as panels:
        for axes, scenario in zip(panels[0], scenarios, strict=True):
            grid = np.full((len(names), len(names)), np.nan)
            for i, row in enumerate(names):
                for j in range(i + 1):
                    grid[i, j] = accuracy[scenario, row if i == j else f"{names[j]} + {row}"]
            image = axes.imshow(grid, vmin=0, vmax=100, cmap="viridis")
            for (i, j), value in np.ndenumerate(grid):
                if np.isfinite(value):
                    colour = "white" if value < 60 else "black"
                    axes.text(j, i, f"{value:.0f}", ha="center", va="center", color=colour)
            axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
            axes.set_yticks(range(len(names)), names)
            axes.set_title(f"split MNIST, {scenario}-incremental; naive: {accuracy[scenario, 'none']:.0f} %")
        axes.figure.colorbar(image, ax=panels, label="accuracy on all tasks (%)")
    return [path]


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
