"""What a decoder forgets of one domain of text when it learns the next, and what EWC and replay do about it.

Command                                                   hardware       time       expected
python -m experiments.text_domains --record               2 CPU cores    10 min     see the ledger
python -m experiments.text_domains --text-dir DIR         2 CPU cores               the folders of DIR as domains

Python's own library: first its code without docstrings and comments, then its docstrings, as bytes. A decoder of two
blocks of width 128 with TTT-Linear, rows of 128 bytes, Adam 3e-3, the same number of updates on each domain, tested on
the last tenth of each. Nothing about the components knows of text: EWC takes the squared gradients of the learner's own
loss of each row (labels="loss"), replay keeps rows. EWC's strength is the best of three in bits per byte over all
domains on validation windows, by the first seed. "joint" draws from all domains at all times.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import tyro
from tqdm.auto import tqdm

from cl_zoo import (
    compose,
    decoder,
    enable_compilation_cache,
    ewc,
    next_token_loss,
    python_library,
    read_text_domains,
    replay,
    run_stream,
    supervised,
    text_domains,
    ttt_linear,
)
from cl_zoo.training.run_directory import ConfigError, settle_config, write_json
from experiments.common import RESULTS, record, shown_command

METHODS = ("none", "ewc", "replay", "joint")


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run. Unknown or impossible values are refused before anything compiles."""

    text_dir: str | None = None
    """A folder whose folders (or files) are domains; without it, Python's code and docstrings."""
    methods: tuple[str, ...] = METHODS
    seeds: int = 1
    steps: int = 150
    """Updates on each domain."""
    batch_size: int = 16
    length: int = 128
    width: int = 128
    text_bytes: int = 1_000_000
    """Of Python's library that is read, at most."""
    capacity: int = 500
    """Rows in the memory of replay."""
    strengths: tuple[float, ...] = (1e3, 1e5, 1e7)
    """Of EWC, from which validation chooses."""
    directory: str = "runs/text_domains"
    """Of the run; what is finished there is not run again."""
    record: bool = False
    """Write the result file that the ledger is made from."""


def main(config: Config) -> None:
    """Runs the study, prints its tables, draws its figure."""
    if config.seeds < 1:
        raise SystemExit(f"seeds is {config.seeds}, but it must be at least 1")
    if unknown := set(config.methods) - set(METHODS):
        raise SystemExit(f"methods names {', '.join(sorted(unknown))}, but there are {', '.join(METHODS)}")
    enable_compilation_cache()
    directory = Path(config.directory)
    may_change = ("methods", "seeds", "directory", "record")
    try:
        domains = read_text_domains(config.text_dir) if config.text_dir else python_library(config.text_bytes)
        settle_config(directory, {k: v for k, v in dataclasses.asdict(config).items() if k not in may_change})
    except (ConfigError, ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    (directory / "cells").mkdir(exist_ok=True)

    def kept(name: str, *arguments: Any) -> dict[str, Any]:
        path = directory / "cells" / f"{name}.json"
        if not path.exists():
            write_json(path, run(config, domains, *arguments))
        return json.loads(path.read_text())

    found: dict[str, list[dict[str, Any]]] = {method: [] for method in config.methods}
    searched = len(config.strengths) if "ewc" in config.methods else 0
    strength = config.strengths[0]
    with tqdm(total=searched + len(config.methods) * config.seeds, unit="run") as bar:
        if searched:
            scores = []
            for tried in config.strengths:
                result = kept(f"validation-{tried:g}", "ewc", 0, tried, "validation")
                scores.append(np.mean(result["bits_per_byte"][-1]))
                bar.update()
            strength = config.strengths[int(np.nanargmin(scores))]
        for method in config.methods:
            for seed in range(config.seeds):
                found[method].append(kept(f"{method}-{seed}", method, seed, strength, "test"))
                bar.update()

    names, cells = list(domains), {}
    for method, runs in found.items():
        matrix = np.array([each["bits_per_byte"] for each in runs])  # [S, T + 1, T]
        print(f"\n{method}: bits per byte of each domain (columns: {', '.join(names)}), before and after each task")
        print(np.array2string(matrix.mean(0), precision=3, suppress_small=True))
        seconds = [each["seconds"] for each in runs]
        for i, name in enumerate(names):
            cells[f"{name}, at the end, bits per byte", method] = {"scores": matrix[:, -1, i], "seconds": seconds}
        if method != "joint":
            cells[f"{names[0]}, when just learnt", method] = {"scores": matrix[:, 1, 0], "seconds": seconds}
    print(f"\nEWC's strength: {strength:g}\nfigure: {figure(found, names, directory)}")
    notes = {key: f"strength {strength:g} of {config.strengths}" for key in cells if key[1] == "ewc"}
    path = RESULTS / "text_domains.json" if config.record else directory / "results.json"
    command = shown_command("experiments.text_domains", sys.argv[1:])
    record("text_domains", f"{', then '.join(names)}: bytes", command, cells, {}, notes, path, lower_is_better=True)
    print(f"results: {path}")


def run(config: Config, domains: dict[str, bytes], method: str, seed: int, strength: float, split: str) -> Any:
    """One method and seed: bits per byte `[T + 1][T]`, as R has it."""
    sizes = {"length": config.length, "batch_size": config.batch_size, "steps": config.steps, "sample_size": 256}
    stream = text_domains(domains, validation=0.05, joint="all" if method == "joint" else None, **sizes)
    net = decoder(256, [ttt_linear(config.width, 2)], layers=2, hidden=2 * config.width)
    more = {
        "ewc": lambda: [ewc(strength, labels="loss")],
        "replay": lambda: [replay(config.capacity, batch_size=config.batch_size)],
    }
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-3))
    learner = compose(net.model, optimiser, supervised(next_token_loss), *more.get(method, list)())
    begun = time.perf_counter()
    result = run_stream(learner, stream, jax.random.key(seed), split=split)
    return {"bits_per_byte": (-np.asarray(result.accuracy)).tolist(), "seconds": time.perf_counter() - begun}


def figure(found: dict[str, list[dict[str, Any]]], names: list[str], directory: Path) -> Path:
    """Bits per byte of every domain before and after each task, a panel for each domain."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, axes = plt.subplots(1, len(names), figsize=(1 + 3.6 * len(names), 3.4), squeeze=False, layout="constrained")
    for i, (panel, name) in enumerate(zip(axes[0], names)):
        for method, runs in found.items():
            values = np.array([each["bits_per_byte"] for each in runs])[:, 1:, i]
            panel.plot(values.mean(0), marker="o", markersize=4, label=method)
        panel.set_xticks(range(len(names)), [f"after {each}" for each in names])
        panel.set(title=f"test loss on {name}", ylabel="bits per byte")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    path = directory / "bits_per_byte.png"
    drawn.savefig(path, dpi=150)
    plt.close(drawn)
    return path


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
