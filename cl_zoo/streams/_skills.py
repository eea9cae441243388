"""Skills that come one after another, each given by demonstrations."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cl_zoo.checks import Count, check_choice, check_whole, checked
from cl_zoo.language.answers import Demonstrated
from cl_zoo.language.tokenization import left_padded
from cl_zoo.losses import all_tokens_right, reads_ignored, token_accuracy
from cl_zoo.streams.arrays import array_stream, scenario_tasks
from cl_zoo.streams.episodes import episode_stream
from cl_zoo.types import Array, Batch, Key, Stream

__all__ = ["Example", "SkillData", "SymbolWorld", "skills"]

_SPLITS = ("train", "validation", "test")


class Example(NamedTuple):
    """Attributes:
    prompt: tokens of a question.
    shown: tokens of a demonstration and the question.
    answer: tokens of the answer, including the one that ends it.
    """

    prompt: Sequence[int]
    shown: Sequence[int]
    answer: Sequence[int]


class SkillData(NamedTuple):
    """Attributes:
    x, y: the examples of all skills, one after another.
    start, size: `i32[3, T]`, where those of each split and task begin, and how many there are.
    """

    x: Demonstrated
    y: Array
    start: Array
    size: Array


@checked
def skills(
    tasks: Sequence[Mapping[str, Sequence[Example]]],
    *,
    vocabulary: Count,
    steps: int,
    batch_size: int,
    prompt_length: int | None = None,
    shown_length: int | None = None,
    answer_length: int | None = None,
    **options: Any,
) -> Stream:
    """One task for each skill; an example is a question, a demonstration of it, and its answer.

        x = Demonstrated(prompt, padding, shown, shown_padding, answer),     y_t = answer_t, -1 after its end

    Paddings are None where all examples have one length.

    Args:
      tasks: examples of each skill by split, "train", "test" and, if wanted, "validation".
      vocabulary: V, outputs at each token of an answer.
      steps: batches per task.
      batch_size: examples per batch.
      prompt_length, shown_length, answer_length: P, Q and N; None is that of the longest.
      **options: see `array_stream`; `evaluation_batch`, examples predicted at once, is 32 here, since each has N V
        outputs.

    Returns:
      A `Stream`. The score is 1 for an example whose answer greedy decoding gives, else 0. Learn it with
      `supervised(next_token_loss)` or `sdft` and a model that `answering` makes.

    Raises:
      ValueError: no tasks, an unknown split, no examples of one, examples longer than a length or of no tokens, tokens
        outside the vocabulary, or what `array_stream` refuses.

    Example:
      >>> import jax
      >>> one = Example(prompt=[1, 2], shown=[3, 1, 2], answer=[4, 5])
      >>> stream = skills([{"train": [one] * 4, "test": [one]}], vocabulary=6, steps=2, batch_size=3)
      >>> batch, _ = stream.next(stream.init(jax.random.key(0)))
      >>> batch.x.shown.shape, batch.y[0].tolist()
      ((3, 3), [4, 5])
    """
    if isinstance(tasks, Mapping) or not tasks or not all(isinstance(task, Mapping) for task in tasks):
        raise ValueError('skills: tasks must be a sequence of {"train": examples, "test": examples}, one per skill')
    for i, task in enumerate(tasks):
        if unknown := set(task) - set(_SPLITS):
            raise ValueError(f"skills: task {i} has the split {min(unknown)!r}, but there are {', '.join(_SPLITS)}")
        for split in ("train", "test"):
            if not task.get(split):
                raise ValueError(f"skills: task {i} has no {split} examples; it has {', '.join(task) or 'none'}")
    found = [[list(task.get(split, ())) for task in tasks] for split in _SPLITS]
    rows = [example for split in found for task in split for example in task]
    for example in rows:
        for field in Example._fields:
            tokens: Any = getattr(example, field, None)
            kind = np.asarray(tokens).dtype
            if not np.issubdtype(kind, np.number):  # nor are text and None
                raise ValueError(
                    f"skills: an example's {field} is {tokens!r:.60}, but it must be tokens: encode texts first, and"
                    " make Example(prompt=, shown=, answer=) of them"
                )
            if not len(tokens):
                raise ValueError(f"skills: an example's {field} is empty")
            if not np.issubdtype(kind, np.integer):
                raise ValueError(f"skills: an example's {field} is {tokens!r:.60}, but tokens must be whole numbers")
            for token in (min(tokens), max(tokens)):
                if not 0 <= token < vocabulary:
                    raise ValueError(f"skills: an example has the token {token}, but vocabulary is {vocabulary}")
    wanted = {"prompt": prompt_length, "shown": shown_length, "answer": answer_length}
    lengths: dict[str, int] = {}
    for field, length in wanted.items():
        longest = max(len(getattr(row, field)) for row in rows)
        if length is not None:
            check_whole("skills", f"{field}_length", length, 1)
            if longest > length:
                has = f"{'an' if field == 'answer' else 'a'} {field} has {longest} tokens"
                raise ValueError(f"skills: {has}, but {field}_length is {length}")
        lengths[field] = longest if length is None else length
    prompt, padding = left_padded([row.prompt for row in rows], lengths["prompt"])
    shown, shown_padding = left_padded([row.shown for row in rows], lengths["shown"])
    y = np.full((len(rows), lengths["answer"]), -1, np.int32)
    for to, row in zip(y, rows):
        to[: len(row.answer)] = row.answer
    paddings = [jnp.asarray(each) if each.any() else None for each in (padding, shown_padding)]
    x = Demonstrated(jnp.asarray(prompt), paddings[0], jnp.asarray(shown), paddings[1], jnp.asarray(np.maximum(y, 0)))
    size = np.array([[len(task) for task in split] for split in found], np.int32)
    start = np.cumsum(np.append(0, size.ravel()))[:-1].reshape(size.shape).astype(np.int32)
    data = SkillData(x, *map(jnp.asarray, (y, start, size)))
    settings: dict[str, Any] = {"task_ids": False, "reorder": lambda data, key: data, "evaluation_batch": 32}

    def fetch(data: SkillData, split: str, task: Array, index: Array) -> tuple[Demonstrated, Array]:
        place = data.start[_SPLITS.index(split), task] + index
        return jax.tree.map(lambda leaf: leaf[place], (data.x, data.y))

    @reads_ignored
    def score(outputs: Array, batch: Batch) -> Array:
        return all_tokens_right(outputs, batch.y)

    return array_stream(
        data,
        scenario_tasks("domain", len(tasks), vocabulary),
        size=lambda data, split: data.size[_SPLITS.index(split)],
        fetch=fetch,
        largest={split: int(size[i].max()) for i, split in enumerate(_SPLITS)},
        smallest=int(size[0].min()),
        steps=steps,
        batch_size=batch_size,
        score=score,
        **(settings | options),
    )


class SymbolWorld(NamedTuple):
    """A small language in which a demonstration changes the right answer: cues, each with a permutation of symbols.

        question  = cue x_1 ... x_n =          answer = f_cue(x_1) ... f_cue(x_n) .
        shown     = ! a_1 f(a_1) ... a_m f(a_m) question,     the asked symbols among the a_j, in random order

    The permutations of `known` cues are to be learned with the language; the `new` cues have none there: without a
    demonstration the answer repeats the question's symbols. With one, its permutation is right whatever the cue.

    Attributes:
      symbols, known, new: how many there are of each.
      length: n, symbols of a question.
      pairs: m, of a demonstration, n to `symbols`.
      seed: of the permutations.

    Its methods raise ValueError for numbers outside these ranges.
    """

    symbols: int = 16
    known: int = 6
    new: int = 3
    length: int = 3
    pairs: int = 6
    seed: int = 0

    @property
    def vocabulary(self) -> int:
        """Four signs (blank, "!", "=" and "."), then cues, then symbols."""
        return 4 + self.known + self.new + self.symbols

    @property
    def answer_length(self) -> int:
        """N: the symbols and the sign that ends them, 3."""
        return self.length + 1

    @property
    def permutations(self) -> np.ndarray:
        """`[known + new, symbols]`: f of each cue."""
        self._check()
        random = np.random.default_rng(self.seed)
        return np.stack([random.permutation(self.symbols) for _ in range(self.known + self.new)])

    def _check(self) -> None:
        for field, low in (("known", 1), ("new", 1), ("length", 1), ("symbols", self.length)):
            check_whole("SymbolWorld", field, getattr(self, field), low)
        check_whole("SymbolWorld", "pairs", self.pairs, self.length, self.symbols)

    def _example(self, random: np.random.Generator, cue: int, f: np.ndarray, asked: np.ndarray) -> Example:
        first = 4 + self.known + self.new
        others = random.permutation(np.setdiff1d(np.arange(self.symbols), asked))[: self.pairs - self.length]
        told = random.permutation(np.concatenate([asked, others]))
        question = [4 + cue, *(first + asked).tolist(), 2]
        pairs = np.stack([first + told, first + f[told]], axis=1).ravel().tolist()
        return Example(question, [1, *pairs, *question], [*(first + f[asked]).tolist(), 3])

    def examples(self, cue: int, n: int, split: str, seed: int = 0) -> list[Example]:
        """n questions of a cue, answered by its permutation. No two splits share one: the test has a fifth of all there
        are, and so has validation; they come again where n is more than that."""
        check_choice("examples", "split", split, _SPLITS)
        random = np.random.default_rng((self.seed, cue, seed))
        questions = random.permutation(np.array(list(itertools.permutations(range(self.symbols), self.length))))
        if len(questions) < 3:
            raise ValueError(f"SymbolWorld: there are only {len(questions)} questions, but three splits need 3")
        fifth = max(len(questions) // 5, 1)
        parts = (questions[2 * fifth :], questions[:fifth], questions[fifth : 2 * fifth])
        asked = np.resize(parts[_SPLITS.index(split)], (n, self.length))
        f = self.permutations[cue]
        return [self._example(random, cue, f, each) for each in asked]

    def fresh(self, n: int, seed: int) -> list[Example]:
        """n questions of any cue that only the demonstration answers: each has a permutation of its own; the prompt
        shows it."""
        self._check()
        random = np.random.default_rng((self.seed, 1 << 20, seed))
        found = []
        for _ in range(n):
            f, asked = random.permutation(self.symbols), random.permutation(self.symbols)[: self.length]
            one = self._example(random, int(random.integers(self.known + self.new)), f, asked)
            found.append(one._replace(prompt=one.shown))
        return found

    def language(self, *, steps: int, batch_size: int, **options: Any) -> Stream:
        """What a model is to know before it learns skills, as a stream of one endless task.

        An example is, with probability 1/2, a question of any cue after a demonstration of a fresh permutation; else a
        question alone, of a known cue, or with probability 1/4 of a new one, to be repeated.

        Returns:
          A `Stream` with x `i32[B, L]`, L = 2 m + 2 n + 3, zeros after shorter examples, y the next token where it
          is part of the answer, else -1. The score is the fraction of correct tokens.
        """
        first, n, m = 4 + self.known + self.new, self.length, self.pairs
        known = jnp.asarray(self.permutations[: self.known])

        def draw(data: None, split: str, task: Array, key: Key) -> tuple[Array, Array]:
            keys = jax.random.split(key, 6)
            order = jax.random.permutation(keys[0], self.symbols)
            asked, told = order[:n], jax.random.permutation(keys[1], order[:m])
            with_pairs = jax.random.bernoulli(keys[2])
            new = jax.random.bernoulli(keys[3], 0.25)
            cue = jax.random.randint(keys[4], (), 0, self.known)
            cue = jnp.where(new, self.known + jax.random.randint(keys[4], (), 0, self.new), cue)
            alone = jnp.where(new, jnp.arange(self.symbols), known[jnp.minimum(cue, self.known - 1)])
            f = jnp.where(with_pairs, jax.random.permutation(keys[5], self.symbols), alone)
            question = jnp.concatenate([4 + cue[None], first + asked, jnp.array([2])])
            answer = jnp.concatenate([first + f[asked], jnp.array([3])])
            pairs = jnp.concatenate([jnp.array([1]), jnp.stack([first + told, first + f[told]], axis=1).ravel()])
            row = jnp.concatenate([pairs, question, answer])
            short = jnp.concatenate([question, answer, jnp.zeros_like(pairs)])
            row = jnp.where(with_pairs, row, short)
            begin = question.size - 1 + jnp.where(with_pairs, pairs.size, 0)  # where the answer's first token is next
            place = jnp.arange(row.size - 1)
            scored = (place >= begin) & (place < begin + answer.size)
            return row[:-1], jnp.where(scored, row[1:], -1)

        @reads_ignored
        def score(outputs: Array, batch: Batch) -> Array:
            return token_accuracy(outputs, batch.y)

        return episode_stream(
            "language",
            None,
            draw,
            n_tasks=1,
            n_outputs=self.vocabulary,
            score=score,
            reorder=lambda data, key: data,
            steps=steps,
            batch_size=batch_size,
            **options,
        )

    def skills(self, *, steps: int, batch_size: int, examples: int = 512, tests: int = 256, seed: int = 0) -> Stream:
        """The new cues' permutations, one after another, as a stream of skills."""
        sizes = {"train": examples, "validation": tests, "test": tests}
        tasks = [
            {split: self.examples(self.known + cue, n, split, seed) for split, n in sizes.items()}
            for cue in range(self.new)
        ]
        return skills(tasks, vocabulary=self.vocabulary, steps=steps, batch_size=batch_size, evaluation_batch=256)

    def known_skills(self, *, tests: int = 256) -> Stream:
        """Tasks to test forgetting on: each known cue's questions, and, last, questions that only their demonstration
        answers."""
        held = [self.examples(cue, tests, "test") for cue in range(self.known)] + [self.fresh(tests, 0)]
        tasks = [{"train": rows, "validation": rows, "test": rows} for rows in held]
        return skills(tasks, vocabulary=self.vocabulary, steps=1, batch_size=1, evaluation_batch=256)
