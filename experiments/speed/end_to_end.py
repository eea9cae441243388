"""What learning along a sequence costs: a training step of end-to-end test-time training beside the same decoder.

    python -m experiments.speed.end_to_end --record         3 minutes on 2 cores, with nothing else running

A decoder of four blocks with windows of attention, the last of which has a prime network; one sequence of T tokens, cut
into more and more chunks, trained by AdamW. Shown are the seconds of a step over those of the decoder without learning
(its own step, since rate 0 costs as much as any), with chunks computed again in the backward pass and kept, and bytes
of temporary memory as the compiler counts them; beside it what the products alone would cost:

    the decoder: 3 passes (forward, and backward for inputs and weights);
    learning: of the blocks that are run by chunks, forward and backward (2 of the prime network's three products), and
    the derivatives of both, twice over; once more with chunks computed again.

Then the seconds of a decoded token at early and late places, learning or not.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from cl_zoo.compilation import jit
from cl_zoo.language import Decoder, decoder, ttt_e2e, unstacked
from cl_zoo.layers import window_attention
from cl_zoo.losses import next_token_loss
from cl_zoo.training.run_directory import environment, write_json


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    length: int = 1024
    """T."""
    batch_size: int = 1
    chunks: tuple[int, ...] = (1, 4, 16, 64)
    vocabulary: int = 256
    width: int = 128
    heads: int = 4
    window: int = 256
    hidden: int = 256
    prime: int = 256
    blocks: int = 4
    rounds: int = 7
    record: bool = False
    """Write experiments/speed/results/end_to_end_DEVICE.json."""


def net(config: Config) -> Decoder:
    """Its last quarter of blocks has prime networks."""
    mixer = window_attention(config.width, config.heads, window=config.window, qk_norm=True)
    last = max(config.blocks // 4, 1)
    layers = {"mixer": mixer, "prime": config.prime, "ffn": config.hidden}
    groups = [(mixer, config.hidden, config.blocks - last), (layers, last)]
    return decoder(config.vocabulary, groups, sandwich=True)


def training(config: Config, made: Decoder) -> tuple[Callable[[], float], int]:
    """`() -> seconds of a step`, and bytes of temporary memory."""
    tokens = jax.random.randint(jax.random.key(0), (config.batch_size, config.length), 0, config.vocabulary)
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    params, model_state = made.model.init(jax.random.key(0), tokens)
    optimiser = optax.adamw(1e-3)

    def loss(params: Any) -> Any:
        return jnp.mean(next_token_loss(made.model.apply(params, model_state, tokens)[0], targets))

    def step(carry: Any) -> tuple[Any, Any]:
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimiser.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    carry = (params, optimiser.init(params))
    compiled = jit(step, donate_argnums=0).lower(carry).compile()
    held = [carry]

    def run() -> float:
        begun = time.perf_counter()
        held[0], value = compiled(held[0])
        jax.block_until_ready(value)
        return time.perf_counter() - begun

    return run, int(compiled.memory_analysis().temp_size_in_bytes)


def operations(config: Config, learning: bool, again: bool) -> float:
    """Of the products of a step."""
    tokens = config.batch_size * config.length
    last = max(config.blocks // 4, 1)
    # A query sees the window before it and its own part of the chunk.
    attention = 4 * config.width**2 + 2 * config.width * config.window
    block = attention + 3 * config.width * config.hidden
    prime = last * 3 * config.width * config.prime
    head = config.vocabulary * config.width
    below, above = (config.blocks - last) * block, last * block + head
    if not learning:
        return 2 * tokens * 3 * (below + above + prime)
    # The inner loss: forward, and backward to the prime networks' weights. Its derivative: each product has two.
    inner = above + prime + above + 2 * prime
    return 2 * tokens * (3 * below + (4 if again else 3) * inner)


def decoding(config: Config, made: Decoder) -> dict[str, float]:
    """Seconds of a decoded token, early and late; the median over whole chunks, of the mean of each."""
    params, _ = made.model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    params, n = unstacked(params), 64
    cache = made.start(params, config.batch_size, 16 * n)
    step = jit(lambda cache, token: made.step(params, cache, token)[::-1], donate_argnums=0)
    token, seconds = jnp.zeros(config.batch_size, jnp.int32), []
    for _ in range(16):
        begun = time.perf_counter()
        for _ in range(n):
            cache, logits = step(cache, token)
        jax.block_until_ready(logits)
        seconds.append((time.perf_counter() - begun) / n)
    return {"early": float(np.median(seconds[1:5])), "late": float(np.median(seconds[-4:]))}


def main(config: Config) -> None:
    """Measures, prints."""
    made = net(config)
    plain, bytes_plain = training(config, made)
    cells = []
    for n in config.chunks:
        size = config.length // n
        runs: dict[str, Callable[[], float]] = {"decoder": plain}
        memory = {"decoder": bytes_plain}
        for name, again in (("computed again", True), ("kept", False)):
            runs[name], memory[name] = training(config, ttt_e2e(made, {"prime": size}, rematerialise=again))
        for run in runs.values():
            run()
        rounds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(config.rounds):
            for name, run in runs.items():
                rounds[name].append(run())
        line = f"{n:3d} chunks of {size:4d} tokens: decoder {1e3 * np.median(rounds['decoder']):.0f} ms"
        for name, again in (("computed again", True), ("kept", False)):
            ratio = np.median(np.array(rounds[name]) / np.array(rounds["decoder"]))
            floor = operations(config, True, again) / operations(config, False, False)
            line += f"; {name} {ratio:.2f} times (products {floor:.2f}), {memory[name] / 2**20:.0f} MiB"
        print(line, flush=True)
        cells.append({"chunks": n, "seconds": rounds, "temporary_bytes": memory})
    tokens = {"decoder": decoding(config, made), "learning": decoding(config, ttt_e2e(made, {"prime": 16}))}
    for name, found in tokens.items():
        print(f"a decoded token, {name}: {1e6 * found['early']:.0f} us early, {1e6 * found['late']:.0f} us late")
    if config.record:
        path = Path(__file__).parent / "results" / f"end_to_end_{jax.default_backend()}.json"
        settings = {k: v for k, v in dataclasses.asdict(config).items() if k != "record"}
        write_json(path, {"environment": environment(), "settings": settings, "cells": cells, "decoding": tokens})


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
