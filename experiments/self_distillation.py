"""Does a language model that learns from its own answers forget less of what it knew? Self-distillation and its rivals.

Command                                                        hardware    time     expected
python -m experiments.self_distillation --seeds 5 --record     1 CPU core  40 min   forgetting per gain: ewc 0.44, sdft
                                                               0.47, replay 0.51, context 0.55, sft, offline 0.57
python -m experiments.self_distillation --model MODEL --seeds 3 --record
                                                               1 CPU core  50 min   sft 0.67, sdft 0.77 (drift 1.5, 0.2)
python -m experiments.self_distillation --model QWEN --lora 64 --steps 60 --rates 1e-4 3e-4 --dtype bfloat16
                                                               1 GPU, 80 GB not run published: Shenfeld et al. 2026

MODEL is a folder or .gguf file, as SmolLM2-135M-Instruct; QWEN a folder with Qwen2.5-7B-Instruct, of which the paper
trained all weights, on other tasks: not attempted. With --lora 0 all weights are trained, in float32.

Skills come one after the other. Each is a mapping that the model follows when a demonstration is before its eyes, and
not without; that is asserted before anything is learned. Two settings:

- By default, a decoder of 2 blocks learns a small language of symbols in this script: two dozen known cues, each with
  its permutation, and to follow any permutation that a demonstration shows. Then come three new cues. What may be
  forgotten are the known cues and the following of demonstrations; text is held-out rows of the language, but for
  those that the new cues are to change.
- With --model, a published one learns words of an invented language with adapters of low rank. It is asked 'In Zorgish,
  cat is called "', where a demonstration is the line 'cat -> "boda"' of a dictionary before the question; and is tested
  by another question, 'The Zorgish word for cat is "'. What may be forgotten are capitals of countries, opposites and
  lines of code that it goes on with, 20 questions each; text is English.

Per method, each rate of --rates is tried; shown is the smallest whose validation score on the new skills, just after
each of them, is within a point of the best. "gain" is that score's rise on the test split, "forgetting" the mean fall
of every skill that was there before the last one, known or new, from when it was known to the end; "drift" is
KL(before || after) per token of text. Nothing in a run sees the language or the known skills again, as after
deployment. So replay and EWC can keep new skills alone, while averaging (with the weights from before) can keep all. At
the end all methods have had equal updates; where the first new skill has risen by 90 %, equal gain.

Differences from the paper: skills, nets and sizes; a warm-up of a tenth of a skill's updates, then a constant rate,
where theirs falls by a cosine; Adam and the teacher go on from skill to skill.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from tqdm.auto import tqdm

from cl_zoo import (
    Component,
    Model,
    Stream,
    compose,
    context_distillation,
    dft,
    enable_compilation_cache,
    ewc,
    offline_distillation,
    replay,
    run_stream,
    sdft,
    supervised,
    wise_ft,
)
from cl_zoo.checks import check_range, check_whole
from cl_zoo.compilation import jit
from cl_zoo.datasets import python_library
from cl_zoo.evaluation import evaluate
from cl_zoo.evaluation.metrics import statistics
from cl_zoo.frozen import join_state, learner_with, split_state
from cl_zoo.language import Decoder, answering, decoder, load_pretrained
from cl_zoo.layers import softmax_attention
from cl_zoo.losses import divergence, next_token_loss, token_losses
from cl_zoo.streams import Example, SymbolWorld, skills
from cl_zoo.training.loop import begin, finish, start, train_steps
from cl_zoo.training.run_directory import ConfigError, settle_config, write_array, write_json
from cl_zoo.wrappers import lora
from experiments.common import RESULTS, record, shown_command, warmed_up_adamw

METHODS = (
    "in context",
    "sft",
    "sft + replay",
    "sft + ewc",
    "sft + interpolation",
    "dft",
    "offline distillation",
    "context distillation",
    "sdft forward",
    "sdft reverse",
)
PUBLISHED = {  # new task, mean of the prior suite; Qwen2.5-7B-Instruct before: 32.1, 42.9, 30.1 and 65.5
    "sft": ((66.2, 53.4), (63.2, 56.0), (35.5, 60.2)),
    "sft + re-invoke": ((66.0, 60.2), (63.1, 63.7), (35.6, 62.6)),
    "dft": ((54.8, 60.2), (64.2, 60.8), (36.2, 64.0)),
    "sdft forward": ((70.2, 64.5), (70.6, 65.4), (40.2, 65.4)),
}
SUITES = ("Science", "Tool use", "Medical")


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run. Unknown or impossible values are refused before anything compiles."""

    model: str | None = None
    """A published checkpoint; None for the small language."""
    methods: tuple[str, ...] = ()
    """All with the small language; "in context", "sft" and "sdft forward" with a model."""
    seeds: int = 1
    rates: tuple[float, ...] = ()
    """Of Adam, each tried; 3e-5, 1e-4, 3e-4 and 1e-3 with the small language, 1e-3, 2e-3, 4e-3, 8e-3 with a model."""
    steps: int | None = None
    """Updates per skill; 150 with the small language, 30 with a model."""
    batch_size: int | None = None
    """32 with the small language, 12 with a model: every word."""
    points: int | None = None
    """Of the curves, within each skill; 5 with the small language, 1 with a model."""
    new: int | None = None
    """Skills; 3 with the small language, 1 with a model."""
    known: int = 24
    """Cues that the small language has from the start."""
    first_steps: int = 4000
    """In which the small language is learned."""
    width: int = 64
    lora: int = 8
    """Rank of the adapters with a model; 0 trains all weights."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    skip: int = 0
    """Tokens of an answer that `sdft` does not learn from; the paper has 3, for answers that are hundreds long."""
    teacher_rate: float = 0.01
    """Of the teacher's moving average."""
    strength: float = 1e5
    """Of EWC; of 1e3, 1e5, 1e7 and 1e9, this one kept most at full gain with the small language (seed 0)."""
    directory: str | None = None
    """Of the run, runs/self_distillation or runs/self_distillation_model; what is finished there is not run again."""
    record: bool = False
    """Write the result file that the ledger is made from."""


