"""Families of sinusoids one after another: does what protects parameters protect those that MAML learned?

Command                                                   hardware       time       expected
python -m experiments.continual_meta_learning --record    2 CPU cores    2 min      error 0.65 alone, 0.72 with EWC,
                                                                                    0.62 averaged, 0.21 with replay

Four families of sinusoids by phase, quarters of [0, pi]; each is met for 3000 batches of 25 sinusoids with K = 10. MAML
with one inner step of 0.01 learns parameters from which all sinusoids of the current family are near, and forgets the
families before. The components beside it are those of any other learner: replay keeps episodes, EWC takes the squared
gradients of the meta-loss (strengths from 0.01 to 10 were tried with seed 0: none did better than MAML alone),
interpolation averages meta-parameters. Tested with five inner steps on 200 sinusoids of
each family: the squared error, so lower is better.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import optax
import tyro

from cl_zoo import Component, compose, ewc, maml, replay, weight_interpolation
from cl_zoo.evaluation.metrics import statistics
from cl_zoo.evaluation.plots import course, label_lines
from cl_zoo.losses import squared_error
from cl_zoo.models import mlp
from cl_zoo.streams import sinusoids
from cl_zoo.wrappers import episodic
from experiments.common import (
    Cell,
    Found,
    Report,
    all_but,
    check_numbers,
    drawing,
    run_cells,
    scored,
    study,
    sweep_cell,
)

METHODS: dict[str, list[Component]] = {
    "maml": [],
    "+ ewc": [ewc(0.1, labels="loss")],
    "+ weight interpolation": [weight_interpolation(0.5, alignment=None)],
    "+ replay": [replay(200, batch_size=25)],
    "+ replay, weight interpolation": [replay(200, batch_size=25), weight_interpolation(0.5, alignment=None)],
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run. Unknown or impossible values are refused before anything compiles."""

    families: int = 4
    steps: int = 3000
    seeds: int = 3
    directory: str = "runs/continual_meta_learning"
    """Of the run; what is finished there is not run again."""
    record: bool = False
    """Write the result file that the ledger is made from."""


def cells(config: Config) -> list[Cell]:
    """Every method."""
    stream = sinusoids(config.families, steps=config.steps, sample_size=200, evaluation_size=200)
    model = episodic(mlp((1,), 1, hidden=(40, 40)))

    def cell(method: str, beside: list[Component]) -> Cell:
        objective = maml(squared_error, inner=optax.sgd(0.01), test_steps=5)
        learner = compose(model, optax.adam(1e-3), objective, *beside, tasks=stream.tasks)
        return sweep_cell(f"{config.families} families", method, learner, stream)

    return [cell(*item) for item in METHODS.items()]


def errors(cell: dict[str, Any]) -> np.ndarray:
    """On all families after the last, `[S]`."""
    return -cell["accuracy"][:, -1].mean(axis=1)


def run(config: Config, directory: Path) -> Found:
    """The cells by themselves, for a notebook."""
    return run_cells(cells(config), directory, range(config.seeds))


def main(config: Config) -> None:
    """Runs the study, prints its table, draws its figure."""
    check_numbers(config, "families", "steps", "seeds")

    def report(found: Found) -> Report:
        title = f"\nSquared error after five inner steps, on {config.families} families, after the last"
        return Report(
            f"{title}\n{table(found)}\n",
            "families of sinusoids one after another: squared error on all, not percent",
            scored(found, errors, scale=1),
            lower_is_better=True,
        )

    study("continual_meta_learning", config, cells(config), report, figures, settled=all_but(config))


def table(found: Found) -> str:
    """Error on each family at the end, and on all."""
    n = next(iter(found.values()))["accuracy"].shape[-1]
    lines = [f"{'':34s}" + "".join(f"{f'family {i + 1}':>10s}" for i in range(n)) + f"{'all':>16s}"]
    for (_, method), cell in found.items():
        each, all_of_them = -cell["accuracy"][:, -1].mean(axis=0), statistics(errors(cell))
        spread = f" ± {all_of_them.sd:.2f}" if all_of_them.n > 1 else ""
        lines.append(f"{method:34s}" + "".join(f"{value:10.2f}" for value in each) + f"{all_of_them.mean:9.2f}{spread}")
    return "\n".join(lines)


def draw(axes: Any, found: Found) -> None:
    """Error on the families met so far, and on the first: two axes."""
    losses = {method: -cell["accuracy"][:, 1:] for (_, method), cell in found.items()}
    seen = {
        method: np.stack([e[:, t, : t + 1].mean(axis=1) for t in range(e.shape[1])], axis=1)
        for method, e in losses.items()
    }
    met = range(1, 1 + next(iter(losses.values())).shape[1])
    course(axes[0], met, seen, "families met so far")
    course(axes[1], met, {method: e[:, :, 0] for method, e in losses.items()}, "the first family")
    for panel in axes:
        label_lines(panel).set_xlabel("families met")
        panel.set_xticks(met)
    axes[0].set_ylabel("squared error after five steps")


def figures(found: Found, directory: Path) -> list[Path]:
    """The figure's file."""
    path = directory / "error_by_family.png"
    with drawing(path, 1, 2, size=(4.5, 3.4)) as axes:
        draw(axes[0], found)
    return [path]


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
