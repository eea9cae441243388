"""One domain of text after another: what does a language model forget, and what keeps it?

Command                                                   hardware       time       expected
python -m experiments.text_domains --seeds 3 --record     1 CPU core     25 min     forgetting of code: naive 0.57 bits,
                                                                                    ewc 0.52, replay 0.01
python -m experiments.text_domains --text-dir TEXTS       1 CPU core                whatever lies in TEXTS

A decoder of 2 blocks of width 128 with half a million parameters reads bytes in sequences of 128: first the code of
Python's library without docstrings and comments, then the docstrings; with --text-dir then also each local domain, see
`read_text_domains`. 300 batches of 8 sequences are read of each, less than one pass. Adam (0.9, 0.95), clipped at norm
1, warmed up once, then at a constant rate, so that no domain is met with a smaller one. No task is told.

"naive" only learns; "ewc" has a penalty by the squared gradients of each sequence's loss, its strength the best of
three by validation, with the first seed, on all domains at the end; "replay" keeps 500 sequences and adds 8 of them to
each batch; "joint" reads all domains at once with as many updates in all, which bounds what can be had. The score is
bits per byte: lower is better. Nothing is published for this setting; what is asked is how the methods stand to each
other. The best strength for EWC was the smallest: more of it costs the docstrings more than it keeps of the code.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optax
import tyro

from cl_zoo import Component, Learner, Stream, compose, ewc, replay, supervised
from cl_zoo.datasets import python_library, read_text_domains
from cl_zoo.evaluation.plots import course, label_lines
from cl_zoo.language import decoder
from cl_zoo.losses import next_token_loss
from cl_zoo.streams import text_domains
from experiments.common import (
    Cell,
    Found,
    Report,
    check_names,
    check_numbers,
    drawing,
    held_out,
    kept,
    mean_and_spread,
    study,
    sweep_cell,
)
from experiments.language_mixers import MIXERS

METHODS = ("naive", "ewc", "replay", "joint")
SMOKE: dict[str, Any] = {
    "steps": 4, "width": 16, "heads": 2, "layers": 1, "hidden": 16, "length": 16, "text_bytes": 4000,
    "strengths": (10.0, 100.0),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run. Unknown or impossible values are refused before anything compiles."""

    protocol: Literal["full", "smoke"] = "full"
    """The smoke protocol only shows that it runs: it sets sizes, steps and strengths."""
    mixers: tuple[str, ...] = ("ttt-linear, b=16",)
    """Sequence layers, of those in `experiments.language_mixers`."""
    methods: tuple[str, ...] = METHODS
    text_dir: str | None = None
    """Folder of further domains."""
    seeds: int = 1
    steps: int = 300
    """Batches of each domain."""
    width: int = 128
    heads: int = 4
    layers: int = 2
    hidden: int = 384
    length: int = 128
    batch_size: int = 8
    learning_rate: float = 2e-3
    strengths: tuple[float, ...] = (1e2, 1e3, 1e4)
    """Of EWC, tried on the validation split."""
    capacity: int = 500
    text_bytes: int = 800_000
    """Of each part of Python's library, at most; the last 4 % are for testing, 4 % before for validation."""
    directory: str = "runs/text_domains"
    """Of the run; what is finished there is not run again."""
    record: bool = False
    """Write the result file that the ledger is made from."""


