"""One domain of text after another: what does a language model forget, and what keeps it?

Command                                                   hardware       time       expected
python -m experiments.text_domains --seeds 3 --record     1 CPU core     25 min     forgetting of code: naive 0.57 bits,
                                                                                    ewc 0.52, replay 0.01
python -m experiments.text_domains --text-dir TEXTS       1 CPU core                whatever lies in TEXTS

A decoder of 2 blocks of width 128 with half a million parameters reads bytes in rows of 128: first the code of Python's
library without docstrings and comments, then the docstrings; with --text-dir then also each local domain, see
`read_text_domains`. 300 batches of 8 rows are read of each, less than one pass. Adam (0.9, 0.95), clipped at norm 1,
warmed up once, then at a constant rate, so that no domain is met with a smaller one. No task is told.

"naive" only learns; "ewc" has a penalty by the squared gradients of each row's loss, its strength the best of three by
validation, with the first seed, on all domains at the end; "replay" keeps 500 rows and adds 8 of them to each batch;
"joint" reads all domains at once with as many updates in all, which bounds what can be had. The score is bits per byte:
lower is better. Nothing is published for this setting; what is asked is how the methods stand to each other. The best
strength for EWC was the smallest: more of it costs the docstrings more than it keeps of the code.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import zlib
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from cl_zoo import Component, Learner, Stream, compose, enable_compilation_cache, ewc, replay, supervised, sweep
from cl_zoo.datasets import python_library, read_text_domains
from cl_zoo.evaluation.metrics import statistics
from cl_zoo.evaluation.plots import course
from cl_zoo.language import decoder
from cl_zoo.losses import next_token_loss
from cl_zoo.streams import text_domains
from cl_zoo.training.run_directory import ConfigError, settle_config, write_json
from experiments.common import RESULTS, Cell, record, run_cells, shown_command
from experiments.language_mixers import MIXERS

METHODS = ("naive", "ewc", "replay", "joint")
SMOKE = {
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
    for field in ("seeds", "steps"):
        if getattr(config, field) < 1:
            raise SystemExit(f"{field} is {getattr(config, field)}, but it must be at least 1")
    for field, known in (("mixers", MIXERS), ("methods", METHODS)):
        if unknown := set(getattr(config, field)) - set(known):
            raise SystemExit(f"{field} names {', '.join(sorted(unknown))}, but there are {', '.join(known)}")
    enable_compilation_cache()
    directory = Path(config.directory)
    found, names = run(config, directory)
    print(f"\n{table(found, names)}\n\nfigure: {figure(found, names, directory)}")
    path = RESULTS / "text_domains.json" if config.record else directory / "results.json"
    benchmark = f"{', '.join(names)} one after another, bytes: bits per byte after the last"
    cells = summary(found, names)
    notes = {
        (setting, method): f"strength {found[setting.split(': ')[0], method]['strength']:g}"
        for setting, method in cells
        if method == "ewc"
    }
    command = shown_command("experiments.text_domains", sys.argv[1:])
    record("text_domains", benchmark, command, cells, {}, notes, path, lower_is_better=True)
    print(f"results: {path}")


def run(config: Config, directory: Path) -> tuple[dict[tuple[str, str], dict[str, Any]], list[str]]:
    """Every method with every layer, with "bits": bits per byte `[S, T + 1, T]`; and the names of the domains."""
    if config.protocol == "smoke":
        config = dataclasses.replace(config, **SMOKE)  # type: ignore[arg-type]
    texts = python_library(config.text_bytes)
    try:
        texts |= {} if config.text_dir is None else read_text_domains(config.text_dir)
        same = ("protocol", "steps", "width", "heads", "layers", "hidden", "length", "batch_size", "learning_rate")
        kept = {field: getattr(config, field) for field in (*same, "strengths", "capacity")}
        crc = {name: zlib.crc32(text) for name, text in texts.items()}
        settle_config(directory, json.loads(json.dumps({**kept, "texts_crc32": crc})))
    except (ConfigError, ValueError, OSError) as error:
        raise SystemExit(str(error)) from error

    share = 0.04 if config.protocol == "full" else 0.1
    sizes: dict[str, Any] = {"length": config.length, "steps": config.steps, "batch_size": config.batch_size}
    stream, joint = (
        text_domains(texts, held_out=share, validation=share, joint=kind, **sizes) for kind in (None, "all")
    )
    found = {}
    for mixer in config.mixers:
        strength = chosen_strength(config, mixer, stream, directory) if "ewc" in config.methods else 0.0
        for method in config.methods:
            beside: list[Component] = []
            if method == "replay":
                beside = [replay(config.capacity, batch_size=config.batch_size)]
            plain = learner(config, mixer, *beside)
            make = with_ewc(config, mixer) if method == "ewc" else lambda _, plain=plain: plain
            cell = Cell(mixer, method, make, joint if method == "joint" else stream)
            setting = strength if method == "ewc" else 0.0
            found |= run_cells([cell], directory, range(config.seeds), setting, orders=None)
            found[mixer, method] |= {"bits": -found[mixer, method]["accuracy"], "strength": setting}
    return found, list(texts)


def learner(config: Config, mixer: str, *beside: Component) -> Learner:
    """A decoder of bytes, and what keeps it."""
    layer = MIXERS[mixer](config.width, config.heads, config.length)
    net = decoder(256, [layer], layers=config.layers, hidden=config.hidden)
    rate = optax.linear_schedule(0.0, config.learning_rate, max(config.steps // 10, 1))
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, 0.9, 0.95))
    return compose(net.model, optimiser, supervised(next_token_loss), *beside)


def with_ewc(config: Config, mixer: str) -> Any:
    """Learners by strength."""
    return lambda strength: learner(config, mixer, ewc(strength, labels="loss", micro_batch=8))


def chosen_strength(config: Config, mixer: str, stream: Stream, directory: Path) -> float:
    """That with the fewest bits per byte on the validation parts of all domains, after the last."""
    path = directory / f"strength_{mixer}.json".replace(" ", "_")
    if not path.exists():
        keys = jax.random.key(0)[None]
        tried = sweep(with_ewc(config, mixer), jnp.array(config.strengths), stream, keys, split="validation")
        bits = -np.asarray(tried.accuracy)[:, 0]
        best = config.strengths[int(np.nanargmin(bits[:, -1].mean(axis=-1)))]
        write_json(path, {"chosen": best, "tried": dict(zip(map(str, config.strengths), bits.tolist(), strict=True))})
    return json.loads(path.read_text())["chosen"]


def forgetting(bits: np.ndarray) -> np.ndarray:
    """How many more bits per byte the first domain takes after the last one than after itself, `[S]`."""
    return bits[:, -1, 0] - bits[:, 1, 0]


def summary(found: dict[tuple[str, str], dict[str, Any]], names: list[str]) -> dict[tuple[str, str], dict[str, Any]]:
    """Scores of the ledger's rows, by setting and method."""
    cells = {}
    for (mixer, method), cell in found.items():
        bits = cell["bits"]
        scores = {f"{name}, after the last": bits[:, -1, i] for i, name in enumerate(names)}
        if method != "joint":  # it never leaves a domain
            scores[f"forgetting of {names[0]}"] = forgetting(bits)
        for name, values in scores.items():
            cells[f"{mixer}: {name}", method] = {"scores": values, "seconds": cell["seconds"]}
    return dict(sorted(cells.items(), key=lambda item: item[0][0].split(": ")[0]))


