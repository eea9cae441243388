"""Convolutional networks inside of compiled loops, beside the same update alone and beside PyTorch.

    bash experiments/speed/make_peer_env.sh PEER                    once: the peers' own environment
    python -m experiments.speed.convolutions --peer PEER            with nothing else running; about 10 minutes

An update of SGD on random images: jitted alone; in the loops of `run_stream` and `fit`; and PyTorch's eager step with
1 and 2 threads, of which the better counts. Then two computations over a convolutional net, alone and in a loop: a step
of second-order MAML, and the Fisher of a batch. All sides take turns, `repeats` times, and medians are compared.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
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
from jax import lax

from cl_zoo import Episode, Model, compose, maml, supervised
from cl_zoo.compilation import jit
from cl_zoo.datasets import LabelledImages
from cl_zoo.estimators.fisher import fisher_diagonal
from cl_zoo.models import cnn, resnet26
from cl_zoo.streams import split_mnist
from cl_zoo.training._fit import _programs
from cl_zoo.training.loop import start, train_steps
from cl_zoo.training.run_directory import environment, write_json
from cl_zoo.types import Batch
from cl_zoo.wrappers import episodic

HERE = Path(__file__).parent
NETS: dict[str, tuple[Callable[[], Model], tuple[int, ...]]] = {
    "resnet26, group norm": (lambda: resnet26((32, 32, 3), 10), (32, 32, 3)),
    "resnet26, batch norm": (lambda: resnet26((32, 32, 3), 10, norm="batch"), (32, 32, 3)),
    "cnn": (lambda: cnn((28, 28), 10), (28, 28)),
}
# Net, batch, updates that are timed at once.
CASES = (
    ("resnet26, group norm", 20, 10),
    ("resnet26, group norm", 128, 3),
    ("resnet26, batch norm", 20, 10),
    ("resnet26, batch norm", 128, 3),
    ("cnn", 64, 50),
    ("cnn", 10, 100),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """What is compared."""

    peer: Path
    """Folder of the peers' environment."""
    repeats: int = 5
    record: bool = False
    """Write experiments/speed/results/convolutions_cpu.json."""


def seconds(function: Callable[[], Any]) -> float:
    """Of one call."""
    begun = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - begun


def sides(net: str, batch: int, updates: int) -> dict[str, Callable[[], float]]:
    """Each gives milliseconds of an update."""
    make, shape = NETS[net]
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (10 * batch, *shape)).astype(np.uint8)
    labels = (np.arange(len(images)) % 10).astype(np.uint8)
    stream = split_mnist(
        n_tasks=1, steps=updates, batch_size=batch, images=LabelledImages(images, labels, images[:10], labels[:10])
    )
    learner = compose(make(), optax.sgd(0.1), supervised(), tasks=stream.tasks)
    carry = jit(lambda learner, stream: start(learner, stream, jax.random.key(0))[1])(learner, stream)
    example, _ = stream.next(carry[1])
    alone = jit(learner.update)
    # The loops of `run_stream` and `fit`, without what they do once a task.
    loop = jit(lambda learner, stream, carry: train_steps(learner, stream, carry, 0, updates, {}, {})[0])
    train = _programs(jax.tree.structure((learner, stream)))["train"]
    count = jnp.int32(updates)

    def in_fit() -> float:
        own = jax.tree.map(jnp.copy, carry)  # it is donated
        return 1e3 * seconds(lambda: train(learner, stream, own, count, updates, None)) / updates

    return {
        "alone": lambda: statistics.median(1e3 * seconds(lambda: alone(carry[0], example)) for _ in range(updates)),
        "run_stream": lambda: 1e3 * seconds(lambda: loop(learner, stream, carry)) / updates,
        "fit": in_fit,
    }


