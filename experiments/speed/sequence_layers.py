"""What sequence layers cost: against length, against each other, at any position of decoding.

    python -m experiments.speed.sequence_layers          10 minutes on 2 cores, with nothing else running; one figure

- "length": time per token of the parallel form, forward, from 1k to 16k tokens a row, batches of as many rows as make
  16k tokens. Linear time is one number.
- "dual": TTT-Linear in its dual form, against a scan over tokens with weights written out (primal) and against chunked
  linear attention, which has fewer products and no chain from chunk to chunk: the cores alone, and whole layers with
  their projections; forward, and with the gradient of all parameters.
- "decoding": time of one step of the recurrent form at positions 1k and 16k.

Floors: operations counted by hand (a multiply-add is two) at the rate of a product of 1024 x 1024 matrices, and bytes
of inputs, outputs and parameters at the bandwidth of adding to an array, both measured here. All that is compared is
timed in turn, round after round; medians of rounds.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from cl_zoo.compilation import jit
from cl_zoo.layers import (
    delta_rule,
    gated_delta_rule,
    gated_linear_attention,
    lact,
    linear_attention,
    softmax_attention,
    titans,
    ttt_linear,
    ttt_mlp,
    window_attention,
)
from cl_zoo.layers._linear_attention import linear_attention_chunked
from cl_zoo.layers.fast_weights import FastLayer
from cl_zoo.layers.mixer import Mixer
from cl_zoo.layers.ttt_core import InnerLoss, ttt_chunked, ttt_start, ttt_step
from cl_zoo.training.run_directory import environment, write_json


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    width: int = 256
    heads: int = 4
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    positions: tuple[int, ...] = (1024, 16384)
    batch_size: int = 4
    """Of "dual"."""
    time: int = 1024
    """Tokens of "dual"."""
    rounds: int = 7
    parts: tuple[str, ...] = ("length", "dual", "decoding")
    only: tuple[str, ...] = ()
    """Names of layers; all by default."""
    directory: Path = Path("runs/sequence-layers")
    """Of the figure."""
    record: bool = False
    """Write experiments/speed/results/sequence_layers_DEVICE.json."""


def mixers(config: Config) -> dict[str, Mixer]:
    """Every layer at its settings of use."""
    made = {
        "softmax attention": softmax_attention,
        "window attention": window_attention,
        "linear attention": linear_attention,
        "gated linear attention": gated_linear_attention,
        "delta rule": delta_rule,
        "gated delta rule": gated_delta_rule,
        "TTT-Linear": ttt_linear,
        "TTT-MLP": ttt_mlp,
        "Titans": titans,
        "LaCT": lact,
    }
    return {
        name: make(config.width, config.heads) for name, make in made.items() if not config.only or name in config.only
    }


def rates(dtype: Any = jnp.float32) -> tuple[float, float]:
    """Operations per second of a product of matrices, large enough to fill the device; bytes per second of adding two
    arrays."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((size, size), dtype)
    long = jnp.ones(2**25)
    product, add = jit(lambda a: a @ a), jit(lambda a: a + 1.0)
    found = timed({"product": (product, (a,)), "add": (add, (long,))}, 9)
    return 2 * size**3 / found["product"], 2 * long.nbytes / found["add"]


def timed(candidates: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]], rounds: int) -> dict[str, float]:
    """Median seconds of a call of each, taken in turn."""
    for function, arguments in candidates.values():
        jax.block_until_ready(function(*arguments))
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, (function, arguments) in candidates.items():
            begun = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values) for name, values in seconds.items()}


def operations(config: Config, name: str, time: int) -> float:
    """Of one token in the parallel form, by hand: products of matrices alone, at the settings of `mixers`."""
    width, d = config.width, config.width // config.heads
    core = {
        "softmax attention": 4 * time * d,  # scores that the mask hides are computed too
        "window attention": 4 * 2 * 64 * d,
        "linear attention": 4 * d * d + 4 * 64 * d,
        "gated linear attention": 4 * d * d + 4 * 16 * d + 4 * 16 * d,
        "delta rule": 6 * d * d + 10 * 32 * d,
        "gated delta rule": 6 * d * d + 10 * 32 * d,
        "TTT-Linear": 6 * d * d + 4 * 16 * d,
        "TTT-MLP": 56 * d * d + 20 * 16 * d,
        "Titans": 44 * d * d + 12 * 16 * d,
        "LaCT": 18 * d * d + 4 * 2 * 256 * d,
    }
    return 8 * width * width + config.heads * core[name]


