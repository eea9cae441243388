"""What is learned in `experiments.self_distillation`: a small language, or by a published model words of a new one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from cl_zoo import Model, Stream, accuracy, compose, run_stream, supervised
from cl_zoo.checks import check_range, check_whole
from cl_zoo.compilation import jit
from cl_zoo.datasets import python_library
from cl_zoo.files import write_array
from cl_zoo.language import Decoder, answering, decoder, load_pretrained
from cl_zoo.layers import softmax_attention
from cl_zoo.losses import next_token_loss
from cl_zoo.streams import Example, SymbolWorld, skills
from cl_zoo.training.loop import start
from cl_zoo.wrappers import lora
from experiments.common import check_names, warmed_up_adamw

IN_CONTEXT = "in context"
METHODS = (
    IN_CONTEXT,
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

CHOOSING = (0, 1)
"""Seeds by which rates are chosen."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run. Unknown or impossible values are refused before anything compiles."""

    model: str | None = None
    """A published checkpoint; None for the small language."""
    methods: tuple[str, ...] = ()
    """All with the small language; "in context", "sft" and "sdft forward" with a model."""
    seeds: int = 1
    first_seed: int = 10
    """Above 1: seeds 0 and 1 choose the rates."""
    rates: tuple[float, ...] = ()
    """Of Adam, each tried; 3e-5, 1e-4, .. 1e-2 with the small language, 1e-3, 2e-3, 4e-3, 8e-3 with a model."""
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
        methods=config.methods or (METHODS if small else (IN_CONTEXT, "sft", "sdft forward")),
        rates=config.rates or ((3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2) if small else (1e-3, 2e-3, 4e-3, 8e-3)),
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
        check_whole("self_distillation", "first_seed", given.first_seed, max(CHOOSING) + 1)
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
    check_names(given, methods=METHODS)
    return given


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
    learner = compose(model.bind(params), optax.sgd(0.0), supervised(next_token_loss))

    @jit
    def score(learner: Any, stream: Stream) -> Any:
        learner, (state, _) = start(learner, stream, jax.random.key(0))
        return accuracy()(learner, state, stream)

    return np.asarray(score(learner, stream))


def language_net(config: Config, world: SymbolWorld) -> Decoder:
    """With short convolutions of queries, keys and values, it learns to follow demonstrations in minutes."""
    mixer = softmax_attention(config.width, 4, convolution=4)
    return decoder(world.vocabulary, [(mixer, 2 * config.width, 2)])


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
        found = run_stream(learner, language, key, measure={}).state.params
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        for path, leaf in zip(paths, jax.tree.leaves(found), strict=True):
            write_array(path, np.asarray(leaf))
    leaves = [jnp.asarray(np.load(path, allow_pickle=False)) for path in paths]
    rows = jax.tree.map(lambda leaf: leaf[0], language.evaluation(0, "test"))
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
