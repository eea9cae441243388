"""Split MNIST without task boundaries: how accurate is a learner at any moment?

Command                                                   hardware       time      expected
python -m experiments.anytime                             2 CPU cores    1 min     blurry: none 79, replay 92;
                                                                                   sharp: none 44, replay 88
python -m experiments.anytime --data-dir DATA --record    2 CPU cores    2 min     blurry: none 92, replay 96;
                                                                                   sharp: none 45, replay 94

Class-incremental split MNIST, all outputs open, every image shown once. Settings: "sharp", tasks one after another, for
comparison; "blurry", a fraction of each class's images comes while other tasks have their turn (Bang et al. 2021, arXiv
2103.17230); "i-blurry", the same for half of each task's classes (Koh et al. 2022, arXiv 2110.10031); "gaussian" and
"linear", each class comes and goes gradually (Shanahan et al. 2021, arXiv 2105.13327). Methods are those that need no
task boundaries. The score is the area under the curve of anytime accuracy (Koh et al. 2022), where a task counts from
its own turn on.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optax
import tyro

from cl_zoo import Component, accuracy, at, compose, replay, supervised
from cl_zoo.evaluation.metrics import average_anytime_accuracy
from cl_zoo.evaluation.plots import anytime_curve, label_lines
from cl_zoo.models import mlp
from cl_zoo.streams import Mixing, blurry, drifting, split_mnist
from experiments.common import (
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

Setting = Literal["sharp", "blurry", "i-blurry", "gaussian", "linear"]
Method = Literal["none", "replay"]


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run. Unknown or impossible values are refused before anything compiles."""

    protocol: Literal["demo", "smoke"] = "demo"
    data_dir: str | None = None
    """Folder of the MNIST files; without it, the embedded digits."""
    source: Literal["embedded", "idx", "tfds"] | None = None
    seeds: int = 3
    share: float = 0.1
    """Of each class's images that come in other tasks' turns, in the blurry settings."""
    width: float = 0.5
    """Of the Gaussian schedule, in units of the distance between two classes."""
    settings: tuple[Setting, ...] = ("sharp", "blurry", "i-blurry", "gaussian", "linear")
    methods: tuple[Method, ...] = ("none", "replay")
    directory: str | None = None
    """Of the run; finished parts of an interrupted run there are not run again. Default: runs/anytime-PROTOCOL."""
    record: bool = False
    """Write the result file that the ledger is made from."""


SIZES = {  # hidden widths, batch size, replay capacity, points of the curve per task
    "demo": ((256, 256), 10, 500, 10),
    "smoke": ((16,), 50, 50, 2),
}
TASKS = 5


def mixings(config: Config) -> dict[str, Mixing | None]:
    """How the rows of all tasks are mixed, in each setting."""
    return {
        "sharp": None,
        "blurry": blurry(config.share),
        "i-blurry": blurry(config.share, disjoint=0.5),
        "gaussian": drifting("gaussian", width=config.width),
        "linear": drifting("linear", width=1.0),
    }


def components(method: str, batch_size: int, capacity: int) -> list[Component]:
    """What is kept, and how."""
    return [supervised(), *([replay(capacity, batch_size=batch_size)] if method == "replay" else [])]


def cells(config: Config, images: Any) -> tuple[list[Cell], int]:
    """Every method in every setting, all of as many steps; and the steps between points of the curve."""
    hidden, batch_size, capacity, points = SIZES[config.protocol]
    chosen = mixings(config)

    def stream(setting: str, steps: int | None = None) -> Any:
        return split_mnist(
            TASKS, "class", images=images, outputs="all", mixing=chosen[setting], batch_size=batch_size, steps=steps
        )

    every = min(stream(setting).steps for setting in config.settings) // points
    if every == 0:
        raise SystemExit(f"there are too few images for {points} points of the curve in each task")
    model = mlp((28, 28), 10, hidden=hidden)
    measure = {"accuracy": accuracy(), "curve": at(every, accuracy(batches=1))}
    found = []
    for setting in config.settings:
        mixed = stream(setting, every * points)
        for method in config.methods:
            kept = components(method, batch_size, capacity)
            learner = compose(model, optax.adam(1e-3), *kept, tasks=mixed.tasks)
            found.append(sweep_cell(setting, method, learner, mixed, measure=measure))
    return found, every


def score(cell: dict[str, Any]) -> np.ndarray:
    """The area under the curve, `[S]`."""
    return average_anytime_accuracy(cell["curve"])


def main(config: Config) -> None:
    """Runs the study, prints its tables, draws its figure."""
    check_numbers(config, "seeds")
    images = load_images(config)
    try:
        chosen, every = cells(config, images)
    except ValueError as error:
        raise SystemExit(str(error)) from error

    def report(found: Found) -> Report:
        text = table(found, score, "area under the curve of anytime accuracy")
        return Report(
            f"\nSplit MNIST without task boundaries, protocol {config.protocol}\n{text}\n\n{table(found)}\n",
            f"split MNIST without task boundaries, {config.protocol}: area under the curve of anytime accuracy",
            scored(found, score),
            name=f"anytime_{config.protocol}",
        )

    def figures(found: Found, directory: Path) -> list[Path]:
        """Anytime accuracy along the stream, a panel per setting."""
        path = directory / "anytime_accuracy.png"
        with drawing(path, 1, len(config.settings), size=(3.6, 3.4)) as axes:
            for panel, setting in zip(axes[0], config.settings, strict=True):
                curves = {method: cell["curve"] for (here, method), cell in found.items() if here == setting}
                anytime_curve(panel, curves, every, setting)
            label_lines(axes[0, -1])
        return [path]

    settled = {"protocol": config.protocol, "share": config.share, "width": config.width, "every": every}
    study("anytime", config, chosen, report, figures, settled=settled, data={"images": images})


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
