"""Reading a prompt and decoding with a published model, against transformers on PyTorch, beside the floor.

    python -m experiments.speed.decoding --model MODEL --peer PEER     10 minutes on 2 cores, with nothing else running
    python -m experiments.speed.decoding --prompts 16 1024 3072 --batch-sizes 1 --tokens 32 --peer PEER      6 minutes
    python -m experiments.speed.decoding --model MODEL --batch-sizes 1 64 --dtype bfloat16         on a GPU: not run yet

MODEL is a folder or .gguf file, as SmolLM2-135M-Instruct; without one, random weights of that shape. PEER is the
folder of an environment with torch and transformers (`pip install torch transformers safetensors`). Both decode
greedily, float32, with a cache of keys and values; the same tokens must come out. A prefill is the prompt's pass and
the first token; decoding is one token after another from there. The floor of a token is all weights read once from
memory, at the rate of a sum over them measured here; of a prefill, operations (two for each weight and token) at the
rate of a product of 1024 x 1024 matrices. The peer's better of 1 and 2 threads counts. Rounds are taken in turn;
medians.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from cl_zoo.language import Pretrained, config_of, generate, load_pretrained, save_pretrained, unstacked
from cl_zoo.training.run_directory import environment, write_json
from experiments.speed.sequence_layers import rates, timed


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    model: str | None = None
    peer: Path | None = None
    """None measures ours alone."""
    batch_sizes: tuple[int, ...] = (1, 8)
    prompts: tuple[int, ...] = (256,)
    """Tokens of a prompt."""
    tokens: int = 64
    rounds: int = 5
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and activations; the peer is always run in float32."""
    record: bool = False
    """Write experiments/speed/results/decoding_DEVICE.json."""


def random_weights(dtype: Any) -> Pretrained:
    """Of the shape of SmolLM2-135M."""
    settings = {"model_type": "llama", "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3}
    settings |= {"intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152, "rope_theta": 1e5}
    settings |= {"tie_word_embeddings": True, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5}
    config = config_of(settings)
    net = config.decoder(dtype=dtype)
    params, _ = net.model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    return Pretrained(config, net, jax.tree.map(np.asarray, params), None)


def ours(config: Config, loaded: Pretrained, batch_size: int, prompt: int) -> dict[str, Any]:
    """Seconds of a prefill and of decoding, the first call aside; and the tokens."""
    params = unstacked(jax.tree.map(jnp.asarray, loaded.params))
    ids = jnp.asarray(np.arange(batch_size * prompt).reshape(batch_size, -1) * 7919 % 40_000, jnp.int32)

    def call(length: int) -> Any:
        return generate(loaded.decoder, params, ids, jax.random.key(0), length=length, temperature=0)

    found = timed({"first": (call, (1,)), "all": (call, (config.tokens + 1,))}, config.rounds)
    seconds = {"prefill": found["first"], "decode": found["all"] - found["first"]}
    return {"seconds": seconds, "tokens": call(config.tokens + 1).tokens.tolist()}


def main(config: Config) -> None:
    """Measures, prints."""
    dtype = jnp.dtype(config.dtype)
    loaded = load_pretrained(config.model, dtype=dtype) if config.model else random_weights(dtype)
    operations, _ = rates(config.dtype)
    weights = jax.tree.map(jnp.asarray, loaded.params)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    total = jax.jit(lambda tree: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(tree)))
    bandwidth = size / timed({"read": (total, (weights,))}, 9)["read"]
    del weights
    print(f"weights: {size / 1e6:.0f} MB; read at {bandwidth / 1e9:.1f} GB/s; products: {operations / 1e9:.0f} GFLOP/s")
    cells = []
    with tempfile.TemporaryDirectory() as folder:
        if config.peer:
            save_pretrained(folder, loaded.params, loaded.config)
        for batch_size, prompt in itertools.product(config.batch_sizes, config.prompts):
            own = ours(config, loaded, batch_size, prompt)
            table = loaded.params["embedding"].nbytes
            each = jnp.dtype(config.dtype).itemsize
            flops = batch_size * (prompt * 2 * (size - table) + 2 * table) / each
            floor = {"prefill": flops / operations, "decode": config.tokens * size / bandwidth}
            cell: dict[str, Any] = {"batch_size": batch_size, "prompt": prompt, "ours": own["seconds"], "floor": floor}
            if config.peer:
                arguments = [str(n) for n in (batch_size, prompt, config.tokens, config.rounds)]
                script = Path(__file__).with_name("decoding_peer.py")
                command = [str(config.peer / "bin" / "python"), str(script), folder, *arguments]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                said = json.loads(done.stdout.strip().splitlines()[-1])
                cell["peer"] = said["seconds"]
                cell["same_tokens"] = float(np.mean(np.array(said["tokens"]) == np.array(own["tokens"])))
                again = ours(config, loaded, batch_size, prompt)["seconds"]
                cell["ours"] = {name: (value + again[name]) / 2 for name, value in own["seconds"].items()}
            cells.append(cell)
            for part, seconds in cell["ours"].items():
                line = f"batch {batch_size}, prompt {prompt}, {part}: {1e3 * seconds:.0f} ms"
                line += f", floor {1e3 * floor[part]:.0f} ms"
                if config.peer:
                    best = min(each[part] for each in cell["peer"].values())
                    line += f"; transformers {1e3 * best:.0f} ms, {best / seconds:.2f} times ours"
                print(line, flush=True)
            if config.peer:
                print(f"batch {batch_size}, prompt {prompt}: {100 * cell['same_tokens']:.0f} % of tokens are the same")
    if config.record:
        path = Path(__file__).parent / "results" / f"decoding_{jax.default_backend()}.json"
        fields = ("tokens", "dtype")
        name = {"model": Path(config.model).stem if config.model else "random weights, 135M"} | {
            field: getattr(config, field) for field in fields
        }
        measured = {"weights_bytes": size, "bytes_per_second": bandwidth, "flop_per_second": operations}
        write_json(path, {"environment": environment(), "settings": name, **measured, "cells": cells})


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
