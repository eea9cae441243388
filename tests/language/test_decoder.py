"""The decoder in its two forms, against a plain loop over blocks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_zoo import compose, supervised
from cl_zoo.language import decoder
from cl_zoo.layers._delta_rule import delta_rule
from cl_zoo.layers.attention import softmax_attention, window_attention
from cl_zoo.layers.norms import rms_norm
from cl_zoo.layers.ttt import ttt_linear
from cl_zoo.losses import next_token_loss
from cl_zoo.types import Batch

WIDTH, HEADS, V = 8, 2, 11
TOKENS = jax.random.randint(jax.random.key(0), (3, 13), 0, V)


def mixed() -> list[Any]:
    """Two kinds of memory, one of them with keys shared by heads."""
    return [softmax_attention(WIDTH, HEADS, kv_heads=1), ttt_linear(WIDTH, HEADS, mini_batch=4)]


def test_rounds_of_blocks_are_a_loop_over_blocks() -> None:
    with jax.enable_x64(True):
        net = decoder(V, mixed(), layers=4, hidden=12, tied=False)
        params, state = net.model.init(jax.random.key(1), TOKENS)
        h = params["embedding"][TOKENS]
        for i in range(4):
            mixer = mixed()[i % 2]
            block = jax.tree.map(lambda leaf, i=i: leaf[i // 2], params["blocks"][f"block_{i % 2}"])
            h = h + mixer.apply(block["mixer"], rms_norm(h, block["mixer_norm"]["scale"]))
            u = rms_norm(h, block["ffn_norm"]["scale"])
            h = h + (jax.nn.silu(u @ block["ffn"]["gate"]) * (u @ block["ffn"]["up"])) @ block["ffn"]["down"]
        wanted = rms_norm(h, params["norm"]["scale"]) @ params["head"]
        logits, _, taps = net.model.apply(params, state, TOKENS)
        np.testing.assert_allclose(logits, wanted, rtol=1e-10, atol=1e-10)
        assert taps == {}


@pytest.mark.parametrize("tied", [True, False])
def test_one_token_after_another_equals_all_at_once(tied: bool) -> None:
    net = decoder(V, mixed(), layers=4, hidden=12, tied=tied)
    params, state = net.model.init(jax.random.key(1), TOKENS)
    assert ("head" in params) != tied
    logits, _, _ = net.model.apply(params, state, TOKENS)
    cache = net.start(params, 3, TOKENS.shape[1])

    def step(cache: Any, tokens: jax.Array) -> Any:
        return net.step(params, cache, tokens)[::-1]

    _, decoded = jax.lax.scan(step, cache, TOKENS.T)
    np.testing.assert_allclose(jnp.swapaxes(decoded, 0, 1), logits, rtol=1e-4, atol=1e-5)


def test_rematerialising_changes_no_gradient() -> None:
    def gradient(rematerialise: bool) -> Any:
        net = decoder(V, mixed(), layers=2, hidden=12, rematerialise=rematerialise)
        params, state = net.model.init(jax.random.key(1), TOKENS)
        return jax.grad(lambda p: jnp.sum(next_token_loss(net.model.apply(p, state, TOKENS)[0], TOKENS)))(params)

    for a, b in zip(jax.tree.leaves(gradient(True)), jax.tree.leaves(gradient(False)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_bfloat16_keeps_parameters_logits_and_fast_weights_in_float32() -> None:
    net = decoder(V, mixed(), layers=2, hidden=12, dtype=jnp.bfloat16)
    wide = decoder(V, mixed(), layers=2, hidden=12)
    params, state = net.model.init(jax.random.key(1), TOKENS)
    logits, _, _ = net.model.apply(params, state, TOKENS)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert logits.dtype == jnp.float32
    exact, _, _ = wide.model.apply(params, state, TOKENS)
    assert 0 < np.abs(logits - exact).max() < 0.05 * np.abs(exact).max()
    cache = net.start(params, 3, 13)
    assert cache["block_0"].state.k.dtype == jnp.bfloat16
    assert cache["block_1"].state.weights[0].kernel.dtype == jnp.float32
    _, after = net.step(params, cache, TOKENS[:, 0])
    kinds = [[(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(c)] for c in (cache, after)]
    assert kinds[0] == kinds[1]


def test_blocks_begin_with_a_residual_stream_that_depth_does_not_widen() -> None:
    def spread(layers: int) -> float:
        net = decoder(V, [delta_rule(32, 2)], layers=layers, hidden=64)
        tokens = jax.random.randint(jax.random.key(2), (4, 32), 0, V)
        params, _ = net.model.init(jax.random.key(3), tokens)
        blocks = params["blocks"]["block_0"]
        return float(jnp.std(blocks["ffn"]["down"]) * layers**0.5)

    assert spread(2) == pytest.approx(spread(8), rel=0.05)


def test_it_learns_as_any_model_does() -> None:
    net = decoder(V, [window_attention(16, 2, window=4)], layers=2, hidden=32)
    learner = compose(net.model, optax.adam(1e-2), supervised(next_token_loss))
    x = jnp.arange(48).reshape(4, 12) % V
    batch = Batch(x, (x + 1) % V, None, jnp.ones(4))
    state = learner.init(jax.random.key(0), batch)
    update = jax.jit(learner.update)
    losses = []
    for _ in range(30):
        state, metrics = update(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": 3}, "layers is 3, but it must be a multiple of the 2 mixers"),
        ({"hidden": 0}, "hidden is 0"),
        ({"mixers": [delta_rule(8, 2), delta_rule(4, 2)]}, r"widths \[4, 8\], but all must have one"),
        ({"mixers": []}, "at least one mixer"),
    ],
)
def test_impossible_decoders_are_refused(change: dict[str, Any], said: str) -> None:
    settings = {"mixers": mixed(), "layers": 4, "hidden": 12} | change
    with pytest.raises(ValueError, match=said):
        decoder(V, **settings)


def test_tokens_must_be_whole_numbers() -> None:
    net = decoder(V, mixed(), layers=2, hidden=12)
    params, state = net.model.init(jax.random.key(1), TOKENS)
    with pytest.raises(ValueError, match="tokens are float32"):
        net.model.apply(params, state, TOKENS.astype(jnp.float32))