class Bench(NamedTuple):
    """What is learned, by which net, and what may be forgotten.

    Attributes:
      net: the decoder.
      weights: that it begins from.
      stream: of new skills.
      held: a stream of skills that it has; only tested.
      text: tokens and targets `i32[R, L]` of what it speaks of otherwise.
      length, stop: of answers.
      wrap: what is trained, around `answering(net)`.
    """

    net: Decoder
    weights: Any
    stream: Stream
    held: Stream
    text: tuple[Any, Any]
    length: int
    stop: tuple[int, ...]
    wrap: Callable[[Model], Model]


def filled(config: Config) -> Config:
    """With the numbers that depend on the setting, and the others checked."""
    small = config.model is None

    def either(value: Any, of_language: Any, of_model: Any) -> Any:
        return value if value is not None else of_language if small else of_model

    given = dataclasses.replace(
        config,
        methods=config.methods or (METHODS if small else ("in context", "sft", "sdft forward")),
        rates=config.rates or ((3e-5, 1e-4, 3e-4, 1e-3) if small else (1e-3, 2e-3, 4e-3, 8e-3)),
        steps=either(config.steps, 150, 30),
        batch_size=either(config.batch_size, 32, len(WORDS)),
        points=either(config.points, 5, 1),
        new=either(config.new, 3, 1),
        directory=either(config.directory, "runs/self_distillation", "runs/self_distillation_model"),
    )
    try:
        for field in ("seeds", "steps", "batch_size", "points", "new", "known", "first_steps", "width"):
            check_whole("self_distillation", field, getattr(given, field), 1)
        for field in ("lora", "skip"):
            check_whole("self_distillation", field, getattr(given, field), 0)
        check_range("self_distillation", "teacher_rate", given.teacher_rate, 0, 1)
        check_range("self_distillation", "strength", given.strength, 0)
        for rate in given.rates:
            check_range("self_distillation", "rates", rate, 0)
        if not small:
            check_whole("self_distillation", "batch_size", given.batch_size, 1, len(WORDS))
            check_whole("self_distillation", "new", given.new, 1, len(LANGUAGES))
    except ValueError as error:
        raise SystemExit(str(error)) from error
    if given.steps % given.points:
        raise SystemExit(f"points is {given.points}, but it must divide the {given.steps} steps of a skill")
    if unknown := set(given.methods) - set(METHODS):
        raise SystemExit(f"methods names {', '.join(sorted(unknown))}, but there are {', '.join(METHODS)}")
    return given


