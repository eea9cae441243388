"""Every way of keeping in one figure: accuracy against bytes kept and against time, and the stability-plasticity plane.

Command                                                   hardware       time       expected
python -m experiments.what_keeps_what                     2 CPU cores               replay above penalties where the
                                                                                    task is not told
python -m experiments.what_keeps_what --data-dir DATA \\
    --record                                              2 CPU cores    3 min      class: DER++ 89, GDumb 88, SLDA 87

Split MNIST, 5 tasks, MLP 256-256, Adam, 300 batches of 64 a task. Strengths are fixed, not tuned here; the
studies that tune them are in the ledger. Seconds are those of the whole run of a compiled program, evaluation included.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax
import tyro

from cl_zoo import (
    Component,
    Stream,
    agem,
    compose,
    continual_backprop,
    der,
    ema,
    ewc,
    fisher_merging,
    gdumb,
    icarl,
    l2_init,
    lwf,
    mas,
    packnet,
    redo,
    replay,
    shrink_and_perturb,
    slda,
    supervised,
    synaptic_intelligence,
    weight_interpolation,
    wise_ft,
)
from cl_zoo.evaluation.cost import state_bytes, timed
from cl_zoo.evaluation.metrics import average_accuracy, forgetting, learning_accuracy, statistics
from cl_zoo.models import mlp
from cl_zoo.streams import split_mnist
from cl_zoo.training import stream_program
from experiments.common import (
    Cell,
    Found,
    Report,
    check_numbers,
    drawing,
    load_images,
    run_cells,
    scored,
    study,
)

Scenario = Literal["task", "domain", "class"]
SIZES = {  # updates per task, hidden widths, batch size, rows in memory
    "demo": (300, (256, 256), 64, 500),
    "smoke": (5, (16,), 16, 50),
}
GROUPS = {  # colours of the figure; at most seven each, whose markers differ
    "nothing": ["none", "l2 init", "ema"],
    "parameters": ["ewc", "online ewc", "si", "mas"],
    "weights": ["weight interpolation", "wise-ft", "fisher merging", "packnet"],
    "answers": ["lwf"],
    "rows": ["er", "er, ring", "der", "der++", "a-gem", "icarl", "gdumb"],
    "statistics": ["slda"],
    "plasticity": ["continual backprop", "redo", "shrink and perturb"],
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run. Unknown or impossible values are refused before anything compiles."""

    protocol: Literal["demo", "smoke"] = "demo"
    data_dir: str | None = None
    """Folder of the MNIST files; without it, the embedded digits."""
    source: Literal["embedded", "idx", "tfds"] | None = None
    scenarios: tuple[Scenario, ...] = ("task", "class")
    methods: tuple[str, ...] = ()
    """Of those in the figure; all by default."""
    seeds: int = 3
    directory: str | None = None
    """Of the run; what is finished there is not run again. Default: runs/what_keeps_what-PROTOCOL."""
    record: bool = False
    """Write the result file that the ledger is made from."""


def methods(scenario: str, protocol: str, n_classes: int) -> dict[str, list[Component]]:
    """Components of every method that can be used in a scenario."""
    _, _, rows, capacity = SIZES[protocol]
    beside: dict[str, Component] = {
        "l2 init": l2_init(1e-4),
        "ema": ema(0.99, warm_up=True),
        "ewc": ewc(1e4),
        "online ewc": ewc(1e4, decay=0.9),
        "si": synaptic_intelligence(10.0),
        "mas": mas(1.0),
        "weight interpolation": weight_interpolation(0.5),
        "wise-ft": wise_ft(0.5),
        "fisher merging": fisher_merging(0.5),
        "lwf": lwf(),
        "er": replay(capacity, batch_size=rows),
        "er, ring": replay(capacity, batch_size=rows, memory="ring", n_classes=n_classes),
        "der": der(capacity, alpha=0.5, batch_size=rows),
        "der++": der(capacity, alpha=0.5, beta=0.5, batch_size=rows),
        "a-gem": agem(capacity, batch_size=rows),
        "continual backprop": continual_backprop(1e-4),
        "redo": redo(0.025, every=100),
        "shrink and perturb": shrink_and_perturb(1e-5, 1e-5),
    }
    instead: dict[str, Component] = {"gdumb": gdumb(capacity, n_classes, batch_size=min(16, capacity)), "slda": slda()}
    if scenario == "task":
        beside["packnet"] = packnet()
    if scenario == "class":
        instead["icarl"] = icarl(capacity, n_classes, batch_size=rows)
    return (
        {"none": [supervised()]}
        | {name: [supervised(), component] for name, component in beside.items()}
        | {name: [component] for name, component in instead.items()}
    )


