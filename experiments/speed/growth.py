"""How costs grow with sizes: time and memory against one size at a time, and the exponent of the last decade.

    python -m experiments.speed.growth               with nothing else running; about 15 minutes on 2 cores
    python -m experiments.speed.growth --only rows batch

An exponent of 1 is linear growth. The verdict compares it with what theory says: more than 0.15 above is too fast.
Memory is what the compiler plans for the program (arguments, results, temporaries), or bytes on disk.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from cl_zoo import Component, compose, der, ewc, fit, gdumb, la_maml, mas, replay, supervised, sweep
from cl_zoo.algorithms.la_maml import look_ahead_sgd
from cl_zoo.compilation import jit
from cl_zoo.datasets import LabelledImages
from cl_zoo.evaluation import accuracy, at
from cl_zoo.language import decoder, unstacked
from cl_zoo.layers import softmax_attention
from cl_zoo.losses import next_token_loss
from cl_zoo.models import mlp
from cl_zoo.streams import permuted_mnist, split_mnist
from cl_zoo.training import stream_program
from cl_zoo.training.loop import finish, start, train_steps
from cl_zoo.training.run_directory import environment, write_json
from cl_zoo.types import Batch
from cl_zoo.wrappers import with_learning_rates

HERE = Path(__file__).parent
KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    only: tuple[str, ...] = ()
    """Names of sizes; all by default."""
    rounds: int = 5
    largest: float = 1e9
    """Sizes above are left out."""
    record: bool = False
    """Write experiments/speed/results/growth_DEVICE.json and the figure beside it."""


class Point(NamedTuple):
    """Attributes:
    call: what is timed, ready to run.
    per: what its time is divided by.
    memory: bytes, or nan.
    compile_seconds: of its program, or nan.
    """

    call: Callable[[], Any]
    per: float
    memory: float = float("nan")
    compile_seconds: float = float("nan")


class Size(NamedTuple):
    """Attributes:
    values: sizes, rising.
    point: makes the measurement at one of them.
    time, memory: exponents that theory allows.
    what: is timed.
    """

    values: Sequence[int]
    point: Callable[[int], Point]
    time: float
    memory: float
    what: str


def images(classes: int = 10, each: int = 40, side: int = 28) -> LabelledImages:
    """Noise: only shapes matter here."""
    random = np.random.default_rng(0)
    labels = np.tile(np.arange(classes), each)
    pixels = random.integers(0, 256, (len(labels), side, side)).astype(np.uint8)
    return LabelledImages(
        pixels, labels.astype(np.int32), pixels[: 2 * classes], labels[: 2 * classes].astype(np.int32)
    )


def program(function: Callable[..., Any], *arguments: Any, per: float = 1, donated: bool = False) -> Point:
    """A compiled call; with `donated`, what it returns is what its last argument becomes."""
    begun = time.perf_counter()
    compiled = jit(function, donate_argnums=len(arguments) - 1 if donated else ()).lower(*arguments).compile()
    seconds, kept = time.perf_counter() - begun, [arguments[-1]]
    plan = compiled.memory_analysis()
    memory = (
        plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes - plan.alias_size_in_bytes
    )

    def call() -> Any:
        result = compiled(*arguments[:-1], kept[0])
        if donated:
            kept[0] = result
        return result

    return Point(call, per, float(memory), seconds)


def steps_of(
    *components: Component,
    hidden: tuple[int, ...] = (64,),
    batch: int = 64,
    steps: int = 200,
    classes: int = 10,
    learned_rates: bool = False,
) -> Point:
    """Microseconds of a step, from a memory that is full as far as time allows."""
    stream = split_mnist(1, images=images(classes, max(40, -(-batch // classes))), steps=steps, batch_size=batch)
    model, optimiser = mlp((28, 28), classes, hidden=hidden), optax.sgd(0.01)
    if learned_rates:
        model, optimiser = with_learning_rates(model, 0.01), look_ahead_sgd(0.1)
    learner = compose(model, optimiser, *(components or [supervised()]), tasks=stream.tasks)
    carry = jit(lambda learner, stream: start(learner, stream, KEY)[1])(learner, stream)

    def run(learner: Any, stream: Any, carry: Any) -> Any:
        return train_steps(learner, stream, carry, 0, steps, {}, {})[0]

    return program(run, learner, stream, carry, per=steps, donated=True)


def fisher(labels: str) -> Callable[[int], Point]:
    """The end of a task under EWC, 400 examples."""

    def point(classes: int) -> Point:
        stream = split_mnist(1, images=images(classes, max(2, 400 // classes)), steps=1, batch_size=8, sample_size=400)
        learner = compose(mlp((28, 28), classes, hidden=(64,)), optax.sgd(0.01), supervised(), ewc(1.0, labels=labels))
        state = jit(lambda learner, stream: start(learner, stream, KEY)[1][0])(learner, stream)
        return program(lambda a, s, c: finish(a, s, KEY, c, jnp.int32(0)), learner, stream, state)

    return point


def runs_of(tasks: int, measure: Any) -> Point:
    """A run of ten updates a task, and what it measures."""
    stream = permuted_mnist(tasks, images=images(), steps=10, batch_size=16)
    learner = compose(mlp((28, 28), 10, hidden=(64,)), optax.sgd(0.01), supervised(), tasks=stream.tasks)
    made = stream_program(learner, stream, measure=measure)
    begun = time.perf_counter()
    compiled = made.lower(learner, stream, KEY).compile()  # type: ignore[attr-defined]
    return Point(lambda: compiled(learner, stream, KEY), 1, compile_seconds=time.perf_counter() - begun)


def fit_of(steps: int, reopened: bool) -> Point:
    """A run of so many updates from the host, or the opening of a finished one; bytes of its log."""
    stream = split_mnist(1, images=images(), steps=steps, batch_size=16)
    learner = compose(mlp((28, 28), 10, hidden=(16,)), optax.sgd(0.01), supervised(), tasks=stream.tasks)
    folder = tempfile.mkdtemp()

    def run(name: str) -> Any:
        return fit(learner, stream, KEY, f"{folder}/{name}", checkpoint_every=1000, progress=False).state.step

    run("kept")
    log = (Path(folder) / "kept" / "metrics.csv").stat().st_size
    if reopened:
        return Point(lambda: run("kept"), 1, log)
    return Point(lambda: run(f"{time.perf_counter_ns()}"), steps, log)


def sweep_of(runs: int) -> Point:
    """So many learning rates."""
    stream = split_mnist(1, images=images(), steps=100, batch_size=16)
    rates = jnp.linspace(0.01, 0.1, runs)

    def make(rate: Any) -> Any:
        return compose(mlp((28, 28), 10, hidden=(64,)), optax.sgd(rate), supervised(), tasks=stream.tasks)

    return Point(lambda: sweep(make, rates, stream, KEY[None]).accuracy, 1)


def tokens_of(tokens: int, decoded: bool) -> Point:
    """A training step on one sequence of so many tokens, or a token with a cache of so many places."""
    net = decoder(256, [(softmax_attention(128, 4), 344, 4)])
    learner = compose(net.model, optax.sgd(0.01), supervised(next_token_loss))
    x = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, tokens)), jnp.int32)
    batch = Batch(x, x, None, jnp.ones(1))
    state = jit(learner.init)(KEY, batch)
    if not decoded:
        return program(lambda batch, state: learner.update(state, batch)[0], batch, state)

    def decode(params: Any, cache: Any) -> Any:
        step = lambda cache, token: net.step(params, cache, token[None])[::-1]  # noqa: E731
        return jax.lax.scan(step, cache, x[0, :32])[0]

    params = unstacked(state.params)  # as `generate` does
    cache = jit(lambda params: net.start(params, 1, tokens))(params)
    return program(decode, params, cache, per=32, donated=True)


def width_of(parameters: int) -> tuple[int, int]:
    """Two hidden layers with so many parameters in all."""
    w = int(-397 + np.sqrt(397**2 + parameters))
    return (max(w, 8), max(w, 8))


def sizes() -> dict[str, Size]:
    """All that is measured."""
    rows = (1_000, 10_000, 100_000, 500_000)
    memories = {
        "reservoir": lambda n: [supervised(), replay(n)],
        "ring": lambda n: [supervised(), replay(n, memory="ring", n_classes=10)],
        "class-balanced": lambda n: [supervised(), replay(n, memory="class_balanced", n_classes=10)],
        "der": lambda n: [supervised(), der(n, alpha=0.5)],
        "gdumb": lambda n: [gdumb(n, 10)],
        "c-maml": lambda n: [la_maml(n, rate=0.1)],
        "la-maml": lambda n: [la_maml(n)],
    }
    last = {"accuracy": at("end", accuracy())}

    def with_rows(name: str) -> Size:
        batch = 10 if "maml" in name else 64
        learned = name == "la-maml"
        return Size(rows, lambda n: steps_of(*memories[name](n), batch=batch, learned_rates=learned), 0, 1, "step")

    return {
        **{f"rows, {name}": with_rows(name) for name in memories},
        "batch": Size((16, 64, 256, 1024, 4096), lambda n: steps_of(batch=n, steps=50), 1, 1, "step"),
        "parameters": Size(
            (10**5, 10**6, 10**7, 10**8),
            lambda n: steps_of(hidden=width_of(n), steps=max(3, 2 * 10**7 // n)),
            1,
            1,
            "step",
        ),
        "classes": Size((10, 100, 1000), lambda n: steps_of(classes=n), 1, 1, "step"),
        "classes, exact Fisher": Size((10, 100, 1000), fisher("expected"), 1, 1, "end of a task"),
        "classes, sampled Fisher": Size((10, 100, 1000), fisher("sampled"), 1, 1, "end of a task"),
        "tasks, R": Size((10, 100, 300), lambda n: runs_of(n, None), 2, 2, "run"),
        "tasks, measured at the end": Size((10, 100, 1000), lambda n: runs_of(n, last), 1, 1, "run"),
        "steps in fit": Size((1_000, 10_000, 100_000), lambda n: fit_of(n, False), 0, 1, "step"),
        "steps in fit, reopened": Size((1_000, 10_000, 100_000), lambda n: fit_of(n, True), 1, 1, "opening"),
        "runs in sweep": Size((1, 4, 16, 64), sweep_of, 1, 1, "sweep"),
        "components": Size(
            (1, 4, 16), lambda n: steps_of(supervised(), *(mas(0.1, name=f"mas_{i}") for i in range(n))), 1, 1, "step"
        ),
        "depth": Size((1, 4, 16, 64), lambda n: steps_of(hidden=(64,) * n), 1, 1, "step"),
        "tokens, training": Size((128, 512, 2048), lambda n: tokens_of(n, False), 2, 2, "step"),
        "tokens, decoding": Size((128, 512, 2048), lambda n: tokens_of(n, True), 1, 1, "token"),
    }


def exponent(values: Sequence[float], costs: Sequence[float]) -> float:
    """The slope of log cost against log size over the last decade, or the last two sizes."""
    x, y = np.log10(np.array(values, float)), np.log10(np.array(costs, float))
    last = np.flatnonzero(x >= x[-1] - 1.01)
    last = last if len(last) > 1 else np.arange(len(x) - 2, len(x))
    return float(np.polyfit(x[last], y[last], 1)[0])


def measured(size: Size, config: Config) -> Iterator[dict[str, float]]:
    """One size after another, so that a large one does not lie in memory beside the others."""
    for value in size.values:
        if value > config.largest:
            continue
        point = size.point(value)
        jax.block_until_ready(point.call())
        seconds = []
        for _ in range(config.rounds):
            begun = time.perf_counter()
            jax.block_until_ready(point.call())
            seconds.append((time.perf_counter() - begun) / point.per)
        yield {
            "size": value,
            "seconds": statistics.median(seconds),
            "least": min(seconds),
            "most": max(seconds),
            "bytes": point.memory,
            "compile_seconds": point.compile_seconds,
        }
        jax.clear_caches()


def told(seconds: float) -> str:
    """With a unit that fits."""
    for unit, scale in (("us", 1e6), ("ms", 1e3)):
        if seconds * scale < 1000:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds:.3g} s"


def row(name: str, size: Size, points: list[dict[str, float]]) -> dict[str, Any]:
    """Points, exponents and verdict."""
    values, seconds = [p["size"] for p in points], [p["seconds"] for p in points]
    found = {"name": name, "what": size.what, "points": points, "time_in_theory": size.time}
    found["time_exponent"] = exponent(values, seconds)
    memory = [p["bytes"] for p in points]
    if np.isfinite(memory).all():
        found |= {"memory_exponent": exponent(values, memory), "memory_in_theory": size.memory}
    found["verdict"] = "as it should" if found["time_exponent"] <= size.time + 0.15 else "too fast"
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown."""
    lines = ["| size | timed | from | to | time | exponent | theory | memory's | verdict |", "|" + "---|" * 9]
    for r in rows:
        first, last = r["points"][0], r["points"][-1]
        memory = f"{r['memory_exponent']:.2f}" if "memory_exponent" in r else ""
        lines.append(
            f"| {r['name']} | {r['what']} | {first['size']:,} | {last['size']:,} | {told(first['seconds'])} to"
            f" {told(last['seconds'])} | {r['time_exponent']:.2f} | {r['time_in_theory']} | {memory} | {r['verdict']} |"
        )
    return "\n".join(lines)


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Small panels: time against size, both logarithmic, with the slope that theory allows."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    columns = 7
    fig, axes = plt.subplots(-(-len(rows) // columns), columns, figsize=(16, 2.4 * -(-len(rows) // columns)))
    for axis, r in zip(np.ravel(axes), rows, strict=False):
        x, y = [p["size"] for p in r["points"]], np.array([p["seconds"] for p in r["points"]])
        spread = np.array([[p["seconds"] - p["least"], p["most"] - p["seconds"]] for p in r["points"]]).T
        axis.errorbar(x, y, spread, marker="o", markersize=3, linewidth=1.2)
        allowed = y[-1] * (np.array(x) / x[-1]) ** r["time_in_theory"]
        axis.plot(x, allowed, linestyle=":", color="grey")
        axis.set(xscale="log", yscale="log", ylim=(y.min() / 4, y.max() * 4))
        axis.set_title(f"{r['name']}: {r['time_exponent']:.2f}", fontsize=8)
        axis.tick_params(labelsize=6)
        for side in (axis.xaxis, axis.yaxis):
            side.set_minor_formatter(NullFormatter())
        axis.set_ylabel(f"s a {r['what']}", fontsize=6)
    for axis in np.ravel(axes)[len(rows) :]:
        axis.axis("off")
    fig.suptitle("time against size (dotted: the slope of theory, through the last point)", fontsize=9)
    fig.tight_layout()
    fig.savefig(path, dpi=120)


def main(config: Config) -> None:
    """Measures, prints a table; with --record writes JSON and the figure."""
    every = sizes()
    chosen = {n: s for n, s in every.items() if not config.only or any(n.startswith(o) for o in config.only)}
    if not chosen:
        raise SystemExit(f"only: no size begins so; there are {', '.join(every)}")
    path, rows = HERE / "results" / f"growth_{jax.default_backend()}.json", []
    kept = {r["name"]: r for r in json.loads(path.read_text())["rows"]} if path.exists() else {}
    for name, size in chosen.items():
        rows.append(row(name, size, list(measured(size, config))))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
        if config.record:  # after each, so that a kill loses no more than one; those not measured again stay
            kept[name] = rows[-1]
            write_json(path, {"environment": environment(), "rows": [kept[n] for n in every if n in kept]})
    print(f"\n{table(rows)}")
    if config.record:
        figure([kept[n] for n in every if n in kept], path.with_suffix(".png"))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
