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
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optax
import tyro

from cl_zoo import Component, compose, replay, supervised, weight_interpolation
from cl_zoo.evaluation.metrics import average_accuracy, statistics, summary
from cl_zoo.evaluation.plots import strength_curve
from cl_zoo.models import mlp
from cl_zoo.streams import split_mnist
from experiments.common import (
    Cell,
    Found,
    Report,
    accuracy_figures,
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
    check_numbers(config, "seeds", "sweep_seeds")
    if not config.alphas or not all(0 <= alpha <= 1 for alpha in config.alphas):
        raise SystemExit(f"alphas are {config.alphas}, but there must be some, and each in [0, 1]")
    steps, hidden, batch_size = SIZES[config.protocol]
    if not config.buffers or min(config.buffers) < batch_size:
        raise SystemExit(f"buffers are {config.buffers}, but there must be some, of at least {batch_size} rows each")
    if config.first_seed < config.sweep_seeds:
        raise SystemExit(f"first_seed is {config.first_seed}, but seeds below {config.sweep_seeds} are the sweep's")
    images = load_images(config)
    stream = split_mnist(
        scenario="class", images=images, outputs="all", batch_size=batch_size, steps=steps, validation=0.1
    )
    model = mlp((28, 28), stream.tasks.active.shape[-1], hidden=hidden)
    curves: dict[tuple[str, str], np.ndarray] = {}
    notes: dict[tuple[str, str], str] = {}

    def learner(*components: Component) -> Any:
        return compose(model, optax.adam(1e-3), supervised(), *components, tasks=stream.tasks)

    def cells(directory: Path) -> list[Cell]:
        """Replay, and beside it every alignment with its best alpha."""
        found = []
        for buffer in config.buffers:
            setting, memory = f"buffer {buffer}", replay(buffer, batch_size=batch_size)
            found.append(sweep_cell(setting, "replay", learner(memory), stream))
            for alignment in config.alignments:
                how = None if alignment == "none" else alignment

                def make(alpha: Any, memory: Component = memory, how: str | None = how) -> Any:
                    return learner(memory, weight_interpolation(alpha, alignment=how, sample="replay"))

                curve = swept(make, config, stream, directory / "sweeps" / f"{buffer}-{alignment}.json")
                best = config.alphas[int(curve.mean(axis=1).argmax())]
                print_curve(f"{setting}, alignment {alignment}", config.alphas, curve, best)
                name = "+ plain mean" if how is None else f"+ {alignment}"
                found.append(sweep_cell(setting, name, make, stream, best))
                curves[setting, alignment] = curve
                notes[setting, name] = (
                    f"replay, weight interpolation, alpha {best:g}, the best of {len(config.alphas)} on held-out images"
                )
        return found

    def report(found: Found) -> Report:
        lines = [f"\nClass-incremental split MNIST, protocol {config.protocol}\n{table(found)}\n"]
        for (setting, name), cell in found.items():
            values = {field: statistics(100 * v).mean for field, v in summary(cell["accuracy"]).items()}
            shown = ("learning_accuracy", "forgetting")
            lines.append(f"{setting}, {name}: " + ", ".join(f"{f.replace('_', ' ')} {values[f]:.2f}" for f in shown))
        return Report(
            "\n".join(lines),
            f"split MNIST, class-incremental, replay and weight interpolation, {config.protocol}",
            scored(found),
            notes=notes,
            name=f"weight_interpolation_{config.protocol}",
        )

    def figures(found: Found, directory: Path) -> list[Path]:
        """Accuracy against alpha, and against tasks seen; the accuracy matrices. A column per memory."""
        path = directory / "accuracy_by_alpha.png"
        with drawing(path, 1, len(config.buffers), size=(4.4, 3.4), sharey=True) as axes:
            for column, buffer in zip(axes[0], config.buffers, strict=True):
                title = f"buffer {buffer}, held-out images"
                for alignment in config.alignments:
                    strength_curve(column, config.alphas, curves[f"buffer {buffer}", alignment], alignment, title)
                    column.lines[-1].set_linestyle("--" if alignment == "none" else "-")  # it may lie on another
                column.set_xscale("linear")
                column.set_xlabel("alpha, the weight of the old model")
            axes[0, 0].legend(title="alignment", fontsize=8)
        return [path, *accuracy_figures(found, directory)]

    settled = {"protocol": config.protocol, "alphas": config.alphas, "sweep_seeds": config.sweep_seeds}
    study("weight_interpolation", config, cells, report, figures, settled=settled, data={"images": images})


def swept(make: Any, config: Config, stream: Any, path: Path) -> np.ndarray:
    """Validation accuracy `[alphas, seeds]` after the last task, all from one program; kept once found."""
    new = not path.exists()

    def tried() -> dict[str, Any]:
        matrices = held_out(make, config.alphas, stream, config.sweep_seeds, orders="per_seed")
        return {"accuracy": average_accuracy(matrices).tolist()}

    found = kept(path, tried)
    curve = np.array(found["accuracy"])
    if new:
        print(f"sweep of {curve.size} runs in {found['seconds']:.0f} s", flush=True)
    return curve


def print_curve(title: str, alphas: tuple[float, ...], curve: np.ndarray, best: float) -> None:
    """Validation accuracy by alpha."""
    print(f"{title}: validation accuracy (%) by alpha")
    for alpha, values in zip(alphas, curve, strict=True):
        s = statistics(100 * values)
        print(
            f"  {alpha:>6g}  {s.mean:6.2f}" + (f" ± {s.sd:.2f}" if s.n > 1 else "") + "   <- chosen" * (alpha == best)
        )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
