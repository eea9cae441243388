"""Attention by blocks, and to a cache: against NumPy, against each other, and what the compiler makes of them."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cl_zoo.language import decoder, generate, unstacked
from cl_zoo.language._generate import _program
from cl_zoo.layers import _blocks, attention, softmax_attention
from cl_zoo.layers._blocks import attend_by_blocks
from tests.oracles import sequence_layers as oracle

D = 3


def draws(shared: int, time: int, dtype: Any = np.float32) -> tuple[Any, Any, Any, Any]:
    """q, k, v of two key-value heads, and a cotangent."""
    random = np.random.default_rng(time)
    shapes = [(2, shared, time, D), (2, time, D), (2, time, D), (2, shared, time, D)]
    q, k, v, c = (jnp.asarray(random.normal(size=shape).astype(dtype)) for shape in shapes)
    return q, k, v, c


def plain(q: Any, k: Any, v: Any) -> Any:
    """The same in three lines."""
    scores = jnp.einsum("nrtd,nsd->nrts", q, k)
    scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
    return jnp.einsum("nrts,nsd->nrtd", jax.nn.softmax(scores), v)


@pytest.mark.parametrize("shared", [1, 3])
@pytest.mark.parametrize("time", [1, 4, 5, 13, 31, 40, 83])  # a block, blocks of unequal spans, spans of many blocks
def test_blocks_are_softmax_attention_and_so_are_their_gradients(
    monkeypatch: pytest.MonkeyPatch, time: int, shared: int
) -> None:
    monkeypatch.setattr(_blocks, "SIZE", 4)
    q, k, v, c = draws(shared, time)
    found = attend_by_blocks(q, k, v)
    for head in range(2):
        for i in range(shared):
            wanted = oracle.softmax_attention(*(np.asarray(a, np.float64) for a in (q[head, i], k[head], v[head])), 1.0)
            np.testing.assert_allclose(found[head, i], wanted, rtol=1e-4, atol=1e-5)
    gradients = [
        jax.grad(lambda *a, f=f: jnp.sum(f(*a) * c), argnums=(0, 1, 2))(q, k, v) for f in (attend_by_blocks, plain)
    ]
    for a, b in zip(*gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_gradients_of_gradients_and_vmap_go_through_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_blocks, "SIZE", 4)
    q, k, v, c = draws(2, 10)

    def bent(f: Any) -> Any:
        return lambda k: jnp.sum(jax.grad(lambda k: jnp.sum(f(q, k, v) * c))(k) ** 2)

    np.testing.assert_allclose(jax.grad(bent(attend_by_blocks))(k), jax.grad(bent(plain))(k), rtol=1e-3, atol=1e-4)
    several = jnp.stack([k, 2 * k, -k])
    found = jax.vmap(lambda k: attend_by_blocks(q, k, v))(several)
    np.testing.assert_allclose(found, jax.vmap(lambda k: plain(q, k, v))(several), rtol=1e-4, atol=1e-5)


def test_no_matrix_of_all_scores_is_made() -> None:
    """Of 2048 tokens, forward or backward: blocks of 128 rows, and less than a ninth of T^2 at once."""
    time = 2048
    q, k, v, c = draws(1, time)

    def sizes(jaxpr: Any) -> list[int]:
        found = []
        for eqn in jaxpr.eqns:
            found += [math.prod(getattr(v.aval, "shape", ())) for v in eqn.outvars]
            for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
                inner = getattr(inner, "jaxpr", inner)
                found += sizes(inner) if hasattr(inner, "eqns") else []
        return found

    closed = jax.make_jaxpr(jax.grad(lambda *a: jnp.sum(attend_by_blocks(*a) * c), argnums=(0, 1, 2)))(q, k, v)
    assert max(sizes(closed.jaxpr)) == _blocks.SIZE * time


@pytest.mark.parametrize("padded", [False, True])
def test_a_long_prompt_is_read_as_token_after_token(monkeypatch: pytest.MonkeyPatch, padded: bool) -> None:
    """At the beginning, by blocks; after tokens that are there, and beside padding, to the cache."""
    monkeypatch.setattr(_blocks, "SIZE", 4)
    monkeypatch.setattr(attention, "SIZE", 4)
    mixer = softmax_attention(8, 4, kv_heads=2)
    params, x = mixer.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (2, 23, 8))
    padding = (jnp.array([0, 3]),) if padded else ()
    empty = mixer.start(params, 2, 40, jnp.float32, *padding)
    step = jax.jit(mixer.step)
    cache, one_by_one = empty, []
    for t in range(23):
        z, cache = step(params, cache, x[:, t])
        one_by_one.append(z)
    wanted = np.stack(one_by_one, axis=1)
    whole, end = jax.jit(mixer.extend)(params, empty, x)
    first, middle = jax.jit(mixer.extend)(params, empty, x[:, :9])
    second, _ = jax.jit(mixer.extend)(params, middle, x[:, 9:])
    seen = np.arange(23) >= np.array([[0], [3 if padded else 0]])
    for found in (whole, np.concatenate([first, second], axis=1)):
        np.testing.assert_allclose(found[seen], wanted[seen], rtol=1e-4, atol=1e-5)
    for a, b in zip(jax.tree.leaves(end), jax.tree.leaves(cache), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_decoding_copies_nothing_of_a_cache() -> None:
    """Neither a copy nor a transpose of keys or values is in the compiled text."""
    net = decoder(16, [(softmax_attention(24, 4, kv_heads=2), 24, 2)])
    params, _ = net.model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    params, prompts = unstacked(params), jnp.ones((1, 250), jnp.int32)
    program = _program(net, 37, 0.0, None, None, ())
    text = program.lower(params, prompts, None, jax.random.key(0)).compile().as_text()
    places = r"\[(?:1,)?2,(?:287,6|6,287)\]"
    assert re.search(rf"f32{places}\S* fusion\(.*dynamic_update_slice", text), "no cache is found in the program"
    moved = [line.strip() for line in text.splitlines() if re.search(rf"= f32{places}\S* (?:copy|transpose)\(", line)]
    in_loop = [line for line in moved if "while/body" in line or "metadata" not in line]
    assert not in_loop, in_loop[0]
    assert generate(net, params, prompts, jax.random.key(0), length=37, temperature=0.0).tokens.shape == (1, 37)
