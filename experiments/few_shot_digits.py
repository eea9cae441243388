"""Five digits that were never seen before, from one or five images each: MAML and its kin on MNIST.

Command                                                   hardware       time       expected
python -m experiments.few_shot_digits                     2 CPU cores               figures on the embedded digits
python -m experiments.few_shot_digits --data-dir DATA \\
    --record                                              2 CPU cores    7 min      MAML 60 and 74, untrained 55 and 69

Meta-training on the digits 0 to 4, testing on 5 to 9, in problems of 5 classes and 5 queries a class; each digit is
four classes, one for every quarter turn. (Without turns there are five classes to learn from, and MAML learns them by
heart: 51 % at 5 shots, one seed, 2500 iterations.) The network that Finn et al. 2017 use where they do without
convolutions, MLP 256-128-64-64, here without normalisation; 4 problems in a batch, Adam 1e-3. Inner rate 0.1, the first
that was tried; one inner step in training and three in testing, as theirs for Omniglot; Reptile 5 steps in both;
"untrained" takes 20 steps from the initialisation. Nothing is published for this setting.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optax
import tyro

from cl_zoo import Component, compose, maml, reptile
from cl_zoo.evaluation.metrics import statistics
from cl_zoo.models import mlp
from cl_zoo.streams import few_shot
from cl_zoo.wrappers import episodic
from experiments.common import (
    AT_THE_END,
    Cell,
    Found,
    Report,
    check_numbers,
    drawing,
    load_images,
    scored,
    study,
    sweep_cell,
    table,
)

METHODS: dict[str, tuple[Any, Component]] = {
    "untrained": (optax.sgd(0.0), maml(inner=optax.sgd(0.1), test_steps=20)),
    "maml": (optax.adam(1e-3), maml(inner=optax.sgd(0.1), test_steps=3)),
    "fomaml": (optax.adam(1e-3), maml(inner=optax.sgd(0.1), test_steps=3, order=1)),
    "anil": (optax.adam(1e-3), maml(inner=optax.sgd(0.1), test_steps=3, only=("output",))),
    "reptile": (optax.sgd(0.5), reptile(inner=optax.sgd(0.1), inner_steps=5)),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run. Unknown or impossible values are refused before anything compiles."""

    data_dir: str | None = None
    """Folder of the MNIST files; without it, the embedded digits."""
    source: Literal["embedded", "idx", "tfds"] | None = None
    shots: tuple[int, ...] = (1, 5)
    iterations: int = 2000
    seeds: int = 3
    directory: str = "runs/few_shot_digits"
    """Of the run; what is finished there is not run again."""
    record: bool = False
    """Write the result file that the ledger is made from."""


def main(config: Config) -> None:
    """Runs the study, prints its table, draws its figure."""
    check_numbers(config, "iterations", "seeds")
    images = load_images(config)
    model = episodic(mlp((28, 28), 5, hidden=(256, 128, 64, 64)))

    def cell(shots: int, method: str) -> Cell:
        stream = few_shot(images, shots=shots, queries=5, steps=config.iterations, rotations=True, evaluation_size=400)
        learner = compose(model, *METHODS[method], tasks=stream.tasks)
        return sweep_cell(f"{shots}-shot", method, learner, stream, orders=None, measure=AT_THE_END)

    def report(found: Found) -> Report:
        text = f"\nUnseen digits, 5-way\n{table(found)}\n"
        return Report(text, "turned digits held out of MNIST, 5-way", scored(found))

    cells = [cell(shots, method) for shots in config.shots for method in METHODS]
    settled = {"iterations": config.iterations}
    study("few_shot_digits", config, cells, report, figures, settled=settled, data={"images": images})


def figures(found: Found, directory: Path) -> list[Path]:
    """A bar for every method and number of shots, with standard deviations."""
    settings = list(dict.fromkeys(setting for setting, _ in found))
    width = 0.8 / len(METHODS)
    path = directory / "accuracy.png"
    with drawing(path, size=(5.5, 3.4)) as ((axes,),):
        for i, method in enumerate(METHODS):
            values = [statistics(100 * found[setting, method]["accuracy"][:, -1, 0]) for setting in settings]
            spread = [s.sd if s.n > 1 else 0 for s in values]
            places = np.arange(len(settings)) + i * width
            axes.bar(places, [s.mean for s in values], width, yerr=spread, label=method)
        axes.axhline(20, color="grey", linestyle=":", linewidth=1)
        axes.set_xticks(np.arange(len(settings)) + 0.4 - width / 2, settings)
        axes.set_ylabel("accuracy on unseen digits (%)")
        axes.legend(fontsize=8)
    return [path]


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
