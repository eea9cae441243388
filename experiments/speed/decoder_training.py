"""A training step of a decoder, against transformers on PyTorch, beside the floor by operations.

    python -m experiments.speed.decoder_training --peer PEER     6 minutes on 2 cores, with nothing else running
    python -m experiments.speed.decoder_training                 ours alone

PEER is the folder of an environment with torch and transformers. The same Llama shape, float32, AdamW, as many tokens
in a step whatever the length of its sequences; with all weights trained, the same rematerialised, and with adapters
alone (LoRA on every kernel of the blocks). Ours is the compiled loop over steps. Rounds are taken in turn; the floor is
the operations of all products at the rate of a product of 2048 x 2048 matrices, measured in the same rounds.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
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
from cl_zoo.language import decoder
from cl_zoo.layers import softmax_attention
from cl_zoo.losses import next_token_loss
from cl_zoo.training.run_directory import environment, write_json
from cl_zoo.wrappers import lora

KINDS = ("all weights", "rematerialised", "lora")


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    peer: Path | None = None
    """None measures ours alone."""
    times: tuple[int, ...] = (128, 1024)
    tokens: int = 1024
    """Of a step."""
    vocabulary: int = 4096
    width: int = 384
    heads: int = 6
    hidden: int = 1024
    layers: int = 8
    rank: int = 8
    threads: int = 2
    """Of the peer."""
    steps: int = 2
    """Of a call that is timed."""
    rounds: int = 7
    record: bool = False
    """Write experiments/speed/results/decoder_training_DEVICE.json."""


def ours(config: Config, length: int, kind: str) -> tuple[Callable[[], float], dict[str, float]]:
    """`() -> seconds of a step`, and seconds to compile and bytes of temporary memory."""
    mixer = softmax_attention(config.width, config.heads)
    net = decoder(config.vocabulary, [(mixer, config.hidden, config.layers)], rematerialise=kind == "rematerialised")
    tokens = jax.random.randint(jax.random.key(0), (config.tokens // length, length), 0, config.vocabulary)
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    weights, model_state = net.model.init(jax.random.key(0), tokens)
    model = lora(net.model, config.rank).bind(weights) if kind == "lora" else net.model
    params = model.init(jax.random.key(0), tokens)[0]
    optimiser = optax.adamw(1e-3)

    def loss(params: Any) -> Any:
        outputs = model.apply(params, model_state, tokens)[0]
        return jnp.mean(next_token_loss(outputs, targets))

    def step(carry: Any, _: None) -> tuple[Any, Any]:
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimiser.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    begun = time.perf_counter()
    program = jit(lambda carry: jax.lax.scan(step, carry, None, length=config.steps), donate_argnums=0)
    compiled = program.lower((params, optimiser.init(params))).compile()
    analysis = compiled.memory_analysis()
    facts = {"compile": time.perf_counter() - begun, "temporary_bytes": analysis.temp_size_in_bytes}
    held = [jax.tree.map(jnp.copy, (params, optimiser.init(params)))]

    def run() -> float:
        begun = time.perf_counter()
        held[0], values = compiled(held[0])
        jax.block_until_ready(values)
        return (time.perf_counter() - begun) / config.steps

    return run, facts


class Peer:
    """A process that trains a step when it is asked to."""

    def __init__(self, config: Config, length: int, kind: str):
        assert config.peer is not None
        settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("peer", "times")}
        script = Path(__file__).with_name("decoder_training_peer.py")
        command = [
            str(config.peer / "bin" / "python"),
            str(script),
            json.dumps(settings | {"time": length, "kind": kind}),
        ]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.process.stdout.readline()

    def __call__(self) -> float:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate()


def operations(config: Config, length: int, kind: str) -> float:
    """Of all matrix products of a step: forward, and backward for inputs and (where trained) weights."""
    block = 4 * config.width**2 + 3 * config.width * config.hidden
    weights = config.layers * block
    attention = config.layers * 2 * config.width * length / 2  # of a token, for each of two products, causal
    head = config.vocabulary * config.width
    if kind == "lora":
        return 2 * config.tokens * (2 * weights + 2 * head + 3 * attention)
    return 2 * config.tokens * 3 * (weights + head + attention)


def rate() -> Callable[[], float]:
    """`() -> seconds of a product of 2048 x 2048 matrices`."""
    x, n = jnp.eye(2048), 16
    products = jit(lambda x: jax.lax.fori_loop(0, n, lambda _, y: x @ y, x))
    jax.block_until_ready(products(x))

    def run() -> float:
        begun = time.perf_counter()
        jax.block_until_ready(products(x))
        return (time.perf_counter() - begun) / n

    return run


def main(config: Config) -> None:
    """Measures, prints."""
    cells = []
    for length in config.times:
        for kind in KINDS:
            own, facts = ours(config, length, kind)
            found: dict[str, Callable[[], float]] = {"ours": own, "product": rate()}
            peer = Peer(config, length, kind) if config.peer else None
            if peer:
                found["peer"] = peer
            for run in found.values():
                run()
            rounds: dict[str, list[float]] = {name: [] for name in found}
            for _ in range(config.rounds):
                for name, run in found.items():
                    rounds[name].append(run())
            if peer:
                peer.close()
            seconds = {name: float(np.median(values)) for name, values in rounds.items()}
            floor = operations(config, length, kind) * seconds["product"] / (2 * 2048**3)
            line = f"T {length}, {kind}: {1e3 * seconds['ours']:.0f} ms, floor {1e3 * floor:.0f} ms"
            if peer:
                ratios = np.array(rounds["peer"]) / np.array(rounds["ours"])
                low, high = np.quantile(ratios, [0.25, 0.75])
                line += f"; transformers {1e3 * seconds['peer']:.0f} ms, {np.median(ratios):.2f} times ours"
                line += f" (quartiles {low:.2f} to {high:.2f})"
            print(line, flush=True)
            cells.append({"time": length, "kind": kind, "floor": floor, "seconds": rounds} | facts)
    if config.record:
        path = Path(__file__).parent / "results" / f"decoder_training_{jax.default_backend()}.json"
        settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("peer", "record")}
        write_json(path, {"environment": environment(), "settings": settings, "cells": cells})


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
