"""What the Fisher of an MLP costs: in Adam steps on the same batch, and against per-example gradients by `vmap(grad)`.

    python -m experiments.speed.fisher          with nothing else running; 25 s on 2 cores

The floor, in multiply-adds per row for widths d-h-h-C: an Adam step takes 3 (dh + hh + hC) - dh, as no gradient goes to
the input. The fast Fisher takes one forward pass, dh + hh + hC; C backward passes of cotangents alone, C (hh + hC); and
one product of squares, dh + hh + hC.
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
import optax
import tyro

from cl_zoo import Batch, compose, supervised
from cl_zoo.compilation import jit
from cl_zoo.estimators.fisher import fisher_diagonal
from cl_zoo.models import mlp
from cl_zoo.training.run_directory import environment, write_json


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    widths: tuple[int, ...] = (256, 400, 1000)
    batch_size: int = 128
    repeats: int = 7
    record: bool = False
    """Write experiments/speed/results/fisher_cpu.json."""


def seconds(function: Callable[..., Any], *arguments: Any, repeats: int, n: int) -> float:
    """The median over `repeats` of one of the `n` rounds of a compiled function."""
    compiled = jit(function).lower(*arguments).compile()
    jax.block_until_ready(compiled(*arguments))
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        times.append((time.perf_counter() - begun) / n)
    return statistics.median(times)


def measure(width: int, config: Config, rounds: int = 20) -> dict[str, float]:
    """Milliseconds a batch."""
    inputs, classes, rows = 784, 10, config.batch_size
    model = mlp((inputs,), classes, hidden=(width, width))
    learner = compose(model, optax.adam(1e-3), supervised())
    key = jax.random.key(0)
    x = jax.random.uniform(key, (rounds, rows, inputs))
    y = jax.random.randint(key, (rounds, rows), 0, classes)
    batches = Batch(x, y, None, jnp.ones((rounds, rows)))
    state = learner.init(key, jax.tree.map(lambda leaf: leaf[0], batches))

    def forward(params: Any, batch: Batch, perturb: Any) -> Any:
        outputs, _, taps = model.apply(params, state.model_state, batch.x, perturb=perturb)
        return outputs, taps

    def without_taps(params: Any, batch: Batch, perturb: Any) -> Any:
        return forward(params, batch, None)[0], {}

    few = jax.tree.map(lambda leaf: leaf[:2], batches)
    step = seconds(lambda s, b: jax.lax.scan(learner.update, s, b), state, batches, repeats=config.repeats, n=rounds)
    fast = seconds(lambda p, b: fisher_diagonal(forward, p, b), state.params, batches, repeats=config.repeats, n=rounds)
    slow = seconds(lambda p, b: fisher_diagonal(without_taps, p, b), state.params, few, repeats=3, n=2)
    layers = inputs * width + width * width + width * classes
    floor = (2 * layers + classes * (layers - inputs * width)) / (3 * layers - inputs * width)
    return {
        "adam_step_ms": 1e3 * step,
        "fisher_ms": 1e3 * fast,
        "vmap_grad_ms": 1e3 * slow,
        "fisher_in_adam_steps": fast / step,
        "floor_in_adam_steps": floor,
        "vmap_grad_in_fishers": slow / fast,
    }


def main(config: Config) -> None:
    """Measures and prints."""
    found = {str(width): measure(width, config) for width in config.widths}
    print(f"{'width':>6s}" + "".join(f"{name:>24s}" for name in next(iter(found.values()))))
    for width, values in found.items():
        print(f"{width:>6s}" + "".join(f"{value:24.2f}" for value in values.values()))
    if config.record:
        path = Path(__file__).parent / "results" / "fisher_cpu.json"
        write_json(path, {"environment": environment(), "batch_size": config.batch_size, "widths": found})


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
