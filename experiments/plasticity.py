"""Loss of plasticity: does a net that has learned many tasks still learn a new one as well as the first?

Command                                                   hardware       time      expected
python -m experiments.plasticity --record                 2 CPU cores    16 min   permuted MNIST, last 20 tasks:
                                                                                  naive 78, continual backprop 85,
                                                                                  shrink and perturb 81
python -m experiments.plasticity --data-dir DATA          2 CPU cores             figures on 10 000 images of all MNIST

Two problems of Dohare et al. 2024 (doi 10.1038/s41586-024-07711-7), in small. They publish curves, and no tables.

Online permuted MNIST: each task is a new order of the pixels and one pass over its images; what counts is the accuracy
on each batch before it is learned. Theirs: 800 tasks of 60 000 images, 3 layers of 2000 units (a run with 100, too),
Kaiming's initialisation, single images, SGD 0.003. Here: 200 tasks of 10 000 images, 3 layers of 100 units, batches of
16. A batch of b rows makes b times fewer steps, so rates per image are kept: learning rate and replacement rate are
multiplied by b, the noise by sqrt(b). Maturity stays 100 steps.

Slowly-changing regression: a net with 5 hidden units follows a target whose inputs change one bit every 10 000 rows.
Theirs: 100 runs, binned by 20 000 rows. Here: 32 runs in one program, binned by task.

The utility of continual backprop is the "released" one, as in the authors' configurations of both.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from cl_zoo import (
    Component,
    Learner,
    Result,
    Stream,
    TrainState,
    compose,
    continual_backprop,
    redo,
    shrink_and_perturb,
    supervised,
)
from cl_zoo.datasets import LabelledImages
from cl_zoo.estimators.units import unit_activations
from cl_zoo.evaluation import online_score
from cl_zoo.evaluation.metrics import statistics
from cl_zoo.evaluation.plots import course, label_lines
from cl_zoo.evaluation.probes import dormant_fraction, effective_rank, mean_absolute_weight
from cl_zoo.losses import squared_error
from cl_zoo.models import mlp
from cl_zoo.streams import permuted_mnist, slowly_changing_regression
from experiments.common import Cell, Found, Report, all_but, drawing, load_images, study, sweep_cell

Method = Literal["none", "continual backprop", "shrink and perturb", "redo"]


@dataclasses.dataclass(frozen=True)
class Permuted:
    """Online permuted MNIST. Rates are per image, see above."""

    tasks: int = 200
    images: int = 10_000
    """Of each task, the same ones with other permutations."""
    hidden: tuple[int, ...] = (100, 100, 100)
    batch_size: int = 16
    learning_rate: float = 0.003
    replacement_rate: float = 1e-5
    weight_decay: float = 1e-4
    noise: float = 1e-5
    threshold: float = 0.1
    """Of ReDo, which looks once a task."""
    probe_every: int = 10
    """Tasks between looks at the hidden units, on 1000 test images; singular values cost more than a task."""
    seeds: int = 3
    methods: tuple[Method, ...] = ("none", "continual backprop", "shrink and perturb")


@dataclasses.dataclass(frozen=True)
class Regression:
    """Slowly-changing regression, row by row."""

    tasks: int = 100
    steps: int = 10_000
    flip: Literal["one", "all"] = "one"
    hidden: int = 5
    learning_rate: float = 0.01
    replacement_rate: float = 1e-4
    runs: int = 32
    methods: tuple[Literal["none", "continual backprop", "shrink and perturb"], ...] = ("none", "continual backprop")


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run. Unknown or impossible values are refused before anything compiles."""

    study: Literal["both", "permuted_mnist", "regression"] = "both"
    data_dir: str | None = None
    """Folder of the MNIST files; without it, the embedded digits."""
    source: Literal["embedded", "idx", "tfds"] | None = None
    permuted: Permuted = Permuted()
    regression: Regression = Regression()
    directory: str = "runs/plasticity"
    """Of the run; finished parts of an interrupted run there are not run again."""
    record: bool = False
    """Write the result files that the ledger is made from."""


def course_of(metric: str, result: Result) -> dict[str, Any]:
    """Of each task the mean of a metric over its updates, and what was seen at its end: `[H, S, T]`."""
    found = {"online": jnp.mean(result.metrics[metric], axis=-1)}
    found |= jax.tree.map(lambda values: values[:, :, 1:], result.measures["seen"])
    if lost := [name for name, values in found.items() if not np.isfinite(values).all()]:
        raise SystemExit(f"{', '.join(lost)} is not finite; lower the learning rate")
    return found


