"""Permuted MNIST, 10 tasks: EWC with the exact Fisher, its strength chosen on a validation split.

Command                                                   hardware       time      expected
python -m experiments.permuted_mnist                      2 CPU cores              figures on the embedded digits
python -m experiments.permuted_mnist --data-dir DATA \\
    --record                                              2 CPU cores    10 min    EWC 91, naive 83

First a sweep of 8 strengths x 8 seeds, each seed with permutations of its own, as one compiled program over a tenth of
the training images; R is measured on images held out of training. Then the best strength and the naive learner, on all
training images but the held-out ones and on the test set, which is read here for the first time.

The reference is 0.94 (Kirkpatrick et al. 2017, as quoted by ContinualAI's baselines); Avalanche's own baseline reaches
0.83, with one hidden layer of 512, SGD 1e-3, 10 epochs, batch 256, strength 1 and the square of batch means.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optax
import tyro

from cl_zoo import compose, ewc, supervised
from cl_zoo.datasets import LabelledImages
from cl_zoo.evaluation.metrics import average_accuracy, statistics, summary
from cl_zoo.evaluation.plots import accuracy_heat_map, seen_task_accuracy, strength_curve
from cl_zoo.models import mlp
from cl_zoo.streams import permuted_mnist as permuted_mnist_stream
from experiments.common import (
    Cell,
    Found,
    Report,
    all_but,
    check_numbers,
    drawing,
    held_out,
    kept,
    load_images,
    scored,
    study,
    sweep_cell,
    table,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run. Unknown or impossible values are refused before anything compiles."""

    data_dir: str | None = None
    """Folder of the MNIST files; without it, the embedded digits."""
    source: Literal["embedded", "idx", "tfds"] | None = None
    tasks: int = 10
    hidden: tuple[int, ...] = (512,)
    learning_rate: float = 1e-3
    batch_size: int = 256
    epochs: int = 2
    sweep_share: float = 0.1
    """Fraction of the training images that the sweep trains on; all of them where there are at most 10 000."""
    sweep_seeds: int = 8
    seeds: int = 3
    strengths: tuple[float, ...] = (1e0, 1e1, 1e2, 3e2, 1e3, 3e3, 1e4, 1e5)
    directory: str = "runs/permuted_mnist"
    record: bool = False
    """Write the result file that the ledger is made from."""


def main(config: Config) -> None:
    """Runs the study, prints its table, draws its figures."""
    check_numbers(config, "tasks", "seeds", "sweep_seeds")
    if not 0 < config.sweep_share <= 1 or min(config.strengths) < 0:
        raise SystemExit("sweep_share must be in (0, 1], and no strength negative")
    images = load_images(config)
    model, adam = mlp((28, 28), 10, hidden=config.hidden), optax.adam(config.learning_rate)
    n_runs = len(config.strengths) * config.sweep_seeds
    tried: dict[str, Any] = {}

    def stream(images: LabelledImages, sample_size: int) -> Any:
        sizes: dict[str, Any] = {"batch_size": config.batch_size, "epochs": config.epochs, "sample_size": sample_size}
        return permuted_mnist_stream(config.tasks, images=images, validation=0.1, **sizes)

    def make(strength: Any) -> Any:
        return compose(model, adam, supervised(), ewc(strength))

    def validation() -> dict[str, Any]:
        """Average accuracy of all strengths and seeds."""
        shape = f"{len(config.strengths)} strengths x {config.sweep_seeds} seeds"
        print(f"sweep: {shape}, {n_runs} runs in one program ...", flush=True)
        small = stream(_share(images, config.sweep_share), 1000)
        matrices = held_out(make, config.strengths, small, config.sweep_seeds, orders="per_seed")
        return {"accuracy": average_accuracy(matrices).tolist()}

    def cells(directory: Path) -> list[Cell]:
        """The naive learner, and the best strength."""
        swept = kept(directory / "sweep.json", validation)
        tried["accuracy"] = np.array(swept["accuracy"])
        tried["best"] = best = config.strengths[int(tried["accuracy"].mean(axis=1).argmax())]
        print(f"sweep in {swept['seconds']:.0f} s: validation accuracy (%) by strength")
        for strength, values in zip(config.strengths, tried["accuracy"], strict=True):
            s = statistics(100 * values)
            print(f"  {strength:>10g}  {s.mean:6.2f} ± {s.sd:.2f}{'   <- chosen' if strength == best else ''}")
        whole, naive = stream(images, 2000), compose(model, adam, supervised())
        return [sweep_cell("domain", "none", naive, whole, best), sweep_cell("domain", "ewc", make, whole, best)]

    def report(found: Found) -> Report:
        best = tried["best"]
        lines = [f"\nPermuted MNIST, {config.tasks} tasks, strength {best:g}\n{table(found)}\n"]
        for name, values in summary(found["domain", "ewc"]["accuracy"]).items():
            lines.append(f"EWC, {name.replace('_', ' ')}: {statistics(values).mean:.4f}")
        said = f"strength {best:g}, the best of {len(config.strengths)} on held-out images"
        return Report(
            "\n".join(lines),
            f"permuted MNIST, {config.tasks} tasks",
            scored(found),
            {("domain", "ewc"): said},
        )

    def figures(found: Found, directory: Path) -> list[Path]:
        """Accuracy against strength; accuracy against tasks seen; the accuracy matrices."""
        paths = [directory / f"{name}.png" for name in ("strength_sweep", "accuracy_by_task", "accuracy_matrices")]
        matrices = {method: cell["accuracy"] for (_, method), cell in found.items()}
        with drawing(paths[0], size=(4.5, 3.4)) as axes:
            strength_curve(axes[0, 0], config.strengths, tried["accuracy"], title="EWC, held-out images")
        with drawing(paths[1], size=(4.5, 3.4)) as axes:
            seen_task_accuracy(axes[0, 0], matrices, "permuted MNIST").legend(fontsize=8)
        with drawing(paths[2], 1, len(matrices), size=(4.6, 4), dpi=120) as axes:
            for place, (method, matrix) in zip(axes[0], matrices.items(), strict=True):
                accuracy_heat_map(place, matrix, method)
        return paths

    study("permuted_mnist", config, cells, report, figures, settled=all_but(config), data={"images": images})


def _share(images: LabelledImages, share: float) -> LabelledImages:
    every = 1 if len(images.train_labels) <= 10_000 else round(1 / share)
    return images._replace(train_images=images.train_images[::every], train_labels=images.train_labels[::every])


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
