"""Text from a decoder: prompts in, tokens out, with a cache of fixed shape."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cl_zoo.checks import Count, Fraction, NonNegative, check_range, checked
from cl_zoo.compilation import jit
from cl_zoo.language._decoder import Decoder, check_decoder, unstacked
from cl_zoo.types import Array, Key, PyTree

__all__ = ["Generated", "generate", "keep_likely"]


class Generated(NamedTuple):
    """Attributes:
    tokens: `i32[B, N]`, 0 after a sequence's end; 0 is a token too, so decode `tokens[mask > 0]`.
    log_probabilities: `f32[B, N]`, of each token under the model itself: temperature 1, no truncation.
    mask: `f32[B, N]`, 1 for tokens of the sequence, including the stop token; 0 after its end.
    """

    tokens: Array
    log_probabilities: Array
    mask: Array


def keep_likely(logits: Array, *, top_k: int | None = None, top_p: Array | float | None = None) -> Array:
    """Logits `[..., V]` with those of improbable tokens so low that they are never drawn.

    Args:
      logits: any.
      top_k: how many of the most probable tokens are kept; ties with the last one stay too.
      top_p: nucleus sampling: the smallest set of most probable tokens with this much probability is kept, at least
        one; after `top_k`. Ties with the last one stay too; 1 keeps all.

    Source: Fan et al. 2018, arXiv 1805.04833; Holtzman et al. 2019, arXiv 1904.09751.
    """
    low = jnp.finfo(logits.dtype).min
    if top_k is not None and top_k < logits.shape[-1]:
        logits = jnp.where(logits >= jax.lax.top_k(logits, top_k)[0][..., -1:], logits, low)
    if top_p is not None:
        falling = -jnp.sort(-logits, axis=-1)
        mass = jax.nn.softmax(falling)
        before = jnp.cumsum(mass, axis=-1) - mass
        least = jnp.min(jnp.where(before < top_p, falling, jnp.inf), axis=-1, keepdims=True)
        least = jnp.minimum(least, falling[..., :1])  # also where top_p is 0
        # The sum of all rounds to less than 1, or reaches it early.
        logits = jnp.where((logits >= least) | (top_p >= 1), logits, low)
    return logits


@checked
def generate(
    decoder: Decoder,
    params: PyTree,
    prompts: Array,
    key: Key,
    *,
    length: Count,
    padding: Array | None = None,
    temperature: NonNegative = 1.0,
    top_k: Count | None = None,
    top_p: Fraction | None = None,
    stop: Sequence[int] = (),
) -> Generated:
    """Each prompt's continuation, token by token: y_t drawn from softmax(logits(prompt, y_<t) / temperature).

    The program is compiled once for each shape of prompts and set of options; prompts of different lengths go into one
    shape by padding on the left (`left_padded`). It ends when all sequences have.

    Args:
      decoder: the network.
      params: its parameters. Stacked blocks are copied into `unstacked` ones, once a call.
      prompts: `i32[B, P]`.
      key: of the draws; greedy decoding ignores it.
      length: N, tokens at most.
      padding: `i32[B]`, padding tokens at the beginning of each prompt, fewer than P; None is 0. Only networks
        whose layers are all softmax attention take it.
      temperature: 0 is greedy.
      top_k: how many of the most probable tokens may be drawn; None for all.
      top_p: nucleus sampling from the smallest set of most probable tokens with this much probability; after top_k;
        None for all.
      stop: tokens that end a sequence.

    Returns:
      A `Generated`.

    Raises:
      ValueError: an empty prompt; sizes below 1; a negative temperature; top_p outside [0, 1]; tokens outside the
        vocabulary (of NumPy arrays); padding of another shape, or that a mixer cannot take.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from cl_zoo.language import decoder
      >>> from cl_zoo.layers import softmax_attention
      >>> net = decoder(256, [(softmax_attention(16, 2), 32, 1)])
      >>> params, _ = net.model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
      >>> generate(net, params, jnp.ones((2, 5), jnp.int32), jax.random.key(1), length=3).tokens.shape
      (2, 3)
    """
    for field, value in (("temperature", temperature), ("top_p", top_p)):
        if not isinstance(value, int | float | None):
            raise ValueError(f"generate: {field} is {value!r}, but it must be a Python number, not an array")
    check_decoder("generate", decoder)
    check_stop("generate", stop)
    if not isinstance(params, dict) or "embedding" not in params:
        raise ValueError(
            "generate: params are not those of a decoder, as there is no 'embedding'; for adapters, take those of"
            " merge_adapters"
        )
    prompts = jnp.asarray(prompts) if isinstance(prompts, (list, tuple)) else prompts
    if prompts.ndim != 2 or not prompts.shape[1]:
        raise ValueError(f"generate: prompts have the shape {prompts.shape}, but it must be [B, P] with P at least 1")
    if padding is not None:
        if padding.shape != prompts.shape[:1] or not jnp.issubdtype(padding.dtype, jnp.integer):
            raise ValueError(
                f"generate: padding is {padding.dtype} of the shape {padding.shape}, but it must be whole numbers of"
                f" the shape {prompts.shape[:1]}"
            )
        if isinstance(padding, np.ndarray):  # what is on a device is not waited for
            check_range("generate", "padding", padding, 0, prompts.shape[1] - 1)
    for field, tokens in (("prompts", prompts), ("stop", np.asarray(stop, int))):
        if isinstance(tokens, np.ndarray) and tokens.size:
            check_range("generate", field, [tokens.min(), tokens.max()], 0, params["embedding"].shape[0] - 1)
    program = _program(decoder, length, temperature, top_k, top_p, tuple(int(token) for token in stop))
    return program(params, prompts, padding, key)


def check_stop(owner: str, stop: Sequence[int]) -> None:
    """Refuses what is not a sequence of tokens."""
    tokens = list(stop) if isinstance(stop, Iterable) and not isinstance(stop, str) else [None]
    if not all(isinstance(token, (int, np.integer)) for token in tokens):
        raise ValueError(f"{owner}: stop is {stop!r}, but it must be a sequence of tokens, as tokenizer.stop")


@functools.lru_cache(maxsize=64)
def _program(
    decoder: Decoder,
    length: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    stop: tuple[int, ...],
) -> Callable[..., Generated]:
    def draw(logits: Array, key: Key) -> Array:
        if temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jax.random.categorical(key, keep_likely(logits / temperature, top_k=top_k, top_p=top_p)).astype(
            jnp.int32
        )

    @jit
    def program(params: PyTree, prompts: Array, padding: Array | None, key: Key) -> Generated:
        params = unstacked(params)
        batch_size, time = prompts.shape
        cache = decoder.start(params, batch_size, time + length, padding)
        h, cache = decoder.extend(params, cache, prompts)
        logits = decoder.logits(params, h[:, -1])

        def record(i: Array, logits: Array, found: Generated, alive: Array) -> tuple[Generated, Array]:
            token = jnp.where(alive, draw(logits, jax.random.fold_in(key, i)), 0)
            likely = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]
            new = (token, jnp.where(alive, likely, 0), alive.astype(jnp.float32))
            found = Generated(*(all_.at[:, i].set(one) for all_, one in zip(found, new)))
            return found, alive & ~jnp.isin(token, jnp.array(stop, jnp.int32))

        def go_on(carry: tuple[Array, PyTree, Generated, Array]) -> tuple[Array, PyTree, Generated, Array]:
            i, cache, found, alive = carry
            logits, cache = decoder.step(params, cache, found.tokens[:, i - 1])
            return (i + 1, cache, *record(i, logits, found, alive))

        empty = Generated(
            jnp.zeros((batch_size, length), jnp.int32), *(jnp.zeros((batch_size, length)) for _ in range(2))
        )
        first = record(jnp.int32(0), logits, empty, jnp.ones(batch_size, bool))
        carry = (jnp.int32(1), cache, *first)
        carry = jax.lax.while_loop(lambda c: (c[0] < length) & jnp.any(c[3]), go_on, carry)
        return carry[2]

    return program
