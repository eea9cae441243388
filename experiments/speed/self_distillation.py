"""What an update of self-distillation costs beside one of fine-tuning, and where its time goes.

    python -m experiments.speed.self_distillation                   2 minutes on 2 cores, with nothing else running
    python -m experiments.speed.self_distillation --model MODEL     5 minutes

In the settings of `experiments.self_distillation`: the small language, or a published model with adapters. Operations
are counted by hand there (`spent`): fine-tuning reads a question and its answer forward and backward; self-distillation
also draws the answer (one more pass forward) and reads the demonstration, question and answer with the teacher. Rounds
are taken in turn; medians. On a GPU give larger batches: --batch-size 64 --dtype bfloat16 (not run yet).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import tyro

from cl_zoo import compose
from cl_zoo.compilation import jit
from cl_zoo.language import answer_logits, answering, generate
from cl_zoo.streams import SymbolWorld
from cl_zoo.training.loop import start
from cl_zoo.training.run_directory import environment, write_json
from experiments.self_distillation import components, spent
from experiments.self_distillation_bench import Bench, Config, filled, language_net, published
from experiments.speed.sequence_layers import rates, timed


@dataclasses.dataclass(frozen=True)
class Measure:
    """What is measured."""

    model: str | None = None
    batch_size: int | None = None
    """None is the study's. Where it is more, rows come again."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of a model with adapters."""
    rounds: int = 7
    record: bool = False
    """Write experiments/speed/results/self_distillation_DEVICE.json, the model's beside the small language's."""


def untrained(config: Config) -> Bench:
    """The small language's net with its first weights: time does not depend on what it knows."""
    world = SymbolWorld(known=config.known, new=1)
    net = language_net(config, world)
    stream = world.skills(steps=config.steps or 1, batch_size=config.batch_size)
    batch, _ = stream.next(stream.init(jax.random.key(0)))
    weights, _ = answering(net).init(jax.random.key(0), batch.x)
    return Bench(net, weights, stream, stream, (None, None), world.answer_length, (), lambda model: model)


def main(measure: Measure) -> None:
    """Measures, prints."""
    config = filled(Config(model=measure.model, dtype=measure.dtype))
    bench = untrained(config) if measure.model is None else published(config, 0)._replace(stop=())
    rows = measure.batch_size or config.batch_size or 1
    model, stream = bench.wrap(answering(bench.net)), bench.stream
    calls: dict[str, tuple[Any, tuple[Any, ...]]] = {}
    for method in ("sft", "sdft forward"):
        learner = compose(model, optax.adam(1e-3), *components(config, bench, method)).bind(bench.weights)
        learner, (state, cursor) = start(learner, stream, jax.random.key(0))
        batch, _ = stream.next(cursor)
        batch = jax.tree.map(lambda leaf: jnp.resize(leaf, (rows, *leaf.shape[1:])), batch)
        update = jit(lambda learner, state, batch: learner.update(state, batch))
        calls[f"{method}, update"] = (update, (learner, state, batch))
    params = learner.model.inner_params(state.params)
    x, n = batch.x, bench.length
    draw = jit(
        lambda params, x: generate(bench.net, params, x.prompt, jax.random.key(0), length=n, padding=x.padding).tokens
    )
    teach = jit(lambda params, x: answer_logits(bench.net, params, x.shown, x.shown_padding, x.answer))
    calls |= {"drawing the answers": (draw, (params, x)), "the teacher's pass": (teach, (params, x))}
    seconds = timed(calls, measure.rounds)
    sized = dataclasses.replace(config, batch_size=rows)
    operations = {method: spent(sized, bench, method)["operations"] for method in ("sft", "sdft forward")}
    for name, value in seconds.items():
        print(f"{name:24s}{1e3 * value:9.1f} ms")
    ratios = {
        "operations": operations["sdft forward"] / operations["sft"],
        "time": seconds["sdft forward, update"] / seconds["sft, update"],
    }
    print("sdft / sft: " + ", ".join(f"{name} {value:.2f}" for name, value in ratios.items()))
    rate, _ = rates("float32" if measure.model is None else config.dtype)
    of_products = {m: value / (config.steps or 1) / seconds[f"{m}, update"] / rate for m, value in operations.items()}
    told = ", ".join(f"{method} {100 * value:.0f} %" for method, value in of_products.items())
    print(f"of the rate of large products, {rate / 1e9:.0f} GFLOP/s: {told}")
    if measure.record:
        what = "language" if measure.model is None else Path(measure.model).stem
        path = Path(__file__).parent / "results" / f"self_distillation_{what}_{jax.default_backend()}.json"
        shapes = {"prompt": x.prompt.shape, "shown": x.shown.shape, "answer": n}
        found = {"seconds": seconds, "ratios": ratios, "flop_per_second": rate, "of_large_products": of_products}
        write_json(path, {"environment": environment(), "settings": shapes, **found})


if __name__ == "__main__":
    main(tyro.cli(Measure, description=__doc__))