def cells(config: Config, images: Any) -> list[Cell]:
    """Every method in every scenario: R, the seconds of the run, and the bytes that are kept."""
    steps, hidden, batch_size, _ = SIZES[config.protocol]

    def cell(scenario: str, method: str, components: list[Component], stream: Stream) -> Cell:
        model = mlp((28, 28), stream.tasks.active.shape[-1], hidden=hidden)
        learner = compose(model, optax.adam(1e-3), *components, tasks=stream.tasks)

        def run(seed: int) -> dict[str, Any]:
            result, _, (seconds,) = timed(stream_program(learner, stream), learner, stream, jax.random.key(seed))
            sizes = state_bytes(result.state)
            own = sum(n for part, n in sizes.items() if part not in ("params", "model_state", "opt_state"))
            return {"accuracy": np.asarray(result.accuracy).tolist(), "seconds": seconds, "bytes": own}

        return Cell(scenario, method, f"{scenario}-{method}", run)

    found = []
    for scenario in config.scenarios:
        stream = split_mnist(scenario=scenario, images=images, batch_size=batch_size, steps=steps)
        for method, components in methods(scenario, config.protocol, stream.tasks.active.shape[-1]).items():
            if method in config.methods or not config.methods:
                found.append(cell(scenario, method, components, stream))
    return found


def run(config: Config, images: Any, directory: Path) -> Found:
    """The cells by themselves, for a notebook."""
    return run_cells(cells(config, images), directory, range(config.seeds))


def table(found: Found) -> str:
    """A line per method and scenario."""
    lines = [f"{'accuracy (%)':32s}{'mean':>8s}{'sd':>7s}{'learned':>9s}{'forgotten':>11s}{'MB kept':>9s}{'s':>7s}"]
    for (scenario, method), cell in found.items():
        s = statistics(100 * average_accuracy(cell["accuracy"]))
        learned, lost = (100 * np.mean(f(cell["accuracy"])) for f in (learning_accuracy, forgetting))
        lines.append(
            f"{scenario + ', ' + method:32s}{s.mean:8.2f}{s.sd:7.2f}{learned:9.2f}{lost:11.2f}"
            f"{cell['bytes'][0] / 1e6:9.2f}{np.median(cell['seconds']):7.2f}"
        )
    return "\n".join(lines)


def draw(rows: Any, found: Found) -> None:
    """Three panels for each scenario, on `rows` of three axes: accuracy against MB, against seconds, and the plane."""
    style = {
        method: {"color": f"C{i}", "marker": "osD^vPX"[j]}
        for i, group in enumerate(GROUPS.values())
        for j, method in enumerate(group)
    }
    for panels, scenario in zip(rows, dict.fromkeys(scenario for scenario, _ in found), strict=True):
        for (_, method), cell in ((key, cell) for key, cell in found.items() if key[0] == scenario):
            accuracy = 100 * np.mean(average_accuracy(cell["accuracy"]))
            points = (
                (cell["bytes"][0] / 1e6, accuracy),
                (np.median(cell["seconds"]), accuracy),
                (100 * np.mean(learning_accuracy(cell["accuracy"])), 100 - 100 * np.mean(forgetting(cell["accuracy"]))),
            )
            for axes, (x, y) in zip(panels, points, strict=True):
                axes.plot(x, y, linestyle="", markersize=6, alpha=0.8, **style[method])
        panels[0].set_xscale("symlog", linthresh=0.1)
        labels = (
            ("MB kept beside the network and its optimiser", "accuracy on all tasks (%)"),
            ("seconds for the stream", "accuracy on all tasks (%)"),
            ("plasticity: accuracy when learned (%)", "stability: 100 - forgetting (%)"),
        )
        for axes, (x, y) in zip(panels, labels, strict=True):
            axes.set_xlabel(x)
            axes.set_ylabel(y)
            axes.set_title(f"{scenario}-incremental")
            axes.grid(alpha=0.3)
    shown = [method for method in style if any(method == name for _, name in found)]
    marks = [rows[0][0].plot([], [], linestyle="", **style[method])[0] for method in shown]
    kept = {method: group for group, members in GROUPS.items() for method in members}
    labels_of = [f"{method} ({kept[method]})" for method in shown]
    rows[0][0].figure.legend(marks, labels_of, title="method (what is kept)", fontsize=8, loc="outside right upper")


def main(config: Config) -> None:
    """Runs the study, prints its table, draws its figure."""
    check_numbers(config, "seeds", least=2)
    known = [method for group in GROUPS.values() for method in group]
    for method in config.methods:
        if method not in known:
            raise SystemExit(f"methods: there is no {method!r}; there are {', '.join(known)}")
    images = load_images(config)

    def report(found: Found) -> Report:
        return Report(
            f"\nSplit MNIST, {config.protocol}, {config.seeds} seeds\n{table(found)}\n",
            "split MNIST, every method",
            scored(found),
            notes={key: f"{cell['bytes'][0] / 1e6:.2f} MB kept" for key, cell in found.items()},
        )

    def figures(found: Found, directory: Path) -> list[Path]:
        path = directory / "what_keeps_what.png"
        with drawing(path, len(config.scenarios), 3, size=(16 / 3, 4.2)) as rows:
            draw(rows, found)
        return [path]

    settled = {"protocol": config.protocol}
    every = cells(config, images)
    study("what_keeps_what", config, every, report, figures, settled=settled, data={"images": images})


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
