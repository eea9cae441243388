"""Linear attention: a matrix to which the outer product of every key and value is added, plain or with decay."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from cl_zoo.checks import Count, checked
from cl_zoo.entries import LayerEntry
from cl_zoo.layers.mixer import Mixer, causal_mask, from_chunks, head_mixer, linear, product, to_chunks
from cl_zoo.types import Array, Key, PyTree

__all__ = [
    "ENTRY",
    "gated_linear_attention",
    "linear_attention",
    "linear_attention_chunked",
    "linear_attention_step",
    "zero_matrix",
]

LOWEST_LOG_DECAY = -10.0
_GATED_CHUNK = 16  # so that exponents within a chunk stay below 80, and float32 holds them


def linear_attention_chunked(q: Array, k: Array, v: Array, log_decay: Array | None = None, *, chunk: int = 64) -> Array:
    """S_t = diag(a_t) S_{t-1} + k_t v_t^T;   z_t = q_t S_t,   in chunks.

    Within a chunk it is attention without softmax, between chunks the matrix S is passed on.

    Args:
      q, k: `[..., T, d]`.
      v: `[..., T, e]`.
      log_decay: log a, `[..., T, d]`, at most 0 and not below -10 (lower ones count as -10); None is no decay.
      chunk: C, tokens of a chunk; with decay it is 16.

    Returns:
      `[..., T, e]`.

    Source: Katharopoulos et al. 2020, arXiv 2006.16236; chunks and decay: Yang et al. 2024, arXiv 2312.06635.
    """
    time = q.shape[-2]
    size = min(chunk if log_decay is None else _GATED_CHUNK, max(time, 1))
    q, k, v = (to_chunks(a, size) for a in (q, k, v))
    start = jnp.zeros((*q.shape[1:-2], q.shape[-1], v.shape[-1]), q.dtype)
    if log_decay is None:
        added = jnp.einsum("...td,...te->...de", k, v)
        _, before = jax.lax.scan(lambda state, new: (state + new, state), start, added)
        return from_chunks(_within(q, k) @ v + q @ before, time)
    total = jnp.cumsum(to_chunks(jnp.maximum(log_decay, LOWEST_LOG_DECAY), size), axis=-2)
    middle, end = total[..., size // 2, None, :], total[..., -1, None, :]
    scores = _within(q * jnp.exp(total - middle), k * jnp.exp(middle - total))
    read, write, whole = q * jnp.exp(total), k * jnp.exp(end - total), jnp.exp(end[..., 0, :, None])

    # With chunks so short, keeping the matrix of each takes more time than a chain of small products.
    def step(state: Array, chunk: tuple[Array, ...]) -> tuple[Array, Array]:
        scores, v, read, write, whole = chunk
        return whole * state + jnp.swapaxes(write, -1, -2) @ v, scores @ v + read @ state

    return from_chunks(jax.lax.scan(step, start, (scores, v, read, write, whole))[1], time)


def _within(q: Array, k: Array) -> Array:
    """q_t . k_s for s <= t, 0 elsewhere: of every chunk."""
    return jnp.where(causal_mask(q.shape[-2]), q @ jnp.swapaxes(k, -1, -2), 0)


def linear_attention_step(
    state: Array, q: Array, k: Array, v: Array, log_decay: Array | None = None
) -> tuple[Array, Array]:
    """One more token: S `[..., d, e]`, q, k `[..., d]`, v `[..., e]` -> z `[..., e]`, S."""
    if log_decay is not None:
        state = jnp.exp(jnp.maximum(log_decay, LOWEST_LOG_DECAY))[..., None] * state
    state = state + k[..., None] * v[..., None, :]
    return jnp.einsum("...d,...de->...e", q, state), state


def zero_matrix(width: int, heads: int, batch_size: int, dtype: Any) -> Array:
    """S of an empty sequence, `[B, H, d, d]`, in float32 at least."""
    d = width // heads
    return jnp.zeros((batch_size, heads, d, d), jnp.promote_types(dtype, jnp.float32))


def widen(*arrays: Array) -> list[Array]:
    """To float32 at least: what is added up over a sequence."""
    return [a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in arrays]


@checked
def linear_attention(width: int, heads: int, *, convolution: int = 0, chunk: Count = 64) -> Mixer:
    """S_t = S_{t-1} + k_t v_t^T;   z_t = q_t S_t / sqrt(d).

    What test-time training becomes with a linear model, one batch step of rate 1 on half the squared error from 0, and
    no norm: a memory that adds and never corrects.

    Args:
      width, heads: D, and H that divides it.
      convolution: width of short convolutions of q, k and v; 0 for none.
      chunk: tokens computed at once in the parallel form; it changes only the speed.

    Returns:
      A `Mixer` whose cache is `f32[B, H, d, d]`.

    Raises:
      ValueError: sizes below 1, heads that do not divide the width.

    Source: Katharopoulos et al. 2020, arXiv 2006.16236.

    Differences from the paper or its code: no feature map and no denominator; each head's output is RMS-normalised
    instead, as in Sun et al. 2023 (RetNet), arXiv 2307.08621, and later work.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> mixer = linear_attention(8, 2)
      >>> mixer.apply(mixer.init(jax.random.key(0)), jnp.ones((1, 5, 8))).shape
      (1, 5, 8)
    """

    def parallel(params: PyTree, q: Array, k: Array, v: Array, x: Array) -> Array:
        q, k, v = widen(q, k, v)
        return linear_attention_chunked(q * q.shape[-1] ** -0.5, k, v, chunk=chunk)

    def recur(
        params: PyTree, state: Array, position: Array, q: Array, k: Array, v: Array, x: Array
    ) -> tuple[Array, Array]:
        q, k, v = widen(q, k, v)
        return linear_attention_step(state, q * q.shape[-1] ** -0.5, k, v)

    return head_mixer(
        "linear_attention",
        width,
        heads,
        init=lambda key: {},
        parallel=parallel,
        start=lambda params, batch_size, length, dtype: zero_matrix(width, heads, batch_size, dtype),
        recur=recur,
        convolution=convolution,
    )


@checked
def gated_linear_attention(
    width: int, heads: int, *, convolution: int = 0, rank: Count = 16, temperature: float = 16.0
) -> Mixer:
    """S_t = diag(a_t) S_{t-1} + k_t v_t^T;   z_t = q_t S_t / sqrt(d),   a_t = sigmoid(x_t W_1 W_2 + b)^(1 / tau).

    Args:
      width, heads, convolution: see `linear_attention`.
      rank: of W_1 W_2, at least 1.
      temperature: tau, above 0: the larger, the slower it forgets.

    Returns:
      A `Mixer` whose cache is `f32[B, H, d, d]`.

    Raises:
      ValueError: sizes below 1, heads that do not divide the width.

    Source: Yang et al. 2024, arXiv 2312.06635.

    Differences from the paper or its code: no output gate; a decay below e^-10 counts as e^-10.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> mixer = gated_linear_attention(8, 2)
      >>> mixer.apply(mixer.init(jax.random.key(0)), jnp.ones((1, 5, 8))).shape
      (1, 5, 8)
    """

    def init(key: Key) -> dict[str, Any]:
        first, second = jax.random.split(key)
        return {
            "decay": {"down": linear(first, width, rank), "up": linear(second, rank, width), "bias": jnp.zeros(width)}
        }

    def log_decay(params: PyTree, x: Array) -> Array:
        """`[B, ..., D]` -> `[B, H, ..., d]`."""
        gate = params["decay"]
        (wide,) = widen(product(product(x, gate["down"]), gate["up"]))
        value = jax.nn.log_sigmoid(wide + gate["bias"]) / temperature
        return jnp.moveaxis(value.reshape((*x.shape[:-1], heads, -1)), -2, 1)

    def parallel(params: PyTree, q: Array, k: Array, v: Array, x: Array) -> Array:
        q, k, v = widen(q, k, v)
        return linear_attention_chunked(q * q.shape[-1] ** -0.5, k, v, log_decay(params, x))

    def recur(
        params: PyTree, state: Array, position: Array, q: Array, k: Array, v: Array, x: Array
    ) -> tuple[Array, Array]:
        q, k, v = widen(q, k, v)
        return linear_attention_step(state, q * q.shape[-1] ** -0.5, k, v, log_decay(params, x))

    return head_mixer(
        "gated_linear_attention",
        width,
        heads,
        init=init,
        parallel=parallel,
        start=lambda params, batch_size, length, dtype: zero_matrix(width, heads, batch_size, dtype),
        recur=recur,
        convolution=convolution,
    )


ENTRY = (
    LayerEntry(
        name="linear_attention",
        summary="a matrix, to which the outer product of each key and value is added",
        factory=linear_attention,
        arguments={"chunk": 4},
        papers=("katharopoulos2020transformers",),
        state="constant",
    ),
    LayerEntry(
        name="gated_linear_attention",
        summary="a sum of outer products of keys and values, each row of which decays by a gate of the token",
        factory=gated_linear_attention,
        arguments={"rank": 3},
        papers=("yang2024gated",),
        state="constant",
    ),
)
