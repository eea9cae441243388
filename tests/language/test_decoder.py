"""The decoder in its two forms, against a plain loop over blocks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_zoo import compose, supervised
from cl_zoo.language import decoder, unstacked
from cl_zoo.layers._delta_rule import delta_rule
from cl_zoo.layers.attention import softmax_attention, window_attention
from cl_zoo.layers.norms import rms_norm
from cl_zoo.layers.ttt import ttt_linear
from cl_zoo.losses import next_token_loss
from cl_zoo.types import Batch

WIDTH, HEADS, V = 8, 2, 11
TOKENS = jax.random.randint(jax.random.key(0), (3, 13), 0, V)


def mixed(n: int) -> list[Any]:
    """n blocks of each of two kinds of memory, one of them with keys shared by heads."""
    return [
        (softmax_attention(WIDTH, HEADS, kv_heads=1), 12, n),
        ({"mixer": ttt_linear(WIDTH, HEADS, mini_batch=4), "prime": 10, "ffn": 12}, n),
    ]


@pytest.mark.parametrize("sandwich", [False, True])
def test_groups_of_blocks_are_a_loop_over_blocks(sandwich: bool) -> None:
    with jax.enable_x64(True):
        groups = mixed(2)
        net = decoder(V, groups, tied=False, sandwich=sandwich)
        params, state = net.model.init(jax.random.key(1), TOKENS)
        params = jax.tree.map(lambda leaf: leaf + 0.1, params)  # no norm at 1
        h = params["embedding"][TOKENS]

        def ffn(p: Any, u: Any) -> Any:
            return (jax.nn.silu(u @ p["gate"]) * (u @ p["up"])) @ p["down"]

        layers = [
            {"mixer": groups[0][0].apply, "ffn": ffn},
            {"mixer": groups[1][0]["mixer"].apply, "prime": ffn, "ffn": ffn},
        ]
        for i, n in ((0, 0), (0, 1), (1, 0), (1, 1)):
            block = jax.tree.map(lambda leaf, n=n: leaf[n], params["blocks"][f"block_{i}"])
            for name, layer in layers[i].items():
                y = layer(block[name], rms_norm(h, block[f"{name}_norm"]["scale"]))
                h = h + (rms_norm(y, block[f"{name}_post_norm"]["scale"]) if sandwich else y)
        wanted = rms_norm(h, params["norm"]["scale"]) @ params["head"]
        logits, _, taps = net.model.apply(params, state, TOKENS)
        np.testing.assert_allclose(logits, wanted, rtol=1e-10, atol=1e-10)
        assert taps == {}


@pytest.mark.parametrize("tied", [True, False])
def test_one_token_after_another_equals_all_at_once(tied: bool) -> None:
    net = decoder(V, mixed(2), tied=tied)
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
        net = decoder(V, mixed(1), rematerialise=rematerialise)
        params, state = net.model.init(jax.random.key(1), TOKENS)
        return jax.grad(lambda p: jnp.sum(next_token_loss(net.model.apply(p, state, TOKENS)[0], TOKENS)))(params)

    for a, b in zip(jax.tree.leaves(gradient(True)), jax.tree.leaves(gradient(False)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_bfloat16_keeps_parameters_logits_and_fast_weights_in_float32() -> None:
    net = decoder(V, mixed(1), dtype=jnp.bfloat16)
    wide = decoder(V, mixed(1))
    params, state = net.model.init(jax.random.key(1), TOKENS)
    logits, _, _ = net.model.apply(params, state, TOKENS)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert logits.dtype == jnp.float32
    exact, _, _ = wide.model.apply(params, state, TOKENS)
    assert 0 < np.abs(logits - exact).max() < 0.1 * np.abs(exact).max()
    cache = net.start(params, 3, 13)
    assert cache["block_0"]["mixer"].state.k.dtype == jnp.bfloat16
    assert cache["block_1"]["mixer"].state.weights[0].kernel.dtype == jnp.float32
    _, after = net.step(params, cache, TOKENS[:, 0])
    kinds = [[(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(c)] for c in (cache, after)]
    assert kinds[0] == kinds[1]


def test_blocks_begin_with_a_residual_stream_that_depth_does_not_widen() -> None:
    def spread(layers: int) -> float:
        net = decoder(V, [(delta_rule(32, 2), 64, layers)])
        tokens = jax.random.randint(jax.random.key(2), (4, 32), 0, V)
        params, _ = net.model.init(jax.random.key(3), tokens)
        blocks = params["blocks"]["block_0"]
        return float(jnp.std(blocks["ffn"]["down"]) * layers**0.5)

    assert spread(2) == pytest.approx(spread(8), rel=0.05)


def test_it_learns_as_any_model_does() -> None:
    net = decoder(V, [(window_attention(16, 2, window=4), 32, 2)])
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
    ("groups", "said"),
    [
        ([(delta_rule(8, 2), 12, 0)], r"n of groups\[0\] is 0"),
        ([(delta_rule(8, 2), 0, 1)], "hidden is 0"),
        ([(delta_rule(8, 2), 12, 1), (delta_rule(4, 2), 12, 1)], r"widths \[4, 8\], but all must have one"),
        ([], "groups is empty"),
        ([delta_rule(8, 2)], r"groups\[0\] is a delta_rule layer, but it must be \(mixer, ffn, n\)"),
        (
            [(delta_rule(8, 2), "gelu", 1)],
            "'gelu', but it must be a layer, or the hidden width of a SwiGLU",
        ),
        ([({"ffn": 12}, 1)], "'ffn' of groups"),
        ([({}, 1)], r"groups\[0\] has {}"),
        ([({"mixer": delta_rule(8, 2), "mixer_norm": 12}, 1)], "is named 'mixer_norm', but it must be a word"),
        ([({"mixer": delta_rule(8, 2), "a/b": 12}, 1)], "is named 'a/b'"),
    ],
)
def test_impossible_decoders_are_refused(groups: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        decoder(V, groups)


@pytest.mark.parametrize("apart", [False, True])
def test_states_with_a_cache_are_those_of_all_at_once(apart: bool) -> None:
    """In pieces of any length, with layers that can read many tokens at once and with one that cannot."""
    window = (window_attention(WIDTH, HEADS, window=4, qk_norm=True), 12, 2)
    for groups in ([mixed(1)[0], window], mixed(2)):
        net = decoder(V, groups)
        params, _ = net.model.init(jax.random.key(1), TOKENS)
        wanted = net.hidden(params, TOKENS)
        used = unstacked(params) if apart else params
        cache, found = net.start(used, 3, TOKENS.shape[1]), []
        for a, b in ((0, 1), (1, 3), (3, 12), (12, 13)):
            h, cache = net.extend(used, cache, TOKENS[:, a:b])
            found.append(h)
        np.testing.assert_allclose(jnp.concatenate(found, axis=1), wanted, rtol=1e-4, atol=1e-5)


def test_a_cache_may_begin_after_keys_and_values() -> None:
    """Those of tokens that were read: then it goes on as if it had read them; and they can be trained."""
    net = decoder(V, [(softmax_attention(WIDTH, HEADS, kv_heads=1), 12, 2)])
    params, _ = net.model.init(jax.random.key(1), TOKENS)
    wanted = net.hidden(params, TOKENS[:1])[:, 5:]
    _, cache = net.extend(params, net.start(params, 1, 5), TOKENS[:1, :5])
    prefix = {"block_0": {"mixer": cache["block_0"]["mixer"].state[:2]}}

    def after(prefix: Any, rows: int = 2) -> jax.Array:
        cache = net.start(params, rows, TOKENS.shape[1], prefix=prefix)
        return net.extend(params, cache, jnp.tile(TOKENS[:1, 5:], (rows, 1)))[0]

    np.testing.assert_allclose(after(prefix), jnp.tile(wanted, (2, 1, 1)), rtol=1e-4, atol=1e-5)
    gradient = jax.grad(lambda p: jnp.sum(after(p) ** 2))(prefix)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
    for wrong, said in (
        ({"block_1": {"mixer": ()}}, "prefix names"),
        ({"block_0": {"ffn": prefix["block_0"]["mixer"]}}, "only softmax attention can begin"),
        ({"block_0": {"mixer": prefix["block_0"]["mixer"][::-1]}}, "prefix has the shapes"),
    ):
        with pytest.raises(ValueError, match=said):
            after(wrong)


def test_tokens_must_be_whole_numbers() -> None:
    net = decoder(V, mixed(1))
    params, state = net.model.init(jax.random.key(1), TOKENS)
    with pytest.raises(ValueError, match="tokens are float32"):
        net.model.apply(params, state, TOKENS.astype(jnp.float32))
