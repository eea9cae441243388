"""Split MNIST, class-incremental, with a small memory: what averaging old and new weights adds to replay.

Command                                                   hardware       time       expected
python -m experiments.weight_interpolation                2 CPU cores    2 min      200 rows 77 -> 82, 500: 82 -> 85
python -m experiments.weight_interpolation \\
    --data-dir DATA --protocol full --seeds 10 --record   2 CPU cores    11 min     nothing is published for this net

Continual learning with weight interpolation (Kozal et al. 2024, arXiv 2404.04002) on top of experience replay, with the
old weights permuted by activations over the memory, by weights alone, or not at all. First alpha, the weight of the OLD
model, is swept for each memory and alignment on images held out of training, all values by one program. Then each
alignment with its best alpha, beside plain replay, trains on all training images but the held-out ones, with seeds of
its own, and the test set is read for the first time.

The paper's figures are for ResNet-18 on CIFAR and Tiny ImageNet (there, on CIFAR-100 in 10 tasks with 500 rows, replay
goes from 22.5 to 40.3 %); nobody has published this small case, so there is no target, only the difference. On the
embedded digits matching by weights leaves every unit in its place, so it equals the plain mean: each task goes on from
the last one's weights.
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

from cl_zoo import Component, compose, enable_compilation_cache, replay, supervised, sweep, weight_interpolation
from cl_zoo.evaluation.metrics import average_accuracy, statistics, summary
from cl_zoo.evaluation.plots import strength_curve
from cl_zoo.models import mlp
from cl_zoo.streams import split_mnist
from experiments.common import (
    RESULTS,
    Cell,
    accuracy_figures,
    load_images,
    record,
    run_cells,
    settle_run,
    shown_command,
    table,
)

Alignment = Literal["activations", "weights", "none"]
SIZES = {  # updates per task, hidden widths, rows of a batch, and of its replay
    "demo": (100, (128, 128), 32),
    "full": (500, (400, 400), 32),
    "smoke": (4, (16,), 8),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run. Unknown or impossible values are refused before anything compiles."""

    protocol: Literal["demo", "full", "smoke"] = "demo"
    data_dir: str | None = None
    """Folder of the MNIST files; without it, the embedded digits."""
    source: Literal["embedded", "idx", "tfds"] | None = None
    buffers: tuple[int, ...] = (200, 500)
    alignments: tuple[Alignment, ...] = ("activations", "weights", "none")
    alphas: tuple[float, ...] = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
    sweep_seeds: int = 3
    seeds: int = 5
    first_seed: int = 100
    directory: str | None = None
    """Of the run; finished parts there are not run again. Default: runs/weight_interpolation-PROTOCOL."""
    record: bool = False
    """Write the result file that the ledger is made from."""


