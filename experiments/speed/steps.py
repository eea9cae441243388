"""What a step of every algorithm costs: its time and its operations, as multiples of the naive learner's.

    python -m experiments.speed.steps          with nothing else running

Those whose rows are learning problems or questions have scripts of their own, and those that look ahead row by row are
made for batches of ten. Operations are those of XLA's cost analysis of one update before optimisation, so that matrix
products given to libraries are counted. A ratio of times above that of operations tells of memory traffic and of many
small kernels.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import optax
import tyro

from cl_zoo import Learner, Stream, catalogue, compose, supervised
from cl_zoo.compilation import jit
from cl_zoo.datasets import load_digits
from cl_zoo.entries import Entry
from cl_zoo.evaluation.cost import state_bytes
from cl_zoo.models import mlp
from cl_zoo.streams import split_mnist
from cl_zoo.training.loop import begin, finish, start, train_steps
from cl_zoo.training.run_directory import environment, write_json
from cl_zoo.wrappers import with_rotation_head

# The catalogue's arguments are those of the contract's tests, in which units are reset all the time.
USUAL = {
    "continual_backprop": {"replacement_rate": 1e-4, "maturity": 100},
    "redo": {"threshold": 0.1, "every": 1000},
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    hidden: tuple[int, ...] = (400, 400)
    batch_size: int = 128
    steps: int = 200
    rounds: int = 7
    only: tuple[str, ...] = ()
    """Names of the catalogue; all by default."""
    record: bool = False
    """Write experiments/speed/results/steps_cpu.json."""


def learner_of(entry: Entry, config: Config, stream: Stream) -> Learner:
    """With a memory of 1000 rows and as many of them in each step as new ones."""
    sizes = {"capacity": 1000, "batch_size": config.batch_size, "n_classes": stream.tasks.active.shape[-1]}
    chosen = {name: sizes.get(name, value) for name, value in entry.arguments.items()} | USUAL.get(entry.name, {})
    component = entry.factory(**chosen)
    components = [component] if entry.own_loss else [supervised(), component]
    norm = "batch" if entry.name == "tent" else None
    model = mlp((28, 28), stream.tasks.active.shape[-1], hidden=config.hidden, norm=norm)
    if entry.name == "ttt":
        model = with_rotation_head(model, mlp(config.hidden[-1:], 4, hidden=()), "output")
    return compose(model, optax.adam(1e-3), *components, tasks=stream.tasks)


def prepare(entry: Entry, config: Config, images: Any) -> tuple[Any, tuple[Any, ...], float, dict[str, int]]:
    """A compiled run of steps in the second task, its arguments, operations of a step, bytes kept."""
    stream = split_mnist(scenario=entry.scenarios[0], images=images, batch_size=config.batch_size, sample_size=1000)
    learner, key = learner_of(entry, config, stream), jax.random.key(0)

    @jit
    def first_task(learner: Learner, stream: Stream) -> Any:
        learner, (state, cursor) = start(learner, stream, key)
        state = begin(learner, stream, key, state, 0)
        (state, cursor), _ = train_steps(learner, stream, (state, cursor), 0, stream.steps, {}, {})
        state = finish(learner, stream, key, state, 0)
        return begin(learner, stream, key, state, 1), cursor

    carry = first_task(learner, stream)
    batch, _ = jit(lambda stream, cursor: stream.next(cursor))(stream, carry[1])
    flops = (jit(learner.update).lower(carry[0], batch).cost_analysis() or {}).get("flops", float("nan"))
    run = jit(lambda learner, stream, carry: train_steps(learner, stream, carry, 0, config.steps, {}, {})[0])
    compiled = run.lower(learner, stream, carry).compile()
    jax.block_until_ready(compiled(learner, stream, carry))
    return compiled, (learner, stream, carry), float(flops), state_bytes(carry[0])


def main(config: Config) -> None:
    """Measures all in turn, so that a slow minute of the machine hits all; prints a table."""
    images = load_digits()
    entries = {name: entry for name, entry in catalogue().items() if name not in ("la_maml", "c_maml")}
    entries = {name: entry for name, entry in entries.items() if entry.scenarios[0] not in ("episodes", "skills")}
    for name in config.only:
        if name not in entries:
            raise SystemExit(f"only: no algorithm is named {name!r}; there are {', '.join(entries)}")
    names = ["supervised", *(name for name in config.only or entries if name != "supervised")]
    ready = {name: prepare(entries[name], config, images) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(config.rounds):
        for name, (compiled, arguments, _, _) in ready.items():
            begun = time.perf_counter()
            jax.block_until_ready(compiled(*arguments))
            times[name].append((time.perf_counter() - begun) / config.steps)
    found = {}
    naive_time, naive_flops = statistics.median(times["supervised"]), ready["supervised"][2]
    print(f"{'':24s}{'us a step':>11s}{'time':>8s}{'FLOPs':>8s}{'time / FLOPs':>14s}{'MB kept':>9s}")
    for name, (_, _, flops, kept) in ready.items():
        median = statistics.median(times[name])
        own = sum(value for part, value in kept.items() if part not in ("params", "model_state", "opt_state"))
        found[name] = {
            "microseconds": 1e6 * median,
            "time_ratio": median / naive_time,
            "flop_ratio": flops / naive_flops,
            "bytes_kept": own,
        }
        time_ratio, flop_ratio = found[name]["time_ratio"], found[name]["flop_ratio"]
        print(
            f"{name:24s}{1e6 * median:11.0f}{time_ratio:8.2f}{flop_ratio:8.2f}"
            f"{time_ratio / flop_ratio if flop_ratio else float('nan'):14.2f}{own / 1e6:9.2f}"
        )
    if config.record:
        path = Path(__file__).parent / "results" / "steps_cpu.json"
        settings = {"hidden": config.hidden, "batch_size": config.batch_size}
        write_json(path, {"environment": environment(), **settings, "steps": found})


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
