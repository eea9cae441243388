"""Tables of bigrams that switch: does end-to-end test-time training follow what keeps changing along a sequence?

Command                                                   hardware       time       expected
python -m experiments.switching_bigrams --record          2 CPU cores    40 min     see the ledger

Every M tokens another one of eight tables of bigrams holds, which none of the tokens tells. Nets of two blocks of width
64 without attention see one token at a time; what they know of the table that holds must be in their weights:

    none                  the net as it was trained
    dynamic evaluation    the same net, whose feed-forward weights take a step of gradient descent after every token
    ttt-e2e               trained through such steps, from weights to learn from
    ttt-e2e, rate 0       its weights, without the steps
    attention             softmax attention in both blocks, no steps

beside the Bayes-optimal loss of who knows all tables and where segments begin. All are trained on the same sequences of
64 tokens, by Adam, for as many updates. The outer rate of each, and the inner one, are the best by validation with seed
100 at 16 tokens a segment; dynamic evaluation has its own inner rate. Scores are nats per token above the best.

Published with real text in place of tables (Tandon et al. 2025, arXiv 2512.23675, figure 2, two blocks of width 384 at
128 tokens, curves alone): ttt-e2e below attention, below dynamic evaluation, below none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from cl_zoo import Learner, Model, Stream, TrainState, at, compose, supervised, sweep
from cl_zoo.evaluation.metrics import confidence_interval
from cl_zoo.language import Decoder, decoder, ttt_e2e
from cl_zoo.layers import softmax_attention, swiglu
from cl_zoo.losses import next_token_loss, token_losses
from cl_zoo.streams import best_bigram_losses, switching_bigrams
from experiments.common import (
    Cell,
    Found,
    Report,
    all_but,
    check_names,
    check_numbers,
    drawing,
    kept,
    mean_and_spread,
    study,
)

METHODS = ("none", "attention", "dynamic evaluation", "ttt-e2e", "ttt-e2e, rate 0")
CHOOSING = 100
"""The seed by which rates are chosen."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run. Unknown or impossible values are refused before anything compiles."""

    segments: tuple[int, ...] = (4, 8, 16, 64)
    """M."""
    methods: tuple[str, ...] = METHODS
    seeds: int = 5
    steps: int = 500
    batch_size: int = 16
    length: int = 64
    vocabulary: int = 32
    tables: int = 8
    width: int = 64
    hidden: int = 64
    """Of the feed-forward networks."""
    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    """Of Adam, each tried."""
    inner_rates: tuple[float, ...] = (0.03, 0.1, 0.3)
    """Of the steps along a sequence, each tried."""
    directory: str = "runs/switching_bigrams"
    """Of the run; what is finished there is not run again."""
    record: bool = False
    """Write the result file that the ledger is made from."""


def stream_of(config: Config, segment: int) -> Stream:
    """The sequences."""
    sizes: dict[str, Any] = {"steps": config.steps, "batch_size": config.batch_size, "length": config.length}
    return switching_bigrams(segment=segment, vocabulary=config.vocabulary, tables=config.tables, **sizes)


def net(config: Config, method: str) -> Decoder:
    """Two blocks, with attention or without."""
    if method == "attention":
        return decoder(config.vocabulary, [(softmax_attention(config.width, 2), config.hidden, 2)])
    return decoder(config.vocabulary, [({"ffn": swiglu(config.width, config.hidden)}, 2)])


def learner_of(config: Config, method: str, setting: Any) -> Learner:
    """By its outer and inner rate. Dynamic evaluation takes no steps in training; "rate 0" none when it is tested."""
    plain = net(config, method)
    model: Model = plain.model
    if method not in ("none", "attention"):
        # Not clipped, as in the public script.
        moving = ttt_e2e(plain, {"ffn": 1}, rate=setting["inner"], clip=1e9).model
        trained, tested = {
            "dynamic evaluation": (plain.model, moving),
            "ttt-e2e": (moving, moving),
            "ttt-e2e, rate 0": (moving, plain.model),
        }[method]

        def apply(*arguments: Any, train: bool = False, **options: Any) -> Any:
            return (trained if train else tested).apply(*arguments, train=train, **options)

        model = Model(plain.model.init_function, apply)
    course = optax.warmup_cosine_decay_schedule(0.0, 1.0, config.steps // 10, config.steps, 0.0)
    adam = optax.adam(lambda step: setting["outer"] * course(step), 0.9, 0.95)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), adam)
    return compose(model, optimiser, supervised(next_token_loss))


def above_best(segment: int, split: str, learner: Learner, state: TrainState, stream: Stream, key: Any) -> Any:
    """The loss above the Bayes-optimal one at every place, `[L]`, the mean over the sequences of a split."""
    examples = stream.evaluation(0, split)

    def one(batch: Any) -> Any:
        outputs = learner.predict(state, batch.x)
        best = best_bigram_losses(stream.data, batch.x, batch.y, segment=segment)
        return jnp.mean(token_losses(outputs, batch.y) - best, axis=0)

    return jnp.mean(jax.lax.map(one, examples), axis=0)


