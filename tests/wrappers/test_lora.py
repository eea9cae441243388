"""Adapters of low rank: what they compute, and that the frozen weights are there once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_zoo import compose, ema, ewc, fit, lwf, replay, run_stream, supervised, sweep, weight_interpolation, wise_ft
from cl_zoo.language import decoder
from cl_zoo.layers import softmax_attention
from cl_zoo.losses import next_token_loss
from cl_zoo.models import cnn, mlp
from cl_zoo.streams import text_domains
from cl_zoo.training import stream_program
from cl_zoo.training.run_directory import ConfigError
from cl_zoo.wrappers import lora, merge_adapters, unmerge_adapters
from cl_zoo.wrappers._lora import AdaptedKernel
from tests.tiny import close, same_bytes

TOKENS = jax.random.randint(jax.random.key(0), (3, 9), 0, 256)
NET = decoder(256, [(softmax_attention(16, 2, kv_heads=1), 24, 2)])
MODEL = lora(NET.model, 3, alpha=6.0)
WEIGHTS, _ = NET.model.init(jax.random.key(7), TOKENS)
BOUND = MODEL.bind(WEIGHTS)


def moved(model: Any = BOUND, x: Any = TOKENS) -> tuple[Any, Any]:
    """Adapters that do something."""
    params, state = model.init(jax.random.key(1), x)
    return jax.tree.map(lambda leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size).reshape(leaf.shape)), params), state


def size(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_without_up_it_is_the_base_function_exactly() -> None:
    params, state = BOUND.init(jax.random.key(1), TOKENS)
    assert all(not leaf.any() for path, leaf in jax.tree_util.tree_leaves_with_path(params) if path[-1].key == "B")
    wanted, inner_state, _ = NET.model.apply(WEIGHTS, {}, TOKENS)
    outputs, after, taps = BOUND.apply(params, state, TOKENS)
    np.testing.assert_array_equal(outputs, wanted)
    same_bytes(state, inner_state)
    same_bytes(after, state)
    assert taps == {}
    # The order does not matter: weights that were bound before are frozen, as those that are bound after.
    before = lora(NET.model.bind(WEIGHTS), 3, alpha=6.0)
    same_bytes(before.init(jax.random.key(1), TOKENS), (params, state))
    np.testing.assert_array_equal(before.apply(params, state, TOKENS)[0], wanted)


def test_it_is_the_equation() -> None:
    params, state = moved()
    full = jax.tree.map(np.asarray, WEIGHTS)
    for part in ("mixer", "ffn"):
        for name, each in params["blocks"]["block_0"][part].items():
            a, b = np.asarray(each["A"], float), np.asarray(each["B"], float)
            full["blocks"]["block_0"][part][name] = full["blocks"]["block_0"][part][name] + 6 / 3 * a @ b
    wanted, _, _ = NET.model.apply(jax.tree.map(jnp.float32, full), {}, TOKENS)
    outputs, _, _ = jax.jit(BOUND.apply)(params, state, TOKENS)
    np.testing.assert_allclose(outputs, wanted, atol=1e-5)
    plain, _, _ = NET.model.apply(WEIGHTS, {}, TOKENS)
    assert np.abs(plain - outputs).max() > 1e-2


def test_merged_is_unmerged() -> None:
    params, state = moved()
    outputs, _, _ = BOUND.apply(params, state, TOKENS)
    merged = merge_adapters(MODEL, params, WEIGHTS)
    np.testing.assert_allclose(NET.model.apply(merged, {}, TOKENS)[0], outputs, atol=1e-5)
    again = unmerge_adapters(MODEL, params, merged)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), again, WEIGHTS)


def test_decoding_with_adapters_is_the_parallel_form() -> None:
    params, state = moved()
    wanted, _, _ = BOUND.apply(params, state, TOKENS)
    full = BOUND.inner_params(params)
    assert isinstance(full["blocks"]["block_0"]["mixer"]["query"], AdaptedKernel)
    h, cache = NET.extend(full, NET.start(full, 3, 9), TOKENS[:, :-1])
    np.testing.assert_allclose(NET.logits(full, h), wanted[:, :-1], atol=1e-5)
    np.testing.assert_allclose(NET.step(full, cache, TOKENS[:, -1])[0], wanted[:, -1], atol=1e-5)


@pytest.mark.parametrize("made", [mlp((4, 4), 3, hidden=(6,)), cnn((4, 4), 3, channels=(4,), hidden=6)])
def test_networks_of_dense_layers(made: Any) -> None:
    x = jnp.cos(jnp.arange(32.0)).reshape((2, 4, 4))
    model = lora(made, 2, targets=("kernel",), merged=True)
    weights, inner_state = made.init(jax.random.key(3), x)
    params, state = moved(model.bind(weights), x)
    same_bytes(state, inner_state)
    wanted = made.apply(merge_adapters(model, params, weights), state, x)[0]
    np.testing.assert_allclose(model.bind(weights).apply(params, state, x)[0], wanted, atol=1e-6)


def test_without_weights_they_are_drawn() -> None:
    """Those that the model would have begun from with this key; and a run draws those that `drawn` tells."""
    weights = MODEL.draw_function(jax.random.key(1), TOKENS)
    same_bytes(weights, NET.model.init(jax.random.key(1), TOKENS)[0])
    same_bytes(MODEL.init(jax.random.key(1), TOKENS), MODEL.bind(weights).init(jax.random.key(1), TOKENS))
    one, source, key = learner(), stream(), jax.random.key(4)
    batch, _ = source.next(source.init(key))
    learner_key = jax.random.split(key)[0]
    weights = one.drawn(learner_key, batch).model.weights
    same_bytes(one.init(learner_key, batch), one.bind(weights).init(learner_key, batch))
    assert one.bind(weights).drawn(learner_key, batch).model.weights is weights
    drawn, bound = run_stream(one, source, key), run_stream(one.bind(weights), source, key)
    close(drawn.metrics, bound.metrics, rtol=1e-4)
    close(drawn.state.params, bound.state.params, atol=1e-3)  # Adam makes much of a gradient that is only rounding
    # So it can predict afterwards.
    rows = source.evaluation(1, "test")
    first = jax.tree.map(lambda leaf: leaf[0], rows)
    assert one.bind(weights).predict(drawn.state, first.x).shape == (*first.x.shape, 256)


def test_full_fine_tuning_begins_from_a_copy_of_bound_weights() -> None:
    params, _ = NET.model.bind(WEIGHTS).init(jax.random.key(1), TOKENS)
    same_bytes(params, WEIGHTS)
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(WEIGHTS), strict=True)
    assert all(a is not b and a.unsafe_buffer_pointer() != b.unsafe_buffer_pointer() for a, b in pairs)
    for wrong, words in (
        (WEIGHTS | {"embedding": WEIGHTS["embedding"][:-1]}, r"'embedding' has the shape \(255, 16\)"),
        ({"embedding": WEIGHTS["embedding"]}, "the weights have no"),
        (WEIGHTS | {"more": WEIGHTS["embedding"]}, "have 'more', for which the model has no place"),
    ):
        with pytest.raises(ValueError, match=words):
            NET.model.bind(wrong).init(jax.random.key(1), TOKENS)


def test_what_is_refused() -> None:
    for wrong in ({"rank": 0}, {"rank": 2, "alpha": -1.0}):
        with pytest.raises(ValueError, match=list(wrong)[-1]):
            lora(NET.model, **wrong)
    with pytest.raises(ValueError, match="no kernels named nothing"):
        lora(NET.model, 2, targets=("nothing",)).init(jax.random.key(0), TOKENS)
    with pytest.raises(ValueError, match="no kernels named v_proj; those that it has: .*query, up, value"):
        lora(NET.model, 2, targets=("query", "v_proj")).init(jax.random.key(0), TOKENS)
    with pytest.raises(ValueError, match="targets is 'query,key', but it must be a sequence, each a word"):
        lora(NET.model, 2, targets="query,key")
    with pytest.raises(ValueError, match="lora: model is a Decoder, but it must be a Model"):
        lora(NET, 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not one that lora made"):
        merge_adapters(NET.model, {}, WEIGHTS)
    with pytest.raises(ValueError, match="weights are frozen already"):
        lora(MODEL, 2)
    params, state = BOUND.init(jax.random.key(1), TOKENS)
    with pytest.raises(ValueError, match=r"none are bound: model\.bind\(weights\), or learner\.bind\(weights\)"):
        MODEL.apply(params, state, TOKENS)
    with pytest.raises(ValueError, match="weights holds a str"):
        run_stream(learner(COMPONENTS["ewc"]()).bind("model"), stream(), jax.random.key(0))
    with pytest.raises(ValueError, match="weights holds a str"):
        sweep(lambda s: learner(), jnp.zeros(1), stream(), jax.random.split(jax.random.key(0), 1), weights="model")
    with pytest.raises(ValueError, match="must be a matrix"):
        lora(mlp((4, 4), 3), 2, targets=("bias",)).init(jax.random.key(0), jnp.zeros((1, 4, 4)))


@pytest.mark.parametrize("options", [{"biases": ("query", "key", "value")}, {"convolution": 4}])
def test_biases_and_convolutions_are_no_kernels(options: dict[str, Any]) -> None:
    net = decoder(256, [(softmax_attention(16, 2, **options), 24, 2)])
    weights, _ = net.model.init(jax.random.key(3), TOKENS)
    model = lora(net.model, 2).bind(weights)
    params, state = moved(model)
    assert set(params["blocks"]["block_0"]["mixer"]) == {"query", "key", "value", "output"}
    wanted = net.model.apply(merge_adapters(model, params, weights), {}, TOKENS)[0]
    np.testing.assert_allclose(model.apply(params, state, TOKENS)[0], wanted, atol=1e-5)


def stream() -> Any:
    texts = {"a": b"one two three four five " * 60, "b": b"uno dos tres cuatro cinco " * 60}
    return text_domains(texts, length=16, batch_size=4, steps=6)


COMPONENTS = {
    "ewc": lambda: ewc(10.0, labels="loss", micro_batch=4),
    "replay": lambda: replay(8, batch_size=4),
    "weight_interpolation": lambda: weight_interpolation(0.5, alignment=None),
    "lwf": lambda: lwf(),
    "ema": lambda: ema(0.9),
    "wise_ft": lambda: wise_ft(0.5),
}


def learner(*components: Any) -> Any:
    return compose(MODEL, optax.adam(1e-2), supervised(next_token_loss), *components)


@pytest.mark.parametrize("name", COMPONENTS)
def test_components_act_on_adapters_and_hold_no_frozen_weights(name: str) -> None:
    before = jax.tree.map(np.array, WEIGHTS)
    result = run_stream(learner(COMPONENTS[name]()).bind(WEIGHTS), stream(), jax.random.key(0))
    same_bytes(WEIGHTS, before)
    own = {leaf.shape for leaf in jax.tree.leaves(WEIGHTS) if leaf.size > 1000}
    assert not own & {leaf.shape for leaf in jax.tree.leaves(result.state)}
    assert np.isfinite(result.accuracy[-1]).all()
    assert result.metrics["loss"][0, -1] < result.metrics["loss"][0, 0]


@pytest.mark.parametrize(
    ("components", "bound"), [((), False), ((ema(0.9), ewc(1.0, labels="loss", micro_batch=4)), True)]
)
def test_a_program_holds_the_frozen_weights_once(components: Any, bound: bool) -> None:
    """As an argument, or drawn inside. Twice as wide, the weights are four times as large; all else grows as the width
    does, but for one block of four that is at work."""
    source, found = stream(), []
    for width in (256, 512):
        net = decoder(256, [(softmax_attention(width, 2), width, 4)])
        weights = jax.eval_shape(lambda net=net: net.model.init(jax.random.key(0), TOKENS)[0])
        one = compose(lora(net.model, 2), optax.adam(1e-2), supervised(next_token_loss), *components)
        one = one.bind(weights) if bound else one
        program = stream_program(one, source).lower(one, source, jax.random.key(0))
        found.append((size(weights), program.compile().memory_analysis()))
    (small, before), (large, after) = found
    assert after.argument_size_in_bytes < (1.05 if bound else 0.05) * large
    assert after.output_size_in_bytes < 0.1 * large
    drawn = 0 if bound else large - 2 * small
    assert after.temp_size_in_bytes - 2 * before.temp_size_in_bytes < drawn + 0.5 * (large - small)


def test_seeds_share_the_frozen_weights() -> None:
    make = lambda rate: compose(MODEL, optax.adam(rate), supervised(next_token_loss))  # noqa: E731
    keys = jax.random.split(jax.random.key(0), 2)
    options = {"weights": WEIGHTS, "keep_states": True}
    result = sweep(make, jnp.array([1e-2, 0.0]), stream(), keys, batch_size=4, **options)
    own = {leaf.shape for leaf in jax.tree.leaves(WEIGHTS) if leaf.size > 1000}
    assert not own & {leaf.shape[2:] for leaf in jax.tree.leaves(result.state)}
    alone = run_stream(make(1e-2).bind(WEIGHTS), stream(), keys[1])
    np.testing.assert_allclose(result.accuracy[0, 1], alone.accuracy, atol=1e-4)
    np.testing.assert_allclose(result.accuracy[1, 0, 0], result.accuracy[1, 1, -1], atol=1e-6)


def test_checkpoints_hold_adapters_alone_and_runs_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cl_zoo.training.checkpoint import Checkpoints

    unbound, arguments = (
        learner(replay(8, batch_size=4)),
        {"progress": False, "checkpoint_every": 4, "checkpoint_seconds": 0},
    )
    one = unbound.bind(WEIGHTS)
    whole = run_stream(one, stream(), jax.random.key(0))
    save = Checkpoints.save

    def stopping(self: Any, step: int, tree: Any) -> None:
        save(self, step, tree)
        assert not any(leaf.shape == WEIGHTS["embedding"].shape for leaf in jax.tree.leaves(tree))
        if step == 10:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", stopping)
    with pytest.raises(KeyboardInterrupt):
        fit(one, stream(), jax.random.key(0), tmp_path / "cut", **arguments)
    monkeypatch.setattr(Checkpoints, "save", save)
    other = jax.tree.map(lambda leaf: leaf + 1, WEIGHTS)
    with pytest.raises(ConfigError, match="weights_crc32"):
        fit(unbound.bind(other), stream(), jax.random.key(0), tmp_path / "cut", **arguments)
    with pytest.raises(ConfigError, match="weights_crc32 was .* now it is 'absent'"):
        fit(unbound, stream(), jax.random.key(0), tmp_path / "cut", **arguments)
    resumed = fit(one, stream(), jax.random.key(0), tmp_path / "cut", **arguments)
    uncut = fit(one, stream(), jax.random.key(0), tmp_path / "uncut", **arguments)
    same_bytes(resumed.state, uncut.state)
    np.testing.assert_allclose(resumed.accuracy, whole.accuracy, atol=1e-4)
    jax.block_until_ready(WEIGHTS)  # they are still the caller's


def test_training_all_weights_leaves_the_callers_alone(tmp_path: Path) -> None:
    weights = jax.tree.map(jnp.copy, WEIGHTS)
    full = compose(NET.model, optax.adam(1e-2), supervised(next_token_loss), ema(0.9)).bind(weights)
    found = fit(full, stream(), jax.random.key(0), tmp_path / "full", progress=False)
    same_bytes(weights, WEIGHTS)
    assert np.abs(np.asarray(found.state.params["embedding"] - WEIGHTS["embedding"])).max() > 1e-3
    whole = run_stream(full, stream(), jax.random.key(0))
    same_bytes(weights, WEIGHTS)
    close(whole.state.params, found.state.params, rtol=1e-2, atol=1e-3)


def test_weights_that_are_drawn_are_in_no_checkpoint_either(tmp_path: Path) -> None:
    one, key = learner(ema(0.9)), jax.random.key(3)
    whole = run_stream(one, stream(), key)
    found = fit(one, stream(), key, tmp_path, progress=False)
    np.testing.assert_allclose(found.accuracy, whole.accuracy, atol=1e-3)
    for manifest in (tmp_path / "checkpoints").glob("*/manifest/metadata"):
        shapes = [tuple(leaf["shape"]) for leaf in json.loads(manifest.read_text())["leaves"]]
        assert shapes and WEIGHTS["embedding"].shape not in shapes
    same_bytes(fit(one, stream(), key, tmp_path, progress=False), found)


def test_weights_in_bfloat16_are_compared_too(tmp_path: Path) -> None:
    net = decoder(256, [(softmax_attention(16, 2), 24, 1)], dtype=jnp.bfloat16)
    weights = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), net.model.init(jax.random.key(0), TOKENS)[0])
    one = compose(lora(net.model, 2), optax.adam(1e-2), supervised(next_token_loss), ema(0.9)).bind(weights)
    found = fit(one, stream(), jax.random.key(0), tmp_path / "half", progress=False)
    assert np.isfinite(found.metrics["loss"]).all()
