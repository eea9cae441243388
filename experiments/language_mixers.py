"""Which sequence layer predicts the next byte best, from the same text with as many parameters?

Command                                                   hardware       time       expected
python -m experiments.language_mixers --record            2 CPU cores    75 min     see the ledger
python -m experiments.language_mixers --seeds 3 --tokens 10000000 --batch-size 64 \\
    --record                                              1 GPU          not run

Decoders of 4 blocks of width 256, rows of 256 bytes of Python's own library without docstrings and comments, a million
bytes in one pass, tested on the last tenth. All have the parameters of the one with softmax attention, to 0.1 %: the
SwiGLU networks are a little narrower where a layer brings weights of its own. No layer has short convolutions or gates.
AdamW (0.9, 0.95, decay 0.1), clipped at norm 1, warmed up over a tenth of the steps and then a cosine down to a tenth.
The learning rate is the same for all, the best of 1e-3, 2e-3, 4e-3, 8e-3 for softmax attention, linear attention and
TTT-Linear together by validation (TTT-Linear without 8e-3): --width 128 --layers 2 --tokens 300000 --split validation.

"batch" is TTT-Linear whose gradients are all taken at the first weights, with rates that do not fall with the place;
"b=16" takes them at the weights of the last mini-batch. Published for layers of that kind (Sun et al. 2024, 125M
parameters, perplexity): linear attention 15.91, batch gradient descent with LayerNorm and residual 14.05, b=16 12.35.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from cl_zoo import Learner, Stream, TrainState, at, compose, run_stream, supervised
from cl_zoo.datasets import python_library
from cl_zoo.language import decoder
from cl_zoo.layers import (
    Mixer,
    delta_rule,
    gated_delta_rule,
    linear_attention,
    softmax_attention,
    titans,
    ttt_linear,
    ttt_mlp,
)
from cl_zoo.losses import next_token_loss, token_losses, weighted_mean
from cl_zoo.streams import text_domains
from experiments.common import (
    Cell,
    Found,
    Report,
    all_but,
    check_names,
    check_numbers,
    drawing,
    mean_and_spread,
    study,
    warmed_up_adamw,
)

MIXERS: dict[str, Callable[[int, int, int], Mixer]] = {
    "softmax attention": lambda width, heads, length: softmax_attention(width, heads),
    "linear attention": lambda width, heads, length: linear_attention(width, heads),
    "ttt-linear, batch": lambda width, heads, length: ttt_linear(width, heads, mini_batch=length, average=False),
    "ttt-linear, b=16": lambda width, heads, length: ttt_linear(width, heads),
    "gated delta rule": lambda width, heads, length: gated_delta_rule(width, heads),
    "delta rule": lambda width, heads, length: delta_rule(width, heads),
    # Not run unless asked for.
    "titans": lambda width, heads, length: titans(width, heads),
    "ttt-mlp, b=16": lambda width, heads, length: ttt_mlp(width, heads),
    "ttt-linear, ascent": lambda width, heads, length: ttt_linear(width, heads, base_rate=-1.0),
    "ttt-linear, frozen": lambda width, heads, length: ttt_linear(width, heads, base_rate=0.0),
}
REMARKS = [
    "Published, in another setting (Sun et al. 2024, arXiv 2407.04620: 125M parameters, Pile, perplexity): linear"
    " attention 15.91, TTT-Linear by batch gradient descent with LayerNorm and residual 14.05, in mini-batches of 16"
    " 12.35.",
    "The last row was run by itself, on a slower machine. Titans' memory of two layers diverged at this learning rate:"
    " the loss became nan at update 34 with base_rate 0.02 and at 44 with 0.005.",
]


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run. Unknown or impossible values are refused before anything compiles."""

    mixers: tuple[str, ...] = tuple(MIXERS)[:6]
    seeds: int = 1
    tokens: int = 1_000_000
    width: int = 256
    heads: int = 4
    layers: int = 4
    hidden: int = 640
    """Of the SwiGLU networks, with softmax attention; others have as many parameters in all."""
    length: int = 256
    batch_size: int = 16
    learning_rate: float = 4e-3
    text_bytes: int = 2_000_000
    """Of Python's library that is read, at most."""
    split: Literal["test", "validation"] = "test"
    directory: str = "runs/language_mixers"
    """Of the run; what is finished there is not run again."""
    record: bool = False
    """Write the result file that the ledger is made from."""


