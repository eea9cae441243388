"""Self-modifying Titans: its objectives and depths against NumPy, and what delta gradient descent erases."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cl_zoo.layers import cms, delta_rule, self_modifying_titans
from tests.oracles import sequence_layers as oracle

D, T = 4, 9


def bare(**options: Any) -> tuple[Any, Any]:
    """One head, no projections: queries, keys and values are the input; and its parameters, none at 0 or 1."""
    mixer = self_modifying_titans(D, 1, **options)
    params = mixer.init(jax.random.key(0))
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, float) + 0.2 * random.normal(size=leaf.shape), params)
    params |= {name: np.eye(D) for name in ("query", "key", "value", "output")} | {"norm": {"scale": np.ones(D)}}
    return mixer, params


def wanted(params: Any, x: np.ndarray, **options: Any) -> np.ndarray:
    memories = {name: [leaf[0] for leaf in layers.values()] for name, layers in params["weights"].items()}
    bias = {name: params["gates"][name][0] for name in ("rate", "decay")}
    z = oracle.self_modifying(x, x, x, memories, bias, **options)
    return z / np.sqrt((z**2).mean(-1, keepdims=True) + 1e-6)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(
    ("objective", "projection"), [("dot", True), ("dot", False), ("half l2", True), ("l2", True), ("half l2", False)]
)
def test_every_objective_and_depth_is_its_equations(depth: int, objective: str, projection: bool) -> None:
    x = np.random.default_rng(1).normal(size=(T, D))
    with jax.enable_x64(True):
        options: dict[str, Any] = {"chunk": 2, "objective": objective, "projection": projection, "base_rate": 0.7}
        mixer, params = bare(depth=depth, **options)
        found = jax.jit(mixer.apply)(params, x[None])[0]
        np.testing.assert_allclose(found, wanted(params, x, **options), rtol=1e-9, atol=1e-10)


def test_all_five_memories_move_and_matter() -> None:
    mixer, params = bare(chunk=2)
    x = np.random.default_rng(1).normal(size=(1, T, D)).astype(np.float32)
    cache = start = mixer.start(params, 1, T, jnp.float32)
    for t in range(T):
        _, cache = jax.jit(mixer.step)(params, cache, x[:, t])
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), cache.state.now, start.state.now)
    assert set(moved) == {"memory", "key", "value", "rate", "decay"} and min(jax.tree.leaves(moved)) > 1e-4
    usual = mixer.apply(params, x)
    for name, layers in params["weights"].items():
        other = params | {"weights": params["weights"] | {name: jax.tree.map(lambda leaf: leaf + 0.5, layers)}}
        assert np.abs(mixer.apply(other, x) - usual).max() > 1e-3


def written(objective: str, eta: float, alpha: float, projection: bool = True) -> tuple[np.ndarray, ...]:
    """k, an orthogonal direction, u, and a linear memory before and after one write."""
    random = np.random.default_rng(2)
    k, other = np.linalg.qr(random.normal(size=(D, 2)))[0].T
    memory, value = random.normal(size=(D, D)), random.normal(size=D)
    value = value / np.linalg.norm(value)
    memories = {
        "memory": [memory],
        "key": [np.eye(D)],
        "value": [np.eye(D)],
        "rate": [np.zeros((D, 1))],
        "decay": [np.zeros((D, 1))],
    }
    logit = lambda p: np.log(p / (1 - p))  # noqa: E731
    bias = {"rate": logit(0.5), "decay": logit(alpha) if alpha < 1 else 40.0}
    rows = np.stack([k, k, other])
    z = oracle.self_modifying(rows, rows, value[None].repeat(3, 0), memories, bias, 1, objective, projection, 2 * eta)
    return k, memory, value, z


@pytest.mark.parametrize(("objective", "times"), [("dot", 1), ("half l2", 2), ("l2", 3)])
def test_the_three_forms_erase_the_old_answer_once_twice_and_three_times(objective: str, times: int) -> None:
    """With a unit key: (alpha - times eta) of what it was, and eta (twice for "l2") of the target is added."""
    for eta, alpha in ((1.0, 1.0), (0.3, 0.8)):
        k, memory, value, z = written(objective, eta, alpha)
        target = value @ memory
        added = 2 * eta if objective == "l2" else eta
        np.testing.assert_allclose(z[1], (alpha - times * eta) * k @ memory + added * target, atol=1e-5)
    k, memory, value, z = written("half l2", 0.4, 1.0, projection=False)
    np.testing.assert_allclose(z[1], 0.6 * k @ memory + 0.4 * value @ memory, atol=1e-5)  # the delta rule


def test_at_rate_and_retention_1_the_old_answer_is_gone() -> None:
    k, memory, value, z = written("dot", 1.0, 1.0)
    np.testing.assert_allclose(z[1], value @ memory, atol=1e-5)
    np.testing.assert_allclose(z[0], k @ memory, atol=1e-5)


def test_a_level_alone_is_a_feed_forward_network() -> None:
    layer = cms(D, 6, levels=1)
    params = layer.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, 3, D))
    one = params["level_0"]
    np.testing.assert_allclose(layer.apply(params, x), jax.nn.silu(x @ one["up"]) @ one["down"], atol=1e-6)
    chain = cms(D, 6, levels=3)
    params = chain.init(jax.random.key(0))
    h = x
    for i in range(3):
        level = params[f"level_{i}"]
        h = h + jax.nn.silu(h @ level["up"]) @ level["down"]
    np.testing.assert_allclose(chain.apply(params, x), h - x, atol=1e-6)


def test_a_rate_above_1_can_turn_the_sign_of_a_response() -> None:
    """Eigenvalue 1 - beta along the key: the same token again and again, with values 0, flips what is held."""
    mixer = delta_rule(D, 1, base_rate=2.0)
    params = mixer.init(jax.random.key(0))
    params |= {name: jnp.eye(D) for name in ("query", "key", "output")} | {"value": jnp.zeros((D, D))}
    params["rate"] = {"kernel": jnp.zeros((D, 1)), "bias": jnp.full(1, 20.0)}  # beta = 2
    k = jnp.zeros((1, 4, D)).at[..., 0].set(1.0)
    cache = mixer.start(params, 1, 4, jnp.float32)
    cache = cache._replace(state=jnp.ones_like(cache.state))
    signs = []
    for t in range(4):
        z, cache = mixer.step(params, cache, k[:, t])
        signs.append(float(jnp.sign(z[0, 0])))
    assert signs == [-1, 1, -1, 1]
    for rate in (-0.1, 2.1):
        with pytest.raises(ValueError, match="base_rate"):
            delta_rule(D, 1, base_rate=rate)