def main(config: Config) -> None:
    """Runs the study, prints its tables, draws its figure."""
    check_numbers(config, "seeds", "steps")
    check_names(config, mixers=MIXERS, methods=METHODS)
    texts = python_library(config.text_bytes if config.protocol == "full" else SMOKE["text_bytes"])
    try:
        texts |= {} if config.text_dir is None else read_text_domains(config.text_dir)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    sizes = dataclasses.replace(config, **(SMOKE if config.protocol == "smoke" else {}))
    strengths: dict[tuple[str, str], float] = {}

    def cells(directory: Path) -> list[Cell]:
        """Every method with every layer, the strength of EWC chosen."""
        share = 0.04 if config.protocol == "full" else 0.1
        options: dict[str, Any] = {"length": sizes.length, "steps": sizes.steps, "batch_size": sizes.batch_size}
        stream, joint = (
            text_domains(texts, held_out=share, validation=share, joint=kind, **options) for kind in (None, "all")
        )
        found = []
        for mixer in config.mixers:
            for method in config.methods:
                strength, make = 0.0, learner(sizes, mixer)
                if method == "ewc":
                    strength, make = chosen_strength(sizes, mixer, stream, directory), with_ewc(sizes, mixer)
                if method == "replay":
                    make = learner(sizes, mixer, replay(sizes.capacity, batch_size=sizes.batch_size))
                source = joint if method == "joint" else stream
                found.append(sweep_cell(mixer, method, make, source, strength, orders=None))
                strengths[mixer, method] = strength
        return found

    def report(found: Found) -> Report:
        names = list(texts)
        rows = summary(found, names)
        return Report(
            f"\n{table(found, names, strengths)}\n",
            f"{', '.join(names)} one after another, bytes: bits per byte after the last",
            rows,
            notes={key: f"strength {strengths[key[0].split(': ')[0], 'ewc']:g}" for key in rows if key[1] == "ewc"},
            lower_is_better=True,
        )

    def figures(found: Found, directory: Path) -> list[Path]:
        """Bits per byte of each domain after each task, a line per method."""
        path, names = directory / "bits_per_byte.png", list(texts)
        met = np.arange(1, len(names) + 1)
        with drawing(path, len(config.mixers), len(names)) as axes:
            for row, mixer in zip(axes, config.mixers, strict=True):
                for i, (panel, name) in enumerate(zip(row, names, strict=True)):
                    lines = {method: bits(cell)[:, 1:, i] for (m, method), cell in found.items() if m == mixer}
                    course(panel, met, lines, name if len(config.mixers) == 1 else f"{name}, {mixer}")
                    panel.set_xticks(met, [f"after {other}" for other in names])
                    panel.margins(x=0.15)
                    label_lines(panel)
                row[0].set_ylabel("bits per byte (less is better)")
        return [path]

    same = ("protocol", "steps", "width", "heads", "layers", "hidden", "length", "batch_size", "learning_rate")
    settled = {field: getattr(sizes, field) for field in (*same, "strengths", "capacity")}
    study("text_domains", config, cells, report, figures, settled=settled, data={"texts": texts})


def learner(config: Config, mixer: str, *beside: Component) -> Learner:
    """A decoder of bytes, and what keeps it."""
    layer = MIXERS[mixer](config.width, config.heads, config.length)
    net = decoder(256, [(layer, config.hidden, config.layers)])
    rate = optax.linear_schedule(0.0, config.learning_rate, max(config.steps // 10, 1))
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, 0.9, 0.95))
    return compose(net.model, optimiser, supervised(next_token_loss), *beside)


def with_ewc(config: Config, mixer: str) -> Any:
    """Learners by strength."""
    return lambda strength: learner(config, mixer, ewc(strength, labels="loss", micro_batch=8))


def chosen_strength(config: Config, mixer: str, stream: Stream, directory: Path) -> float:
    """That with the fewest bits per byte on the validation parts of all domains, after the last."""

    def tried() -> dict[str, Any]:
        matrices = -held_out(with_ewc(config, mixer), config.strengths, stream)[:, 0]
        best = config.strengths[int(np.nanargmin(matrices[:, -1].mean(axis=-1)))]
        return {"chosen": best, "tried": dict(zip(map(str, config.strengths), matrices.tolist(), strict=True))}

    return kept(directory / f"strength_{mixer}.json".replace(" ", "_"), tried)["chosen"]


def bits(cell: dict[str, Any]) -> np.ndarray:
    """Bits per byte, `[S, T + 1, T]`."""
    return -cell["accuracy"]


def forgetting(cell: dict[str, Any]) -> np.ndarray:
    """How many more bits per byte the first domain takes after the last one than after itself, `[S]`."""
    return bits(cell)[:, -1, 0] - bits(cell)[:, 1, 0]


def summary(found: Found, names: list[str]) -> Found:
    """Scores of the ledger's rows, by setting and method."""
    cells = {}
    for (mixer, method), cell in found.items():
        scores = {f"{name}, after the last": bits(cell)[:, -1, i] for i, name in enumerate(names)}
        if method != "joint":  # it never leaves a domain
            scores[f"forgetting of {names[0]}"] = forgetting(cell)
        for name, values in scores.items():
            cells[f"{mixer}: {name}", method] = {"scores": values, "seconds": cell["seconds"]}
    return dict(sorted(cells.items(), key=lambda item: item[0][0].split(": ")[0]))


def table(found: Found, names: list[str], strengths: dict[tuple[str, str], float]) -> str:
    """The matrix R of every method: a row for each moment, a column for each domain."""
    moments = ["before", *(f"after {name}" for name in names)]
    wide = max(map(len, moments)) + 2
    lines = ["bits per byte, mean over seeds" + ", standard deviation where there are several"]
    for (mixer, method), cell in found.items():
        strength = f", strength {strengths[mixer, method]:g}" if method == "ewc" else ""
        lines += ["", f"{mixer}: {method}{strength}", " " * wide + "".join(f"{name:>18s}" for name in names)]
        for t, moment in enumerate(moments):
            said = (mean_and_spread(bits(cell)[:, t, i]) for i in range(len(names)))
            lines.append(f"{moment:{wide}s}" + "".join(f"{each:>18s}" for each in said))
        if method != "joint":
            lines.append(f"forgetting of {names[0]}: {forgetting(cell).mean():.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
