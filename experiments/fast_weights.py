"""What fast weights do along one document that has a dictionary of its own.

Command                                                   hardware       time       expected
python -m experiments.fast_weights --record               1 CPU core     12 min     see the ledger

Decoders of 2 blocks of width 64, every layer with short convolutions of width 4, learn from documents of words that
are each followed by their value, the same one all through a document; which it is, each document draws anew. The loss
at values is shown against their place in the document, beside the least that any model can expect, and as bits above
that: at words that have come before, whose value is known for sure, and at new ones, of which all values are as likely.

TTT-Linear is then asked without what it learns in the document: "frozen" is the same net, trained with moving fast
weights, with an inner rate of 0. One document is read token by token, and the figure shows how far the fast weights of
every head have gone from their start. The study stops if they did not move, or if moving them does not help.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from cl_zoo import Learner, Stream, TrainState, at, compose, run_stream, supervised
from cl_zoo.language import Decoder, decoder
from cl_zoo.layers import Mixer, delta_rule, linear_attention, softmax_attention, ttt_linear
from cl_zoo.losses import next_token_loss, token_losses
from cl_zoo.streams import best_dictionary_scores, fresh_dictionaries
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

MIXERS: dict[str, Callable[..., Mixer]] = {
    "softmax attention": softmax_attention,
    "linear attention": linear_attention,
    "delta rule": delta_rule,
    "ttt-linear": ttt_linear,
}
FROZEN = "ttt-linear, frozen"


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run. Unknown or impossible values are refused before anything compiles."""

    mixers: tuple[str, ...] = tuple(MIXERS)
    seeds: int = 1
    steps: int = 600
    batch_size: int = 16
    length: int = 128
    words: int = 16
    values: int = 16
    width: int = 64
    heads: int = 2
    layers: int = 2
    hidden: int = 128
    """Of the SwiGLU networks."""
    learning_rate: float = 1e-2
    mini_batch: int = 16
    """Of TTT-Linear."""
    directory: str = "runs/fast_weights"
    """Of the run; what is finished there is not run again."""
    record: bool = False
    """Write the result file that the ledger is made from."""


def main(config: Config) -> None:
    """Runs the study, prints its table, draws its figure."""
    check_numbers(config, "seeds")
    check_names(config, mixers=MIXERS)

    def cell(name: str) -> Cell:
        return Cell("documents", name, name, lambda seed: run(config, name, seed))

    cells = [cell(name) for name in config.mixers]
    study("fast_weights", config, cells, report, partial(figures, config), settled=all_but(config, "mixers"))


def report(found: Found) -> Report:
    """Bits above the best at known and at new words."""
    lines = by_name(found)
    shown = [f"\n{'bits above the best':24s}{'known words':>16s}{'new words':>16s}"]
    for name, cell in lines.items():
        shown.append(f"{name:24s}" + "".join(f"{mean_and_spread(cell[kind]):>16s}" for kind in ("known", "new")))
    remarks = [
        "Known words have come before in the document: 0 bits are possible. Of a new word's value nothing is known."
    ]
    if "ttt-linear" in lines:
        most = np.max(lines["ttt-linear"]["movement"], axis=(0, 3))
        remarks.append(
            "Fast weights of TTT-Linear go from their start, along one document, as far as"
            f" {most.min():.2g} to {most.max():.2g} times its norm, by head and block."
        )
    rows = {
        (f"{kind} words", name): {"scores": cell[kind], "seconds": cell["seconds"]}
        for kind in ("known", "new")
        for name, cell in lines.items()
    }
    benchmark = "Documents with a dictionary of their own: bits above the best possible, not percent"
    return Report("\n".join(shown), benchmark, rows, remarks=remarks, lower_is_better=True)


def by_name(found: Found) -> dict[str, dict[str, Any]]:
    """What was found of every mixer; after TTT-Linear, which must use its fast weights, comes the same one frozen."""
    lines = {}
    for (_, name), cell in found.items():
        lines[name] = cell
        if "frozen" in cell:
            check_that_weights_matter(cell)
            lines[FROZEN] = cell["frozen"]
    return lines


def check_that_weights_matter(cell: dict[str, Any]) -> None:
    """Stops unless every head's fast weights moved, and without moving the same net is worse, with every seed."""
    for gone, moving, frozen in zip(cell["movement"], cell["known"], cell["frozen"]["known"], strict=True):
        last = np.array(gone)[..., -1]
        if not (last > 0).all():
            raise SystemExit(f"fast weights did not move in all heads: {last.tolist()} times their norm")
        if not frozen > moving:
            raise SystemExit(
                f"fast weights do not help: known words cost {moving:.4f} bits with them moving, and"
                f" {frozen:.4f} frozen"
            )


def make_net(config: Config, name: str, **options: Any) -> Decoder:
    """A decoder; with options of the mixer."""
    options |= {"mini_batch": config.mini_batch} if name == "ttt-linear" else {}
    mixer = MIXERS[name](config.width, config.heads, convolution=4, **options)
    return decoder(config.words + config.values, [(mixer, config.hidden, config.layers)])


