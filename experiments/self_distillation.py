"""Does a language model that learns from its own answers forget less of what it knew? Self-distillation and its rivals.

Command                                                        hardware    time     expected
python -m experiments.self_distillation --seeds 10 --record    1 CPU core           5 seeds, per gain: ewc 0.44, sdft
                                                               0.47, replay 0.51, context 0.55, sft, offline 0.57
python -m experiments.self_distillation --model MODEL --seeds 3 --record
                                                               1 CPU core  50 min   sft 0.67, sdft 0.77 (drift 1.5, 0.2)
python -m experiments.self_distillation --model QWEN --lora 64 --steps 60 --rates 1e-4 3e-4 --dtype bfloat16
                                                               1 GPU, 80 GB not run published: Shenfeld et al. 2026

MODEL is a folder or .gguf file, as SmolLM2-135M-Instruct; QWEN a folder with Qwen2.5-7B-Instruct, of which the paper
trained all weights, on other tasks: not attempted. With --lora 0 all weights are trained, in float32.

Skills come one after the other. Each is a mapping that the model follows with a demonstration in its context, and
not without; that is asserted before anything is learned. Two settings:

- By default, a decoder of 2 blocks learns a small language of symbols in this script: two dozen known cues, each with
  its permutation, and to follow any permutation that a demonstration shows. Then come three new cues. What may be
  forgotten are the known cues and the following of demonstrations; text is held-out sequences of the language, but for
  those that the new cues are to change.
- With --model, a published one learns words of an invented language with adapters of low rank. It is asked 'In Zorgish,
  cat is called "', where a demonstration is the line 'cat -> "boda"' of a dictionary before the question; and is tested
  by another question, 'The Zorgish word for cat is "'. What may be forgotten are capitals of countries, opposites and
  lines of code that it goes on with, 20 questions each; text is English.

Per method, each rate of --rates is tried with seeds 0 and 1; with the smallest whose validation score on the new
skills, just after each of them, is within a point of the best, all --seeds are run, from --first-seed on. "gain" is
that score's rise on the test split, "forgetting" the mean fall
of every skill that was there before the last one, known or new, from when it was known to the end; "drift" is
KL(before || after) per token of text. Nothing in a run sees the language or the known skills again, as after
deployment. So replay and EWC can keep new skills alone, while averaging (with the weights from before) can keep all. At
the end all methods have had equal updates; where the first new skill has risen by 90 %, equal gain.

Whether sdft forgets less than sft is judged by one measure, settled before seeds 10 and above were run: the fall of the
known skills at equal gain, paired by seed; with a curve of one point, forgetting per gain at the end.

Differences from the paper: skills, nets and sizes; a warm-up of a tenth of a skill's updates, then a constant rate,
where theirs falls by a cosine; Adam and the teacher go on from skill to skill.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from cl_zoo import (
    Component,
    Learner,
    Stream,
    TrainState,
    accuracy,
    at,
    compose,
    context_distillation,
    dft,
    ewc,
    offline_distillation,
    replay,
    sdft,
    supervised,
    sweep,
    wise_ft,
)
from cl_zoo.compilation import jit
from cl_zoo.language import Decoder, answering
from cl_zoo.losses import divergence, next_token_loss, token_losses
from experiments.common import Cell, all_but, run_cells, study
from experiments.self_distillation_bench import CHOOSING, IN_CONTEXT, Bench, Config, filled, prepare, scores
from experiments.self_distillation_report import chosen, figures, report, runs_of


def main(config: Config) -> None:
    """Runs the study, prints its table, draws its figures."""
    config = filled(config)
    bench = functools.lru_cache(maxsize=1)(lambda seed: prepare(config, Path(config.directory or ""), seed))
    make = functools.lru_cache(maxsize=1)(lambda method, seed: learners(config, bench(seed), method))

    def cell(method: str, rate: float) -> Cell:
        def one(seed: int) -> dict[str, Any]:
            learner = None if method == IN_CONTEXT else make(method, seed)
            return run(config, bench(seed), method, learner, rate, seed)

        return Cell(f"{rate:g}", method, f"{method}-{rate:g}", one)

    def cells(directory: Path) -> list[Cell]:
        """Every method with its rate, chosen on seeds that are not reported."""
        tried = [
            (method, rate) for method in config.methods for rate in (config.rates if method != IN_CONTEXT else (0.0,))
        ]
        best = chosen(runs_of(run_cells([cell(*each) for each in tried], directory, CHOOSING)))
        return [cell(*each) for each in best.items()]

    files = {"model": Path(config.model)} if config.model and Path(config.model).exists() else {}
    options: dict[str, Any] = {"settled": all_but(config, "methods", "rates"), "data": files}
    study("self_distillation", config, cells, functools.partial(report, config), figures, **options)


def components(config: Config, bench: Bench, method: str) -> list[Component]:
    """What learns, and what keeps."""
    options: dict[str, Any] = {"length": bench.length, "stop": bench.stop}
    own: dict[str, Any] = {**options, "skip": config.skip, "decay": 1 - config.teacher_rate}
    return {
        "sft": lambda: [supervised(next_token_loss)],
        "sft + replay": lambda: [supervised(next_token_loss), replay(500, batch_size=config.batch_size)],
        "sft + ewc": lambda: [supervised(next_token_loss), ewc(config.strength, labels="loss", micro_batch=8)],
        "sft + interpolation": lambda: [supervised(next_token_loss), wise_ft(0.5, pretrained=True)],
        "dft": lambda: [dft()],
        "offline distillation": lambda: [offline_distillation(**options)],
        "context distillation": lambda: [context_distillation(**options)],
        "sdft forward": lambda: [sdft(**own)],
        "sdft reverse": lambda: [sdft(direction="reverse", **own)],
    }[method]()


def learners(config: Config, bench: Bench, method: str) -> Callable[[Any], Learner]:
    """By rate: the same program for all of them."""
    model, parts = bench.wrap(answering(bench.net)), components(config, bench, method)
    warm_up = max((config.steps or 1) // 10, 1)

    def make(rate: Any) -> Learner:
        schedule = optax.linear_schedule(0.0, rate, warm_up)
        return compose(model, optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule)), *parts)

    return make


def run(config: Config, bench: Bench, method: str, make: Any, rate: float, seed: int) -> dict[str, Any]:
    """One method, rate and seed: what was measured before, at each point within the skills, and after each of them."""
    begun = time.perf_counter()
    found = measured_in_context(bench) if method == IN_CONTEXT else measured(config, bench, make, rate, seed)
    found = jax.tree.map(lambda leaf: np.asarray(leaf, float).tolist(), found)
    if not np.isfinite(found["loss"]).all():
        raise SystemExit(f"{method} with rate {rate:g} diverged; leave this rate out")
    return found | {"seconds": time.perf_counter() - begun, **spent(config, bench, method)}


def measured(config: Config, bench: Bench, make: Callable[[Any], Learner], rate: float, seed: int) -> dict[str, Any]:
    """All skills in turn, measured on the way."""

    def measure(learner: Learner, state: TrainState, stream: Stream, key: jax.Array) -> dict[str, jax.Array]:
        before, after = learner.model.weights, learner.model.inner_params(state.params)
        drift, perplexity = on_text(bench.net, bench.text, before, after)
        return {
            "new": accuracy()(learner, state, stream),
            "validation": accuracy("validation")(learner, state, stream),
            "held": accuracy()(learner, state, bench.held),
            "drift": drift,
            "perplexity": perplexity,
        }

    result = sweep(
        make,
        jnp.array([rate], jnp.float32),
        bench.stream,
        jax.random.key(seed)[None],
        weights=bench.weights,
        measure={"skills": measure, "curve": at(bench.stream.steps // (config.points or 1), measure)},
        metrics=["loss"],
    )
    found, loss = jax.tree.map(lambda leaf: leaf[0, 0], (result.measures, result.metrics["loss"]))
    before, after = (jax.tree.map(lambda leaf, at=at: leaf[at], found["skills"]) for at in (0, slice(1, None)))
    return {"before": before, "after": after, "curve": found["curve"], "loss": loss}


def on_text(net: Decoder, text: Any, before: Any, after: Any) -> tuple[Any, Any]:
    """Means over the scored tokens: KL(before || after), and the perplexity after."""

    def row(each: Any) -> tuple[Any, Any, Any]:
        x, y = each
        old, new = (net.model.apply(params, {}, x[None])[0] for params in (before, after))
        drift = jnp.where(y >= 0, divergence(new, old, "forward")[0], 0)
        return jnp.sum(drift), jnp.sum(token_losses(new, y[None])), jnp.sum(y >= 0)

    drift, loss, n = (jnp.sum(each) for each in jax.lax.map(row, text))
    return drift / n, jnp.exp(loss / n)


def measured_in_context(bench: Bench) -> dict[str, Any]:
    """Demonstrations before every question, and no update: nothing can be forgotten, and every question is longer."""
    shown, plain = answering(bench.net, shown=True), answering(bench.net)
    new, held = scores(bench, shown, bench.weights, bench.stream), scores(bench, plain, bench.weights, bench.held)
    without = scores(bench, plain, bench.weights, bench.stream)
    _, perplexity = jit(functools.partial(on_text, bench.net))(bench.text, bench.weights, bench.weights)
    still = {"held": held, "drift": np.zeros(()), "perplexity": np.asarray(perplexity)}
    t = bench.stream.n_tasks
    again = jax.tree.map(lambda leaf: np.stack([leaf] * t), still | {"new": new, "validation": new})
    curve = jax.tree.map(lambda leaf: leaf[:, None], again)
    before = still | {"new": without, "validation": without}
    return {"before": before, "after": again, "curve": curve, "loss": np.zeros((t, 1))}


def spent(config: Config, bench: Bench, method: str) -> dict[str, float]:
    """Tokens that pass through the net in a skill's updates, forward, and operations: two for each weight that a token
    meets forward, four more backward, two where it is frozen; the embedding's table is met by logits alone."""
    x = jax.eval_shape(lambda: bench.stream.next(bench.stream.init(jax.random.key(0)))[0]).x
    p, q, n = x.prompt.shape[1], x.shown.shape[1], bench.length
    shapes = jax.tree.leaves_with_path(bench.weights)
    kernels = sum(leaf.size for path, leaf in shapes if leaf.ndim > 2 and "embedding" not in str(path[0]))
    table = sum(leaf.size for path, leaf in shapes if str(path[0].key) in ("embedding", "head")) / (
        1 + any(str(path[0].key) == "head" for path, _ in shapes)
    )

    def forward(context: int) -> tuple[float, float]:
        """A question and its answer."""
        return context + n - 1, 2 * (kernels * (context + n - 1) + table * n)

    student, teacher = forward(p), forward(q)
    rows = config.batch_size * (config.steps or 1)
    # Frozen kernels have no gradients of their own, only those that pass through them.
    learn = (2 if config.model and config.lora else 3) * student[1]
    if method == IN_CONTEXT:
        return {"tokens": 0.0, "operations": 0.0}
    if method == "sft + replay":
        return {"tokens": 2.0 * rows * student[0], "operations": 2.0 * rows * learn}
    if method.startswith("sdft"):  # drawn by the student, graded by the teacher
        return {
            "tokens": rows * (2 * student[0] + teacher[0]),
            "operations": rows * (student[1] + learn + teacher[1]),
        }
    if method == "context distillation":
        return {
            "tokens": rows * (student[0] + 2 * teacher[0]),
            "operations": rows * (2 * teacher[1] + learn),
        }
    if method == "offline distillation":
        return {"tokens": rows * (student[0] + teacher[0]), "operations": rows * (teacher[1] + learn)}
    return {"tokens": float(rows * student[0]), "operations": float(rows * learn)}


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
