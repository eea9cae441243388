"""Split MNIST in three scenarios: how much is kept by EWC, SI, distillation and replay.

Command                                                   hardware       time      expected
python -m experiments.split_mnist                         2 CPU cores    3 min     EWC: task 98; replay: class 86
python -m experiments.split_mnist --data-dir DATA \\
    --protocol van_de_ven --seeds 3 --record \\
    --methods none joint ewc "online ewc" si lwf replay \\
    a-gem                                                 2 CPU cores    35 min    EWC: task >= 98, class about 20;
                                                                                   none: class 19.9

Protocol "van_de_ven" is that of van de Ven, Tuytelaars and Tolias 2022 (doi 10.1038/s42256-022-00568-3): 5 tasks of two
digits, a class order for each seed; MLP 400-400; Adam 1e-3, not reset; 2000 batches of 128 per task; class-incremental
losses over all ten outputs; EWC with the Fisher of all classes on the whole task. "demo" is the same in small, on the
digits that come with the package.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Literal

import optax
import tyro

from cl_zoo import (
    Component,
    Model,
    Stream,
    agem,
    compose,
    ewc,
    lwf,
    replay,
    supervised,
    synaptic_intelligence,
)
from cl_zoo.models import mlp
from cl_zoo.streams import split_mnist as split_mnist_stream
from experiments.common import (
    Cell,
    Found,
    Report,
    accuracy_figures,
    check_numbers,
    load_images,
    scored,
    study,
    sweep_cell,
    table,
)

Scenario = Literal["task", "domain", "class"]
Method = Literal["none", "joint", "ewc", "online ewc", "si", "lwf", "replay", "a-gem"]


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run. Unknown or impossible values are refused before anything compiles."""

    protocol: Literal["demo", "van_de_ven", "smoke"] = "demo"
    data_dir: str | None = None
    """Folder of the MNIST files; without it, the embedded digits."""
    source: Literal["embedded", "idx", "tfds"] | None = None
    seeds: int = 2
    first_seed: int = 2
    scenarios: tuple[Scenario, ...] = ("task", "domain", "class")
    methods: tuple[Method, ...] = ("none", "joint", "ewc", "lwf", "replay")
    """Also "online ewc", "si" and "a-gem"."""
    directory: str | None = None
    """Of the run; finished parts of an interrupted run there are not run again. Default: runs/split_mnist-PROTOCOL."""
    record: bool = False
    """Write the result file that the ledger is made from."""


SIZES = {  # updates per task, hidden widths, batch size, replay capacity
    "demo": (300, (256, 256), 64, 500),
    "van_de_ven": (2000, (400, 400), 128, 1000),
    "smoke": (5, (16,), 16, 50),
}
STRENGTHS: dict[str, dict[str, dict[str, float]]] = {
    # van de Ven et al. 2022, their code's param_values; the decay of online EWC that of 2019
    "van_de_ven": {
        "ewc": {"task": 1e5, "domain": 1e10, "class": 1e9},
        "online ewc": {"task": 1e5, "domain": 1e10, "class": 1e9},
        "si": {"task": 10.0, "domain": 5e4, "class": 5e3},
    },
    # The best of six powers of 10 on held-out images, seeds 100 and 101.
    "demo": {
        "ewc": {"task": 1e5, "domain": 1e3, "class": 1e5},
        "online ewc": {"task": 1e5, "domain": 1e3, "class": 1e4},
        "si": {"task": 100.0, "domain": 10.0, "class": 100.0},
    },
}
DECAYS = {"task": 0.8, "domain": 0.7, "class": 0.8}


def components(method: str, scenario: str, protocol: str) -> list[Component]:
    """What is kept, and how."""
    _, _, batch_size, capacity = SIZES[protocol]
    strengths = STRENGTHS["van_de_ven" if protocol == "van_de_ven" else "demo"]
    strength = strengths.get(method, {}).get(scenario, 0.0)
    kept: dict[str, list[Component]] = {
        "none": [],
        "joint": [],
        "ewc": [ewc(strength)],
        "online ewc": [ewc(strength, decay=DECAYS[scenario])],
        "si": [synaptic_intelligence(strength, damping=0.1, gradient="total", clamp=False)],
        "lwf": [lwf(weighting="constant" if scenario == "class" else "tasks")],
        "replay": [replay(capacity, batch_size=batch_size, weighting="tasks")],
        "a-gem": [agem(capacity, batch_size=min(batch_size, capacity))],
    }
    return [supervised(), *kept[method]]


def cell(config: Config, scenario: str, method: str, images: Any) -> Cell:
    """One method in one scenario."""
    steps, hidden, batch_size, _ = SIZES[config.protocol]
    stream: Stream = split_mnist_stream(
        scenario=scenario,
        images=images,
        outputs="all",
        batch_size=batch_size,
        steps=steps,
        joint="all" if method == "joint" else None,
    )
    model: Model = mlp((28, 28), stream.tasks.active.shape[-1], hidden=hidden, initialiser="fan_in_uniform")
    kept = components(method, scenario, config.protocol)
    return sweep_cell(scenario, method, compose(model, optax.adam(1e-3), *kept, tasks=stream.tasks), stream)


_SCENARIOS = ("task", "domain", "class")
NOTES = {
    (scenario, method): note
    for scenario in _SCENARIOS
    for method, note in {
        "online ewc": "2019's settings but for the Fisher: that of all classes, with EWC's strength of 2022",
        "replay": "a reservoir of 1000 rows; theirs is filled at each task's end with 100 rows per class",
    }.items()
}


def main(config: Config) -> None:
    """Runs the study, prints its table, draws its figures."""
    check_numbers(config, "seeds")
    images = load_images(config)

    def report(found: Found) -> Report:
        return Report(
            f"\nSplit MNIST, protocol {config.protocol}\n{table(found)}\n",
            f"split MNIST, {config.protocol}",
            scored(found),
            NOTES,
            name=f"split_mnist_{config.protocol}",
        )

    cells = [cell(config, scenario, method, images) for scenario in config.scenarios for method in config.methods]
    figures = partial(accuracy_figures, title="{}-incremental", matrices=("none", "ewc", "lwf", "replay"))
    settled = {"protocol": config.protocol}
    study("split_mnist", config, cells, report, figures, settled=settled, data={"images": images})


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