def by_length(config: Config, rate: float) -> dict[str, dict[str, float]]:
    """Microseconds per token of every layer at every length, and their floor by operations at the longest."""
    found: dict[str, dict[str, float]] = {}
    for name, mixer in mixers(config).items():
        params = mixer.init(jax.random.key(0))
        # Equal numbers of tokens at once, so that all lengths find as much of their work in the processor's cache.
        total = max(config.lengths)
        apply = jit(mixer.apply)
        calls = {
            str(n): (apply, (params, jax.random.normal(jax.random.key(1), (total // n, n, config.width))))
            for n in config.lengths
            if mixer.name != "softmax_attention" or n <= 4096  # its scores take 1 GB there
        }
        seconds = timed(calls, config.rounds)
        found[name] = {n: 1e6 * value / total for n, value in seconds.items()}
        values, longest = list(found[name].values()), max(map(int, calls))
        floor = 1e6 * operations(config, name, longest) / rate
        shown = "".join(f"{value:9.2f}" for value in values)
        ratio = values[-1] / values[0]
        print(f"{name:24s}{shown}   longest / shortest {ratio:.2f}; floor {floor:.2f}", flush=True)
        found[name]["floor"] = floor
    return found


def core_operations(config: Config, chunk: int = 64, mini_batch: int = 16) -> dict[str, float]:
    """By hand, of "dual": products of matrices alone."""
    d, tokens = config.width // config.heads, config.batch_size * config.time * config.heads
    return {
        # scores, values, and both ways between tokens and the matrix
        "linear attention, core": tokens * (4 * chunk * d + 4 * d * d),
        # keys and queries times W, scores, scores times gradients, the outer products
        "TTT-Linear, dual core": tokens * (4 * mini_batch * d + 6 * d * d),
    }


def dual(config: Config) -> dict[str, float]:
    """Seconds of one call: cores, layers, and layers with gradients."""
    d = config.width // config.heads
    shape = (config.batch_size, config.heads, config.time, d)
    q, k, v = (jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), 3))
    kernel = 0.02 * jax.random.normal(jax.random.key(1), (*shape[:2], d, d))
    weights = [FastLayer(kernel, jnp.zeros((*shape[:2], d)))]
    loss = InnerLoss(jnp.ones((config.heads, d)), jnp.zeros((config.heads, d)))
    row, token = 1 / jnp.arange(1.0, 17), jnp.full(shape[:3], 0.5 / d)

    def primal(q: Any, k: Any, v: Any) -> Any:
        def step(cache: Any, each: Any) -> Any:
            place, *arrays, rate = each
            z, cache = ttt_step(cache, place, *arrays, row, rate, loss)
            return cache, z

        sequence = [jnp.moveaxis(a, 2, 0) for a in (q, k, v, token)]
        _, z = jax.lax.scan(step, ttt_start(weights), (jnp.arange(config.time) % 16, *sequence))
        return jnp.moveaxis(z, 0, 2)

    calls: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "linear attention, core": (jit(linear_attention_chunked), (q, k, v)),
        "TTT-Linear, dual core": (
            jit(lambda q, k, v: ttt_chunked(q, k, v, weights, row, token, loss, mini_batch=16)),
            (q, k, v),
        ),
        "TTT-Linear, primal core": (jit(primal), (q, k, v)),
    }
    x = jax.random.normal(jax.random.key(2), (config.batch_size, config.time, config.width))
    primal_layer = ttt_linear(config.width, config.heads)

    def token_by_token(params: Any, x: Any) -> Any:
        cache = primal_layer.start(params, config.batch_size, config.time)
        _, y = jax.lax.scan(lambda c, each: primal_layer.step(params, c, each)[::-1], cache, jnp.moveaxis(x, 1, 0))
        return jnp.moveaxis(y, 0, 1)

    calls["TTT-Linear, primal, layer"] = (jit(token_by_token), (primal_layer.init(jax.random.key(3)), x))
    for name, mixer in (
        ("linear attention", linear_attention(config.width, config.heads)),
        ("TTT-Linear, dual", ttt_linear(config.width, config.heads)),
    ):
        params = mixer.init(jax.random.key(3))
        calls[f"{name}, layer"] = (jit(mixer.apply), (params, x))
        gradient = jax.grad(lambda p, x, mixer=mixer: jnp.sum(jnp.square(mixer.apply(p, x))))
        calls[f"{name}, layer with gradient"] = (jit(gradient), (params, x))
    found = timed(calls, config.rounds)
    for name, seconds in found.items():
        print(f"{name:44s}{1e3 * seconds:9.1f} ms")
    for part in ("core", "layer", "layer with gradient"):
        ratio = (
            found[f"TTT-Linear, dual{' core' if part == 'core' else ', ' + part}"] / found[f"linear attention, {part}"]
        )
        print(f"TTT-Linear, dual / linear attention, {part}: {ratio:.2f}")
    for part in (" core", ", layer"):
        ratio = found[f"TTT-Linear, primal{part}"] / found[f"TTT-Linear, dual{part}"]
        print(f"TTT-Linear, primal / dual{part}: {ratio:.1f}")
    return found


def decoding(config: Config, bandwidth: float) -> dict[str, dict[str, float]]:
    """Microseconds of a step, the mean of 256, at each position; and the bytes of parameters and cache at the bandwidth
    of memory, which no step of a single row can beat unless they stay in the processor's cache."""
    found: dict[str, dict[str, float]] = {}
    for name, mixer in mixers(config).items():
        params = mixer.init(jax.random.key(0))
        x = jax.random.normal(jax.random.key(1), (256, 1, config.width))

        @jit
        def run(params: Any, cache: Any, x: Any, mixer: Mixer = mixer) -> Any:
            return jax.lax.scan(lambda c, each: mixer.step(params, c, each)[::-1], cache, x)[1]

        calls = {}
        for position in config.positions:
            cache = mixer.start(params, 1, max(config.positions) + 256)
            calls[str(position)] = (run, (params, cache._replace(position=jnp.int32(position)), x))
        found[name] = {n: 1e6 * value / 256 for n, value in timed(calls, config.rounds).items()}
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((params, cache)))
        values = list(found[name].values())
        found[name]["floor"] = 1e6 * size / bandwidth
        shown = "".join(f"{value:9.1f}" for value in values)
        print(
            f"{name:24s}{shown}   last / first {values[-1] / values[0]:.2f}; {size / 1e6:.2f} MB, floor"
            f" {found[name]['floor']:.1f}",
            flush=True,
        )
    return found