def main(config: Config) -> None:
    """Runs the study, prints its table, draws its figure."""
    check_numbers(config, "seeds")
    check_names(config, mixers=MIXERS)
    text = python_library(config.text_bytes)["code"]
    stream = stream_of(config, text)

    def cell(name: str) -> Cell:
        return Cell("bits per byte", name, name, lambda seed: run(config, stream, name, seed))

    def report(found: Found) -> Report:
        lines = [f"\n{'':24s}{'bits per byte':>16s}{'parameters':>12s}{'tokens/s':>10s}"]
        for (_, name), each in found.items():
            score, speed = mean_and_spread(each["bits_per_byte"]), np.median(each["tokens_per_second"])
            lines.append(f"{name:24s}{score:>16s}{each['parameters'][0]:12d}{speed:10.0f}")
        return Report(
            "\n".join(lines),
            f"Python's library, bytes, {config.tokens / 1e6:g}M of them",
            {key: {"scores": each["bits_per_byte"], "seconds": each["seconds"]} for key, each in found.items()},
            notes={key: f"{each['parameters'][0] / 1e6:.2f}M parameters" for key, each in found.items()},
            remarks=REMARKS,
            lower_is_better=True,
        )

    cells = [cell(name) for name in config.mixers]
    settled = all_but(config, "mixers")
    study("language_mixers", config, cells, report, figures, settled=settled, data={"texts": {"code": text}})


def make_net(config: Config, name: str) -> Any:
    """A decoder with as many parameters as that with softmax attention."""

    def build(name: str, hidden: int) -> Any:
        mixer = MIXERS[name](config.width, config.heads, config.length)
        return decoder(256, [(mixer, hidden, config.layers)])

    def size(net: Any) -> int:
        tokens = jnp.zeros((1, 1), jnp.int32)
        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(net.model.init, jax.random.key(0), tokens)))

    wanted = size(build("softmax attention", config.hidden))
    extra = size(build(name, config.hidden)) - wanted
    net = build(name, config.hidden - round(extra / (3 * config.width * config.layers)))
    return net, size(net)


def stream_of(config: Config, text: bytes) -> Stream:
    """One domain of code, passed through once."""
    steps = config.tokens // (config.batch_size * config.length)
    validation = 0.1 if config.split == "validation" else 0.0
    sizes = {"length": config.length, "batch_size": config.batch_size, "steps": steps}
    return text_domains({"code": text}, validation=validation, **sizes)


def run(config: Config, stream: Stream, name: str, seed: int) -> dict[str, Any]:
    """One mixer and seed."""
    net, parameters = make_net(config, name)
    learner = compose(net.model, warmed_up_adamw(config.learning_rate, stream.steps), supervised(next_token_loss))

    def tests(learner: Learner, state: TrainState, stream: Stream, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The score, and the loss at each place of a row, of the same predictions."""

        def of(batch: Any) -> tuple[jax.Array, jax.Array]:
            outputs = learner.predict(state, batch.x)
            return stream.score(outputs, batch), token_losses(outputs, batch.y)

        batches = stream.evaluation(0, config.split)
        scores, losses = jax.lax.map(of, batches)
        by_position = jnp.einsum("ebl,eb->l", losses, batches.weight) / jnp.sum(batches.weight)
        return weighted_mean(scores, batches.weight), by_position

    begun = time.perf_counter()
    result = run_stream(learner, stream, jax.random.key(seed), measure={"tests": at("end", tests)})
    seconds = time.perf_counter() - begun
    score, by_position = result.measures["tests"]
    return {
        "bits_per_byte": -float(score),
        "by_position": np.asarray(by_position / np.log(2)).tolist(),
        "training_loss": np.asarray(result.metrics["loss"][0] / np.log(2)).tolist(),
        "parameters": parameters,
        "seconds": seconds,
        "tokens_per_second": stream.steps * config.batch_size * config.length / seconds,
    }


def figures(found: Found, directory: Path) -> list[Path]:
    """Loss in training, and in tests against the place in the row."""
    path = directory / "loss.png"
    with drawing(path, 1, 2, size=(4.8, 3.6)) as ((left, right),):
        for (_, name), cell in found.items():
            loss, place = (cell[field].mean(axis=0) for field in ("training_loss", "by_position"))
            width = max(len(loss) // 40, 1)
            smooth = np.convolve(loss, np.ones(width) / width, "valid")
            left.plot(np.arange(len(smooth)) + width, smooth, label=name, linewidth=1)
            edges = np.unique(np.geomspace(1, len(place), 13).astype(int))
            means = [place[a - 1 : max(b - 1, a)].mean() for a, b in zip(edges, edges[1:])]
            right.plot(edges[:-1], means, marker="o", markersize=3, label=name, linewidth=1)
        left.set(xlabel="updates", ylabel="training loss, bits per byte")
        left.set_ylim(right.get_ylim()[0] * 0.8, 6)
        right.set(xlabel="place in the row (mean to the next point)", ylabel="test loss, bits per byte", xscale="log")
        for axes in (left, right):
            axes.grid(alpha=0.3)
        right.legend(fontsize=8)
    return [path]


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
