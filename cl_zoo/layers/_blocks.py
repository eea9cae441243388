"""Causal softmax attention by blocks, for processors with caches: nothing of T x T is made or transposed."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cl_zoo.types import Array

__all__ = ["SIZE", "attend_by_blocks"]

SIZE = 128
"""Tokens of a block at most: its scores against a thousand keys then stay in a processor's cache."""

SPANS = 8
"""The keys that a block reads are cut to this many lengths, each of which is compiled."""


def attend_by_blocks(q: Array, k: Array, v: Array) -> Array:
    """z_rt = sum_{s <= t} p_rts v_s,   p_rt = softmax_s(q_rt . k_s), one sequence and key-value head after another.

    Backward, p is computed again from the logarithm of its denominator, l_rt = log sum_s exp(q_rt . k_s):

        dv_s = sum_rt p_rts dz_rt,   ds_rts = p_rts (dz_rt . v_s - z_rt . dz_rt),   dq = ds k,   dk = ds^T q

    Args:
      q: `[N, R, T, d]`, scaled; R queries share each key.
      k, v: `[N, T, d]`.

    Returns:
      `[N, R, T, d]`; scores and softmax in float32 at least.

    Raises:
      TypeError: by JAX, where it is differentiated forwards first (`jax.jvp` of it, not of its gradient).

    Source: Dao et al. 2022 (FlashAttention), arXiv 2205.14135; Rabe and Staats 2021, arXiv 2112.05682.

    Differences from the paper or its code: only queries are cut into blocks (backward, only keys), so that each
    softmax is over a whole row.
    """
    time = q.shape[2]
    padding = -time % _block(time)[0]
    if padding:  # keys after all queries, which none of these sees
        q, k, v = (jnp.pad(a, [(0, padding if i == a.ndim - 2 else 0) for i in range(a.ndim)]) for a in (q, k, v))
    return _attend(q, k, v)[:, :, :time]


def _block(time: int) -> tuple[int, int]:
    """Tokens of a block, and blocks."""
    count = -(-time // SIZE)
    return -(-time // count), count


def _spans(time: int) -> list[tuple[int, int]]:
    """The first token of each span of blocks, and the one after its last."""
    size, count = _block(time)
    cuts = [size * (i * count // min(SPANS, count)) for i in range(min(SPANS, count) + 1)]
    return list(zip(cuts[:-1], cuts[1:]))


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def _forward(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    """z, and log_sum `[N, R, T]`."""
    return jax.lax.map(lambda each: _forward_one(*each), (q, k, v))


def _forward_one(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    shared, time, d = q.shape
    size = _block(time)[0]

    def rows(first: Array | int, q: Array, end: int) -> tuple[Array, Array]:
        """z and log_sum of the block of queries that begins with the token `first`, over the keys before `end`."""
        scores = _matmul(q.reshape((-1, d)), k[:end].T).reshape((shared, size, end))
        seen = jnp.arange(end) <= first + jnp.arange(size)[:, None]
        scores = jnp.where(seen, scores, jnp.finfo(scores.dtype).min)
        top = jnp.max(scores, axis=-1, keepdims=True)
        p = jnp.exp(scores - top)
        total = jnp.sum(p, axis=-1, keepdims=True)
        z = _matmul(p.reshape((-1, end)).astype(v.dtype), v[:end]).reshape(q.shape) / total
        return z.astype(v.dtype), (top + jnp.log(total))[..., 0]

    found = []
    for begin, end in _spans(time):
        if end - begin == size:
            found.append(rows(begin, q[:, begin:end], end))
            continue
        blocks = jnp.moveaxis(q[:, begin:end].reshape((shared, -1, size, d)), 1, 0)
        firsts = jnp.arange(begin, end, size)
        z, log_sum = jax.lax.map(lambda each, end=end: rows(each[0], each[1], end), (firsts, blocks))
        found.append(
            (jnp.moveaxis(z, 0, 1).reshape((shared, -1, d)), jnp.moveaxis(log_sum, 0, 1).reshape((shared, -1)))
        )
    z, log_sum = zip(*found)
    return jnp.concatenate(z, axis=1), jnp.concatenate(log_sum, axis=1)


def _backward_one(q: Array, k: Array, v: Array, z: Array, log_sum: Array, dz: Array) -> tuple[Array, Array, Array]:
    shared, time, d = q.shape
    size = _block(time)[0]
    own = jnp.sum(z.astype(log_sum.dtype) * dz.astype(log_sum.dtype), axis=-1)

    def keys(first: Array | int, k: Array, v: Array, begin: int) -> tuple[Array, Array, Array]:
        """dq^T `[d, R, T - begin]`, dk and dv of the block of keys that begins with the token `first`."""
        late, to = q[:, begin:].reshape((-1, d)), dz[:, begin:].reshape((-1, d))
        seen = first + jnp.arange(size)[:, None, None] <= jnp.arange(begin, time)
        scores = _matmul(k, late.T).reshape((size, shared, -1))
        p = jnp.where(seen, jnp.exp(scores - log_sum[:, begin:]), 0)
        ds = p * (_matmul(v, to.T).reshape(p.shape) - own[:, begin:])
        p, ds = (a.reshape((size, -1)).astype(q.dtype) for a in (p, ds))
        return _matmul(k.T, ds).reshape((d, shared, -1)), _matmul(ds, late), _matmul(p, to)

    dq, dk, dv = jnp.zeros((d, shared, time), log_sum.dtype), [], []
    for begin, end in _spans(time):
        if end - begin == size:
            more, dk_span, dv_span = keys(begin, k[begin:end], v[begin:end], begin)
        else:

            def add(dq: Array, each: tuple[Array, ...], begin: int = begin) -> tuple[Array, tuple[Array, Array]]:
                more, dk, dv = keys(each[0], each[1], each[2], begin)
                return dq + more, (dk, dv)

            blocks = (a[begin:end].reshape((-1, size, d)) for a in (k, v))
            none = jnp.zeros((d, shared, time - begin), log_sum.dtype)
            more, (dk_span, dv_span) = jax.lax.scan(add, none, (jnp.arange(begin, end, size), *blocks))
        dq = dq.at[..., begin:].add(more)
        dk.append(dk_span.reshape((-1, d)))
        dv.append(dv_span.reshape((-1, d)))
    return (
        jnp.moveaxis(dq, 0, 2).astype(q.dtype),
        jnp.concatenate(dk).astype(k.dtype),
        jnp.concatenate(dv).astype(v.dtype),
    )


@jax.custom_vjp
def _attend(q: Array, k: Array, v: Array) -> Array:
    return _forward(q, k, v)[0]


def _attend_forward(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, ...]]:
    z, log_sum = _forward(q, k, v)
    return z, (q, k, v, z, log_sum)


def _attend_backward(kept: tuple[Array, ...], dz: Array) -> tuple[Array, Array, Array]:
    return jax.lax.map(lambda each: _backward_one(*each), (*kept, dz))


_attend.defvjp(_attend_forward, _attend_backward)
