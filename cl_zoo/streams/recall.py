"""Streams that query earlier tokens of the same sequence: associative recall, documents with their own dictionary."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cl_zoo.checks import Count, NonNegative, check_whole, checked
from cl_zoo.losses import token_accuracy
from cl_zoo.shuffle import shuffled_index
from cl_zoo.streams.episodes import one_task
from cl_zoo.types import Array, Key, Stream

__all__ = ["RecallData", "associative_recall", "best_dictionary_scores", "fresh_dictionaries"]


class RecallData(NamedTuple):
    """Attributes:
    alpha: `f32[]`, of the power law of gaps.
    """

    alpha: Array


@checked
def associative_recall(
    *,
    steps: int = 10_000,
    length: int = 64,
    pairs: Count = 8,
    updates: int = 0,
    vocabulary: int = 256,
    batch_size: int = 64,
    alpha: NonNegative = 0.01,
    filler: Literal["noise", "zeros"] = "noise",
    **options: Any,
) -> Stream:
    """Multi-query associative recall: a sequence gives n keys and their values, then queries every key once.

        x = k_1 v_1 ... k_n v_n,  then L - 2 n tokens;     x_q = k_i,  y_q = v_i   at   q = 2 n + 2 g_i

    Keys and values are drawn for each sequence, without replacement, from the two halves of the vocabulary. The gaps
    g_i are drawn one after the other, i = 1, ..., n, each among those that are left, with

        P(g) ~ (g + 1)^(alpha - 1),     g = 0, ..., (L - 2 n) // 2 - 1

    so most queries come soon. Weights cannot predict their values: that takes a memory within the sequence.

    With u `updates`, as many of the keys come again after the pairs, each with a new value, and that one is its target:
    what was written must be overwritten. Then n + u stands for n in the places of queries.

    Args:
      steps: batches of the one task.
      length: L, at least 4 n + 2 u.
      pairs: n, at least 1.
      updates: u, keys that are given a new value, in [0, n].
      vocabulary: V, even: token 0 is filler, 1 to V/2 - 1 are keys, V/2 to V - 1 are values; at least 2 (n + u) + 2.
      batch_size: sequences per batch.
      alpha: at least 0; 1 makes the gaps uniform. May be traced.
      filler: tokens in all other places: "noise", drawn from the whole vocabulary; or "zeros".
      **options: `sample_size`, `evaluation_size` and `evaluation_batch` (sequences), see `episode_stream`.

    Returns:
      A `Stream` with x `i32[B, L]`, y `i32[B, L]`, -1 except at the queries, and V outputs at each position. Sequences
      are computed from the cursor; those of an evaluation split are the same every time. The score is the accuracy on
      a sequence's queries. Learn it with `supervised(next_token_loss)`.

    Raises:
      ValueError: an impossible value, named.

    Source: Arora et al. 2023, arXiv 2312.04927, whose vocabulary is 8192, with 4 to 64 pairs in 64 to 512 tokens.

    Differences from the paper or its code: the stream does not end, theirs is a fixed set of 100 000 sequences.
    As in the code, a query's value is its target but does not follow in x, and noise may repeat a key of the sequence.
    Keys that are given a new value always get another one; in their data (forgetting recall) it may be the same.

    Example:
      >>> import jax
      >>> stream = associative_recall(length=12, pairs=2, vocabulary=8, filler="zeros", batch_size=3)
      >>> batch, cursor = stream.next(stream.init(jax.random.key(0)))
      >>> batch.x.shape, (batch.y >= 0).sum(axis=1).tolist()
      ((3, 12), [2, 2, 2])
    """
    owner = "associative_recall"
    check_whole(owner, "updates", updates, 0, pairs)
    check_whole(owner, "length", length, 4 * pairs + 2 * updates)
    check_whole(owner, "vocabulary", vocabulary, 2 * (pairs + updates) + 2)
    if vocabulary % 2:
        raise ValueError(f"{owner}: vocabulary is {vocabulary}, but it must be even")
    half, told, gaps = vocabulary // 2, 2 * (pairs + updates), length // 2 - pairs - updates

    def draw(data: RecallData, split: str, task: Array, key: Key) -> tuple[Array, Array]:
        of_gaps, of_noise = jax.random.split(key)
        keys = 1 + shuffled_index(key, jnp.arange(pairs), half - 1, 0)
        values = half + shuffled_index(key, jnp.arange(pairs + updates), half, 1)
        again = shuffled_index(key, jnp.arange(updates), pairs, 2)  # which keys
        given = jnp.concatenate([keys, keys[again]])
        latest = values[:pairs].at[again].set(values[pairs:])
        # The largest log-probabilities plus Gumbel noise, in order, are draws without replacement, in order.
        chance = (data.alpha - 1) * jnp.log(jnp.arange(1, gaps + 1, dtype=jnp.float32))
        _, gap = jax.lax.top_k(chance + jax.random.gumbel(of_gaps, (gaps,)), pairs)
        query = told + 2 * gap
        x = (
            jnp.zeros(length, jnp.int32)
            if filler == "zeros"
            else jax.random.randint(of_noise, (length,), 0, vocabulary)
        )
        x = x.at[:told].set(jnp.stack([given, values], axis=1).ravel()).at[query].set(keys)
        return x, jnp.full(length, -1, jnp.int32).at[query].set(latest)

    data = RecallData(jnp.asarray(alpha, jnp.float32))
    sizes: dict[str, Any] = {"steps": steps, "batch_size": batch_size}
    return one_task(owner, data, draw, vocabulary, token_accuracy, **sizes, **options)


@checked
def fresh_dictionaries(
    *,
    steps: int = 10_000,
    length: int = 256,
    words: int = 16,
    values: int = 16,
    batch_size: int = 32,
    **options: Any,
) -> Stream:
    """Every example is a document in its own language: a random dictionary, and words drawn from it with their values.

        x = k_1 v_1 k_2 v_2 ... k_{L/2} v_{L/2},     v_n = d(k_n),     k_n ~ U(words),     d(k) ~ U(values)

    with d drawn once for each document. Only the values are scored. A word's value cannot be known when it first comes,
    later it can: the loss falls along the document for a model that learns in context, see `best_dictionary_scores`.

    Args:
      steps: batches of the one task.
      length: L, even, at least 2.
      words: K, at least 1; tokens 0 to K - 1.
      values: at least 1; tokens K to K + values - 1.
      batch_size: documents per batch.
      **options: `sample_size`, `evaluation_size` and `evaluation_batch` (sequences), see `episode_stream`.

    Returns:
      A `Stream` with x `i32[B, L]`, y `i32[B, L]`, the next token where that is a value, else -1, and K + values
      outputs at each position. Documents are computed from the cursor; those of an evaluation split are the same every
      time. The score is the accuracy on a document's values. Learn it with `supervised(next_token_loss)`.

    Raises:
      ValueError: an impossible value, named.

    Source: a usual probe of learning in context, as in Arora et al. 2023, arXiv 2312.04927, with keys that come again
    and again.

    Example:
      >>> import jax
      >>> stream = fresh_dictionaries(length=8, words=3, values=2, batch_size=4)
      >>> batch, cursor = stream.next(stream.init(jax.random.key(0)))
      >>> batch.x.shape, bool((batch.y[:, ::2] == batch.x[:, 1::2]).all()), stream.tasks.active.shape
      ((4, 8), True, (1, 5))
    """
    owner = "fresh_dictionaries"
    _check_documents(owner, length, words, values)

    def draw(data: None, split: str, task: Array, key: Key) -> tuple[Array, Array]:
        of_words, of_values = jax.random.split(key)
        word = jax.random.randint(of_words, (length // 2,), 0, words)
        value = words + jax.random.randint(of_values, (words,), 0, values)[word]
        x = jnp.stack([word, value], axis=1).ravel()
        return x, jnp.stack([value, jnp.full_like(value, -1)], axis=1).ravel()

    sizes: dict[str, Any] = {"steps": steps, "batch_size": batch_size}
    return one_task(owner, None, draw, words + values, token_accuracy, **sizes, **options)


@checked
def best_dictionary_scores(length: int, words: int, values: int) -> tuple[np.ndarray, np.ndarray]:
    """The lowest expected loss, and the highest expected accuracy, at each value of a document of `fresh_dictionaries`.

        P(new_n) = (1 - 1/K)^n,     loss_n = P(new_n) log(values),     accuracy_n = 1 - P(new_n) (1 - 1/values)

    for n = 0, ..., L/2 - 1: the value of a word that came before is known; of a new word all values are equally likely.

    Args:
      length, words, values: of the stream.

    Returns:
      Loss in nats and accuracy, `f64[L/2]` each. Compare them with `token_losses(outputs, y)[:, ::2]`.

    Raises:
      ValueError: an impossible value, named.

    Example:
      >>> loss, accuracy = best_dictionary_scores(6, words=2, values=4)
      >>> loss.round(3).tolist(), accuracy.tolist()
      ([1.386, 0.693, 0.347], [0.25, 0.625, 0.8125])
    """
    _check_documents("best_dictionary_scores", length, words, values)
    new = (1 - 1 / words) ** np.arange(length // 2)
    return new * np.log(values), 1 - new * (1 - 1 / values)


def _check_documents(owner: str, length: int, words: int, values: int) -> None:
    for field, value, least in (("length", length, 2), ("words", words, 1), ("values", values, 1)):
        check_whole(owner, field, value, least)
    if length % 2:
        raise ValueError(f"{owner}: length is {length}, but it must be even: words and their values alternate")