def main(config: Config) -> None:
    """Runs the study, prints its tables, draws its figures."""
    for field in ("seeds", "sweep_seeds"):
        if getattr(config, field) < 1:
            raise SystemExit(f"{field} is {getattr(config, field)}, but it must be at least 1")
    if not config.alphas or not all(0 <= alpha <= 1 for alpha in config.alphas):
        raise SystemExit(f"alphas are {config.alphas}, but there must be some, and each in [0, 1]")
    steps, hidden, batch_size = SIZES[config.protocol]
    if not config.buffers or min(config.buffers) < batch_size:
        raise SystemExit(f"buffers are {config.buffers}, but there must be some, of at least {batch_size} rows each")
    if config.first_seed < config.sweep_seeds:
        raise SystemExit(f"first_seed is {config.first_seed}, but seeds below {config.sweep_seeds} are the sweep's")
    enable_compilation_cache()
    directory = Path(config.directory or f"runs/weight_interpolation-{config.protocol}")
    images = load_images(config.data_dir, config.source)
    settled = {"protocol": config.protocol, "alphas": config.alphas, "sweep_seeds": config.sweep_seeds}
    settle_run(directory, settled, images)
    stream = split_mnist(
        scenario="class", images=images, outputs="all", batch_size=batch_size, steps=steps, validation=0.1
    )
    model = mlp((28, 28), stream.tasks.active.shape[-1], hidden=hidden)

    def learner(*components: Component) -> Any:
        return compose(model, optax.adam(1e-3), supervised(), *components, tasks=stream.tasks)

    curves: dict[tuple[str, str], np.ndarray] = {}
    found: dict[tuple[str, str], dict[str, Any]] = {}
    notes: dict[tuple[str, str], str] = {}
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    for buffer in config.buffers:
        setting = f"buffer {buffer}"

        def make_replay(_: Any, buffer: int = buffer) -> Any:
            return learner(replay(buffer, batch_size=batch_size))

        found |= run_cells([Cell(setting, "replay", make_replay, stream)], directory, seeds)
        for alignment in config.alignments:

            def make(alpha: Any, buffer: int = buffer, alignment: str = alignment) -> Any:
                interpolation = weight_interpolation(alpha, alignment=how(alignment), sample="replay")
                return learner(replay(buffer, batch_size=batch_size), interpolation)

            curve = swept(make, config, stream, directory / "sweeps" / f"{buffer}-{alignment}.npz")
            best = config.alphas[int(curve.mean(axis=1).argmax())]
            curves[setting, alignment] = curve
            name = "+ plain mean" if how(alignment) is None else f"+ {alignment}"
            print_curve(f"{setting}, alignment {alignment}", config.alphas, curve, best)
            found |= run_cells([Cell(setting, name, make, stream)], directory, seeds, setting=best)
            notes[setting, name] = (
                f"replay, weight interpolation, alpha {best:g}, the best of {len(config.alphas)} on held-out images"
            )

    print(f"\nClass-incremental split MNIST, protocol {config.protocol}\n{table(found)}\n")
    for (setting, name), cell in found.items():
        values = {field: statistics(100 * v).mean for field, v in summary(cell["accuracy"]).items()}
        shown = ("learning_accuracy", "forgetting")
        print(f"{setting}, {name}: " + ", ".join(f"{f.replace('_', ' ')} {values[f]:.2f}" for f in shown))
    for path in figures(config, curves, found, directory):
        print(f"figure: {path}")
    name = f"weight_interpolation_{config.protocol}"
    path = RESULTS / f"{name}.json" if config.record else directory / "results.json"
    command = shown_command("experiments.weight_interpolation", sys.argv[1:])
    benchmark = f"split MNIST, class-incremental, replay and weight interpolation, {config.protocol}"
    record(name, benchmark, command, found, {}, notes, path)
    print(f"results: {path}")


def how(alignment: str) -> str | None:
    """As `weight_interpolation` takes it."""
    return None if alignment == "none" else alignment


def swept(make: Any, config: Config, stream: Any, kept: Path) -> np.ndarray:
    """Validation accuracy `[alphas, seeds]` after the last task, all from one program; kept once found."""
    if kept.exists():
        with np.load(kept, allow_pickle=False) as arrays:
            return arrays["accuracy"]
    keys = jax.vmap(jax.random.key)(jnp.arange(config.sweep_seeds))
    begun = time.perf_counter()
    result = sweep(make, jnp.asarray(config.alphas), stream, keys, orders="per_seed", split="validation")
    accuracy = average_accuracy(jax.block_until_ready(result.accuracy))
    kept.parent.mkdir(parents=True, exist_ok=True)
    np.savez(kept, accuracy=accuracy)
    print(f"sweep of {accuracy.size} runs in {time.perf_counter() - begun:.0f} s", flush=True)
    return accuracy


def print_curve(title: str, alphas: tuple[float, ...], curve: np.ndarray, best: float) -> None:
    """Validation accuracy by alpha."""
    print(f"{title}: validation accuracy (%) by alpha")
    for alpha, values in zip(alphas, curve, strict=True):
        s = statistics(100 * values)
        print(
            f"  {alpha:>6g}  {s.mean:6.2f}" + (f" ± {s.sd:.2f}" if s.n > 1 else "") + "   <- chosen" * (alpha == best)
        )


def figures(
    config: Config,
    curves: dict[tuple[str, str], np.ndarray],
    found: dict[tuple[str, str], dict[str, Any]],
    directory: Path,
) -> list[Path]:
    """Accuracy against alpha, and against tasks seen; the accuracy matrices. A column per memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings = list(dict.fromkeys(setting for setting, _ in found))
    path = directory / "accuracy_by_alpha.png"
    wide = {"figsize": (4.4 * len(settings), 3.4), "squeeze": False, "sharey": True, "layout": "constrained"}

    figure, axes = plt.subplots(1, len(settings), **wide)
    for column, setting in zip(axes[0], settings, strict=True):
        for alignment in config.alignments:
            strength_curve(column, config.alphas, curves[setting, alignment], alignment, f"{setting}, held-out images")
            column.lines[-1].set_linestyle("--" if alignment == "none" else "-")  # it may lie on another
        column.set_xscale("linear")
        column.set_xlabel("alpha, the weight of the old model")
    axes[0, 0].legend(title="alignment", fontsize=8)
    figure.savefig(path, dpi=150)

    plt.close("all")
    return [path, *accuracy_figures(found, directory)]


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