def figure_of(found: dict[str, dict[str, float]], directory: Path) -> Path:
    """Time per token against length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
    for name, values in found.items():
        lengths = [n for n in values if n != "floor"]
        axes.plot([int(n) for n in lengths], [values[n] for n in lengths], marker="o", markersize=3, label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="microseconds per token, forward")
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "time_per_token.png"
    figure.savefig(path, dpi=150)
    plt.close("all")
    return path


def main(config: Config) -> None:
    """Measures, prints, draws the figure."""
    operations_rate, bandwidth = rates()
    print(f"products of matrices: {operations_rate / 1e9:.0f} GFLOP/s; adding: {bandwidth / 1e9:.1f} GB/s")
    found: dict[str, Any] = {"flop_per_second": operations_rate, "bytes_per_second": bandwidth}
    if "dual" in config.parts:
        seconds = dual(config)
        # Queries, keys and values are read, and as much is written.
        moved = 4 * 4 * config.batch_size * config.time * config.width / bandwidth
        floors = {name: count / operations_rate for name, count in core_operations(config).items()}
        for name, floor in floors.items():
            print(
                f"{name}: floor by operations {1e3 * floor:.1f} ms ({floor / seconds[name]:.2f} of the time), by bytes"
                f" {1e3 * moved:.1f} ms"
            )
        floors["bytes of a core"] = moved
        found |= {"dual_seconds": seconds, "dual_floor_seconds": floors}
    if "length" in config.parts:
        print("microseconds per token at " + ", ".join(map(str, config.lengths)))
        found["microseconds_per_token"] = by_length(config, operations_rate)
        print(f"figure: {figure_of(found['microseconds_per_token'], config.directory)}")
    if "decoding" in config.parts:
        print("microseconds of a decoding step at positions " + ", ".join(map(str, config.positions)))
        found["microseconds_per_step"] = decoding(config, bandwidth)
    if config.record:
        device = jax.default_backend()
        settings = {
            key: value for key, value in dataclasses.asdict(config).items() if key not in ("directory", "record")
        }
        path = Path(__file__).parent / "results" / f"sequence_layers_{device}.json"
        write_json(path, {"environment": environment(), "settings": settings, **found})


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