def main(config: Config) -> None:
    """Runs the study, prints its table, draws its figures."""
    config = filled(config)
    enable_compilation_cache()
    directory = Path(config.directory)
    may_change = ("methods", "rates", "seeds", "directory", "record")
    try:
        settle_config(directory, {k: v for k, v in dataclasses.asdict(config).items() if k not in may_change})
    except ConfigError as error:
        raise SystemExit(str(error)) from error
    (directory / "cells").mkdir(exist_ok=True)
    cells: dict[tuple[str, float], list[dict[str, Any]]] = {}
    tried = [(name, rate) for name in config.methods for rate in (config.rates if name != "in context" else (0.0,))]
    bar = tqdm(total=len(tried) * config.seeds, unit="run")
    for seed in range(config.seeds):
        paths = {each: directory / "cells" / f"{each[0]}-{each[1]:g}-{seed}.json".replace(" ", "_") for each in tried}
        bench = None
        for each, path in paths.items():
            bar.set_description(each[0])
            if not path.exists():
                bench = bench or prepare(config, directory, seed)
                write_json(path, run(config, bench, *each, seed))
            cells.setdefault(each, []).append(json.loads(path.read_text()))
            bar.update()
    bar.close()
    best = chosen(cells)
    print(table(cells, best))
    print(*claim(cells, best), sep="\n")
    for path in figures(cells, best, directory):
        print(f"figure: {path}")
    name = "self_distillation" if config.model is None else "self_distillation_model"
    path = RESULTS / f"{name}.json" if config.record else directory / "results.json"
    write_record(config, name, cells, best, path)
    print(f"results: {path}")


def prepare(config: Config, directory: Path, seed: int) -> Bench:
    """Net, weights and streams of a seed; stops where demonstrations do not help."""
    bench = small_language(config, directory, seed) if config.model is None else published(config, seed)
    plain, shown = (
        float(scores(bench, answering(bench.net, shown=shown), bench.weights, bench.stream).mean())
        for shown in (False, True)
    )
    tqdm.write(f"seed {seed}: new skills {100 * plain:.1f} % without a demonstration, {100 * shown:.1f} % with one")
    if shown < plain + 0.1:
        raise SystemExit(
            f"the teacher is no better than the net itself: {100 * shown:.1f} % of the new skills with a demonstration,"
            f" {100 * plain:.1f} % without, so there is nothing to distil; take a larger net, or train it longer"
        )
    return bench


def scores(bench: Bench, model: Model, params: Any, stream: Stream) -> np.ndarray:
    """Of every skill, with all weights of the net."""
    learner = compose(model, optax.sgd(0.0), supervised(next_token_loss))

    @jit
    def score(params: Any, data: Any) -> Any:
        state, _ = start(learner, stream, data, jax.random.key(0), params)
        return evaluate(learner, stream, data, state)

    return np.asarray(score(params, stream.data))


def language_net(config: Config, world: SymbolWorld) -> Decoder:
    """With short convolutions of queries, keys and values, it learns to follow demonstrations in minutes."""
    mixer = softmax_attention(config.width, 4, convolution=4)
    return decoder(world.vocabulary, [mixer], layers=2, hidden=2 * config.width)


