"""Where the time of a compiled stream goes: the thunks of XLA's CPU runtime, by total time.

    python -m experiments.speed.profile_stream --setting online

Names are those of the compiled program's instructions: "dot" and "ynn" are matrix products, "fusion" element-wise work.
"""

from __future__ import annotations

import collections
import dataclasses
import gzip
import json
import tempfile
from pathlib import Path
from typing import Literal

import jax
import optax
import tyro

from cl_zoo import compose, ewc, supervised
from cl_zoo.datasets import load_digits
from cl_zoo.models import mlp
from cl_zoo.streams import permuted_mnist
from cl_zoo.training import stream_program
from experiments.speed.cl_zoo_run import SETTINGS


@dataclasses.dataclass(frozen=True)
class Config:
    """What is profiled."""

    setting: Literal["permuted", "online"] = "permuted"
    top: int = 25


def main(config: Config) -> None:
    """Runs once under the profiler, and prints a table."""
    n_tasks, n_train, hidden, batch_size = SETTINGS[config.setting]
    images = load_digits()
    every = len(images.train_labels) // n_train
    images = images._replace(train_images=images.train_images[::every], train_labels=images.train_labels[::every])
    stream = permuted_mnist(n_tasks, images=images, batch_size=batch_size)
    learner = compose(
        mlp((28, 28), 10, hidden=hidden, initialiser="fan_in_uniform"),
        optax.adam(1e-3),
        supervised(),
        ewc(100.0, labels="observed"),
        tasks=stream.tasks,
    )
    program = stream_program(learner, stream)
    arguments = (learner, stream, jax.random.key(0))
    jax.block_until_ready(program(*arguments))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            jax.block_until_ready(program(*arguments))
        (path,) = Path(folder).rglob("perfetto_trace.json.gz")
        trace = json.loads(gzip.decompress(path.read_bytes()))
    total: collections.Counter[str] = collections.Counter()
    count: collections.Counter[str] = collections.Counter()
    for event in trace["traceEvents"] if isinstance(trace, dict) else trace:
        if event.get("ph") == "X" and not event["name"].startswith("$"):
            total[event["name"]] += event["dur"]
            count[event["name"]] += 1
    print(f"{'ms':>9s}{'calls':>9s}{'us each':>10s}  thunk")
    for name, microseconds in total.most_common(config.top):
        print(f"{microseconds / 1e3:9.1f}{count[name]:9d}{microseconds / count[name]:10.1f}  {name[:90]}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
