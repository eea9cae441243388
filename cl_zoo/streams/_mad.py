"""The six tasks of mechanistic architecture design (MAD): what a sequence layer can do, one ability at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from cl_zoo.checks import Count, Range, check_whole, checked
from cl_zoo.losses import token_accuracy
from cl_zoo.shuffle import shuffled_index
from cl_zoo.streams.episodes import one_task
from cl_zoo.types import Array, Key, Stream

__all__ = ["mad"]

Task = Literal["recall", "fuzzy recall", "noisy recall", "selective copying", "memorization", "compression"]


class _Settings(NamedTuple):
    """As published."""

    vocabulary: int
    length: int
    noise_tokens: int = 0
    noise: float = 0.0


_PUBLISHED = {
    "recall": _Settings(16, 128),
    "fuzzy recall": _Settings(16, 128),
    "noisy recall": _Settings(32, 128, 16, 0.2),
    "selective copying": _Settings(16, 256),
    "memorization": _Settings(256, 32),
    "compression": _Settings(16, 32),
}
_MOTIF = 3
"""Tokens of a fuzzy key or value, at most."""


@checked
def mad(
    task: Task,
    *,
    steps: int = 20_000,
    vocabulary: Count | None = None,
    length: Count | None = None,
    noise: Annotated[float, Range(0, 0.999)] | None = None,
    copied: Count = 16,
    batch_size: int = 128,
    seed: int = 0,
    **options: Any,
) -> Stream:
    """One of MAD's tasks.

        recall              k v k v ...: a key of the sequence always has the same value; asked when it comes again
        fuzzy recall        the same, keys and values of 1 to 3 tokens (keys of 3 when tested)
        noisy recall        the same, a fifth of the pairs replaced by tokens of noise
        selective copying   16 tokens among blanks; then, in order, without them
        memorization        k _ k _ ...: the value of a key, in all sequences the same
        compression         the whole sequence from its last state: for `language.compressing`

    Args:
      task: one of those above.
      steps: batches of the one task.
      vocabulary: V; None, here and below, is as published: 16, noisy recall 32 (16 of them noise), memorization 256.
      length: L of the sequences: 128, selective copying 256, memorization and compression 32.
      noise: the fraction of pairs that are noise in noisy recall, 0.2.
      copied: tokens to copy.
      batch_size: sequences per batch.
      seed: of what is to be memorized.
      **options: `sample_size`, `evaluation_size` and `evaluation_batch` (sequences), see `episode_stream`.

    Returns:
      A `Stream` with x `i32[B, L]` (recall: L - 1), y alike, -1 where nothing is asked, and V outputs. The recall tasks
      are trained on every next token, and tested on what can be recalled. The score is the accuracy on what is asked.
      Learn it with `supervised(next_token_loss)`.

    Raises:
      ValueError: an unknown task, a vocabulary or length that is too small for it.

    Source: Poli et al. 2024, arXiv 2403.17844, and its code's settings: width 128, two rounds of the layer and SwiGLU,
    12 800 sequences (memorization 256), 200 epochs in batches of 128, AdamW.

    Differences from the paper or its code: the stream does not end, theirs are fixed sets of sequences. Tokens to copy
    lie evenly among the blanks, which the code inserts one by one. A fuzzy sequence is filled as far as its pairs fit.

    Example:
      >>> import jax
      >>> batch, _ = (stream := mad("memorization", length=8, batch_size=2)).next(stream.init(jax.random.key(0)))
      >>> batch.x.shape, (batch.y >= 0).sum(axis=1).tolist()
      ((2, 8), [4, 4])
    """
    published = _PUBLISHED[task]
    v = published.vocabulary if vocabulary is None else vocabulary
    size = published.length if length is None else length
    least = {"fuzzy recall": (2 * _MOTIF + 1, 4 * _MOTIF), "selective copying": (3, 2 * copied + 2)}.get(task, (4, 4))
    check_whole("mad", "vocabulary", v, least[0] + published.noise_tokens)
    check_whole("mad", "length", size, least[1])
    if task in ("recall", "noisy recall", "memorization") and size % 2:
        raise ValueError(f"mad: length is {size}, but it must be even: {task} is made of pairs")
    kept = published.noise if noise is None else noise
    if task != "noisy recall" and noise is not None:
        raise ValueError(f"mad: noise is {noise}, but only noisy recall has noise")
    make: Callable[[str, Key], tuple[Array, Array]] = {
        "recall": lambda split, key: _recall(split, key, v, size, 0, 0.0),
        "fuzzy recall": lambda split, key: _fuzzy(split, key, v, size),
        "noisy recall": lambda split, key: _recall(split, key, v, size, published.noise_tokens, kept),
        "selective copying": lambda split, key: _copying(key, v, size, copied),
        "memorization": lambda split, key: _memorization(key, v, size, seed),
        "compression": lambda split, key: _compression(key, v, size),
    }[task]

    def draw(data: None, split: str, task: Array, key: Key) -> tuple[Array, Array]:
        x, y = make(split, key)
        return x.astype(jnp.int32), y.astype(jnp.int32)

    sizes: dict[str, Any] = {"steps": steps, "batch_size": batch_size}
    return one_task("mad", None, draw, v, token_accuracy, **sizes, **options)


assert tuple(_PUBLISHED) == get_args(Task)


def _asked(split: str, whole: Array, told: Array) -> tuple[Array, Array]:
    """Inputs and targets: of training every next token, else those tokens of the sequence that are `told` before."""
    return whole[:-1], whole[1:] if split == "train" else jnp.where(told[1:], whole[1:], -1)


def _earlier(keys: Array) -> Array:
    """Which of the keys `[n]` (none where negative) has come before."""
    same = (keys[:, None] == keys) & (keys >= 0)
    return jnp.any(same & (jnp.arange(len(keys)) < jnp.arange(len(keys))[:, None]), axis=1)


def _recall(split: str, key: Key, v: int, size: int, noise_tokens: int, noise: float) -> tuple[Array, Array]:
    of_keys, of_values, of_noise, of_which, of_probe = jax.random.split(key, 5)
    half, n = (v - noise_tokens) // 2, size // 2
    keys = jax.random.randint(of_keys, (n,), 0, half)
    dictionary = half + jax.random.randint(of_values, (half,), 0, v - noise_tokens - half)
    is_noise = jax.random.bernoulli(of_which, noise, (n,)).at[0].set(False)  # one pair at least is not
    # The last pair asks for a key that is there.
    there = jax.random.categorical(of_probe, jnp.where(is_noise[:-1], -jnp.inf, 0.0))
    keys, is_noise = keys.at[-1].set(keys[there]), is_noise.at[-1].set(False)
    pairs = jnp.stack([keys, dictionary[keys]], axis=1)
    random = v - noise_tokens + jax.random.randint(of_noise, (n, 2), 0, max(noise_tokens, 1))
    whole = jnp.where(is_noise[:, None], random, pairs).ravel()
    again = _earlier(jnp.where(is_noise, -1, keys))
    return _asked(split, whole, jnp.stack([jnp.zeros_like(again), again], axis=1).ravel())


def _fuzzy(split: str, key: Key, v: int, size: int) -> tuple[Array, Array]:
    half, n = (v - 1) // 2, size // 2  # the last token is padding
    of_keys, of_sizes, of_values, of_probe = jax.random.split(key, 4)

    def motif(k: Key, first: int, tokens: int, longest: Array) -> Array:
        """Different tokens, -1 after the end."""
        drawn = first + jax.random.permutation(k, tokens)[:_MOTIF]
        return jnp.where(jnp.arange(_MOTIF) < longest, drawn, -1)

    shortest = 1 if split == "train" else _MOTIF
    lengths = jax.random.randint(of_sizes, (n,), shortest, _MOTIF + 1)
    keys = jax.vmap(lambda k, m: motif(k, 0, half, m))(jax.random.split(of_keys, n), lengths)
    names = jnp.sum((keys + 1) * (v + 1) ** jnp.arange(_MOTIF), axis=1)

    def value(name: Array) -> Array:
        """The same for the same key of this sequence."""
        first, second = jax.random.split(jax.random.fold_in(of_values, name))
        return motif(first, half, v - 1 - half, jax.random.randint(second, (), 1, _MOTIF + 1))

    values = jax.vmap(value)(names)
    cells = jnp.concatenate([keys, values], axis=1)  # [n, 6], -1 where there is no token
    long = jnp.sum(cells >= 0, axis=1)
    # The probe is one of the first pairs, which are there whatever is drawn; then come as many pairs as fit.
    sure = max((size + 1 - 2 * _MOTIF) // (2 * _MOTIF), 1)
    probe = jax.random.randint(of_probe, (), 0, sure)
    room = size + 1 - long[probe]
    fits = jnp.cumsum(long) <= room
    order = jnp.concatenate([jnp.where(fits[:, None], cells, -1), cells[probe][None]]).ravel()
    again = _earlier(jnp.concatenate([jnp.where(fits, names, -1), names[probe][None]]))
    told = jnp.repeat(again, 2 * _MOTIF) & (jnp.arange(len(order)) % (2 * _MOTIF) >= _MOTIF)
    # Tokens in order, at the end of the sequence; padding before.
    present = order >= 0
    place = size + 1 - jnp.sum(present) + jnp.cumsum(present) - 1
    place = jnp.where(present, place, size + 1)
    whole = jnp.full(size + 1, v - 1).at[place].set(order, mode="drop")
    return _asked(split, whole, jnp.zeros(size + 1, bool).at[place].set(told, mode="drop"))


def _copying(key: Key, v: int, size: int, copied: int) -> tuple[Array, Array]:
    of_tokens, of_places = jax.random.split(key)
    tokens = jax.random.randint(of_tokens, (copied,), 0, v - 2)
    before = size - copied - 1
    places = jnp.sort(shuffled_index(of_places, jnp.arange(copied), before, 0))
    x = jnp.full(size, v - 2).at[places].set(tokens).at[before].set(v - 1)
    return x, jnp.full(size, -1).at[before + 1 :].set(tokens)


def _memorization(key: Key, v: int, size: int, seed: int) -> tuple[Array, Array]:
    half = (v - 1) // 2
    values = half + jax.random.permutation(jax.random.key(seed), v - 1 - half)[:half]
    keys = jax.random.randint(key, (size // 2,), 0, half)
    x = jnp.stack([keys, jnp.full_like(keys, v - 1)], axis=1).ravel()
    return x, jnp.stack([jnp.full_like(keys, -1), values[keys]], axis=1).ravel()


def _compression(key: Key, v: int, size: int) -> tuple[Array, Array]:
    x = jax.random.randint(key, (size,), 0, v - 1).at[-1].set(v - 1)
    return x, x
