"""The delta rule: a matrix that corrects its value for a key, token by token, plain or with decay."""

from __future__ import annotations

from typing import Annotated, Any

import jax
import jax.numpy as jnp

from cl_zoo.checks import Count, Range, checked
from cl_zoo.entries import LayerEntry
from cl_zoo.layers._linear_attention import widen, zero_matrix
from cl_zoo.layers.mixer import Mixer, causal_mask, from_chunks, head_mixer, linear, product, to_chunks
from cl_zoo.layers.norms import normalise
from cl_zoo.types import Array, Key, PyTree

__all__ = [
    "ENTRY",
    "delta_rule",
    "delta_rule_chunked",
    "delta_rule_step",
    "gated_delta_rule",
    "unit_triangular_inverse",
]


def delta_rule_chunked(
    q: Array, k: Array, v: Array, beta: Array, log_decay: Array | None = None, *, chunk: int = 32
) -> Array:
    """S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T;   z_t = q_t S_t,   in chunks.

    With u_t = beta_t (v_t - a_t k_t S_{t-1}), S_t = a_t S_{t-1} + k_t u_t^T. Within a chunk that begins at S, and L the
    running sum of log a, all u are the solution of one unit-triangular system

        (I + tril(beta_t e^(L_t - L_s) k_t . k_s, -1)) u = beta v - beta e^L k S

    Args:
      q, k: `[..., T, d]`; keys of norm at most 1 where beta goes up to 1.
      v: `[..., T, e]`.
      beta: `[..., T]`, the learning rate, in [0, 1] (up to 2 is stable).
      log_decay: log a, `[..., T]`, at most 0; None is no decay.
      chunk: C, tokens of a chunk.

    Returns:
      `[..., T, e]`.

    Source: Schlag et al. 2021, arXiv 2102.11174; chunks: Yang et al. 2024, arXiv 2406.06484; decay: Yang et al. 2025,
    arXiv 2412.06464.
    """
    time, e = q.shape[-2], v.shape[-1]
    size = min(chunk, max(time, 1))
    q, k, v = (to_chunks(a, size) for a in (q, k, v))
    beta = to_chunks(beta, size, -1)[..., None]
    total = (
        jnp.zeros_like(beta) if log_decay is None else jnp.cumsum(to_chunks(log_decay, size, -1), axis=-1)[..., None]
    )
    apart = jnp.where(causal_mask(size), total - jnp.swapaxes(total, -1, -2), -jnp.inf)
    between = jnp.exp(apart)  # e^(L_t - L_s), 0 above the diagonal
    scores = between * jnp.einsum("...td,...sd->...ts", q, k)
    system = beta * jnp.where(causal_mask(size, strict=True), between * jnp.einsum("...td,...sd->...ts", k, k), 0)
    right = beta * jnp.concatenate([v, jnp.exp(total) * k], axis=-1)
    solved = unit_triangular_inverse(system) @ right
    own, seen = solved[..., :e], solved[..., e:]
    read, write = jnp.exp(total) * q, jnp.exp(total[..., -1:, :] - total) * k
    whole = jnp.exp(total[..., -1:, :])

    def step(state: Array, chunk: tuple[Array, ...]) -> tuple[Array, Array]:
        own, seen, read, write, scores, whole = chunk
        u = own - seen @ state
        z = read @ state + scores @ u
        return whole * state + jnp.swapaxes(write, -1, -2) @ u, z

    start = jnp.zeros((*q.shape[1:-2], q.shape[-1], e), q.dtype)
    _, z = jax.lax.scan(step, start, (own, seen, read, write, scores, whole))
    return from_chunks(z, time)


