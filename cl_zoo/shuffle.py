"""A random order of n things that is computed, not stored."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cl_zoo.types import Array, Key

__all__ = ["shuffled_index"]

_ROUNDS = 4


def _hash(x: Array) -> Array:
    """A 32-bit integer mixer: xor-shifts and odd multipliers ("lowbias32", found by search for low bias)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


@jax.jit  # so that its many small operations are traced once for all calls of one shape
def shuffled_index(key: Key, position: Array, n: Array | int, *salt: Array | int) -> Array:
    """Where `position` goes in the random order of `n` things that `key` (and `salt`) names.

    A Feistel network over pairs (left, right) of digits below s, the even
    number from ceil(sqrt(n)):

        left <- left + hash(right, round key);   right <- right + hash(left, round key)     (modulo s)

    is a bijection of a set slightly larger than n; walking on until the result is below n makes it one of [0, n).
    So an epoch's shuffle, or k draws without replacement, cost O(k) and need no state but the key: no sort, no table
    in the checkpoint, and seeds may be vmapped. Plain integer hashes make the round keys, as this runs at every step.

    Args:
      key: names the order.
      position: `i32[...]`, each in `[0, n)`; others give a value in `[0, n)` too, but not a distinct one.
      n: `i32[]`, at least 1 and below 2^30; may be traced.
      *salt: further whole numbers that name the order, an epoch say.

    Returns:
      `i32[...]`, distinct for distinct positions.

    Source: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002 (generalised Feistel, cycle walking).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> sorted(shuffled_index(jax.random.key(0), jnp.arange(5), 5).tolist())
      [0, 1, 2, 3, 4]
    """
    n = jnp.maximum(jnp.asarray(n).astype(jnp.uint32), 1)
    side = jnp.ceil(jnp.sqrt(n.astype(jnp.float32))).astype(jnp.uint32)
    side = side + (side * side < n)  # the root is rounded, to float32
    side = side + side % 2  # rotations of odd length would make even permutations only
    seed = jnp.uint32(0x9E3779B9)
    for word in (*jnp.ravel(jax.random.key_data(key)), *salt):
        seed = _hash(seed ^ jnp.asarray(word).astype(jnp.uint32)) + jnp.uint32(0x9E3779B9)
    round_keys = _hash(seed + jnp.arange(2 * _ROUNDS, dtype=jnp.uint32))

    def permute(index: Array) -> Array:
        left, right = index // side, index % side
        for i in range(0, 2 * _ROUNDS, 2):
            left = (left + _hash(right ^ round_keys[i]) % side) % side
            right = (right + _hash(left ^ round_keys[i + 1]) % side) % side
        return left * side + right

    def walk(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        index, outside = carry
        index = jnp.where(outside, permute(index), index)
        return index, index >= n

    start = position.astype(jnp.uint32) % n
    index, _ = jax.lax.while_loop(lambda carry: jnp.any(carry[1]), walk, (start, jnp.full(start.shape, True)))
    return index.astype(jnp.int32)
