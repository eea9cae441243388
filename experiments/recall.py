"""Which sequence layer answers from what its sequence has told, as it is told more? Multi-query associative recall.

Command                                 hardware    time     expected
python -m experiments.recall --record   1 CPU core  45 min   32 pairs: softmax attention 100.0 %, gated delta rule 64.1,
                                                              linear attention 63.2, delta rule 61.6, TTT-Linear 28.8;
                                                              16 pairs: 100.0, 91.1, 86.5, 90.5, 32.5

Decoders of 2 blocks of width 32 with 2 heads, every layer with short convolutions of width 4, learn from sequences of 4
n tokens: n keys with their values, then n questions among as many tokens of noise. Keys, values and noise come from
1024 tokens. First there are few pairs; when a net has learned from those sequences, and been tested on such, it goes on
with more pairs. The first stage is the longest: until a net finds out how to recall at all it learns little, and from
sequences of 32 pairs none of these found out in 600 updates. Each stage has its own AdamW (0.9, 0.95, decay 0.1),
clipped at norm 1, warmed up over a tenth of the steps and then a cosine down to a tenth; rates, steps and sequences are
the same for all. The score is the fraction of questions that are answered. Each head of a layer other than softmax
attention remembers a sequence in d x d numbers, however long it is.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from cl_zoo import compose, run_stream, supervised
from cl_zoo.language import decoder
from cl_zoo.layers import (
    Mixer,
    delta_rule,
    gated_delta_rule,
    gated_linear_attention,
    linear_attention,
    softmax_attention,
    titans,
    ttt_linear,
)
from cl_zoo.losses import next_token_loss
from cl_zoo.streams import associative_recall
from experiments.common import (
    AT_THE_END,
    Cell,
    Found,
    Report,
    all_but,
    check_names,
    check_numbers,
    drawing,
    study,
    table,
    warmed_up_adamw,
)

MIXERS: dict[str, Callable[..., Mixer]] = {
    "softmax attention": softmax_attention,
    "linear attention": linear_attention,
    "gated linear attention": gated_linear_attention,
    "delta rule": delta_rule,
    "gated delta rule": gated_delta_rule,
    "ttt-linear": ttt_linear,
    "titans": titans,
}
REMARKS = [
    "Published in figures alone, with a vocabulary of 8192 and longer rows (Arora et al. 2023, arXiv 2312.04927, and"
    " later work): softmax attention answers all questions at any width; a memory that only adds stops when there are"
    " more pairs than it is wide; the delta rule goes on.",
    "Inconclusive on the delta rule: 4 to 5 points above linear attention at 16 pairs, as many as a head is wide, and"
    " within 2 of it at 32, after a fraction of the published training and one seed. Each key is written once in a"
    " sequence, so nothing needs to be overwritten, which is what the delta rule is for.",
]


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run. Unknown or impossible values are refused before anything compiles."""

    mixers: tuple[str, ...] = tuple(MIXERS)
    pairs: tuple[int, ...] = (4, 8, 16, 32)
    """Keys and values of a sequence, which has four times as many tokens; one stage after the other."""
    seeds: int = 1
    first_steps: int = 2000
    """Of the first stage, in which a net finds out how to recall at all."""
    steps: int = 1500
    """Of each later stage."""
    batch_size: int = 16
    vocabulary: int = 1024
    width: int = 32
    heads: int = 2
    layers: int = 2
    hidden: int = 128
    """Of the SwiGLU networks."""
    learning_rate: float = 5e-3
    mini_batch: int = 16
    """Of TTT-Linear."""
    directory: str = "runs/recall"
    """Of the run; what is finished there is not run again."""
    record: bool = False
    """Write the result file that the ledger is made from."""