def unit_triangular_inverse(below: Array) -> Array:
    """(I + below)^-1 of strictly lower-triangular `[..., C, C]`, by matrix products alone.

    Blocks on the diagonal double in size: the inverse of [[A, 0], [B, D]] is [[A^-1, 0], [-D^-1 B A^-1, D^-1]]. It is
    as exact as substitution, which the sum of powers of `below` is not where keys are similar.

    Example:
      >>> unit_triangular_inverse(jnp.array([[0.0, 0.0], [3.0, 0.0]]))
      Array([[ 1.,  0.],
             [-3.,  1.]], dtype=float32)
    """
    size = below.shape[-1]
    whole = 1 << (size - 1).bit_length()
    below = jnp.pad(below, [(0, 0)] * (below.ndim - 2) + [(0, whole - size)] * 2)
    inverse = jnp.ones((*below.shape[:-1], 1, 1), below.dtype)  # one block for each row
    s = 1
    while s < whole:
        pairs = below.reshape((*below.shape[:-2], whole // (2 * s), 2, s, whole // (2 * s), 2, s))
        off = jnp.einsum("...asat->...ast", pairs[..., :, 1, :, :, 0, :])
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        corner = -second @ off @ first
        upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        inverse = jnp.concatenate([upper, jnp.concatenate([corner, second], axis=-1)], axis=-2)
        s *= 2
    return inverse[..., 0, :size, :size]


def delta_rule_step(
    state: Array, q: Array, k: Array, v: Array, beta: Array, log_decay: Array | None = None
) -> tuple[Array, Array]:
    """One more token: S `[..., d, e]`, q, k `[..., d]`, v `[..., e]`, beta, log_decay `[...]` -> z `[..., e]`, S."""
    if log_decay is not None:
        state = jnp.exp(log_decay)[..., None, None] * state
    error = v - jnp.einsum("...d,...de->...e", k, state)
    state = state + k[..., None] * (beta[..., None] * error)[..., None, :]
    return jnp.einsum("...d,...de->...e", q, state), state


def _per_head(params: PyTree, x: Array) -> Array:
    """x W + b for each head: `[B, ..., D]` -> `[B, H, ...]`, in float32 at least."""
    (wide,) = widen(product(x, params["kernel"]))
    return jnp.moveaxis(wide + params["bias"], -1, 1)


def _unit(q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """Queries and keys of length 1."""
    q, k, v = widen(q, k, v)
    return normalise(q), normalise(k), v


@checked
def delta_rule(
    width: int,
    heads: int,
    *,
    convolution: int = 0,
    chunk: Count = 32,
    base_rate: Annotated[Array | float, Range(0, 2)] = 1.0,
) -> Mixer:
    """S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T;   z_t = q_t S_t,   beta_t = c sigmoid(x_t w + b).

    One step of gradient descent for every token, on 1/2 ||k_t S - v_t||^2 with rate beta_t: a key's new value replaces
    the old one. It is online test-time training of a linear model without
    norm. Queries and keys are scaled to length 1.

    Args:
      width, heads: D, and H that divides it.
      convolution: width of short convolutions of q, k and v; 0 for none.
      chunk: tokens computed at once in the parallel form; it changes only the speed.
      base_rate: c, the largest beta, in [0, 2]; may be traced. Up to 1, what S answers to a key shrinks; above, it can
        change its sign, without which no such layer can keep a parity (Grazzi et al. 2025, arXiv 2411.12537).

    Returns:
      A `Mixer` whose cache is `f32[B, H, d, d]`.

    Raises:
      ValueError: sizes below 1, heads that do not divide the width, a base_rate outside [0, 2].

    Source: Schlag et al. 2021, arXiv 2102.11174; Yang et al. 2024 (DeltaNet), arXiv 2406.06484.

    Differences from the paper or its code: convolutions are off unless asked for; DeltaNet has them, of width 4. The
    library fla has an epsilon of 1e-5 in the output's norm, and scales q by d^-1/2.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> mixer = delta_rule(8, 2)
      >>> mixer.apply(mixer.init(jax.random.key(0)), jnp.ones((1, 5, 8))).shape
      (1, 5, 8)
    """

    def init(key: Key) -> dict[str, Any]:
        return {"rate": {"kernel": linear(key, width, heads), "bias": jnp.zeros(heads)}}

    def beta(params: PyTree, x: Array) -> Array:
        return base_rate * jax.nn.sigmoid(_per_head(params["rate"], x))

    def parallel(params: PyTree, q: Array, k: Array, v: Array, x: Array) -> Array:
        return delta_rule_chunked(*_unit(q, k, v), beta(params, x), chunk=chunk)

    def recur(
        params: PyTree, state: Array, position: Array, q: Array, k: Array, v: Array, x: Array
    ) -> tuple[Array, Array]:
        return delta_rule_step(state, *_unit(q, k, v), beta(params, x))

    return head_mixer(
        "delta_rule",
        width,
        heads,
        init=init,
        parallel=parallel,
        start=lambda params, batch_size, length, dtype: zero_matrix(width, heads, batch_size, dtype),
        recur=recur,
        convolution=convolution,
    )


@checked
def gated_delta_rule(width: int, heads: int, *, convolution: int = 0, chunk: Count = 32) -> Mixer:
    """S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T;   z_t = q_t S_t.

    beta_t = sigmoid(x_t w + b) as in `delta_rule`, and a decay for each head, log a_t = -A softplus(x_t w' + b'), A > 0
    learned: it corrects single keys, and forgets all of them when that is better.

    Args:
      width, heads, convolution, chunk: see `delta_rule`.

    Returns:
      A `Mixer` whose cache is `f32[B, H, d, d]`.

    Raises:
      ValueError: sizes below 1, heads that do not divide the width.

    Source: Yang et al. 2025, arXiv 2412.06464.

    Differences from the paper or its code: no output gate, convolutions only if asked for; A begins evenly spread over
    [1, 16] on a log scale and softplus at 0.001 to 0.1, where the code draws both. The library fla has an epsilon of
    1e-5 in the output's norm, and scales q by d^-1/2.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> mixer = gated_delta_rule(8, 2)
      >>> mixer.apply(mixer.init(jax.random.key(0)), jnp.ones((1, 5, 8))).shape
      (1, 5, 8)
    """

    def init(key: Key) -> dict[str, Any]:
        first, second = jax.random.split(key)
        begin = jnp.geomspace(1e-3, 1e-1, heads)
        return {
            "rate": {"kernel": linear(first, width, heads), "bias": jnp.zeros(heads)},
            "decay": {"kernel": linear(second, width, heads), "bias": jnp.log(jnp.expm1(begin))},
            "log_decay_scale": jnp.log(jnp.geomspace(1.0, 16.0, heads)[::-1]),
        }

    def gates(params: PyTree, x: Array) -> tuple[Array, Array]:
        scale = jnp.exp(params["log_decay_scale"]).reshape((-1, *[1] * (x.ndim - 2)))
        log_decay = -scale * jax.nn.softplus(_per_head(params["decay"], x))
        return jax.nn.sigmoid(_per_head(params["rate"], x)), log_decay

    def parallel(params: PyTree, q: Array, k: Array, v: Array, x: Array) -> Array:
        return delta_rule_chunked(*_unit(q, k, v), *gates(params, x), chunk=chunk)

    def recur(
        params: PyTree, state: Array, position: Array, q: Array, k: Array, v: Array, x: Array
    ) -> tuple[Array, Array]:
        return delta_rule_step(state, *_unit(q, k, v), *gates(params, x))

    return head_mixer(
        "gated_delta_rule",
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
        name="delta_rule",
        summary="a matrix that each token corrects by its own prediction error",
        factory=delta_rule,
        arguments={"chunk": 4},
        papers=("schlag2021linear", "yang2024parallelizing"),
        state="constant",
    ),
    LayerEntry(
        name="gated_delta_rule",
        summary="a matrix that each token corrects by its own prediction error and decays by a gate",
        factory=gated_delta_rule,
        arguments={"chunk": 4},
        papers=("yang2025gated",),
        state="constant",
    ),
)
