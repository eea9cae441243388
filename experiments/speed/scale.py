"""Toward many devices: what lies on each of 8, and what crosses between them in an update.

    python -m experiments.speed.scale            3 minutes; the devices are simulated, so no time is measured
    python -m experiments.speed.scale --record

Examples of a batch are dealt out over the devices. Of the state, every leaf that is large enough is cut along its
longest axis that 8 divides, a memory along its rows; XLA's partitioner does the rest. Bytes a device are what the
compiler plans (`memory_analysis`), and those that cross are the results of its collectives, times the passes of the
loops around them.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEVICES = 8
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
import tyro  # noqa: E402
from jax.sharding import AxisType, NamedSharding, PartitionSpec  # noqa: E402

from cl_zoo import Component, Learner, compose, ewc, replay, supervised  # noqa: E402
from cl_zoo.language import decoder  # noqa: E402
from cl_zoo.layers import softmax_attention  # noqa: E402
from cl_zoo.losses import next_token_loss  # noqa: E402
from cl_zoo.training.run_directory import environment, write_json  # noqa: E402
from cl_zoo.types import Batch, PyTree  # noqa: E402
from cl_zoo.wrappers import lora  # noqa: E402

HERE = Path(__file__).parent
LARGE = 2**14
"""Elements from which on a leaf is cut."""
WIDTH, LAYERS, VOCABULARY, LENGTH, BATCH = 512, 8, 8192, 128, 16


@dataclasses.dataclass(frozen=True)
class Config:
    """What is kept."""

    record: bool = False
    """Write experiments/speed/results/scale.json."""


def learner_of(*components: Component, adapters: bool = False) -> Learner:
    """A decoder of 33 million parameters."""
    net = decoder(VOCABULARY, [(softmax_attention(WIDTH, heads=8), 4 * WIDTH, LAYERS)], rematerialise=True)
    model = lora(net.model, rank=16) if adapters else net.model
    return compose(model, optax.adamw(1e-3), supervised(next_token_loss), *components)


def cut(mesh: jax.sharding.Mesh, leaf: Any) -> NamedSharding:
    """Along the longest axis that the devices divide, if it is worth it."""
    axes = [i for i, size in enumerate(leaf.shape) if size % DEVICES == 0]
    if leaf.size < LARGE or not axes or jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return NamedSharding(mesh, PartitionSpec())
    axis = max(axes, key=lambda i: leaf.shape[i])
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, "devices"))


COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(")
CALLED = re.compile(r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def crossing(text: str) -> dict[str, int]:
    """Bytes of the results of each kind of collective in a compiled program, on one device."""
    bodies: dict[str, list[str]] = {}
    for block in re.split(r"\n\n", text):
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) ?\(", block.lstrip("\n")):
            bodies["ENTRY" if head[1] else head[2]] = block.splitlines()[1:]

    def walk(name: str) -> dict[str, int]:
        found: dict[str, int] = defaultdict(int)
        for line in bodies.get(name, []):
            if match := COLLECTIVE.search(line):
                found[match[2]] += sum(map(bytes_of, re.findall(r"(\w+)\[([\d,]*)\]", match[1])))
            times = int(trips[1]) if (trips := TRIPS.search(line)) else 1
            inner = [found_name for found_name in CALLED.findall(line) if not match]
            for found_name in inner:
                for kind, value in walk(found_name).items():
                    found[kind] += times * value
        return found

    return dict(walk("ENTRY"))


def bytes_of(shape: tuple[str, str]) -> int:
    """Of an array as the compiler writes it, `f32[8,16]`."""
    size = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}.get(shape[0], 4)
    return size * math.prod(int(n) for n in shape[1].split(",") if n)


def measured(learner: Learner, replicated: bool = False) -> dict[str, int]:
    """Bytes of each part of the state on a device, of the whole update, and what crosses; with `replicated` nothing but
    the batch is cut."""
    mesh = jax.make_mesh((DEVICES,), ("devices",), axis_types=(AxisType.Auto,))
    shape = jax.ShapeDtypeStruct
    key, tokens = jax.random.key(0), jnp.zeros((BATCH, LENGTH), jnp.int32)
    example = Batch(tokens, tokens, None, jnp.ones(BATCH))
    learner, state = jax.eval_shape(lambda: (learner.drawn(key, example), learner.init(key, example)))

    def placed(tree: PyTree, rule: Callable[[Any], NamedSharding]) -> PyTree:
        return jax.tree.map(lambda leaf: shape(leaf.shape, leaf.dtype, sharding=rule(leaf)), tree)

    def kept(tree: PyTree) -> int:
        leaves = [leaf for leaf in jax.tree.leaves(tree) if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
        return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)

    deal, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("devices",), ()))
    state, learner = placed((state, learner), lambda leaf: whole if replicated else cut(mesh, leaf))
    update = jax.jit(
        lambda learner, state, batch: learner.update(state, batch)[0],
        donate_argnums=1,
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, state),
    )
    compiled = update.lower(learner, state, placed(example, lambda _: deal)).compile()
    plan = compiled.memory_analysis()
    return {
        "params": kept(state.params),
        "frozen weights": kept(learner.model.weights),
        "opt_state": kept(state.opt_state),
        **{name: kept(part) for name, part in state.parts.items()},
        "arguments": plan.argument_size_in_bytes,
        "temporaries": plan.temp_size_in_bytes,
        **crossing(compiled.as_text()),
    }


ROWS: dict[str, Callable[[], dict[str, int]]] = {
    "supervised": lambda: measured(learner_of()),
    "supervised, nothing cut": lambda: measured(learner_of(), replicated=True),
    "ewc": lambda: measured(learner_of(ewc(1.0, labels="loss"))),
    "replay of 100 000 sequences": lambda: measured(learner_of(replay(100_000, batch_size=BATCH))),
    "LoRA and ewc": lambda: measured(learner_of(ewc(1.0, labels="loss"), adapters=True)),
    "LoRA and ewc, nothing cut": lambda: measured(learner_of(ewc(1.0, labels="loss"), adapters=True), replicated=True),
}


def main(config: Config) -> None:
    """Prints a row a learner, in MB a device."""
    found = {}
    for name, measure in ROWS.items():
        row = found[name] = measure()
        print(f"{name}:", *(f"{key} {value / 1e6:.1f}" for key, value in row.items() if value), flush=True)
    if config.record:
        write_json(HERE / "results" / "scale.json", {"devices": DEVICES, "environment": environment(), "rows": found})


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