def small_language(config: Config, directory: Path, seed: int) -> Bench:
    """The net learns the language first; what it learned is kept."""
    world = SymbolWorld(known=config.known, new=config.new or 1, seed=seed)
    net = language_net(config, world)
    language = world.language(steps=config.first_steps, batch_size=64)
    key = jax.random.key(seed)
    shapes = jax.eval_shape(lambda: net.model.init(key, jnp.zeros((1, 1), jnp.int32))[0])
    paths = [directory / f"weights-{seed}" / f"{i}.npy" for i in range(len(jax.tree.leaves(shapes)))]
    if not all(path.exists() for path in paths):
        learner = compose(net.model, warmed_up_adamw(3e-3, config.first_steps), supervised(next_token_loss))
        found = run_stream(learner, language, key, evaluate_at="end").state.params
        paths[0].parent.mkdir(exist_ok=True)
        for path, leaf in zip(paths, jax.tree.leaves(found), strict=True):
            write_array(path, np.asarray(leaf))
    leaves = [jnp.asarray(np.load(path, allow_pickle=False)) for path in paths]
    rows = jax.tree.map(lambda leaf: leaf[0], language.evaluation(language.data, jnp.int32(0), "test"))
    overwritten = rows.x[:, 0] >= 4 + config.known  # a row begins with a demonstration's sign, or with its cue
    text = rows.x, jnp.where(overwritten[:, None], -1, rows.y)  # a new cue alone is what a skill is to change
    return Bench(
        net,
        jax.tree.unflatten(jax.tree.structure(shapes), leaves),
        world.skills(steps=config.steps or 1, batch_size=config.batch_size, seed=seed),
        world.known_skills(tests=64),
        text,
        world.answer_length,
        (3,),
        lambda model: model,
    )


WORDS = (
    "cat", "house", "river", "stone", "bread", "water", "fire", "moon", "tree", "bird", "road", "king",
)  # fmt: skip
LANGUAGES = ("Zorgish", "Balnic", "Quendar", "Movian")
CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo",
    "China": "Beijing", "Russia": "Moscow", "England": "London", "Egypt": "Cairo", "Greece": "Athens",
    "Ireland": "Dublin", "Portugal": "Lisbon", "Austria": "Vienna", "Norway": "Oslo", "Sweden": "Stockholm",
    "Poland": "Warsaw", "Hungary": "Budapest", "Cuba": "Havana", "Peru": "Lima", "Canada": "Ottawa",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "up": "down", "good": "bad", "fast": "slow", "hard": "soft", "wet": "dry", "strong": "weak",
    "inside": "outside", "high": "low", "light": "dark", "long": "short", "positive": "negative", "north": "south",
    "win": "lose", "old": "new", "black": "white", "true": "false", "left": "right", "big": "small", "rich": "poor",
}  # fmt: skip
CODE = {
    "import numpy as": " np", "import pandas as": " pd", "import matplotlib.pyplot as": " plt", "for i in": " range",
    "def __init__(": "self", "with open(filename) as": " f", "if x is not": " None", 'print("Hello,': " World",
    "x = x +": " 1", "a = [1, 2, 3,": " 4", "#include <stdio": ".h", "def add(a, b):\n    return a": " +",
    "if x > 0:\n    return True\nelse:\n    return": " False", "SELECT * FROM users": " WHERE", "x = np.": "array",
    "    def __len__(self):\n        return len(": "self", "class Cat(Animal):\n    def __init__(": "self",
    "np.zeros((2, 2": "))", "for key, value in data.": "items", "import tensorflow as": " tf",
}  # fmt: skip