def trained(config: Config, method: str, segment: int, settings: Any, seeds: Sequence[int], split: str) -> np.ndarray:
    """The losses above the best, `[H, S, L]`: all settings and seeds at once, since each is many small operations."""
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    n = len(jax.tree.leaves(settings)[0]) * len(seeds)
    measure = {"loss": at("end", partial(above_best, segment, split))}
    make = partial(learner_of, config, method)
    options: dict[str, Any] = {"measure": measure, "metrics": ["loss"], "batch_size": n, "progress": False}
    return np.asarray(sweep(make, settings, stream_of(config, segment), keys, **options).measures["loss"])


def chosen(config: Config, method: str, folder: Path) -> dict[str, float]:
    """The best outer and inner rate by validation; kept once found."""
    if method == "ttt-e2e, rate 0":
        return chosen(config, "ttt-e2e", folder)
    fixed = chosen(config, "none", folder)["outer"] if method == "dynamic evaluation" else None
    inner = config.inner_rates if method in ("dynamic evaluation", "ttt-e2e") else (0.0,)
    grid = [(outer, i) for outer in (config.rates if fixed is None else (fixed,)) for i in inner]

    def tried() -> dict[str, Any]:
        settings = {"outer": jnp.array([o for o, _ in grid]), "inner": jnp.array([i for _, i in grid])}
        losses = trained(config, method, 16, settings, [CHOOSING], "validation").mean((1, 2), dtype=np.float64)
        return {"grid": grid, "loss": np.nan_to_num(losses, nan=1e9).tolist()}

    found = kept(folder / "chosen" / f"{method}.json".replace(" ", "_"), tried)
    outer, i = found["grid"][int(np.argmin(found["loss"]))]
    return {"outer": outer, "inner": i}


def main(config: Config) -> None:
    """Runs the study, prints its table, draws its figure."""
    check_numbers(config, "seeds", "steps", "batch_size")
    check_names(config, methods=METHODS)
    notes: dict[tuple[str, str], str] = {}

    def cells(directory: Path) -> list[Cell]:
        """All seeds of a method at once."""
        return [cell(directory, segment, method) for segment in config.segments for method in config.methods]

    def cell(directory: Path, segment: int, method: str) -> Cell:
        found = chosen(config, method, directory)
        settings = {name: jnp.full((1,), value) for name, value in found.items()}

        def run(seeds: Sequence[int]) -> dict[str, Any]:
            return {"loss": trained(config, method, segment, settings, seeds, "test")[0].tolist()}

        setting = f"{segment} tokens a segment"
        notes[setting, method] = f"rate {found['outer']:g}" + (f", inner {found['inner']:g}" if found["inner"] else "")
        return Cell(setting, method, f"{segment}-{method}", run, config.seeds)

    settled = all_but(config, "segments", "methods")
    study("switching_bigrams", config, cells, partial(report, notes), figures, settled=settled)


def report(notes: dict[tuple[str, str], str], found: Found) -> Report:
    """Nats above the best, and the published order by paired intervals."""
    scores = {key: cell["loss"].mean(-1) for key, cell in found.items()}
    settings, methods = (list(dict.fromkeys(key[i] for key in found)) for i in (0, 1))
    lines = [f"\n{'nats above the best':24s}" + "".join(f"{setting:>24s}" for setting in settings)]
    for method in methods:
        lines.append(f"{method:24s}" + "".join(f"{mean_and_spread(scores[s, method]):>24s}" for s in settings))
    remarks = []
    for low, high in (("ttt-e2e", "attention"), ("ttt-e2e", "dynamic evaluation"), ("dynamic evaluation", "none")):
        told = [
            difference(scores[s, low] - scores[s, high], s) for s in settings if {(s, low), (s, high)} <= set(scores)
        ]
        if told:
            remarks.append(f"{low} - {high}, nats, paired by seed, 95 % interval: {'; '.join(told)}.")
    rows = {key: {"scores": scores[key], "seconds": cell["seconds"]} for key, cell in found.items()}
    benchmark = "Tables of bigrams that switch: nats per token above the Bayes-optimal loss, not percent"
    return Report("\n".join([*lines, *remarks]), benchmark, rows, notes, remarks, lower_is_better=True)


def difference(values: np.ndarray, setting: str) -> str:
    """A mean and its interval, and what it says."""
    low, high = confidence_interval(values) if len(values) > 1 else (-np.inf, np.inf)
    word = "lower" if high < 0 else "higher" if low > 0 else "undecided"
    return f"{setting} {values.mean():+.3f} ({low:+.3f} to {high:+.3f}, {word})"


def figures(found: Found, directory: Path) -> list[Path]:
    """Nats above the best against the place in the sequence, a panel for each M."""
    path = directory / "by_place.png"
    settings = list(dict.fromkeys(setting for setting, _ in found))
    n = len(next(iter(found.values()))["seconds"])
    with drawing(path, 1, len(settings), size=(3.6, 3.2), sharey=True) as (panels,):
        for axes, setting in zip(panels, settings, strict=True):
            for i, ((here, method), cell) in enumerate(found.items()):
                if here == setting:
                    place = np.arange(cell["loss"].shape[-1])
                    look = {"color": f"C{METHODS.index(method)}", "linestyle": ("-", "--", ":", "-", "-.")[i % 5]}
                    axes.plot(place, cell["loss"].mean(0), label=method, linewidth=1.2, **look)
            axes.set(title=setting, xlabel="token")
            axes.grid(alpha=0.3)
        panels[0].set_ylabel(f"nats above the best (mean of {n} seeds)")
        panels[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return [path]


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
