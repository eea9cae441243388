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
import json
import sys
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax
import tyro
from tqdm.auto import tqdm

from cl_zoo import (
    Component,
    Learner,
    Stream,
    agem,
    compose,
    continual_backprop,
    der,
    ema,
    enable_compilation_cache,
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
    stream_program,
    supervised,
    synaptic_intelligence,
    weight_interpolation,
    wise_ft,
)
from cl_zoo.evaluation.cost import state_bytes, timed
from cl_zoo.evaluation.metrics import average_accuracy, forgetting, learning_accuracy, statistics
from cl_zoo.models import mlp
from cl_zoo.streams import split_mnist
from cl_zoo.training.run_directory import write_json
from experiments.common import RESULTS, load_images, record, settle_run, shown_command

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


def cells(config: Config, images: Any) -> dict[tuple[str, str], tuple[Learner, Stream]]:
    """A learner and its stream for every method in every scenario."""
    steps, hidden, batch_size, _ = SIZES[config.protocol]
    found = {}
    for scenario in config.scenarios:
        stream = split_mnist(scenario=scenario, images=images, batch_size=batch_size, steps=steps)
        n_classes = stream.tasks.active.shape[-1]
        model = mlp((28, 28), n_classes, hidden=hidden)
        for method, components in methods(scenario, config.protocol, n_classes).items():
            if method in config.methods or not config.methods:
                learner = compose(model, optax.adam(1e-3), *components, tasks=stream.tasks)
                found[scenario, method] = learner, stream
    return found


def run(config: Config, images: Any, directory: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Accuracy `[S, T + 1, T]`, seconds `[S]` and bytes kept of every method; what is finished is not run again."""
    folder = directory / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    found, todo = {}, cells(config, images)
    with tqdm(total=len(todo), unit="method") as bar:
        for (scenario, method), (learner, stream) in todo.items():
            bar.set_description(f"{scenario}, {method}")
            path = folder / f"{scenario}-{method.replace(' ', '_')}-{config.seeds}.json"
            if path.exists():
                kept = json.loads(path.read_text())
            else:
                matrices, seconds, program = [], [], stream_program(learner, stream)
                for seed in range(config.seeds):
                    result, _, (took,) = timed(program, stream.tasks, stream.data, jax.random.key(seed))
                    matrices.append(np.asarray(result.accuracy).tolist())
                    seconds.append(took)
                sizes = state_bytes(result.state)
                own = sum(n for part, n in sizes.items() if part not in ("params", "model_state", "opt_state"))
                kept = {"accuracy": matrices, "seconds": seconds, "bytes": own}
                write_json(path, kept)
            found[scenario, method] = {**kept, "accuracy": np.array(kept["accuracy"])}
            bar.update()
    return found


def table(found: dict[tuple[str, str], dict[str, Any]]) -> str:
    """A line per method and scenario."""
    lines = [f"{'accuracy (%)':32s}{'mean':>8s}{'sd':>7s}{'learnt':>9s}{'forgotten':>11s}{'MB kept':>9s}{'s':>7s}"]
    for (scenario, method), cell in found.items():
        s = statistics(100 * average_accuracy(cell["accuracy"]))
        learnt, lost = (100 * np.mean(f(cell["accuracy"])) for f in (learning_accuracy, forgetting))
        lines.append(
            f"{scenario + ', ' + method:32s}{s.mean:8.2f}{s.sd:7.2f}{learnt:9.2f}{lost:11.2f}"
            f"{cell['bytes'] / 1e6:9.2f}{np.median(cell['seconds']):7.2f}"
        )
    return "\n".join(lines)


def draw(rows: Any, found: dict[tuple[str, str], dict[str, Any]]) -> None:
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
                (cell["bytes"] / 1e6, accuracy),
                (np.median(cell["seconds"]), accuracy),
                (100 * np.mean(learning_accuracy(cell["accuracy"])), 100 - 100 * np.mean(forgetting(cell["accuracy"]))),
            )
            for axes, (x, y) in zip(panels, points, strict=True):
                axes.plot(x, y, linestyle="", markersize=6, alpha=0.8, **style[method])
        panels[0].set_xscale("symlog", linthresh=0.1)
        labels = (
            ("MB kept beside the network and its optimiser", "accuracy on all tasks (%)"),
            ("seconds for the stream", "accuracy on all tasks (%)"),
            ("plasticity: accuracy when learnt (%)", "stability: 100 - forgetting (%)"),
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
    if config.seeds < 2:
        raise SystemExit(f"seeds is {config.seeds}, but it must be at least 2")
    known = [method for group in GROUPS.values() for method in group]
    for method in config.methods:
        if method not in known:
            raise SystemExit(f"methods: there is no {method!r}; there are {', '.join(known)}")
    enable_compilation_cache()
    directory = Path(config.directory or f"runs/what_keeps_what-{config.protocol}")
    images = load_images(config.data_dir, config.source)
    settle_run(directory, {"protocol": config.protocol}, images)
    found = run(config, images, directory)
    print(f"\nSplit MNIST, {config.protocol}, {config.seeds} seeds\n{table(found)}\n")

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, rows = plt.subplots(
        len(config.scenarios), 3, figsize=(16, 4.2 * len(config.scenarios)), squeeze=False, layout="constrained"
    )
    draw(rows, found)
    figure.savefig(directory / "what_keeps_what.png", dpi=150)
    print(f"figure: {directory / 'what_keeps_what.png'}")
    path = RESULTS / "what_keeps_what.json" if config.record else directory / "results.json"
    notes = {key: f"{cell['bytes'] / 1e6:.2f} MB kept" for key, cell in found.items()}
    command = shown_command("experiments.what_keeps_what", sys.argv[1:])
    record("what_keeps_what", "split MNIST, every method", command, found, {}, notes, path)
    print(f"results: {path}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
