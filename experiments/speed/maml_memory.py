"""What the second order costs in memory: temporary memory of a MAML update against inner steps, kept or computed again.

    python -m experiments.speed.maml_memory          a minute on 2 cores; draws one figure

The setting is that of `maml.py`. Bytes are those of XLA's plan for the compiled update: what it needs beside arguments
and results, at once. The backward pass of n inner steps reads what each computed; with `rematerialise` it keeps the
parameters before each step alone, and computes the rest again.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import tyro

from cl_zoo.compilation import jit
from cl_zoo.training.loop import start
from cl_zoo.training.run_directory import environment, write_json
from experiments.speed.maml import problem


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    inner_steps: tuple[int, ...] = tuple(range(1, 11))
    directory: Path = Path("runs/maml-memory")
    """Of the figure."""
    record: bool = False
    """Write experiments/speed/results/maml_memory_cpu.json."""


def temporary_bytes(inner_steps: int, rematerialise: bool) -> int:
    """Of one update; nothing is run."""
    learner, stream = problem(inner_steps=inner_steps, rematerialise=rematerialise)
    state, cursor = jax.eval_shape(lambda stream, key: start(learner, stream, key)[1], stream, jax.random.key(0))
    batch, _ = jax.eval_shape(lambda stream, cursor: stream.next(cursor), stream, cursor)
    plan = jit(learner.update).lower(state, batch).compile().memory_analysis()
    if plan is None:
        raise SystemExit("this device does not tell how much memory a program takes")
    return int(plan.temp_size_in_bytes)


def figure_of(found: dict[str, list[int]], inner_steps: tuple[int, ...], directory: Path) -> Path:
    """Memory against inner steps, two lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(4.4, 3.2), layout="constrained")
    for name, values in found.items():
        axes.plot(inner_steps, [value / 1e6 for value in values], marker="o", markersize=3, label=name)
    axes.set(xlabel="inner steps", ylabel="temporary memory of an update, MB", ylim=(0, None), xticks=inner_steps)
    axes.legend(fontsize=8)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "memory.png"
    figure.savefig(path, dpi=150)
    plt.close("all")
    return path


def main(config: Config) -> None:
    """Measures, prints a table, draws the figure."""
    found: dict[str, list[int]] = {"kept": [], "computed again": []}
    print(f"{'inner steps':>11s}{'kept, MB':>14s}{'again, MB':>14s}{'ratio':>8s}")
    for n in config.inner_steps:
        kept, again = (temporary_bytes(n, rematerialise) for rematerialise in (False, True))
        found["kept"].append(kept)
        found["computed again"].append(again)
        print(f"{n:11d}{kept / 1e6:14.3f}{again / 1e6:14.3f}{kept / again:8.2f}", flush=True)
    print(f"figure: {figure_of(found, config.inner_steps, config.directory)}")
    if config.record:
        path = Path(__file__).parent / "results" / "maml_memory_cpu.json"
        write_json(path, {"environment": environment(), "inner_steps": config.inner_steps, "temporary_bytes": found})


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
