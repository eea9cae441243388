"""Permuted and rotated MNIST, 20 tasks in one pass, as in the tables of dark experience replay.

Command                                                   hardware       time       expected
python -m experiments.dark_experience                     2 CPU cores               figures on the embedded digits
python -m experiments.dark_experience --data-dir DATA \\
    --seeds 10 --record                                   2 CPU cores    40 min     permuted: DER++ 84, ER 73, SGD 40;
                                                                                    rotated: DER++ 92, ER 86, SGD 71

Protocol of Buzzega et al. 2020 (arXiv 2004.07211): MLP 100-100, Xavier's uniform initialisation, plain SGD, one pass,
batches of 128, as many examples from memory with each; rates and strengths as in the best arguments of their code,
Mammoth. Accuracy is the mean over all 20 tasks after the last.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import optax
import tyro

from cl_zoo import (
    Component,
    agem,
    compose,
    der,
    ewc,
    replay,
    supervised,
    synaptic_intelligence,
)
from cl_zoo.evaluation.plots import course, label_lines
from cl_zoo.models import mlp
from cl_zoo.streams import permuted_mnist, rotated_mnist
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

Benchmark = Literal["permuted", "rotated"]
STREAMS = {"permuted": permuted_mnist, "rotated": rotated_mnist}


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run. Unknown or impossible values are refused before anything compiles."""

    data_dir: str | None = None
    """Folder of the MNIST files; without it, the embedded digits."""
    source: Literal["embedded", "idx", "tfds"] | None = None
    benchmarks: tuple[Benchmark, ...] = ("permuted", "rotated")
    buffers: tuple[int, ...] = (200, 500)
    tasks: int = 20
    batch_size: int = 128
    seeds: int = 2
    first_seed: int = 0
    directory: str = "runs/dark_experience"
    record: bool = False
    """Write the result file that the ledger is made from."""


def methods(benchmark: str, buffer: int | None, batch_size: int) -> dict[str, tuple[float, list[Component]]]:
    """Learning rate and components of every method with a buffer of that size, or of those without any."""
    permuted = benchmark == "permuted"
    if buffer is None:
        return {
            "sgd": (0.2, []),
            # Their penalty has no 1/2, hence twice their strength.
            "online ewc": (0.1, [ewc(2 * 0.7, decay=1.0)]),
            "si": (0.1, [synaptic_intelligence(0.5 if permuted else 1.0, damping=1.0, clamp=False)]),
        }
    rows = min(batch_size, buffer)
    alpha = 1.0 if permuted or buffer < 500 else 0.5
    rate, alpha_plus, beta = {
        (True, True): (0.1, 1.0, 1.0),
        (True, False): (0.2, 1.0, 0.5),
        (False, True): (0.1, 1.0, 0.5),
        (False, False): (0.2, 0.5, 1.0),
    }[permuted, buffer < 500]
    return {
        "er": (0.2, [replay(buffer, batch_size=rows)]),
        "a-gem": (0.1 if permuted or buffer < 500 else 0.3, [agem(buffer, batch_size=rows)]),
        "der": (0.2, [der(buffer, alpha=alpha, batch_size=rows)]),
        "der++": (rate, [der(buffer, alpha=alpha_plus, beta=beta, batch_size=rows)]),
    }


NOTES = {
    "online ewc": "the Fisher of all classes; theirs weighs the observed label's squared gradient by its probability",
    "si": "theirs clips every gradient to [-1, 1]",
}


def cells(config: Config, images: Any) -> list[Cell]:
    """Every method on every benchmark."""
    found = []
    for benchmark in config.benchmarks:
        stream = STREAMS[benchmark](config.tasks, images=images, batch_size=config.batch_size, epochs=1)
        model = mlp((28, 28), 10, hidden=(100, 100), initialiser="xavier_uniform")
        for buffer in (None, *config.buffers):
            for method, (rate, components) in methods(benchmark, buffer, config.batch_size).items():
                learner = compose(model, optax.sgd(rate), supervised(), *components, tasks=stream.tasks)
                setting = benchmark + (f", buffer {buffer}" if buffer else "")
                found.append(sweep_cell(setting, method, learner, stream, measure=AT_THE_END))
    return found


def main(config: Config) -> None:
    """Runs the study, prints its table, draws its figure."""
    check_numbers(config, "seeds", "tasks")
    images = load_images(config)

    def report(found: Found) -> Report:
        return Report(
            f"\n{config.tasks} tasks, one pass\n{table(found)}\n",
            f"MNIST, {config.tasks} tasks in one pass",
            scored(found),
            {(setting, method): NOTES.get(method, "") for setting, method in found},
        )

    settled = {"tasks": config.tasks, "batch_size": config.batch_size}
    study("dark_experience", config, cells(config, images), report, figures, settled=settled, data={"images": images})


def figures(found: Found, directory: Path) -> list[Path]:
    """Accuracy on each task after the last, a panel per benchmark and buffer, the methods without one in each."""
    settings = [setting for setting in dict.fromkeys(setting for setting, _ in found) if "buffer" in setting]
    path = directory / "accuracy_by_task.png"
    with drawing(path, 1, len(settings), size=(3.8, 3.4), sharey=True) as axes:
        for place, setting in zip(axes[0], settings, strict=True):
            here = (setting, setting.split(",")[0])
            last = {m: 100 * cell["accuracy"][:, -1] for (s, m), cell in found.items() if s in here}
            course(place, range(1, 1 + len(next(iter(last.values()))[0])), last, setting)
            label_lines(place).set_xlabel("task, first to last")
        axes[0, 0].set_ylabel("accuracy after the last (%)")
    return [path]


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
