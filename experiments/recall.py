"""Which sequence layer answers from what the row itself has told, as it is told more? Multi-query associative recall.

Command                                                   hardware       time       expected
python -m experiments.recall --record                     1 CPU core     TIME       see the ledger

Decoders of 2 blocks of width 64, every layer with short convolutions of width 4, learn from rows of 4 n tokens: n keys
with their values, then n questions among as many tokens of noise. Keys, values and noise come from 128 tokens. AdamW
(0.9, 0.95, decay 0.1), clipped at norm 1, warmed up over a tenth of the steps and then a cosine down to a tenth; rates,
steps and rows are the same for all. The score is the share of questions that are answered. Only the memory is to limit
it: each head of a layer other than softmax attention holds d x d numbers, however long the row.
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

from cl_zoo import (
    Mixer,
    associative_recall,
    compose,
    decoder,
    delta_rule,
    enable_compilation_cache,
    gated_delta_rule,
    gated_linear_attention,
    linear_attention,
    next_token_loss,
    run_stream,
    softmax_attention,
    supervised,
    titans,
    ttt_linear,
)
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
]


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run. Unknown or impossible values are refused before anything compiles."""

    mixers: tuple[str, ...] = tuple(MIXERS)
    pairs: tuple[int, ...] = (4, 8, 16, 32)
    """Keys and values of a row, which has four times as many tokens."""
    seeds: int = 1
    steps: int = 1000
    batch_size: int = 16
    vocabulary: int = 128
    width: int = 64
    heads: int = 4
    layers: int = 2
    hidden: int = 128
    """Of the SwiGLU networks."""
    learning_rate: float = 1e-2
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
    may_change = ("mixers", "pairs", "seeds", "directory", "record")
    try:
        settle_config(directory, {k: v for k, v in dataclasses.asdict(config).items() if k not in may_change})
    except ConfigError as error:
        raise SystemExit(str(error)) from error
    (directory / "cells").mkdir(exist_ok=True)
    found: dict[tuple[str, str], dict[str, Any]] = {}
    with tqdm(total=len(config.mixers) * len(config.pairs) * config.seeds, unit="run") as bar:
        for pairs in config.pairs:
            for name in config.mixers:
                bar.set_description(f"{pairs} pairs, {name}")
                runs = []
                for seed in range(config.seeds):
                    path = directory / "cells" / f"{name}-{pairs}-{seed}.json".replace(" ", "_")
                    if not path.exists():
                        write_json(path, run(config, name, pairs, seed))
                    runs.append(json.loads(path.read_text()))
                    bar.update()
                kinds = {kind: [each[kind] for each in runs] for kind in runs[0]}
                found[f"{pairs} pairs", name] = {**kinds, "scores": 100 * np.array(kinds["accuracy"])}

    print(table(found, lambda cell: cell["scores"] / 100, "of questions after training"))
    print(f"figure: {figure(found, config, directory)}")
    notes = {cell: f"{kinds['parameters'][0] / 1e3:.0f}k parameters" for cell, kinds in found.items()}
    path = RESULTS / "recall.json" if config.record else directory / "results.json"
    benchmark = f"Associative recall, {config.heads} heads of width {config.width // config.heads}, accuracy"
    command = shown_command("experiments.recall", sys.argv[1:])
    record("recall", benchmark, command, found, {}, notes, path, remarks=REMARKS)
    print(f"results: {path}")


def run(config: Config, name: str, pairs: int, seed: int) -> dict[str, Any]:
    """One mixer, number of pairs and seed."""
    stream = associative_recall(
        steps=config.steps,
        length=4 * pairs,
        pairs=pairs,
        vocabulary=config.vocabulary,
        batch_size=config.batch_size,
    )
    options = {"mini_batch": config.mini_batch} if name == "ttt-linear" else {}
    mixer = MIXERS[name](config.width, config.heads, convolution=4, **options)
    net = decoder(config.vocabulary, [mixer], layers=config.layers, hidden=config.hidden)
    learner = compose(net.model, warmed_up_adamw(config.learning_rate, config.steps), supervised(next_token_loss))
    begun = time.perf_counter()
    result = run_stream(learner, stream, jax.random.key(seed), evaluate_at="end")
    return {
        "accuracy": float(result.accuracy[-1, 0]),
        "training_loss": np.asarray(result.metrics["loss"][0]).tolist(),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(result.state.params)),
        "seconds": time.perf_counter() - begun,
    }


def figure(found: dict[tuple[str, str], dict[str, Any]], config: Config, directory: Path) -> Path:
    """Accuracy against pairs, and the loss of training with the most of them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.6), layout="constrained")
    pairs = sorted(config.pairs)
    for i, name in enumerate(config.mixers):
        look = {"label": name, "linewidth": 1.2, "linestyle": ("-", "--", ":")[i % 3]}
        scores = [np.mean(found[f"{n} pairs", name]["scores"]) for n in pairs]
        left.plot(pairs, scores, marker="o", markersize=3, **look)
        loss = np.mean(found[f"{pairs[-1]} pairs", name]["training_loss"], axis=0) / np.log(2)
        width = max(len(loss) // 40, 1)
        smooth = np.convolve(loss, np.ones(width) / width, "valid")
        right.plot(np.arange(len(smooth)) + width, smooth, **look)
    d = config.width // config.heads
    left.axvline(d, color="grey", linewidth=0.8)
    left.annotate(f" d = {d}", (d, 2), color="grey", fontsize=8)
    left.set(xlabel="pairs in the row", ylabel="accuracy, %", ylim=(0, 103), xscale="log")
    left.set_xticks(pairs, [str(n) for n in pairs])
    left.minorticks_off()
    right.set(xlabel="updates", ylabel=f"training loss, {pairs[-1]} pairs, bits per question", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(fontsize=7, loc="lower left")
    path = directory / "accuracy.png"
    drawn.savefig(path, dpi=150)
    plt.close(drawn)
    return path


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