def main(config: Config) -> None:
    """Runs the study, prints its table, draws its figure."""
    check_numbers(config, "seeds")
    check_names(config, mixers=MIXERS)
    most = config.vocabulary // 2 - 1
    if too_many := [n for n in config.pairs if not 1 <= n <= most]:
        raise SystemExit(f"pairs names {too_many[0]}, but it must be in 1 to {most}, as many keys as there are")

    def report(found: Found) -> Report:
        rows = {
            (f"{pairs} pairs", name): {"scores": 100 * cell["accuracy"][:, i], "seconds": cell["seconds"][:, i]}
            for i, pairs in enumerate(config.pairs)
            for (_, name), cell in found.items()
        }
        text = table(rows, lambda cell: cell["scores"] / 100, "after each stage")
        benchmark = f"Associative recall, {config.heads} heads of width {config.width // config.heads}, accuracy"
        return Report(text, benchmark, rows, remarks=REMARKS)

    cells = [Cell("all pairs", name, name, lambda seed, name=name: run(config, name, seed)) for name in config.mixers]
    study("recall", config, cells, report, partial(figures, config), settled=all_but(config, "mixers"))


def run(config: Config, name: str, seed: int) -> dict[str, Any]:
    """One mixer and seed: accuracy, losses of training and seconds of each stage."""
    options = {"mini_batch": config.mini_batch} if name == "ttt-linear" else {}
    mixer = MIXERS[name](config.width, config.heads, convolution=4, **options)
    model = decoder(config.vocabulary, [(mixer, config.hidden, config.layers)]).model
    stages: dict[str, list[Any]] = {"accuracy": [], "training_loss": [], "seconds": []}
    for stage, pairs in enumerate(config.pairs):
        steps = config.steps if stage else config.first_steps
        stream = associative_recall(
            steps=steps,
            length=4 * pairs,
            pairs=pairs,
            vocabulary=config.vocabulary,
            batch_size=config.batch_size,
        )
        learner = compose(model, warmed_up_adamw(config.learning_rate, steps), supervised(next_token_loss))
        begun = time.perf_counter()
        result = run_stream(learner, stream, jax.random.key(seed), measure=AT_THE_END)
        stages["accuracy"].append(float(result.accuracy[0]))
        stages["training_loss"].append(np.asarray(result.metrics["loss"][0]).tolist())
        stages["seconds"].append(time.perf_counter() - begun)
        model = model.bind(result.state.params)  # the next stage begins where this one ends
    return stages


def figures(config: Config, found: Found, directory: Path) -> list[Path]:
    """Accuracy against pairs, and the loss of training."""
    path = directory / "accuracy.png"
    begins = [0, *(config.first_steps + i * config.steps for i in range(len(config.pairs) - 1))]
    width, d = max(config.steps // 20, 1), config.width // config.heads
    with drawing(path, 1, 2, size=(4.8, 3.6)) as ((left, right),):
        for i, ((_, name), cell) in enumerate(found.items()):
            look = {"label": name, "linewidth": 1.2, "linestyle": ("-", "--", ":")[i % 3], "color": f"C{i}"}
            left.plot(config.pairs, 100 * cell["accuracy"].mean(axis=0), marker="o", markersize=3, **look)
            for stage, begin in enumerate(begins):
                losses = np.mean([each[stage] for each in cell["training_loss"]], axis=0) / np.log(2)
                smooth = np.convolve(losses, np.ones(width) / width, "valid")
                right.plot(begin + np.arange(len(smooth)) + width, smooth, **look)
        left.axvline(d, color="grey", linewidth=0.8)
        left.annotate(f" d = {d}", (d, 2), color="grey", fontsize=8)
        left.set(xlabel="pairs in the sequence", ylabel="accuracy, %", ylim=(0, 103), xscale="log")
        left.set_xticks(config.pairs, [str(n) for n in config.pairs])
        left.minorticks_off()
        right.set(xlabel="updates", ylabel="training loss, bits per question", ylim=(0, None))
        for begin, pairs in zip(begins, config.pairs):
            right.annotate(f"{pairs} pairs", (begin, right.get_ylim()[1]), fontsize=8, va="bottom")
        for axes in (left, right):
            axes.grid(alpha=0.3)
        left.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return [path]


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
