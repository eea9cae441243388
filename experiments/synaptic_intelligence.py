"""Permuted MNIST, 10 tasks: synaptic intelligence as its authors ran it, in a narrower network.

Command                                                   hardware       time       expected
python -m experiments.synaptic_intelligence               2 CPU cores               figures on the embedded digits
python -m experiments.synaptic_intelligence \\
    --data-dir DATA --strengths 0 0.1 --record            2 CPU cores    25 min     45 without, 93 with
python -m experiments.synaptic_intelligence \\
    --data-dir DATA --hidden 2000 2000 --record           a GPU          not tried  96.94, theirs

Protocol of Zenke et al. 2017 (arXiv 1703.04200): one head, 2 hidden layers, Adam 1e-3 that is not reset, 20 epochs a
task in batches of 256, strength 0.1, damping 0.1. Theirs have 2000 units in each layer, here it is 400 unless told: a
step of the wide network is some 20 times the work.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import optax
import tyro

from cl_zoo import compose, supervised, synaptic_intelligence
from cl_zoo.models import mlp
from cl_zoo.streams import permuted_mnist
from experiments.common import (
    Found,
    Report,
    accuracy_figures,
    all_but,
    check_numbers,
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
    hidden: tuple[int, ...] = (400, 400)
    epochs: int = 20
    batch_size: int = 256
    strengths: tuple[float, ...] = (0.0, 0.01, 0.1)
    seeds: int = 3
    directory: str = "runs/synaptic_intelligence"
    """Of the run; what is finished there is not run again."""
    record: bool = False
    """Write the result file that the ledger is made from."""


def main(config: Config) -> None:
    """Runs the study, prints its table, draws its figures."""
    check_numbers(config, "tasks", "seeds", "epochs")
    if min(config.strengths, default=-1) < 0:
        raise SystemExit(f"strengths are {config.strengths}, but there must be some, and none may be negative")
    images = load_images(config)
    stream = permuted_mnist(config.tasks, images=images, batch_size=config.batch_size, epochs=config.epochs)
    model = mlp((28, 28), 10, hidden=config.hidden)
    widths = " x ".join(map(str, config.hidden))

    def make(strength: Any) -> Any:
        kept = synaptic_intelligence(strength, damping=0.1)
        return compose(model, optax.adam(1e-3), supervised(), kept, tasks=stream.tasks)

    def report(found: Found) -> Report:
        return Report(
            f"\nPermuted MNIST, {config.tasks} tasks, hidden {widths}\n{table(found)}\n",
            f"permuted MNIST, {config.tasks} tasks, the protocol of synaptic intelligence",
            scored(found),
            dict.fromkeys(found, "" if config.hidden == (2000, 2000) else "a narrower network than theirs"),
        )

    cells = [sweep_cell(f"domain, hidden {widths}", f"si {s:g}", make, stream, s) for s in config.strengths]
    settled = all_but(config, "strengths")
    study("synaptic_intelligence", config, cells, report, accuracy_figures, settled=settled, data={"images": images})


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