def in_torch(peer: Path, net: str, batch: int, updates: int, threads: int) -> float:
    """Milliseconds of an update."""
    command = [str(peer.absolute() / "bin" / "python"), str(HERE / "torch_convolutions.py"), net]
    sizes = [str(size) for size in (batch, updates, threads)]
    return json.loads(subprocess.run([*command, *sizes], capture_output=True, check=True).stdout)["ms"]


def alone_and_in_a_loop(step: Callable[[Any], Any], carry: Any, times: int) -> dict[str, Callable[[], float]]:
    """Milliseconds of `carry -> carry`, jitted alone and scanned."""
    alone, loop = jit(step), jit(lambda carry: lax.scan(lambda c, _: (step(c), None), carry, length=times)[0])
    return {
        "alone": lambda: statistics.median(1e3 * seconds(lambda: alone(carry)) for _ in range(times)),
        "loop": lambda: 1e3 * seconds(lambda: loop(carry)) / times,
    }


def maml_step() -> dict[str, Callable[[], float]]:
    """Of four problems, five ways with two images each, of 28 x 28 pixels."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.integers(0, 256, (4, 10, 28, 28)), jnp.uint8)
    y = jnp.tile(jnp.arange(5, dtype=jnp.int32).repeat(2), (4, 1))
    batch = Batch(Episode(x, y, x), y, None, jnp.ones(4))
    model = episodic(cnn((28, 28), 5))
    learner = compose(model, optax.adam(1e-3), maml(inner=optax.sgd(0.1), inner_steps=3))
    state = jit(learner.init)(jax.random.key(0), batch)
    return alone_and_in_a_loop(lambda state: learner.update(state, batch)[0], state, 10)


def fisher_step() -> dict[str, Callable[[], float]]:
    """With sampled labels, of 32 images."""
    model = cnn((28, 28), 10)
    x = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, 32, 28, 28)), jnp.uint8)
    params, state = jit(model.init)(jax.random.key(0), x[0])
    batches = Batch(x, None, None, jnp.ones((1, 32)))

    def forward(params: Any, batch: Batch, perturb: Any) -> Any:
        outputs, _, taps = model.apply(params, state, batch.x, perturb=perturb)
        return outputs, taps

    def step(params: Any) -> Any:
        fisher = fisher_diagonal(forward, params, batches, labels="sampled", key=jax.random.key(0))
        return jax.tree.map(lambda p, f: p - 1e-3 * f, params, fisher)

    return alone_and_in_a_loop(step, params, 10)


def main(config: Config) -> None:
    """Measures, prints milliseconds and ratios."""
    found: dict[str, dict[str, float]] = {}
    cases: dict[str, dict[str, Callable[[], float]]] = {}
    for net, batch, updates in CASES:
        each = cases[f"{net}, batch {batch}"] = sides(net, batch, updates)
        for threads in (1, 2):
            each[f"torch, {threads} threads"] = functools.partial(in_torch, config.peer, net, batch, updates, threads)
    cases |= {"second-order MAML on a cnn": maml_step(), "Fisher of a cnn": fisher_step()}
    for name, each in cases.items():
        for side, measure in each.items():
            if "torch" not in side:
                measure()  # compiles
        rounds = [{side: measure() for side, measure in each.items()} for _ in range(config.repeats)]
        row = {side: statistics.median(r[side] for r in rounds) for side in each}
        if "fit" in row:
            row["torch"] = min(row.pop("torch, 1 threads"), row.pop("torch, 2 threads"))
            row["slowest loop / alone"] = max(row["run_stream"], row["fit"]) / row["alone"]
            row["slowest loop / torch"] = max(row["run_stream"], row["fit"]) / row["torch"]
        else:
            row["loop / alone"] = row["loop"] / row["alone"]
        found[name] = row
        print(f"{name:30s}" + "".join(f"  {side} {value:.2f}" for side, value in row.items()), flush=True)
    if config.record:
        write_json(HERE / "results" / "convolutions_cpu.json", {"environment": environment(), "ms": found})


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
