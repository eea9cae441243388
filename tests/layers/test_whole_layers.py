"""Whole layers, from input to output, against NumPy: the gates, rates and norms around each core."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import numpy as np
import pytest

from cl_zoo import layer_catalogue
from tests.oracles import sequence_layers as oracle

WIDTH, HEADS, B, T, C = 8, 2, 2, 11, 4  # C tokens of a chunk, or of a mini-batch
D = WIDTH // HEADS


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    return -np.log1p(np.exp(-x))


def softplus(x: np.ndarray) -> np.ndarray:
    return np.log1p(np.exp(x))


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)


def rms(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return scale * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def affine(part: dict[str, Any], x: np.ndarray) -> np.ndarray:
    return x @ part["kernel"] + part["bias"]


def attention(p: Any, q: Any, k: Any, v: Any, x: Any, h: int, window: int | None = None) -> np.ndarray:
    places = np.arange(T)
    return oracle.softmax_attention(oracle.rotary(q, places), oracle.rotary(k, places), v, D**-0.5, window)


def linear_attention(p: Any, q: Any, k: Any, v: Any, x: Any, h: int) -> np.ndarray:
    return oracle.linear_attention(q / D**0.5, k, v)


def gated_linear_attention(p: Any, q: Any, k: Any, v: Any, x: Any, h: int) -> np.ndarray:
    gate = x @ p["decay"]["down"] @ p["decay"]["up"] + p["decay"]["bias"]
    return oracle.gated_linear_attention(q / D**0.5, k, v, log_sigmoid(gate)[:, h * D : (h + 1) * D] / 16)


def delta_rule(p: Any, q: Any, k: Any, v: Any, x: Any, h: int) -> np.ndarray:
    return oracle.delta_rule(unit(q), unit(k), v, oracle.sigmoid(affine(p["rate"], x)[:, h]))


def gated_delta_rule(p: Any, q: Any, k: Any, v: Any, x: Any, h: int) -> np.ndarray:
    log_decay = -np.exp(p["log_decay_scale"][h]) * softplus(affine(p["decay"], x)[:, h])
    return oracle.gated_delta_rule(unit(q), unit(k), v, oracle.sigmoid(affine(p["rate"], x)[:, h]), log_decay)


def ttt(p: Any, q: Any, k: Any, v: Any, x: Any, h: int) -> np.ndarray:
    weights = [layer[n][h] for layer in p["weights"].values() for n in ("kernel", "bias")]
    one = len(weights) == 2
    eta = oracle.ttt_rates(affine(p["rate"], x)[:, h], p["row_rate"], D, 1.0 if one else 0.1)
    q, k = (oracle.rotary(a, np.arange(T) % C) for a in (q, k))
    net = oracle.ttt_linear if one else oracle.ttt_mlp
    return net(q, k, v, eta, *weights, p["inner_norm"]["scale"][h], p["inner_norm"]["bias"][h], C)


def titans(p: Any, q: Any, k: Any, v: Any, x: Any, h: int) -> np.ndarray:
    alpha, eta, theta = (oracle.sigmoid(affine(p["gates"][n], x)[:, h]) for n in ("decay", "momentum", "rate"))
    weights = [leaf[h] for leaf in p["weights"].values()]
    activation = (oracle.silu, oracle.silu_slope)
    return oracle.titans(unit(q), unit(k), v / D**0.5, weights, alpha, eta, 0.005 * theta, C, activation)


def lact(p: Any, q: Any, k: Any, v: Any, x: Any, h: int) -> np.ndarray:
    rates = softplus(affine(p["rate"], x)).reshape(T, HEADS, 3)[:, h]  # of gate, up, down
    momentum = oracle.sigmoid(affine(p["momentum"], x)[:, h])
    means = [momentum[i : i + C].mean() for i in range(0, T, C)]
    weights = [p["weights"][n][h] for n in ("gate", "down", "up")]
    written = [unit(oracle.silu(q)), unit(oracle.silu(k)), oracle.silu(v)]
    answered = oracle.lact(*written, *weights, rates[:, [0, 2, 1]], C, means)
    return attention(p, q, k, v, x, h, window=3) + rms(answered, p["fast_norm"]["scale"][h])


def self_modifying(p: Any, q: Any, k: Any, v: Any, x: Any, h: int) -> np.ndarray:
    memories = {name: [leaf[h] for leaf in layers.values()] for name, layers in p["weights"].items()}
    return oracle.self_modifying(q, k, v, memories, {name: p["gates"][name][h] for name in ("rate", "decay")}, C)


CORES = {
    "softmax_attention": attention,
    "window_attention": lambda *a: attention(*a, window=5),
    "linear_attention": linear_attention,
    "gated_linear_attention": gated_linear_attention,
    "delta_rule": delta_rule,
    "gated_delta_rule": gated_delta_rule,
    "ttt_linear": ttt,
    "ttt_mlp": ttt,
    "titans": titans,
    "titans_linear": titans,
    "lact": lact,
    "self_modifying_titans": self_modifying,
}


def whole(name: str, p: Any, x: np.ndarray) -> np.ndarray:
    """One row: `[T, D]` -> `[T, D]`."""
    q, k, v = (oracle.silu(oracle.short_convolution(x @ p[n], p["convolution"][n])) for n in ("query", "key", "value"))
    groups = k.shape[1] // D
    heads = []
    for h in range(HEADS):
        own, shared = slice(h * D, (h + 1) * D), h // (HEADS // groups)
        shared = slice(shared * D, (shared + 1) * D)
        heads.append(CORES[name](p, q[:, own], k[:, shared], v[:, shared], x, h))
    z = np.concatenate(heads, axis=-1)
    if name.startswith("ttt"):
        z = np.array([oracle.layer_norm(row, p["norm"]["scale"], p["norm"]["bias"]) for row in z])
        z = oracle.gelu(x @ p["gate"]) * z
    elif "norm" in p:
        z = rms(z.reshape(T, HEADS, D), p["norm"]["scale"].reshape(HEADS, D)).reshape(T, WIDTH)
    return z @ p["output"]


@pytest.mark.parametrize("name", list(layer_catalogue()))
def test_layer_is_its_equations(name: str) -> None:
    entry, random = layer_catalogue()[name], np.random.default_rng(1)
    gate = {"gate": True} if "gate" in inspect.signature(entry.factory).parameters else {}
    mixer = entry.factory(WIDTH, HEADS, **entry.arguments, convolution=3, **gate)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, float), jax.jit(mixer.init)(jax.random.key(2)))
    params = jax.tree.map(lambda leaf: leaf + 0.2 * random.normal(size=leaf.shape), params)
    x = random.normal(size=(B, T, WIDTH))
    with jax.enable_x64(True):
        ours = np.asarray(jax.jit(mixer.apply)(params, x))
    wanted = np.array([whole(name, params, row) for row in x])
    assert ours.dtype == float
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-10 * np.abs(wanted).max())
