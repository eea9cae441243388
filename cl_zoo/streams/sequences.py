"""Streams that tell sequence layers apart: tables of bigrams that switch, and formal languages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from cl_zoo.checks import Count, Positive, checked
from cl_zoo.losses import all_tokens_right, token_accuracy
from cl_zoo.streams.episodes import one_task
from cl_zoo.types import Array, Key, Stream

__all__ = ["BigramData", "best_bigram_losses", "formal_language", "switching_bigrams"]


class BigramData(NamedTuple):
    """Attributes:
    log_tables: `f32[K, V, V]`, log P_c(next | token).
    """

    log_tables: Array


@checked
def switching_bigrams(
    *,
    steps: int = 500,
    length: Count = 64,
    segment: Count = 16,
    vocabulary: Count = 32,
    tables: Count = 8,
    temperature: Positive = 0.15,
    batch_size: int = 32,
    seed: int = 0,
    **options: Any,
) -> Stream:
    """Sequences by a table of bigrams that changes every M tokens.

        x_{t+1} ~ P_c(. | x_t),   c = c_j,   j = t // M,   c_j ~ U(tables),      P_c(. | u) = softmax(g / temperature)

    with g from N(0, 1), drawn once for the stream; x_0 ~ U(vocabulary). Which table holds is told by the last tokens
    alone: what was learned in one segment is wrong in the next, see `best_bigram_losses`.

    Args:
      steps: batches of the one task.
      length: L, tokens.
      segment: M, tokens of a segment.
      vocabulary: V.
      tables: K.
      temperature: above 0; small ones make tables with few likely tokens.
      batch_size: sequences per batch.
      seed: of the tables.
      **options: `sample_size`, `evaluation_size` and `evaluation_batch` (sequences), see `episode_stream`.

    Returns:
      A `Stream` with x `i32[B, L]`, y `i32[B, L]`, the next tokens, and V outputs at each position; its data are
      `BigramData`. Sequences are computed from the cursor; those of an evaluation split are the same every time. The
      score is the accuracy of the next token. Learn it with `supervised(next_token_loss)`.

    Raises:
      ValueError: an impossible value, named.

    Source: a usual probe of learning in context; V, K, L and the temperature are those of a public script to Tandon et
    al. 2025, arXiv 2512.23675 (not of the paper).

    Example:
      >>> import jax
      >>> stream = switching_bigrams(length=8, segment=4, vocabulary=5, batch_size=3)
      >>> batch, cursor = stream.next(stream.init(jax.random.key(0)))
      >>> batch.x.shape, bool((batch.y[:, :-1] == batch.x[:, 1:]).all())
      ((3, 8), True)
    """
    drawn = jax.random.normal(jax.random.key(seed), (tables, vocabulary, vocabulary)) / temperature
    data = BigramData(jax.nn.log_softmax(drawn))

    def draw(data: BigramData, split: str, task: Array, key: Key) -> tuple[Array, Array]:
        first, of_tables, of_tokens = jax.random.split(key, 3)
        which = jax.random.randint(of_tables, (-(-length // segment),), 0, tables)[jnp.arange(length) // segment]

        def step(token: Array, each: tuple[Array, Array]) -> tuple[Array, Array]:
            c, k = each
            new = jax.random.categorical(k, data.log_tables[c, token]).astype(jnp.int32)
            return new, new

        start = jax.random.randint(first, (), 0, vocabulary)
        _, y = jax.lax.scan(step, start, (which, jax.random.split(of_tokens, length)))
        return jnp.concatenate([start[None], y[:-1]]), y

    return one_task(
        "switching_bigrams", data, draw, vocabulary, token_accuracy, steps=steps, batch_size=batch_size, **options
    )


@checked
def best_bigram_losses(data: BigramData, x: Array, y: Array, *, segment: Count) -> Array:
    """The loss of who knows all tables and where segments begin, and infers which one holds (Bayes).

        w_c ~ prod_s P_c(y_s | x_s) over the segment's tokens s < t;     loss_t = - log sum_c w_c P_c(y_t | x_t)

    No network has a lower expected loss.

    Args:
      data: of the stream.
      x, y: `i32[B, L]`, of a batch.
      segment: M.

    Returns:
      `f32[B, L]`, nats.

    Example:
      >>> import jax
      >>> stream = switching_bigrams(length=8, segment=4, vocabulary=5, tables=1)
      >>> batch, _ = stream.next(stream.init(jax.random.key(0)))
      >>> losses = best_bigram_losses(stream.data, batch.x, batch.y, segment=4)  # with one table, nothing to infer
      >>> bool((abs(losses + stream.data.log_tables[0, batch.x, batch.y]) < 1e-5).all())
      True
    """
    each = jnp.moveaxis(data.log_tables[:, x, y], 0, -1)  # [B, L, K]

    def step(log_w: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        t, likely = now
        log_w = jnp.where(t % segment == 0, 0.0, log_w)
        loss = jax.nn.logsumexp(log_w, axis=-1) - jax.nn.logsumexp(log_w + likely, axis=-1)
        return log_w + likely, loss

    start = jnp.zeros((x.shape[0], each.shape[-1]), each.dtype)
    _, losses = jax.lax.scan(step, start, (jnp.arange(x.shape[1]), jnp.swapaxes(each, 0, 1)))
    return losses.T


Language = Literal["parity", "(aa)*", "(abab)*", "a^n b^n", "a^n b^n c^n", "shuffle-2"]
_SIZES = {  # symbols after the first token, classes, lengths are multiples of
    "parity": (2, 2, 1),
    "(aa)*": (1, 2, 1),
    "(abab)*": (2, 4, 1),
    "a^n b^n": (2, 4, 2),
    "a^n b^n c^n": (3, 5, 3),
    "shuffle-2": (4, 4, 2),
}


@checked
def formal_language(
    language: Language,
    *,
    steps: int = 2000,
    shortest: Count = 1,
    longest: Count = 40,
    batch_size: int = 64,
    **options: Any,
) -> Stream:
    """Strings of a language, and at each of their places what may come next.

    A string follows the token 0, its symbols are 1, 2, ...; the label of a place is the class of all that may follow
    it, so a network that is right at every place knows the language:

        parity        strings of 1 and 2;                       whether there were evenly many 2
        (aa)*         of 1;                                     whether it may end: an even number
        (abab)*       1 2 1 2 ...;                              the number of symbols modulo 4
        a^n b^n       {a}; {a, b}; {b}; the end
        a^n b^n c^n   {a}; {a, b}; {b}; {c}; the end
        shuffle-2     two kinds of brackets, each balanced by itself, that may cross;    which of the two are open

    The first three ask for counting modulo a number, the others for counters. One string's length is drawn evenly from
    those that the language has. To test on longer strings, score a second stream's examples:

        other = formal_language("parity", shortest=41, longest=256)
        other.mean_score(agent, other.evaluation(0, "test"))

    Args:
      language: one of those above.
      steps: batches of the one task.
      shortest, longest: lengths of strings, between which the language must have one.
      batch_size: strings per batch.
      **options: `sample_size`, `evaluation_size` and `evaluation_batch` (strings), see `episode_stream`.

    Returns:
      A `Stream` with x `i32[B, longest + 1]`, 0 after the end of a string, y of the same shape, -1 there, and as many
      outputs as symbols, the 0 and classes need. The score is 1 where a string is right at every place, else 0. Learn
      it with `supervised(next_token_loss)`.

    Raises:
      ValueError: an unknown language; lengths of which the language has none.

    Source: Bhattamishra et al. 2020, arXiv 2009.11264 (next characters; brackets here cross, where their sampler nests
    them); the choice of languages: Behrouz et al. 2025, arXiv 2512.24695, table 5, after Irie et al. 2023.

    Example:
      >>> import jax
      >>> stream = formal_language("parity", longest=6, batch_size=2)
      >>> batch, _ = stream.next(stream.init(jax.random.key(1)))
      >>> batch.x.shape, batch.y[:, 0].tolist()
      ((2, 7), [0, 0])
    """
    symbols, classes, multiple = _SIZES[language]
    low, high = -(-shortest // multiple), longest // multiple
    if low > high:
        raise ValueError(
            f"formal_language: shortest is {shortest} and longest {longest}, but the lengths of {language} are"
            f" multiples of {multiple}"
        )
    make = _MAKERS[language]

    def draw(data: None, split: str, task: Array, key: Key) -> tuple[Array, Array]:
        of_length, of_symbols = jax.random.split(key)
        length = multiple * jax.random.randint(of_length, (), low, high + 1)
        string, labels = make(of_symbols, length, longest)
        place = jnp.arange(longest + 1)
        x = jnp.concatenate([jnp.zeros(1, jnp.int32), string.astype(jnp.int32)])
        return jnp.where(place <= length, x, 0), jnp.where(place <= length, labels, -1).astype(jnp.int32)

    outputs = max(symbols + 1, classes)
    return one_task(
        "formal_language", None, draw, outputs, all_tokens_right, steps=steps, batch_size=batch_size, **options
    )


def _parity(key: Key, length: Array, longest: int) -> tuple[Array, Array]:
    bits = jax.random.randint(key, (longest,), 0, 2)
    return 1 + bits, jnp.concatenate([jnp.zeros(1, bits.dtype), jnp.cumsum(bits) % 2])


def _modulo(n: int, kinds: int) -> Callable[[Key, Array, int], tuple[Array, Array]]:
    def make(key: Key, length: Array, longest: int) -> tuple[Array, Array]:
        return 1 + jnp.arange(longest) % kinds, jnp.arange(longest + 1) % n

    return make


def _counters(kinds: int) -> Callable[[Key, Array, int], tuple[Array, Array]]:
    def make(key: Key, length: Array, longest: int) -> tuple[Array, Array]:
        n = length // kinds
        read = jnp.arange(longest + 1)  # symbols so far
        # {a}; {a, b} among the first n; then {b} until there are n of them, {c}, and the end.
        labels = jnp.where(read == 0, 0, jnp.where(read <= n, 1, 1 + read // jnp.maximum(n, 1)))
        return 1 + jnp.minimum(jnp.arange(longest) // jnp.maximum(n, 1), kinds - 1), labels

    return make


def _shuffled_brackets(key: Key, length: Array, longest: int) -> tuple[Array, Array]:
    """Symbols 1 and 2 open and close the first kind, 3 and 4 the second."""

    def step(depth: Array, each: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        i, k = each
        may_open = jnp.sum(depth) < length - i  # what is open can still be closed
        may = jnp.stack([may_open, depth[0] > 0, may_open, depth[1] > 0])
        symbol = jax.random.categorical(k, jnp.where(may, 0.0, -jnp.inf))
        depth = depth.at[symbol // 2].add(1 - 2 * (symbol % 2))
        return depth, (1 + symbol, (depth[0] > 0) + 2 * (depth[1] > 0))

    keys = jax.random.split(key, longest)
    # After the end nothing is read, so nothing may go wrong there.
    _, (string, labels) = jax.lax.scan(step, jnp.zeros(2, jnp.int32), (jnp.arange(longest), keys))
    return string, jnp.concatenate([jnp.zeros(1, labels.dtype), labels])


_MAKERS: dict[str, Callable[[Key, Array, int], tuple[Array, Array]]] = {
    "parity": _parity,
    "(aa)*": _modulo(2, 1),
    "(abab)*": _modulo(4, 2),
    "a^n b^n": _counters(2),
    "a^n b^n c^n": _counters(3),
    "shuffle-2": _shuffled_brackets,
}
assert tuple(_MAKERS) == get_args(Language)
