"""Which sequence layer answers from what the row itself has told, as it is told more? Multi-query associative recall.

Command                                 hardware    time     expected
python -m experiments.recall --record   1 CPU core  45 min   32 pairs: softmax attention 100.0 %, gated delta rule 64.1,
                                                              linear attention 63.2, delta rule 61.6, TTT-Linear 28.8;
                                                              16 pairs: 100.0, 91.1, 86.5, 90.5, 32.5

Decoders of 2 blocks of width 32 with 2 heads, every layer with short convolutions of width 4, learn from rows of 4 n
tokens: n keys with their values, then n questions among as many tokens of noise. Keys, values and noise come from 1024
tokens. First there are few pairs; when a net has learned from those rows, and been tested on such, it goes on with more
pairs. The first stage is the longest: until a net finds out how to recall at all it learns little, and from rows of 32
pairs none of these found out in 600 updates. Each stage has its own AdamW (0.9, 0.95, decay 0.1), clipped at norm 1,
warmed up over a tenth of the steps and then a cosine down to a tenth; rates, steps and rows are the same for all. The
score is the share of questions that are answered. Each head of a layer other than softmax attention remembers a row in
d x d numbers, however long it is.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from tqdm.auto import tqdm

from cl_zoo import compose, enable_compilation_cache, run_stream, supervised
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
from cl_zoo.training.run_directory import ConfigError, settle_config, write_json
from experiments.common import RESULTS, record, shown_command, table, warmed_up_adamw

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
    "Not seen here: the delta rule and the gated one are 4 to 5 points above linear attention at 16 pairs, as many as a"
    " head is wide, and within 2 of it at 32. Each key is written once in a row, so nothing needs to be overwritten,"
    " which is what the delta rule is for.",
]


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run. Unknown or impossible values are refused before anything compiles."""

    mixers: tuple[str, ...] = tuple(MIXERS)
    pairs: tuple[int, ...] = (4, 8, 16, 32)
    """Keys and values of a row, which has four times as many tokens; one stage after the other."""
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
    if config.seeds < 1:
        raise SystemExit(f"seeds is {config.seeds}, but it must be at least 1")
    if unknown := set(config.mixers) - set(MIXERS):
        raise SystemExit(f"mixers names {', '.join(sorted(unknown))}, but there are {', '.join(MIXERS)}")
    if too_many := [n for n in config.pairs if not 1 <= n <= config.vocabulary // 2 - 1]:
        raise SystemExit(
            f"pairs names {too_many[0]}, but it must be in 1 to {config.vocabulary // 2 - 1}, as many keys as there are"
        )
    enable_compilation_cache()
    directory = Path(config.directory)
    may_change = ("mixers", "seeds", "directory", "record")
    try:
        settle_config(directory, {k: v for k, v in dataclasses.asdict(config).items() if k not in may_change})
    except ConfigError as error:
        raise SystemExit(str(error)) from error
    (directory / "cells").mkdir(exist_ok=True)
    runs: dict[str, list[dict[str, Any]]] = {}
    with tqdm(total=len(config.mixers) * config.seeds, unit="run") as bar:
        for name in config.mixers:
            bar.set_description(name)
            runs[name] = []
            for seed in range(config.seeds):
                path = directory / "cells" / f"{name}-{seed}.json".replace(" ", "_")
                if not path.exists():
                    write_json(path, run(config, name, seed))
                runs[name].append(json.loads(path.read_text()))
                bar.update()

    found = {
        (f"{pairs} pairs", name): {
            "scores": 100 * np.array([each["accuracy"][i] for each in runs[name]]),
            "seconds": [each["seconds"][i] for each in runs[name]],
        }
        for i, pairs in enumerate(config.pairs)
        for name in config.mixers
    }
    print(table(found, lambda cell: cell["scores"] / 100, "after each stage"))
    print(f"figure: {figure(runs, config, directory)}")
    path = RESULTS / "recall.json" if config.record else directory / "results.json"
    benchmark = f"Associative recall, {config.heads} heads of width {config.width // config.heads}, accuracy"
    command = shown_command("experiments.recall", sys.argv[1:])
    record("recall", benchmark, command, found, {}, {}, path, remarks=REMARKS)
    print(f"results: {path}")


def run(config: Config, name: str, seed: int) -> dict[str, Any]:
    """One mixer and seed: accuracy, losses of training and seconds of each stage."""
    options = {"mini_batch": config.mini_batch} if name == "ttt-linear" else {}
    mixer = MIXERS[name](config.width, config.heads, convolution=4, **options)
    model = decoder(config.vocabulary, [mixer], layers=config.layers, hidden=config.hidden).model
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
        result = run_stream(learner, stream, jax.random.key(seed), evaluate_at="end")
        stages["accuracy"].append(float(result.accuracy[-1, 0]))
        stages["training_loss"].append(np.asarray(result.metrics["loss"][0]).tolist())
        stages["seconds"].append(time.perf_counter() - begun)
        # The next stage begins where this one ends.
        learned = jax.tree.map(np.asarray, result.state.params)
        model = model._replace(init=lambda key, x, learned=learned: (jax.tree.map(jax.numpy.asarray, learned), {}))
    return stages


def figure(runs: dict[str, list[dict[str, Any]]], config: Config, directory: Path) -> Path:
    """Accuracy against pairs, and the loss of training."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.6), layout="constrained")
    begins = [0, *(config.first_steps + i * config.steps for i in range(len(config.pairs) - 1))]
    for i, (name, seeds) in enumerate(runs.items()):
        look = {"label": name, "linewidth": 1.2, "linestyle": ("-", "--", ":")[i % 3], "color": f"C{i}"}
        scores = 100 * np.mean([each["accuracy"] for each in seeds], axis=0)
        left.plot(config.pairs, scores, marker="o", markersize=3, **look)
        width = max(config.steps // 20, 1)
        for stage, begin in enumerate(begins):
            losses = np.mean([each["training_loss"][stage] for each in seeds], axis=0) / np.log(2)
            smooth = np.convolve(losses, np.ones(width) / width, "valid")
            right.plot(begin + np.arange(len(smooth)) + width, smooth, **look)
    d = config.width // config.heads
    left.axvline(d, color="grey", linewidth=0.8)
    left.annotate(f" d = {d}", (d, 2), color="grey", fontsize=8)
    left.set(xlabel="pairs in the row", ylabel="accuracy, %", ylim=(0, 103), xscale="log")
    left.set_xticks(config.pairs, [str(n) for n in config.pairs])
    left.minorticks_off()
    right.set(xlabel="updates", ylabel="training loss, bits per question", ylim=(0, None))
    for begin, pairs in zip(begins, config.pairs):
        right.annotate(f"{pairs} pairs", (begin, right.get_ylim()[1]), fontsize=8, va="bottom")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    path = directory / "accuracy.png"
    drawn.savefig(path, dpi=150)
    plt.close(drawn)
    return path


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