def run(config: Config, name: str, seed: int) -> dict[str, Any]:
    """One mixer and seed: bits above the best at known and new words, and bits by place."""
    stream = fresh_dictionaries(
        steps=config.steps,
        length=config.length,
        words=config.words,
        values=config.values,
        batch_size=config.batch_size,
    )
    net = make_net(config, name)
    nets = {name: net} | ({FROZEN: make_net(config, name, base_rate=0.0)} if name == "ttt-linear" else {})
    learner = compose(net.model, warmed_up_adamw(config.learning_rate, config.steps), supervised(next_token_loss))
    measure: dict[str, Any] = {"losses": at("end", partial(losses, nets))}
    if name == "ttt-linear":
        measure["movement"] = at("end", partial(movement, net))
    begun = time.perf_counter()
    found = run_stream(learner, stream, jax.random.key(seed), measure=measure).measures
    seconds = time.perf_counter() - begun
    words = np.asarray(stream.evaluation(0, "test").x)[..., ::2]
    scores = {
        name: {**document_scores(config, each, words), "seconds": seconds} for name, each in found["losses"].items()
    }
    if name != "ttt-linear":
        return scores[name]
    gone, step_by_step, parallel = map(np.asarray, found["movement"])
    np.testing.assert_allclose(step_by_step, parallel, rtol=1e-3, atol=1e-3)
    return scores[name] | {"frozen": scores[FROZEN], "movement": gone.tolist()}


def losses(
    nets: dict[str, Decoder], learner: Learner, state: TrainState, stream: Stream, key: jax.Array
) -> dict[str, jax.Array]:
    """Of all test documents at each token, with these parameters in each of the nets."""

    def of(net: Decoder) -> jax.Array:
        def one(batch: Any) -> jax.Array:
            return token_losses(net.model.apply(state.params, {}, batch.x)[0], batch.y)

        return jax.lax.map(one, stream.evaluation(0, "test"))

    return {name: of(net) for name, net in nets.items()}


def document_scores(config: Config, losses: jax.Array, words: np.ndarray) -> dict[str, Any]:
    """Of all test documents; in bits."""
    bits = np.asarray(losses)[..., ::2].reshape(-1, config.length // 2) / np.log(2)
    known = seen_before(words.reshape(bits.shape))
    return {
        "known": float(bits[known].mean()),
        "new": float(bits[~known].mean() - np.log2(config.values)),
        "by_place": bits.mean(axis=0).tolist(),
    }


def seen_before(words: np.ndarray) -> np.ndarray:
    """`bool[N, n]`: whether the word in this place has come before in its document."""
    same = words[:, :, None] == words[:, None, :]
    return np.tril(same, -1).any(axis=2)


def movement(
    net: Decoder, learner: Learner, state: TrainState, stream: Stream, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """||W_t - W_0|| / ||W_0|| after each token of a document, `[layers, heads, L]`; and the logits token by token, and
    of the parallel form, which must be the same.
    """
    params, document = state.params, stream.evaluation(0, "test").x[0, 0]
    cache = net.start(params, 1, document.shape[0])
    first = cache["block_0"]["mixer"].state.weights[0].kernel

    def one(cache: Any, token: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        logits, cache = net.step(params, cache, token[None])
        gone = cache["block_0"]["mixer"].state.weights[0].kernel - first
        return cache, (logits[0], jnp.linalg.norm(gone, axis=(-2, -1))[:, 0])

    _, (logits, gone) = jax.lax.scan(one, cache, document)
    begin = jnp.linalg.norm(first, axis=(-2, -1))[:, 0]
    return jnp.moveaxis(gone / begin, 0, -1), logits, net.model.apply(params, {}, document[None])[0][0]


def figures(config: Config, found: Found, directory: Path) -> list[Path]:
    """Loss by place in the document, and the way of fast weights along one."""
    path, lines = directory / "document.png", by_name(found)
    place = np.arange(config.length // 2) + 1
    best = best_dictionary_scores(config.length, config.words, config.values)[0] / np.log(2)
    with drawing(path, 1, 2, size=(4.8, 3.6)) as ((left, right),):
        left.plot(place, best, color="black", linewidth=2, label="best possible")
        for name, cell in lines.items():
            look = {"linewidth": 1, "linestyle": "--" if name == FROZEN else "-"}
            left.plot(place, np.mean(cell["by_place"], axis=0), label=name, **look)
        left.set(xlabel="place of the word in the document", ylabel="loss at its value, bits", ylim=(0, None))
        left.legend(fontsize=8)
        if "ttt-linear" in lines:
            for i, heads in enumerate(np.array(lines["ttt-linear"]["movement"])[0]):
                for j, gone in enumerate(heads):
                    look = {"color": f"C{i}", "linestyle": ("-", "--", ":", "-.")[j % 4], "linewidth": 1}
                    right.plot(np.arange(len(gone)) + 1, gone, label=f"block {i}, head {j}", **look)
            right.legend(fontsize=8)
        right.set(xlabel="tokens read", ylabel="|W - W_0| / |W_0|, TTT-Linear", ylim=(0, None))
        for axes in (left, right):
            axes.grid(alpha=0.3)
    return [path]


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