def hidden_units(
    every: int, looked: int, learner: Learner, state: TrainState, stream: Stream, key: jax.Array
) -> dict[str, jax.Array]:
    """Silent units, rank and weights after every n-th task from the `looked`-th on, zeros after others."""

    def look() -> dict[str, jax.Array]:
        rows = jax.tree.map(lambda leaf: leaf[0], stream.evaluation(state.task, "test"))
        taps = learner.model.apply(state.params, state.model_state, rows.x)[2]
        hidden = unit_activations("probe", learner.model.units, state.params, taps)
        return {
            "dormant": jnp.mean(jnp.stack([dormant_fraction(h, rows.weight, threshold=0.01) for h in hidden])),
            "rank": effective_rank(hidden[-1][:, 0], rows.weight),
            "weight": mean_absolute_weight(state.params),
        }

    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(look))
    return jax.lax.cond(state.task % every == looked, look, lambda: nothing)


def permuted_cells(config: Permuted, images: LabelledImages) -> list[Cell]:
    """Every method: "online" `[S, T]`, and "dormant", "rank" and "weight" `[S, T]`, of which `looks` are not zero."""
    every = max(len(images.train_labels) // config.images, 1)
    images = images._replace(
        train_images=images.train_images[::every][: config.images],
        train_labels=images.train_labels[::every][: config.images],
    )
    stream = permuted_mnist(config.tasks, images=images, batch_size=config.batch_size)
    model = mlp((28, 28), stream.tasks.active.shape[-1], hidden=config.hidden)
    b, rate = config.batch_size, config.learning_rate * config.batch_size
    components: dict[str, list[Component]] = {
        "none": [],
        "continual backprop": [continual_backprop(min(config.replacement_rate * b, 1.0), utility="released")],
        "shrink and perturb": [shrink_and_perturb(rate * config.weight_decay, config.noise * math.sqrt(b))],
        "redo": [redo(config.threshold, stream.steps)],
    }
    options: dict[str, Any] = {
        "measure": {"seen": partial(hidden_units, config.probe_every, looks(config).start)},
        "metrics": ["online_score/score"],
        "keep": partial(course_of, "online_score/score"),
        "at_once": 1,  # together, all would look after every task
    }

    def cell(method: str) -> Cell:
        learner = compose(model, optax.sgd(rate), supervised(), *components[method], online_score(stream.score))
        return sweep_cell("permuted", method, learner, stream, **options)

    return [cell(method) for method in config.methods]


def looks(config: Permuted) -> slice:
    """The tasks after which hidden units are looked at: every n-th, so that the last is among them."""
    return slice((config.tasks - 1) % config.probe_every, None, config.probe_every)


def regression_cells(config: Regression) -> list[Cell]:
    """Every method: "online" and "weight" `[S, T]`; all runs of a method are one vmapped program."""
    stream = slowly_changing_regression(config.tasks, steps=config.steps, flip=config.flip)
    model = mlp((20,), 1, hidden=(config.hidden,))
    sgd = optax.sgd(config.learning_rate)
    components: dict[str, list[Component]] = {
        "none": [],
        "continual backprop": [continual_backprop(config.replacement_rate, utility="released")],
        "shrink and perturb": [shrink_and_perturb(config.learning_rate * 1e-4, 1e-5)],
    }

    def weights(learner: Learner, state: TrainState, stream: Stream, key: jax.Array) -> dict[str, jax.Array]:
        return {"weight": mean_absolute_weight(state.params)}

    options: dict[str, Any] = {
        "measure": {"seen": weights},
        "metrics": ["loss"],
        "keep": partial(course_of, "loss"),
        "at_once": config.runs,
        "batch_size": config.runs,
    }

    def cell(method: str) -> Cell:
        learner = compose(model, sgd, supervised(squared_error), *components[method], tasks=stream.tasks)
        return sweep_cell("regression", method, learner, stream, **options)

    return [cell(method) for method in config.methods]


def parts_of_the_course(found: Found, scale: float) -> Found:
    """The online score of the first and the last tenth of the tasks, as rows of a table."""
    n = max(next(iter(found.values()))["online"].shape[1] // 10, 1)
    return {
        (f"{place} {n} tasks", method): {"scores": scale * cell["online"][:, part].mean(1), "seconds": cell["seconds"]}
        for place, part in (("first", slice(None, n)), ("last", slice(-n, None)))
        for (_, method), cell in found.items()
    }


def table(title: str, rows: Found) -> str:
    """One line per row."""
    lines = [f"\n{title}"]
    for (setting, method), row in rows.items():
        s = statistics(row["scores"])
        spread = f" ± {s.sd:.3f}" if s.n > 1 else ""
        lines.append(f"  {setting:16s} {method:20s} {s.mean:8.3f}{spread} (n = {s.n})")
    return "\n".join(lines)


def main(config: Config) -> None:
    """Runs the studies, prints their tables, draws their figures."""
    for owner in ("permuted", "regression"):
        for field, value in dataclasses.asdict(getattr(config, owner)).items():
            if isinstance(value, int | float) and value < (0 if isinstance(value, float) else 1):
                raise SystemExit(f"{owner}.{field} is {value}, but it must be at least {int(isinstance(value, int))}")
    directory = Path(config.directory)
    if config.study != "regression":
        study_permuted(config, directory / "permuted_mnist")
    if config.study != "permuted_mnist":
        study_regression(config, directory / "regression")


def study_permuted(config: Config, directory: Path) -> None:
    """Online permuted MNIST."""
    permuted, images = config.permuted, load_images(config)
    if len(images.train_labels) < permuted.images:
        raise SystemExit(f"permuted.images is {permuted.images}, but there are only {len(images.train_labels)}")
    title = f"online permuted MNIST, {permuted.tasks} tasks"

    def report(found: Found) -> Report:
        rows = parts_of_the_course(found, 100)
        notes, text = dict.fromkeys(rows, "online accuracy"), table(f"{title}: online accuracy (%)", rows)
        return Report(text, title, rows, notes=notes, name="plasticity_permuted_mnist")

    def figures(found: Found, directory: Path) -> list[Path]:
        """Online accuracy, silent units, and rank of the last hidden layer, against tasks."""
        path, every = directory / "online_accuracy.png", np.arange(1, permuted.tasks + 1)
        panels = (
            ("online", 100, slice(None), "online accuracy (%)"),
            ("dormant", 100, looks(permuted), "dormant units (%)"),
            ("rank", 1, looks(permuted), "effective rank of the last hidden layer"),
        )
        with drawing(path, 1, 3) as axes:
            for place, (field, scale, shown, label) in zip(axes[0], panels, strict=True):
                runs = {method: scale * cell[field][:, shown] for (_, method), cell in found.items()}
                label_lines(course(place, every[shown], runs))
                place.set_xlabel("task")
                place.set_ylabel(label)
        return [path]

    options: dict[str, Any] = {"data": {"images": images}, "seeds": range(permuted.seeds), "directory": directory}
    cells, settled = permuted_cells(permuted, images), all_but(permuted, "methods")
    study("plasticity", config, cells, report, figures, settled=settled, **options)


def study_regression(config: Config, directory: Path) -> None:
    """Slowly-changing regression."""
    regression = config.regression
    title = f"slowly-changing regression, {regression.tasks} tasks of {regression.steps} rows"

    def report(found: Found) -> Report:
        rows = parts_of_the_course(found, 1)
        notes, text = dict.fromkeys(rows, "squared error, not percent"), table(f"{title}: squared error", rows)
        return Report(text, title, rows, notes=notes, name="plasticity_regression")

    def figures(found: Found, directory: Path) -> list[Path]:
        """Squared error against rows seen."""
        path = directory / "error.png"
        with drawing(path, size=(4.5, 3.4)) as ((axes,),):
            rows = regression.steps * np.arange(1, regression.tasks + 1)
            label_lines(course(axes, rows, {method: cell["online"] for (_, method), cell in found.items()}))
            axes.set_xlabel("rows seen")
            axes.set_ylabel("squared error, mean over a task")
        return [path]

    options: dict[str, Any] = {"seeds": range(regression.runs), "directory": directory}
    cells, settled = regression_cells(regression), all_but(regression, "methods")
    study("plasticity", config, cells, report, figures, settled=settled, **options)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
