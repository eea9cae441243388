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
import sys
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from cl_zoo import compose, enable_compilation_cache, ewc, supervised, sweep
from cl_zoo.datasets import LabelledImages
from cl_zoo.evaluation.metrics import average_accuracy, statistics, summary
from cl_zoo.evaluation.plots import accuracy_heat_map, seen_task_accuracy, strength_curve
from cl_zoo.models import mlp
from cl_zoo.streams import permuted_mnist as permuted_mnist_stream
from experiments.common import RESULTS, Cell, load_images, record, run_cells, settle_run, shown_command, table


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
    """Share of the training images that the sweep trains on; all of them where there are at most 10 000."""
    sweep_seeds: int = 8
    seeds: int = 3
    strengths: tuple[float, ...] = (1e0, 1e1, 1e2, 3e2, 1e3, 3e3, 1e4, 1e5)
    directory: str = "runs/permuted_mnist"
    record: bool = False
    """Write the result file that the ledger is made from."""


def main(config: Config) -> None:
    """Runs the study, prints its table, draws its figures."""
    for field in ("tasks", "seeds", "sweep_seeds"):
        if getattr(config, field) < 1:
            raise SystemExit(f"{field} is {getattr(config, field)}, but it must be at least 1")
    enable_compilation_cache()
    directory = Path(config.directory)
    if not 0 < config.sweep_share <= 1 or min(config.strengths) < 0:
        raise SystemExit("sweep_share must be in (0, 1], and no strength negative")
    images = load_images(config.data_dir, config.source)
    changing = {"data_dir", "source", "seeds", "directory", "record"}
    settle_run(directory, {k: v for k, v in dataclasses.asdict(config).items() if k not in changing}, images)

    def stream(images: LabelledImages, sample_size: int) -> Any:
        return permuted_mnist_stream(
            config.tasks,
            images=images,
            batch_size=config.batch_size,
            epochs=config.epochs,
            validation=0.1,
            sample_size=sample_size,
        )

    model = mlp((28, 28), 10, hidden=config.hidden)
    adam = optax.adam(config.learning_rate)

    def make(strength: Any) -> Any:
        return compose(model, adam, supervised(), ewc(strength))

    def make_naive(_: Any) -> Any:
        return compose(model, adam, supervised())

    small = stream(_share(images, config.sweep_share), 1000)
    kept = directory / "sweep.npz"
    if kept.exists():
        with np.load(kept, allow_pickle=False) as arrays:
            accuracy, seconds = arrays["accuracy"], float(arrays["seconds"])
    else:
        n_runs = len(config.strengths) * config.sweep_seeds
        print(
            f"sweep: {len(config.strengths)} strengths x {config.sweep_seeds} seeds, {n_runs} runs in one program ...",
            flush=True,
        )
        keys = jax.vmap(jax.random.key)(jnp.arange(config.sweep_seeds))
        begun = time.perf_counter()
        swept = sweep(make, jnp.asarray(config.strengths), small, keys, orders="per_seed", split="validation")
        accuracy = average_accuracy(jax.block_until_ready(swept.accuracy))
        seconds = time.perf_counter() - begun
        np.savez(kept, accuracy=accuracy, seconds=seconds)
    best = config.strengths[int(accuracy.mean(axis=1).argmax())]
    print(f"sweep in {seconds:.0f} s: validation accuracy (%) by strength")
    for strength, values in zip(config.strengths, accuracy, strict=True):
        s = statistics(100 * values)
        print(f"  {strength:>10g}  {s.mean:6.2f} ± {s.sd:.2f}{'   <- chosen' if strength == best else ''}")

    whole = stream(images, 2000)
    cells = [Cell("domain", "none", make_naive, whole), Cell("domain", "ewc", make, whole)]
    found = run_cells(cells, directory, range(config.seeds), setting=best)
    print(f"\nPermuted MNIST, {config.tasks} tasks, strength {best:g}\n{table(found)}\n")
    for name, values in summary(found["domain", "ewc"]["accuracy"]).items():
        print(f"EWC, {name.replace('_', ' ')}: {statistics(values).mean:.4f}")
    for path in figures(config.strengths, accuracy, found, directory):
        print(f"figure: {path}")
    published = {
        ("domain", "ewc"): [
            {"mean": 94.0, "sem": None, "n": None, "source": "Kirkpatrick et al. 2017, read off by ContinualAI"},
            {"mean": 83.0, "sem": None, "n": None, "source": "Avalanche's baseline, other settings"},
        ]
    }
    notes = {("domain", "ewc"): f"strength {best:g}, the best of {len(config.strengths)} on held-out images"}
    path = RESULTS / "permuted_mnist.json" if config.record else directory / "results.json"
    command = shown_command("experiments.permuted_mnist", sys.argv[1:])
    record("permuted_mnist", f"permuted MNIST, {config.tasks} tasks", command, found, published, notes, path)
    print(f"results: {path}")


def _share(images: LabelledImages, share: float) -> LabelledImages:
    every = 1 if len(images.train_labels) <= 10_000 else round(1 / share)
    return images._replace(train_images=images.train_images[::every], train_labels=images.train_labels[::every])


def figures(strengths: Any, accuracy: Any, found: dict[tuple[str, str], dict[str, Any]], directory: Path) -> list[Path]:
    """Accuracy against strength; accuracy against tasks seen; the accuracy matrices."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    paths = [directory / name for name in ("strength_sweep.png", "accuracy_by_task.png", "accuracy_matrices.png")]
    figure, axes = plt.subplots(figsize=(4.5, 3.4), layout="constrained")
    strength_curve(axes, strengths, accuracy, title="EWC, held-out images")
    figure.savefig(paths[0], dpi=150)
    matrices = {method: cell["accuracy"] for (_, method), cell in found.items()}
    figure, axes = plt.subplots(figsize=(4.5, 3.4), layout="constrained")
    seen_task_accuracy(axes, matrices, "permuted MNIST").legend(fontsize=8)
    figure.savefig(paths[1], dpi=150)
    figure, axes = plt.subplots(1, len(matrices), figsize=(4.6 * len(matrices), 4), squeeze=False, layout="constrained")
    for place, (method, matrix) in zip(axes[0], matrices.items(), strict=True):
        accuracy_heat_map(place, matrix, method)
    figure.savefig(paths[2], dpi=120)
    plt.close("all")
    return paths


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
