"""Generation: the cache, padding, stopping and the distribution of what is drawn."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from cl_zoo.language import decoder, generate, unstacked
from cl_zoo.language._generate import _program, keep_likely
from cl_zoo.layers import delta_rule, softmax_attention

V = 11
KEY = jax.random.key(3)


def net(mixer: Any = None, layers: int = 2) -> tuple[Any, Any]:
    made = decoder(V, [(mixer or softmax_attention(8, 2, kv_heads=1), 12, layers)])
    params, _ = made.model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    return made, jax.tree.map(lambda leaf: 2.0 * leaf, params)  # so that not all tokens are as likely


PROMPTS = jax.random.randint(jax.random.key(1), (3, 5), 0, V)


def greedy_without_cache(made: Any, params: Any, tokens: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    likely = []
    for _ in range(n):
        logits = np.asarray(made.model.apply(params, {}, tokens)[0][:, -1])
        new = logits.argmax(-1)
        likely.append((logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(len(new)), new])
        tokens = np.concatenate([tokens, new[:, None]], axis=1)
    return tokens[:, -n:], np.stack(likely, 1)


@pytest.mark.parametrize("mixer", [None, delta_rule(8, 2)], ids=["attention", "delta rule"])
def test_with_cache_is_without(mixer: Any) -> None:
    made, params = net(mixer)
    found = generate(made, params, PROMPTS, KEY, length=6, temperature=0)
    tokens, likely = greedy_without_cache(made, params, np.asarray(PROMPTS), 6)
    np.testing.assert_array_equal(found.tokens, tokens)
    np.testing.assert_allclose(found.log_probabilities, likely, atol=1e-5)
    np.testing.assert_array_equal(found.mask, 1)


def test_unstacked_blocks_give_the_same() -> None:
    made, params = net()
    apart = unstacked(params)
    assert isinstance(apart["blocks"]["block_0"], list) and len(apart["blocks"]["block_0"]) == 2
    cache, cache_apart = made.start(params, 3, 8), made.start(apart, 3, 8)
    h, cache = made.extend(params, cache, PROMPTS)
    h_apart, cache_apart = made.extend(apart, cache_apart, PROMPTS)
    np.testing.assert_allclose(h, h_apart, atol=1e-6)
    for new in PROMPTS.T[:2]:
        logits, cache = made.step(params, cache, new)
        logits_apart, cache_apart = made.step(apart, cache_apart, new)
        np.testing.assert_allclose(logits, logits_apart, atol=1e-6)


def test_padding_on_the_left_changes_nothing() -> None:
    made, params = net()
    wanted = generate(made, params, PROMPTS, KEY, length=6, temperature=0)
    padding = jnp.array([3, 0, 7])
    rows = np.full((3, 12), 9)
    for row, n in zip(rows, padding):
        row[n : n + 12] = np.resize(np.asarray(PROMPTS)[0], 12)[: 12 - n]
    for i, n in enumerate(padding):
        alone = generate(made, params, jnp.asarray(rows[i : i + 1, n:]), KEY, length=4, temperature=0)
        together = generate(made, params, jnp.asarray(rows), KEY, length=4, temperature=0, padding=padding)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[i])
        np.testing.assert_allclose(alone.log_probabilities[0], together.log_probabilities[i], atol=1e-5)
    zero = generate(made, params, PROMPTS, KEY, length=6, temperature=0, padding=jnp.zeros(3, jnp.int32))
    np.testing.assert_array_equal(zero.tokens, wanted.tokens)


def test_rows_end_at_a_stop_token() -> None:
    made, params = net()
    free = generate(made, params, PROMPTS, KEY, length=8)
    stop = int(free.tokens[0, 2])
    found = generate(made, params, PROMPTS, KEY, length=8, stop=[stop])
    for row, all_, mask, likely in zip(found.tokens, free.tokens, found.mask, found.log_probabilities):
        hits = np.flatnonzero(np.asarray(all_) == stop)
        n = hits[0] + 1 if len(hits) else 8
        np.testing.assert_array_equal(row[:n], all_[:n])
        np.testing.assert_array_equal(row[n:], 0)
        np.testing.assert_array_equal(mask, np.arange(8) < n)
        np.testing.assert_array_equal(likely[n:], 0)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 2.0}, {"top_k": 3}, {"top_p": 0.7}, {"temperature": 0.7, "top_k": 5, "top_p": 0.8}]
)
def test_tokens_are_drawn_as_often_as_they_are_likely(options: dict[str, Any]) -> None:
    made, params = net()
    prompts = jnp.tile(PROMPTS[:1], (4000, 1))
    found = generate(made, params, prompts, KEY, length=1, **options)
    logits = np.asarray(made.model.apply(params, {}, PROMPTS[:1])[0][0, -1], float)
    p = np.exp(logits / options.get("temperature", 1.0))
    order = np.argsort(-p)
    p[order[options.get("top_k", V) :]] = 0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= options.get("top_p", 1.1)]] = 0
    p /= p.sum()
    counts = np.bincount(np.asarray(found.tokens)[:, 0], minlength=V)
    assert not counts[p == 0].any()
    assert scipy.stats.chisquare(counts[p > 0], 4000 * p[p > 0]).pvalue > 1e-3
    raw = logits - np.log(np.exp(logits).sum())
    np.testing.assert_allclose(found.log_probabilities[:, 0], raw[np.asarray(found.tokens)[:, 0]], atol=1e-5)


def test_at_least_one_token_is_kept() -> None:
    logits = jnp.array([[0.0, 3.0, 1.0]])
    kept = keep_likely(logits, top_p=0.0)
    assert list(np.asarray(kept[0]) > -1e30) == [False, True, False]


def test_compiled_once_for_each_shape() -> None:
    made, params = net()
    options = (4, 1.0, None, None, ())
    generate(made, params, PROMPTS, KEY, length=4)
    generate(made, params, PROMPTS + 1, jax.random.key(9), length=4)
    assert _program(made, *options)._cache_size() == 1
    generate(made, params, PROMPTS[:, :4], KEY, length=4)
    assert _program(made, *options)._cache_size() == 2


def test_errors_before_anything_compiles() -> None:
    made, params = net()
    for wrong, field in (
        ({"length": 0}, "length"),
        ({"length": 1, "temperature": -1.0}, "temperature"),
        ({"length": 1, "top_k": 0}, "top_k"),
        ({"length": 1, "top_p": 1.5}, "top_p"),
        ({"length": 1, "temperature": jnp.ones(())}, "temperature"),
        ({"length": 1, "stop": 3}, "stop is 3"),
        ({"length": 1, "stop": (999,)}, "stop is 999"),
        ({"length": 1, "padding": jnp.zeros(2, jnp.int32)}, r"padding is int32 of the shape \(2,\)"),
        ({"length": 1, "padding": jnp.zeros(3)}, "padding is float32"),
        ({"length": 1, "padding": np.array([0, 99, 0])}, "padding is 99"),
    ):
        with pytest.raises(ValueError, match=field):
            generate(made, params, PROMPTS, KEY, **wrong)
    with pytest.raises(ValueError, match="prompts"):
        generate(made, params, PROMPTS[:, :0], KEY, length=1)
    with pytest.raises(ValueError, match="prompts is 999"):
        generate(made, params, np.full((3, 2), 999), KEY, length=1)
    with pytest.raises(ValueError, match="merge_adapters"):
        generate(made, {"blocks": {}}, PROMPTS, KEY, length=1)
    with pytest.raises(ValueError, match="decoder is a Model, but it must be a Decoder"):
        generate(made.model, params, PROMPTS, KEY, length=1)  # type: ignore[arg-type]
    other, its = net(delta_rule(8, 2))
    with pytest.raises(ValueError, match="delta_rule"):
        generate(other, its, PROMPTS, KEY, length=1, padding=jnp.ones(3, jnp.int32))
