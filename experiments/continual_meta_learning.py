"""Families of sinusoids one after another: does what protects parameters protect those that MAML learnt?

Command                                                   hardware       time       expected
python -m experiments.continual_meta_learning --record    2 CPU cores    2 min      error 0.65 alone, 0.72 with EWC,
                                                                                    0.62 averaged, 0.21 with replay

Four families of sinusoids by phase, quarters of [0, pi]; each is met for 3000 batches of 25 sinusoids with K = 10. MAML
with one inner step of 0.01 learns parameters from which all sinusoids of the family at hand are near, and forgets the
families before. The components beside it are those of any other learner: replay keeps episodes, EWC takes the squared
gradients of the meta-loss (strengths from 0.01 to 10 were tried with seed 0: none did better than MAML alone),
interpolation averages meta-parameters. Tested with five inner steps on 200 sinusoids of
each family: the squared error, so lower is better.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import optax
import tyro

from cl_zoo import Component, compose, enable_compilation_cache, ewc, maml, replay, weight_interpolation
from cl_zoo.evaluation.metrics import statistics
from cl_zoo.evaluation.plots import course
from cl_zoo.losses import squared_error
from cl_zoo.models import mlp
from cl_zoo.streams import sinusoids
from cl_zoo.training.run_directory import ConfigError, settle_config
from cl_zoo.wrappers import episodic
from experiments.common import RESULTS, Cell, record, run_cells, shown_command

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


def run(config: Config, directory: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Every method, with "scores": the error on all families after the last."""
    stream = sinusoids(config.families, steps=config.steps, sample_size=200, evaluation_size=200)
    model = episodic(mlp((1,), 1, hidden=(40, 40)))

    def cell(method: str, beside: list[Component]) -> Cell:
        objective = maml(squared_error, inner=optax.sgd(0.01), test_steps=5)
        learner = compose(model, optax.adam(1e-3), objective, *beside, tasks=stream.tasks)
        return Cell(f"{config.families} families", method, lambda _: learner, stream)

    found = run_cells([cell(*item) for item in METHODS.items()], directory, range(config.seeds))
    for kept in found.values():
        kept["scores"] = -kept["accuracy"][:, -1].mean(axis=1)
    return found


def main(config: Config) -> None:
    """Runs the study, prints its table, draws its figure."""
    for field in ("families", "steps", "seeds"):
        if getattr(config, field) < 1:
            raise SystemExit(f"{field} is {getattr(config, field)}, but it must be at least 1")
    enable_compilation_cache()
    directory = Path(config.directory)
    try:
        settle_config(directory, {"families": config.families, "steps": config.steps})
    except ConfigError as error:
        raise SystemExit(str(error)) from error
    found = run(config, directory)
    print(f"\nSquared error after five inner steps, on {config.families} families, after the last\n{table(found)}\n")
    print(f"figure: {figure(found, directory)}")
    path = RESULTS / "continual_meta_learning.json" if config.record else directory / "results.json"
    command = shown_command("experiments.continual_meta_learning", sys.argv[1:])
    benchmark = "families of sinusoids one after another: squared error on all, not percent"
    record("continual_meta_learning", benchmark, command, found, {}, {}, path, lower_is_better=True)
    print(f"results: {path}")


def table(found: dict[tuple[str, str], dict[str, Any]]) -> str:
    """Error on each family at the end, and on all."""
    n = next(iter(found.values()))["accuracy"].shape[-1]
    lines = [f"{'':34s}" + "".join(f"{f'family {i + 1}':>10s}" for i in range(n)) + f"{'all':>16s}"]
    for (_, method), cell in found.items():
        each, all_of_them = -cell["accuracy"][:, -1].mean(axis=0), statistics(cell["scores"])
        spread = f" ± {all_of_them.sd:.2f}" if all_of_them.n > 1 else ""
        lines.append(f"{method:34s}" + "".join(f"{value:10.2f}" for value in each) + f"{all_of_them.mean:9.2f}{spread}")
    return "\n".join(lines)


def draw(axes: Any, found: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Error on the families met so far, and on the first: two axes."""
    errors = {method: -cell["accuracy"][:, 1:] for (_, method), cell in found.items()}
    seen = {
        method: np.stack([e[:, t, : t + 1].mean(axis=1) for t in range(e.shape[1])], axis=1)
        for method, e in errors.items()
    }
    met = range(1, 1 + next(iter(errors.values())).shape[1])
    course(axes[0], met, seen, "families met so far")
    course(axes[1], met, {method: e[:, :, 0] for method, e in errors.items()}, "the first family")
    for panel in axes:
        panel.set_xlabel("families met")
        panel.set_xticks(met)
    axes[0].set_ylabel("squared error after five steps")
    axes[1].legend(fontsize=8)


def figure(found: dict[tuple[str, str], dict[str, Any]], directory: Path) -> Path:
    """The figure's file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    draw(axes, found)
    path = directory / "error_by_family.png"
    drawn.savefig(path, dpi=150)
    plt.close(drawn)
    return path


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