def published(config: Config, seed: int) -> Bench:
    """A published model learns words of invented languages."""
    try:
        kept = config.dtype if config.lora else "float32"  # what is trained moves by less than bfloat16 can tell
        loaded = load_pretrained(config.model or "", dtype=jnp.dtype(config.dtype), weights_dtype=jnp.dtype(kept))
    except ValueError as error:
        raise SystemExit(str(error)) from error
    if loaded.tokenizer is None:
        raise SystemExit(f"{config.model} has no tokenizer, but questions are text")
    encode, random = loaded.tokenizer.encode, np.random.default_rng(seed)
    stop = tuple(encode('"'))
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    phrases = {
        "train": 'In {0}, {1} is called "',
        "validation": 'The word for {1} in {0} is "',
        "test": 'The {0} word for {1} is "',
    }
    tasks = []
    for language in LANGUAGES[: config.new]:
        words = {word: "".join(random.choice(syllables, 2)) for word in WORDS}
        rows: dict[str, list[Example]] = {}
        for split, phrase in phrases.items():
            rows[split] = []
            for word, told in words.items():
                question = phrase.format(language, word)
                shown = f'A {language} dictionary:\n{word} -> "{told}"\n{question}'
                rows[split].append(Example(encode(question), encode(shown), [*encode(told), *stop]))
        tasks.append(rows)
    suites = (
        {f"The capital of {country} is": f" {city}" for country, city in CAPITALS.items()},
        {f"The opposite of {word} is": f" {other}" for word, other in OPPOSITES.items()},
        CODE,
    )
    known: list[dict[str, list[Example]]] = []
    for suite in suites:
        asked = [Example(encode(question), encode(question), encode(answer)) for question, answer in suite.items()]
        known.append({"train": asked, "test": asked})
    lines = np.asarray(encode(python_library(60_000)["docstrings"].decode(errors="replace"))[: 8 * 129])
    text = lines.reshape((-1, 129))
    answers = (each.answer for rows in (*tasks, *known) for split in rows.values() for each in split)
    sizes = {"vocabulary": loaded.config.vocabulary, "answer_length": max(map(len, answers))}
    held = skills(known, steps=1, batch_size=1, evaluation_batch=10, **sizes)
    return Bench(
        loaded.decoder,
        jax.tree.map(jnp.asarray, loaded.params),
        skills(tasks, steps=config.steps or 1, batch_size=config.batch_size, evaluation_batch=8, **sizes),
        held,
        (jnp.asarray(text[:, :-1]), jnp.asarray(text[:, 1:])),
        sizes["answer_length"],
        stop,
        (lambda model: lora(model, config.lora)) if config.lora else (lambda model: model),
    )


def components(config: Config, bench: Bench, method: str) -> list[Component]:
    """What learns, and what keeps."""
    options: dict[str, Any] = {"length": bench.length, "stop": bench.stop}
    own: dict[str, Any] = {**options, "skip": config.skip, "rate": config.teacher_rate}
    return {
        "sft": lambda: [supervised(next_token_loss)],
        "sft + replay": lambda: [supervised(next_token_loss), replay(500, batch_size=config.batch_size)],
        "sft + ewc": lambda: [supervised(next_token_loss), ewc(config.strength, labels="loss", micro_batch=8)],
        "sft + interpolation": lambda: [supervised(next_token_loss), wise_ft(0.5, pretrained=True)],
        "dft": lambda: [dft()],
        "offline distillation": lambda: [offline_distillation(bench.net, **options)],
        "context distillation": lambda: [context_distillation(bench.net, **options)],
        "sdft forward": lambda: [sdft(bench.net, **own)],
        "sdft reverse": lambda: [sdft(bench.net, direction="reverse", **own)],
    }[method]()


def run(config: Config, bench: Bench, method: str, rate: float, seed: int) -> dict[str, Any]:
    """One method, rate and seed: what was measured before, at each point within the skills, and after each of them."""
    begun = time.perf_counter()
    if method == "in context":
        found = measured_in_context(bench)
    else:
        data = bench.stream.data, bench.held.data, bench.text
        found = program(config, bench, method)(*data, bench.weights, jnp.float32(rate), jax.random.key(seed))
    found = jax.tree.map(lambda leaf: np.asarray(leaf, float).tolist(), found)
    if not np.isfinite(found["loss"]).all():
        raise SystemExit(f"{method} with rate {rate:g} diverged; leave this rate out")
    return found | {"seconds": time.perf_counter() - begun, **spent(config, bench, method)}


