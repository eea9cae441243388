"""Adapters of low rank: what they compute, and that the frozen weights are there once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_zoo import (
    compose,
    ema,
    ewc,
    fit,
    lwf,
    replay,
    run_stream,
    stream_program,
    supervised,
    sweep,
    weight_interpolation,
    wise_ft,
)
from cl_zoo.frozen import split_state
from cl_zoo.language import decoder
from cl_zoo.layers import softmax_attention
from cl_zoo.losses import next_token_loss
from cl_zoo.models import cnn, mlp
from cl_zoo.streams import text_domains
from cl_zoo.training.run_directory import ConfigError
from cl_zoo.wrappers import lora, merge_adapters, unmerge_adapters
from cl_zoo.wrappers._lora import AdaptedKernel
from tests.tiny import same_bytes

TOKENS = jax.random.randint(jax.random.key(0), (3, 9), 0, 256)
NET = decoder(256, [softmax_attention(16, 2, kv_heads=1)], layers=2, hidden=24)
MODEL = lora(NET.model, 3, alpha=6.0)


def moved(model: Any = MODEL, x: Any = TOKENS, *weights: Any) -> tuple[Any, Any]:
    """Adapters that do something."""
    params, state = model.init(jax.random.key(1), x, *weights)
    return jax.tree.map(lambda leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size).reshape(leaf.shape)), params), state


def size(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_without_up_it_is_the_base_function_exactly() -> None:
    params, state = MODEL.init(jax.random.key(1), TOKENS)
    assert all(not leaf.any() for path, leaf in jax.tree_util.tree_leaves_with_path(params) if path[-1].key == "B")
    wanted, _, _ = NET.model.apply(state["frozen"], {}, TOKENS)
    outputs, after, taps = MODEL.apply(params, state, TOKENS)
    np.testing.assert_array_equal(outputs, wanted)
    same_bytes(after, state)
    assert taps == {}


def test_it_is_the_equation() -> None:
    params, state = moved()
    full = jax.tree.map(np.asarray, state["frozen"])
    for part in ("mixer", "ffn"):
        for name, each in params["blocks"]["block_0"][part].items():
            a, b = np.asarray(each["A"], float), np.asarray(each["B"], float)
            full["blocks"]["block_0"][part][name] = full["blocks"]["block_0"][part][name] + 6 / 3 * a @ b
    wanted, _, _ = NET.model.apply(jax.tree.map(jnp.float32, full), {}, TOKENS)
    outputs, _, _ = jax.jit(MODEL.apply)(params, state, TOKENS)
    np.testing.assert_allclose(outputs, wanted, atol=1e-5)
    plain, _, _ = NET.model.apply(state["frozen"], {}, TOKENS)
    assert np.abs(plain - outputs).max() > 1e-2


def test_merged_is_unmerged() -> None:
    params, state = moved()
    outputs, _, _ = MODEL.apply(params, state, TOKENS)
    merged = merge_adapters(params, state)
    np.testing.assert_allclose(NET.model.apply(merged, {}, TOKENS)[0], outputs, atol=1e-5)
    again = unmerge_adapters(merged, params, state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), again, state["frozen"])


def test_decoding_with_adapters_is_the_parallel_form() -> None:
    params, state = moved()
    wanted, _, _ = MODEL.apply(params, state, TOKENS)
    assert MODEL.parameters is not None
    full = MODEL.parameters(params, state)
    assert isinstance(full["blocks"]["block_0"]["mixer"]["query"], AdaptedKernel)
    logits, cache = NET.extend(full, NET.start(full, 3, 9), TOKENS[:, :-1])
    np.testing.assert_allclose(logits, wanted[:, -2], atol=1e-5)
    np.testing.assert_allclose(NET.step(full, cache, TOKENS[:, -1])[0], wanted[:, -1], atol=1e-5)


@pytest.mark.parametrize("made", [mlp((4, 4), 3, hidden=(6,)), cnn((4, 4), 3, channels=(4,), hidden=6)])
def test_networks_of_dense_layers(made: Any) -> None:
    x = jnp.cos(jnp.arange(32.0)).reshape((2, 4, 4))
    model = lora(made, 2, targets=("kernel",), merged=True)
    params, state = moved(model, x)
    wanted = made.apply(merge_adapters(params, state), state["model"], x)[0]
    np.testing.assert_allclose(model.apply(params, state, x)[0], wanted, atol=1e-6)


def test_what_is_refused() -> None:
    for wrong in ({"rank": 0}, {"rank": 2, "alpha": -1.0}):
        with pytest.raises(ValueError, match=list(wrong)[-1]):
            lora(NET.model, **wrong)
    with pytest.raises(ValueError, match="no kernels named nothing"):
        lora(NET.model, 2, targets=("nothing",)).init(jax.random.key(0), TOKENS)
    with pytest.raises(ValueError, match="no kernels named v_proj; those that it has: .*query, up, value"):
        lora(NET.model, 2, targets=("query", "v_proj")).init(jax.random.key(0), TOKENS)
    with pytest.raises(ValueError, match="must be a sequence of names"):
        lora(NET.model, 2, targets="query,key")
    with pytest.raises(ValueError, match="lora: model is Decoder"):
        lora(NET, 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not that of a model which lora made"):
        merge_adapters(WEIGHTS, {})
    with pytest.raises(ValueError, match="weights holds a str"):
        run_stream(learner(COMPONENTS["ewc"]()), stream(), jax.random.key(0), weights="model")
    with pytest.raises(ValueError, match="must be a matrix"):
        lora(mlp((4, 4), 3), 2, targets=("bias",)).init(jax.random.key(0), jnp.zeros((1, 4, 4)))


@pytest.mark.parametrize("options", [{"biases": ("query", "key", "value")}, {"convolution": 4}])
def test_biases_and_convolutions_are_no_kernels(options: dict[str, Any]) -> None:
    net = decoder(256, [softmax_attention(16, 2, **options)], layers=2, hidden=24)
    params, state = moved(lora(net.model, 2))
    assert set(params["blocks"]["block_0"]["mixer"]) == {"query", "key", "value", "output"}
    wanted = net.model.apply(merge_adapters(params, state), {}, TOKENS)[0]
    np.testing.assert_allclose(lora(net.model, 2).apply(params, state, TOKENS)[0], wanted, atol=1e-5)


def stream() -> Any:
    texts = {"a": b"one two three four five " * 60, "b": b"uno dos tres cuatro cinco " * 60}
    return text_domains(texts, length=16, batch_size=4, steps=6)


WEIGHTS, _ = NET.model.init(jax.random.key(7), TOKENS)
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
    result = run_stream(learner(COMPONENTS[name]()), stream(), jax.random.key(0), weights=WEIGHTS)
    rest, frozen = split_state(result.state)
    same_bytes(frozen, WEIGHTS)
    assert set(rest.model_state) == {"scale", "model"}
    own = {leaf.shape for leaf in jax.tree.leaves(WEIGHTS) if leaf.size > 1000}
    assert not own & {leaf.shape for leaf in jax.tree.leaves((result.state.parts, result.state.params))}
    assert np.isfinite(result.accuracy[-1]).all()
    assert result.metrics["loss"][0, -1] < result.metrics["loss"][0, 0]


@pytest.mark.parametrize("components", [(), (ema(0.9), ewc(1.0, labels="loss", micro_batch=4))])
def test_a_program_holds_the_frozen_weights_once(components: Any) -> None:
    """As an argument. Twice as wide, the weights are four times as large; all else grows as the width does, but for one
    block of four that is at work."""
    source, found = stream(), []
    for width in (256, 512):
        net = decoder(256, [softmax_attention(width, 2)], layers=4, hidden=width)
        weights = jax.eval_shape(lambda net=net: net.model.init(jax.random.key(0), TOKENS)[0])
        one = compose(lora(net.model, 2), optax.adam(1e-2), supervised(next_token_loss), *components)
        program = stream_program(one, source).lower(source.tasks, source.data, jax.random.key(0), weights)
        found.append((size(weights), program.compile().memory_analysis()))
    (small, before), (large, after) = found
    assert after.argument_size_in_bytes < 1.05 * large
    assert after.output_size_in_bytes < 0.1 * large
    assert after.temp_size_in_bytes - 2 * before.temp_size_in_bytes < 0.5 * (large - small)


def test_seeds_share_the_frozen_weights() -> None:
    make = lambda rate: compose(MODEL, optax.adam(rate), supervised(next_token_loss))  # noqa: E731
    keys = jax.random.split(jax.random.key(0), 2)
    options = {"weights": WEIGHTS, "keep_states": True}
    result = sweep(make, jnp.array([1e-2, 0.0]), stream(), keys, batch_size=4, **options)
    assert "frozen" not in result.state.model_state
    alone = run_stream(make(1e-2), stream(), keys[1], weights=WEIGHTS)
    np.testing.assert_allclose(result.accuracy[0, 1], alone.accuracy, atol=1e-4)
    np.testing.assert_allclose(result.accuracy[1, 0, 0], result.accuracy[1, 1, -1], atol=1e-6)


def test_checkpoints_hold_adapters_alone_and_runs_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cl_zoo.training.checkpoint import Checkpoints

    one, arguments = learner(replay(8, batch_size=4)), {"progress": False, "weights": WEIGHTS, "checkpoint_every": 4}
    whole = run_stream(one, stream(), jax.random.key(0), weights=WEIGHTS)
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
        fit(
            learner(replay(8, batch_size=4)),
            stream(),
            jax.random.key(0),
            tmp_path / "cut",
            **(arguments | {"weights": other}),
        )
    resumed = fit(one, stream(), jax.random.key(0), tmp_path / "cut", **arguments)
    uncut = fit(one, stream(), jax.random.key(0), tmp_path / "uncut", **arguments)
    same_bytes(resumed.state, uncut.state)
    np.testing.assert_allclose(resumed.accuracy, whole.accuracy, atol=1e-4)
    jax.block_until_ready(WEIGHTS)  # they are still the caller's


def test_training_all_weights_leaves_the_callers_alone(tmp_path: Path) -> None:
    full = compose(NET.model, optax.adam(1e-2), supervised(next_token_loss), ema(0.9))
    weights = jax.tree.map(jnp.copy, WEIGHTS)
    found = fit(full, stream(), jax.random.key(0), tmp_path / "full", progress=False, weights=weights)
    same_bytes(weights, WEIGHTS)
    assert np.abs(np.asarray(found.state.params["embedding"] - WEIGHTS["embedding"])).max() > 1e-3


def test_weights_in_bfloat16_are_compared_too(tmp_path: Path) -> None:
    net = decoder(256, [softmax_attention(16, 2)], layers=1, hidden=24, dtype=jnp.bfloat16)
    weights = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), net.model.init(jax.random.key(0), TOKENS)[0])
    one = compose(lora(net.model, 2), optax.adam(1e-2), supervised(next_token_loss), ema(0.9))
    found = fit(one, stream(), jax.random.key(0), tmp_path / "half", progress=False, weights=weights)
    assert np.isfinite(found.metrics["loss"]).all()