def table(found: dict[tuple[str, str], dict[str, Any]], names: list[str]) -> str:
    """The matrix R of every method: a row for each moment, a column for each domain."""
    moments = ["before", *(f"after {name}" for name in names)]
    wide = max(map(len, moments)) + 2
    lines = ["bits per byte, mean over seeds" + ", standard deviation where there are several"]
    for (mixer, method), cell in found.items():
        strength = f", strength {cell['strength']:g}" if method == "ewc" else ""
        lines += ["", f"{mixer}: {method}{strength}", " " * wide + "".join(f"{name:>18s}" for name in names)]
        for t, moment in enumerate(moments):
            shown = [statistics(cell["bits"][:, t, i]) for i in range(len(names))]
            said = (f"{s.mean:.3f} ± {s.sd:.3f}" if s.n > 1 else f"{s.mean:.3f}" for s in shown)
            lines.append(f"{moment:{wide}s}" + "".join(f"{each:>18s}" for each in said))
        if method != "joint":
            lines.append(f"forgetting of {names[0]}: {forgetting(cell['bits']).mean():.3f}")
    return "\n".join(lines)


def figure(found: dict[tuple[str, str], dict[str, Any]], names: list[str], directory: Path) -> Path:
    """Bits per byte of each domain after each task, a line per method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    mixers = list(dict.fromkeys(mixer for mixer, _ in found))
    shape = (len(mixers), len(names))
    drawn, axes = plt.subplots(*shape, figsize=(4 * shape[1], 3.4 * shape[0]), squeeze=False, layout="constrained")
    met = np.arange(1, len(names) + 1)
    for row, mixer in zip(axes, mixers, strict=True):
        for i, (panel, name) in enumerate(zip(row, names, strict=True)):
            lines = {method: cell["bits"][:, 1:, i] for (m, method), cell in found.items() if m == mixer}
            course(panel, met, lines, name if len(mixers) == 1 else f"{name}, {mixer}")
            panel.set_xticks(met, [f"after {other}" for other in names])
            panel.margins(x=0.15)
            for line in panel.lines:
                line.set_marker("o")
        row[0].set_ylabel("bits per byte (less is better)")
    axes[0, -1].legend(fontsize=8)
    path = directory / "bits_per_byte.png"
    drawn.savefig(path, dpi=150)
    plt.close(drawn)
    return path


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