def program(config: Config, bench: Bench, method: str) -> Callable[..., dict[str, Any]]:
    """All skills in turn, measured on the way, as one compiled program: the same for every rate and seed."""
    stream, held = bench.stream, bench.held
    tasks, model, parts = stream.tasks, bench.wrap(answering(bench.net)), components(config, bench, method)
    warm_up = max((config.steps or 1) // 10, 1)

    def whole(data: Any, held_data: Any, text: Any, weights: Any, rate: Any, key: Any) -> dict[str, Any]:
        schedule = optax.linear_schedule(0.0, rate, warm_up)
        learner = compose(model, optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule)), *parts)
        state, cursor = start(learner, stream, data, key, weights)
        state, frozen = split_state(state)
        holding = learner_with(learner, frozen)

        def measure(state: Any) -> dict[str, Any]:
            full = join_state(state, frozen)
            params = full.params if model.parameters is None else model.parameters(full.params, full.model_state)
            drift, perplexity = on_text(bench.net, text, weights, params)
            return {
                "new": evaluate(holding, stream, data, state),
                "validation": evaluate(holding, stream, data, state, "validation"),
                "held": evaluate(holding, held, held_data, state),
                "drift": drift,
                "perplexity": perplexity,
            }

        def chunk(carry: Any, _: Any) -> tuple[Any, Any]:
            carry, metrics = train_steps(holding, stream, data, carry, stream.steps // config.points)
            return carry, (measure(carry[0]), metrics["loss"])

        def task(carry: Any, t: Any) -> tuple[Any, Any]:
            carry = begin(holding, stream, tasks, data, key, carry[0], t), carry[1]
            carry, (curve, loss) = jax.lax.scan(chunk, carry, length=config.points)
            state = finish(holding, stream, data, key, carry[0], t)
            return (state, carry[1]), {"curve": curve, "after": measure(state), "loss": loss.ravel()}

        before = measure(state)
        _, found = jax.lax.scan(task, (state, cursor), jnp.arange(stream.n_tasks, dtype=jnp.int32))
        return {"before": before, **found}

    return jit(whole)


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
    _, perplexity = jit(partial(on_text, bench.net))(bench.text, bench.weights, bench.weights)
    still = {"held": held, "drift": np.zeros(()), "perplexity": np.asarray(perplexity)}
    t = bench.stream.n_tasks
    again = jax.tree.map(lambda leaf: np.stack([leaf] * t), still | {"new": new, "validation": new})
    curve = jax.tree.map(lambda leaf: leaf[:, None], again)
    before = still | {"new": without, "validation": without}
    return {"before": before, "after": again, "curve": curve, "loss": np.zeros((t, 1))}


def spent(config: Config, bench: Bench, method: str) -> dict[str, float]:
    """Tokens that pass through the net in a skill's updates, forward, and operations: two for each weight that a token
    meets forward, four more backward, two where it is frozen; the embedding's table is met by logits alone."""
    x = jax.eval_shape(lambda: bench.stream.next(bench.stream.data, bench.stream.init(jax.random.key(0)), None)[0]).x
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
    if method == "in context":
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


def summary(cell: dict[str, Any]) -> dict[str, float]:
    """The numbers of the table, of one run."""
    before, after = cell["before"], cell["after"]
    learned = np.diag(np.array(after["new"]))
    fallen = [np.array(before["held"]) - np.array(after["held"][-1]), (learned - np.array(after["new"][-1]))[:-1]]
    gain = float(np.mean(learned - np.array(before["new"])))
    forgetting = float(np.mean(np.concatenate(fallen)))
    return {
        "new": float(learned.mean()),
        "validation": float(np.diag(np.array(after["validation"])).mean()),
        "gain": gain,
        "retained": float(np.mean(after["held"][-1])),
        "forgetting": forgetting,
        "per gain": forgetting / gain if gain > 0.05 else float("nan"),
        "drift": float(after["drift"][-1]),
        "perplexity": float(after["perplexity"][-1]),
        "before": float(before["perplexity"]),
    }


def chosen(cells: dict[tuple[str, float], list[dict[str, Any]]]) -> dict[str, float]:
    """Of each method, the smallest rate whose validation score is within a point of its best."""
    scores: dict[str, dict[float, float]] = {}
    for (method, rate), runs in cells.items():
        scores.setdefault(method, {})[rate] = float(np.mean([summary(cell)["validation"] for cell in runs]))
    return {m: min(rate for rate, s in tried.items() if s >= max(tried.values()) - 0.01) for m, tried in scores.items()}


def table(cells: dict[tuple[str, float], list[dict[str, Any]]], best: dict[str, float]) -> str:
    """A row for each method at its best rate."""
    names = ("new", "retained", "forgetting", "per gain", "drift", "perplexity")
    lines = [f"{'':24s}{'rate':>8s}" + "".join(f"{name:>18s}" for name in names) + f"{'tokens':>10s}{'GFLOP':>10s}"]
    for method, rate in best.items():
        runs = cells[method, rate]
        row = f"{method:24s}{rate:>8g}"
        for name in names:
            factor = 100 if name in ("new", "retained", "forgetting") else 1
            s = statistics(factor * np.array([summary(cell)[name] for cell in runs]))
            row += f"{f'{s.mean:.3g} ± {s.sd:.2g}' if s.n > 1 else f'{s.mean:.3g}':>18s}"
        lines.append(row + f"{runs[0]['tokens']:>10.0f}{runs[0]['operations'] / 1e9:>10.1f}")
    perplexity = np.mean([summary(cell)["before"] for runs in cells.values() for cell in runs if runs[0]["tokens"]])
    said = "tokens and operations of a skill's updates; drift in nats per token of text"
    return "\n".join(lines) + f"\nnew, retained and forgetting in %; {said}; perplexity before: {perplexity:.3g}"


def fall_at(cell: dict[str, Any], gain: float) -> float:
    """How far the known skills have fallen when the first new one has risen by `gain`, linear between the points of
    the curve; nan where it never does, or the curve has one point."""
    before, new, held = cell["before"], np.array(cell["curve"]["new"]), np.array(cell["curve"]["held"])
    gains = np.array([0.0, *(new[0, :, 0] - before["new"][0])])
    falls = np.array([0.0, *(np.mean(before["held"]) - held[0].mean(axis=-1))])
    if gains.size < 3 or gains.max() < gain:
        return float("nan")
    after = int(np.argmax(gains >= gain))
    return float(np.interp(gain, gains[after - 1 : after + 1], falls[after - 1 : after + 1]))


def claim(cells: dict[tuple[str, float], list[dict[str, Any]]], best: dict[str, float]) -> list[str]:
    """Whether less is forgotten at equal gain, judged seed by seed in two ways; nothing where one of the two methods
    was not run, or learned nothing."""
    from scipy.stats import ttest_rel

    if not {"sft", "sdft forward"} <= set(best):
        return []
    measures = {
        "Forgetting per unit of gain, at the end": lambda cell: summary(cell)["per gain"],
        "Fall of the known skills when the first new one has risen by 90 %": lambda cell: fall_at(cell, 0.9),
    }
    told = []
    for what, measure in measures.items():
        sft, sdft = (np.array([measure(cell) for cell in cells[m, best[m]]]) for m in ("sft", "sdft forward"))
        if not np.isfinite([sft, sdft]).all():
            continue
        p = float(ttest_rel(sft, sdft).pvalue) if sft.size > 1 else float("nan")
        verdict = ("confirmed" if sdft.mean() < sft.mean() else "refuted") if p < 0.05 else "undecided"
        told.append(
            f"{what}: {sdft.mean():.3f} with sdft forward, {sft.mean():.3f} with sft; lower in"
            f" {np.sum(sdft < sft)} of {sft.size} seeds, p = {p:.2g} (paired t-test). That less is forgotten is"
            f" {verdict} at this scale."
        )
    return told


def figures(
    cells: dict[tuple[str, float], list[dict[str, Any]]], best: dict[str, float], directory: Path
) -> list[Path]:
    """New skills against what is retained, every method and rate; drift by update."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    looks = {method: {"color": f"C{i}", "marker": "os^vD<>pP*"[i % 10]} for i, method in enumerate(METHODS)}
    drawn, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for method in best:
        rates = sorted(rate for name, rate in cells if name == method)
        points = [
            [100 * np.mean([summary(cell)[field] for cell in cells[method, rate]]) for field in ("new", "retained")]
            for rate in rates
        ]
        axes.plot(*zip(*points), **looks[method], label=method, linewidth=1, markersize=5, alpha=0.8)
    axes.set(xlabel="new skills, % right just after each", ylabel="known skills, % right at the end")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), title="a point for each rate")
    paths = [directory / "new_against_retained.png", directory / "drift.png"]
    drawn.savefig(paths[0], dpi=150)
    plt.close(drawn)

    drawn, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for method, rate in best.items():
        if method == "in context":
            continue
        drift = np.mean([np.ravel(cell["curve"]["drift"]) for cell in cells[method, rate]], axis=0)
        steps = len(cells[method, rate][0]["loss"][0]) * len(cells[method, rate][0]["loss"]) // len(drift)
        axes.plot(steps * np.arange(len(drift) + 1), [0, *drift], **looks[method], label=method, markersize=3)
    axes.set(xlabel="updates", ylabel="KL(before || after), nats per token of text")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    drawn.savefig(paths[1], dpi=150)
    plt.close(drawn)
    return paths


def note(cells: dict[tuple[str, float], list[dict[str, Any]]], method: str, rate: float) -> str:
    """What must be known of a row."""
    tried = [each for name, each in cells if name == method]
    said = f"rate {rate:g}" if rate else "no update"
    if len(tried) > 1 and rate == max(tried):
        said += ", the largest tried"
    if not np.mean([summary(cell)["gain"] for cell in cells[method, rate]]) > 0.05:
        said += "; nothing was learned"
    return said


def write_record(
    config: Config,
    name: str,
    cells: dict[tuple[str, float], list[dict[str, Any]]],
    best: dict[str, float],
    path: Path,
) -> None:
    """The result file: ours in this setting, and the paper's in theirs, which is another."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    fields = {
        "new": "new skills",
        "retained": "known skills, at the end",
        "per gain": "forgetting per unit of gain",
        "drift": "drift, nats per token of text",
    }
    for field, setting in fields.items():
        for method, rate in best.items():
            factor = 1 if field in ("per gain", "drift") else 100
            values = factor * np.array([summary(cell)[field] for cell in cells[method, rate]])
            if np.isfinite(values).all():
                rows[setting, method] = {"scores": values, "seconds": [cell["seconds"] for cell in cells[method, rate]]}
    notes = {key: note(cells, key[1], best[key[1]]) for key in rows}
    told = "; ".join(
        f"{method}: " + ", ".join(f"{suite} {a} / {b}" for suite, (a, b) in zip(SUITES, figures_))
        for method, figures_ in PUBLISHED.items()
    )
    remarks = [
        *claim(cells, best),
        "Published with Qwen2.5-7B-Instruct (Shenfeld et al. 2026, arXiv 2601.19897; new task / mean of six earlier"
        f" benchmarks, 32.1, 42.9 and 30.1 / 65.5 before): {told}. That setting is not attempted here.",
    ]
    what = "A small language" if config.model is None else Path(config.model).stem
    command = shown_command("experiments.self_distillation", model_named(sys.argv[1:]))
    record(name, f"{what} learns skills from demonstrations", command, rows, {}, notes, path, remarks=remarks)


def model_named(arguments: Sequence[str]) -> list[str]:
    """Without the place of the model on this machine."""
    shown = list(arguments)
    if "--model" in shown[:-1]:
        shown[shown.index("--model") + 1] = "MODEL"
    return shown


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
