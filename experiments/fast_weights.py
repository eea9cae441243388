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
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm.auto import tqdm

from cl_zoo import compose, enable_compilation_cache, run_stream, supervised
from cl_zoo.compilation import jit
from cl_zoo.evaluation.metrics import statistics
from cl_zoo.language import Decoder, decoder
from cl_zoo.layers import Mixer, delta_rule, linear_attention, softmax_attention, ttt_linear
from cl_zoo.losses import next_token_loss, token_losses
from cl_zoo.streams import best_dictionary_scores, fresh_dictionaries
from cl_zoo.training.run_directory import ConfigError, settle_config, write_json
from experiments.common import RESULTS, record, shown_command, warmed_up_adamw

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
    if config.seeds < 1:
        raise SystemExit(f"seeds is {config.seeds}, but it must be at least 1")
    if unknown := set(config.mixers) - set(MIXERS):
        raise SystemExit(f"mixers names {', '.join(sorted(unknown))}, but there are {', '.join(MIXERS)}")
    enable_compilation_cache()
    directory = Path(config.directory)
    may_change = ("mixers", "seeds", "directory", "record")
    try:
        settle_config(directory, {k: v for k, v in dataclasses.asdict(config).items() if k not in may_change})
    except ConfigError as error:
        raise SystemExit(str(error)) from error
    (directory / "cells").mkdir(exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {}
    with tqdm(total=len(config.mixers) * config.seeds, unit="run") as bar:
        for name in config.mixers:
            bar.set_description(name)
            found[name] = []
            for seed in range(config.seeds):
                path = directory / "cells" / f"{name}-{seed}.json".replace(" ", "_")
                if not path.exists():
                    write_json(path, run(config, name, seed))
                found[name].append(json.loads(path.read_text()))
                bar.update()
            if name == "ttt-linear":
                check_that_weights_matter(found[name])
                found[FROZEN] = [each["frozen"] for each in found[name]]

    print(f"\n{'bits above the best':24s}{'known words':>16s}{'new words':>16s}")
    for name, runs in found.items():
        line = f"{name:24s}"
        for kind in ("known", "new"):
            s = statistics(np.array([each[kind] for each in runs]))
            line += f"{f'{s.mean:.3f} ± {s.sd:.3f}' if s.n > 1 else f'{s.mean:.3f}':>16s}"
        print(line)
    print(f"figure: {figure(found, config, directory)}")
    cells = {
        (f"{kind} words", name): {
            "scores": np.array([each[kind] for each in runs]),
            "seconds": [each["seconds"] for each in runs],
        }
        for kind in ("known", "new")
        for name, runs in found.items()
    }
    remarks = [
        "Known words have come before in the document: 0 bits are possible. Of a new word's value nothing is known."
    ]
    if "ttt-linear" in found:
        most = np.max([each["movement"] for each in found["ttt-linear"]], axis=(0, 3))
        remarks.append(
            "Fast weights of TTT-Linear go from their start, along one document, as far as"
            f" {most.min():.2g} to {most.max():.2g} times its norm, by head and block."
        )
    path = RESULTS / "fast_weights.json" if config.record else directory / "results.json"
    benchmark = "Documents with a dictionary of their own: bits above the best possible, not percent"
    command = shown_command("experiments.fast_weights", sys.argv[1:])
    record("fast_weights", benchmark, command, cells, {}, {}, path, lower_is_better=True, remarks=remarks)
    print(f"results: {path}")


def check_that_weights_matter(runs: list[dict[str, Any]]) -> None:
    """Stops unless every head's fast weights moved, and without moving the same net is worse."""
    for each in runs:
        last = np.array(each["movement"])[..., -1]
        if not (last > 0).all():
            raise SystemExit(f"fast weights did not move in all heads: {last.tolist()} times their norm")
        if not each["frozen"]["known"] > each["known"]:
            raise SystemExit(
                f"fast weights do not help: known words cost {each['known']:.4f} bits with them moving, and"
                f" {each['frozen']['known']:.4f} frozen"
            )


def make_net(config: Config, name: str, **options: Any) -> Decoder:
    """A decoder; with options of the mixer."""
    options |= {"mini_batch": config.mini_batch} if name == "ttt-linear" else {}
    mixer = MIXERS[name](config.width, config.heads, convolution=4, **options)
    return decoder(config.words + config.values, [mixer], layers=config.layers, hidden=config.hidden)


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
    learner = compose(net.model, warmed_up_adamw(config.learning_rate, config.steps), supervised(next_token_loss))
    begun = time.perf_counter()
    result = run_stream(learner, stream, jax.random.key(seed), evaluate_at="end")
    seconds = time.perf_counter() - begun
    params = result.state.params
    tests = stream.evaluation(stream.data, jnp.int32(0), "test")
    scores = {**document_scores(config, net, params, tests), "seconds": seconds}
    if name == "ttt-linear":
        still = make_net(config, name, base_rate=0.0)
        scores["frozen"] = {**document_scores(config, still, params, tests), "seconds": seconds}
        scores["movement"] = movement(net, params, tests.x[0, 0]).tolist()
    return scores


def document_scores(config: Config, net: Decoder, params: Any, tests: Any) -> dict[str, Any]:
    """Of all test documents; in bits."""

    @jit
    def losses(params: Any, tests: Any) -> jax.Array:
        def one(batch: Any) -> jax.Array:
            return token_losses(net.model.apply(params, {}, batch.x)[0], batch.y)

        return jax.lax.map(one, tests)

    bits = np.asarray(losses(params, tests))[..., ::2].reshape(-1, config.length // 2) / np.log(2)
    known = seen_before(np.asarray(tests.x)[..., ::2].reshape(bits.shape))
    return {
        "known": float(bits[known].mean()),
        "new": float(bits[~known].mean() - np.log2(config.values)),
        "by_place": bits.mean(axis=0).tolist(),
    }


def seen_before(words: np.ndarray) -> np.ndarray:
    """`bool[N, n]`: whether the word in this place has come before in its document."""
    same = words[:, :, None] == words[:, None, :]
    return np.tril(same, -1).any(axis=2)


def movement(net: Decoder, params: Any, document: jax.Array) -> np.ndarray:
    """||W_t - W_0|| / ||W_0|| after each token of a document, `[layers, heads, L]`. The token-by-token form must give
    what the parallel one gives.
    """

    @jit
    def read(params: Any, document: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        cache = net.start(params, 1, document.shape[0])
        first = cache["block_0"].state.weights[0].kernel

        def one(cache: Any, token: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
            logits, cache = net.step(params, cache, token[None])
            gone = cache["block_0"].state.weights[0].kernel - first
            return cache, (logits[0], jnp.linalg.norm(gone, axis=(-2, -1))[:, 0])

        _, (logits, gone) = jax.lax.scan(one, cache, document)
        parallel = net.model.apply(params, {}, document[None])[0][0]
        start = jnp.linalg.norm(first, axis=(-2, -1))[:, 0]
        return jnp.moveaxis(gone / start, 0, -1), logits, parallel

    gone, logits, parallel = map(np.asarray, read(params, document))
    np.testing.assert_allclose(logits, parallel, rtol=1e-3, atol=1e-3)
    return gone


def figure(found: dict[str, list[dict[str, Any]]], config: Config, directory: Path) -> Path:
    """Loss by place in the document, and the way of fast weights along one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.6), layout="constrained")
    place = np.arange(config.length // 2) + 1
    best = best_dictionary_scores(config.length, config.words, config.values)[0] / np.log(2)
    left.plot(place, best, color="black", linewidth=2, label="best possible")
    for name, runs in found.items():
        bits = np.mean([each["by_place"] for each in runs], axis=0)
        left.plot(place, bits, label=name, linewidth=1, linestyle="--" if name == FROZEN else "-")
    left.set(xlabel="place of the word in the document", ylabel="loss at its value, bits", ylim=(0, None))
    left.legend(fontsize=8)
    if "ttt-linear" in found:
        for i, heads in enumerate(np.array(found["ttt-linear"][0]["movement"])):
            for j, gone in enumerate(heads):
                look = {"color": f"C{i}", "linestyle": ("-", "--", ":", "-.")[j % 4]}
                right.plot(np.arange(len(gone)) + 1, gone, label=f"block {i}, head {j}", linewidth=1, **look)
        right.legend(fontsize=8)
    right.set(xlabel="tokens read", ylabel="|W - W_0| / |W_0|, TTT-Linear", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    path = directory / "document.png"
    drawn.savefig(path, dpi=150)
    plt.close(drawn)
    return path


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
