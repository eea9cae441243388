"""Second-order MAML on sinusoids side by side: cl_zoo, learn2learn and plain PyTorch, all else being the same.

    bash experiments/speed/make_peer_env.sh PEER            once: the peers' own environment
    python -m experiments.speed.maml --peer PEER            with nothing else running; some minutes

25 tasks in an iteration, drawn again every time, 10 support and 10 query points each, an MLP 1-40-40-1, one inner step.
Every number is the median of `repeats` fresh processes, taken in turn so that a slow minute of the machine hits all,
and of each process the median of its rounds after a warm-up: compiling is left out on all sides. All run with 1 and
with 2 threads, and the better counts. `torch_maml.py` tells the ways of PyTorch. The losses of the first 100 and the
last 300 iterations show that all do the same.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import optax
import tyro

from cl_zoo import Learner, Stream, compose, maml
from cl_zoo.compilation import jit
from cl_zoo.losses import squared_error
from cl_zoo.models import mlp
from cl_zoo.streams import sinusoids
from cl_zoo.training.loop import histories, start, train_steps
from cl_zoo.training.run_directory import environment, write_json
from cl_zoo.wrappers import episodic
from experiments.speed.compare import run

HERE = Path(__file__).parent
WAYS = {
    "learn2learn": ["--way", "learn2learn"],
    "torch, task by task": ["--way", "tasks"],
    "torch.func": ["--way", "func"],
    "torch.func, compiled": ["--way", "func", "--compile"],
    "torch, batched": ["--way", "batched"],
}
WARM_UP, ITERATIONS = 100, 300  # as in torch_maml.py


@dataclasses.dataclass(frozen=True)
class Config:
    """What is compared."""

    peer: Path
    """Folder of the peers' environment."""
    repeats: int = 5
    rounds: int = 5
    """Of 300 iterations in each process."""
    threads: tuple[int, ...] = (1, 2)
    record: bool = False
    """Write experiments/speed/results/maml_cpu.json."""


def problem(**options: Any) -> tuple[Learner, Stream]:
    """The learner and its stream; `options` are those of `maml`."""
    stream = sinusoids(steps=70_000, shots=10, queries=10, batch_size=25)
    model = episodic(mlp((1,), 1, hidden=(40, 40), initialiser="fan_in_uniform"))
    learner = compose(
        model, optax.adam(1e-3), maml(squared_error, inner=optax.sgd(0.01), **options), tasks=stream.tasks
    )
    return learner, stream


def cl_zoo_report(threads: int, rounds: int) -> dict[str, Any]:
    """Of this process, which must not have computed anything yet: what `torch_maml.py` prints."""
    os.environ["NPROC"] = str(threads)  # read when XLA starts its threads
    learner, stream = problem(inner_steps=1)

    def compiled(n: int, carry: Any) -> Any:
        def steps(learner: Learner, stream: Stream, carry: Any) -> Any:
            return train_steps(learner, stream, carry, 0, n, *histories(learner, stream, carry, n))

        return jit(steps).lower(learner, stream, carry).compile()

    carry = jit(lambda learner, stream, key: start(learner, stream, key)[1])(learner, stream, jax.random.key(0))
    carry, metrics = compiled(WARM_UP, carry)(learner, stream, carry)
    first, steps = float(metrics["loss"].mean()), compiled(ITERATIONS, carry)
    seconds = []
    for _ in range(rounds):
        begun = time.perf_counter()
        carry, metrics = jax.block_until_ready(steps(learner, stream, carry))
        seconds.append((time.perf_counter() - begun) / ITERATIONS)
    last = float(metrics["loss"].mean())
    return {"seconds_iteration": statistics.median(seconds), "loss_first": first, "loss_last": last}


def in_fresh_process(function: Any, *arguments: Any) -> Any:
    """What the function gives in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure(config: Config) -> dict[str, dict[str, Any]]:
    """Medians of every side with every number of threads; of the peers' versions, those of the last report."""
    peer = str(config.peer.resolve() / "bin" / "python")
    reports: dict[str, list[dict[str, Any]]] = {}
    for i in range(config.repeats):
        for threads in config.threads:
            found = in_fresh_process(cl_zoo_report, threads, config.rounds)
            reports.setdefault(f"cl_zoo, {threads} threads", []).append(found)
            for name, way in WAYS.items():
                sizes = {"warm-up": WARM_UP, "iterations": ITERATIONS, "rounds": config.rounds, "threads": threads}
                options = [part for field, value in sizes.items() for part in (f"--{field}", str(value))]
                found = run([peer, "torch_maml.py", *way, *options], OMP_WAIT_POLICY="passive")
                reports.setdefault(f"{name}, {threads} threads", []).append(found)
        print(f"round {i + 1} of {config.repeats}", flush=True)
    fields = ("seconds_iteration", "loss_first", "loss_last")
    return {
        name: {field: statistics.median(report[field] for report in each) for field in fields}
        | {"n": len(each), "versions": each[-1].get("versions", {})}
        for name, each in reports.items()
    }


def main(config: Config) -> None:
    """Measures, prints microseconds, iterations a second and multiples."""
    found = measure(config)
    best = {
        side: min(value["seconds_iteration"] for name, value in found.items() if name.rsplit(",", 1)[0] == side)
        for side in ("cl_zoo", *WAYS)
    }
    ratios = {side: seconds / best["cl_zoo"] for side, seconds in best.items() if side != "cl_zoo"}
    print(f"{'':32s}{'us an iteration':>17s}{'a second':>10s}{'first loss':>12s}{'last loss':>11s}")
    for name, value in found.items():
        seconds = value["seconds_iteration"]
        losses = f"{value['loss_first']:12.3f}{value['loss_last']:11.3f}"
        print(f"{name:32s}{1e6 * seconds:17.0f}{1 / seconds:10.0f}{losses}")
    for side, ratio in ratios.items():
        print(f"{side:32s}{ratio:17.2f} times as long as cl_zoo")
    if config.record:
        write_json(HERE / "results" / "maml_cpu.json", {"environment": environment(), "sides": found, "ratios": ratios})


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
