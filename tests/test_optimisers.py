"""Optimisers that are memories of gradients: their equations in NumPy, and what they are special cases of."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_zoo import compose, run_stream, supervised
from cl_zoo.models import mlp
from cl_zoo.optimisers import clocks, orthogonalised, scale_by_delta_momentum, scale_by_m3, scale_by_mlp_momentum
from cl_zoo.streams import split_mnist

SHAPES = {"kernel": (4, 3), "bias": (3,), "stack": (2, 3, 5)}


def gradients(n: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(seed)
    return [{name: random.normal(size=shape) for name, shape in SHAPES.items()} for _ in range(n)]


def run(optimiser: Any, each: list[Any]) -> list[Any]:
    state, found = optimiser.init(each[0]), []
    update = jax.jit(optimiser.update)
    for g in each:
        updates, state = update(g, state, g)
        found.append(updates)
    return found


def close(found: Any, wanted: Any, tolerance: float = 1e-10) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_momentum_by_the_delta_rule_is_its_equation() -> None:
    with jax.enable_x64(True):
        each = [jax.tree.map(lambda g: 0.3 * g, g) for g in gradients(4)]
        found = run(scale_by_delta_momentum(0.8, rate=0.5), each)
        m = jax.tree.map(np.zeros_like, each[0])
        for g, ours in zip(each, found):
            for name in m:
                room = 0.5 * np.einsum("...ij,...kj,...kl->...il", g[name], g[name], m[name]) if g[name].ndim > 1 else 0
                m[name] = 0.8 * m[name] - room + g[name]
            close(ours, m)
        close(run(scale_by_delta_momentum(0.8, rate=0.0), each), run(optax.trace(0.8), each))


def test_a_written_gradient_is_erased_where_its_inputs_come_again() -> None:
    """With a gradient of norm 1 and alpha 1, what the memory holds along it is replaced and not added to."""
    g = jnp.zeros((3, 2)).at[1, 0].set(1.0)
    found = run(scale_by_delta_momentum(1.0), [g] * 3)
    for each in found:
        np.testing.assert_allclose(each, g, atol=1e-7)


def test_a_linear_memory_with_newton_schulz_is_muon() -> None:
    """Without Nesterov's term, whose correction of bias differs."""
    with jax.enable_x64(True):
        each = [{"kernel": g["kernel"], "wide": g["kernel"].T} for g in gradients(4)]
        ours = run(optax.chain(optax.trace(0.9), orthogonalised(), optax.scale(-1.0)), each)
        theirs = run(optax.contrib.muon(1.0, beta=0.9, nesterov=False), each)
        for name in ("kernel", "wide"):  # theirs also scales by the shape
            a, b = (np.stack([u[name] / np.linalg.norm(u[name]) for u in found]) for found in (ours, theirs))
            np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("form", ["literal", "normalised"])
def test_m3_is_its_equation(form: str) -> None:
    def ns(m: np.ndarray) -> np.ndarray:
        if m.ndim < 2:
            return m
        x = m / (np.linalg.norm(m, axis=(-2, -1), keepdims=True) + 1e-7)
        for _ in range(5):
            a = np.einsum("...ij,...kj->...ik", x, x)
            x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
        return x

    with jax.enable_x64(True):
        each = gradients(8)
        options: dict[str, Any] = {
            "period": 3,
            "fast": 0.7,
            "squares": 0.6,
            "slow": 0.5,
            "weight": 0.4,
        }
        found = run(scale_by_m3(form=form, epsilon=1e-3, **options), each)  # type: ignore[arg-type]
        for name, shape in SHAPES.items():
            m1, m2, v, o2, total = (np.zeros(shape) for _ in range(5))
            for i, (g, ours) in enumerate(zip(each, found)):
                literal = form == "literal"
                if i and i % 3 == 0:
                    m2 = m2 + 0.5 * total if literal else 0.5 * m2 + 0.5 * total
                    o2, total = ns(m2), np.zeros(shape)
                total = total + g[name]
                m1 = m1 + 0.7 * g[name] if literal else 0.7 * m1 + 0.3 * g[name]
                v = v + 0.6 * g[name] ** 2 if literal else 0.6 * v + 0.4 * g[name] ** 2
                u = (ns(m1) + 0.4 * o2) / np.sqrt(v + 1e-3)
                np.testing.assert_allclose(
                    ours[name], u if literal else u / np.sqrt(np.mean(u**2)), rtol=1e-6, atol=1e-8
                )


def test_m3_without_its_slow_memory_and_squares_is_muon_without_decay() -> None:
    with jax.enable_x64(True):
        each = [{"kernel": g["kernel"]} for g in gradients(4)]
        m3 = run(scale_by_m3(form="literal", weight=0.0, squares=0.0, fast=0.5, epsilon=4.0), each)
        muon = run(optax.chain(optax.trace(1.0), orthogonalised()), each)
        close(jax.tree.map(lambda u: 2 * u, m3), muon, 1e-6)


def test_momentum_by_a_network_begins_as_descent_and_turns_towards_what_persists() -> None:
    same = {"kernel": gradients(1)[0]["kernel"], "bias": gradients(1)[0]["bias"]}
    found = run(scale_by_mlp_momentum(0.9, rate=0.0), [same] * 2)
    close(found[1]["kernel"], same["kernel"], 1e-6)
    close(found[1]["bias"], 1.9 * same["bias"], 1e-6)
    # One direction comes again and again with noise: the memory's answer has less of the noise than its input.
    random = np.random.default_rng(1)
    truth = random.normal(size=(1, 6))
    noisy = [np.repeat(truth, 8, 0) + 1.0 * random.normal(size=(8, 6)) for _ in range(60)]
    answers = run(scale_by_mlp_momentum(0.95, rate=0.3, hidden=32), noisy)

    def cosine(a: Any) -> float:
        return float(
            np.mean([np.dot(row, truth[0]) / np.linalg.norm(row) / np.linalg.norm(truth) for row in np.asarray(a)])
        )

    before, after = (np.mean([cosine(each) for each in some]) for some in (noisy[30:], answers[30:]))
    assert after > before + 0.05
    for g, u in zip(noisy, answers):  # it turns a gradient, and keeps its length
        np.testing.assert_allclose(np.linalg.norm(u), np.linalg.norm(g), rtol=1e-4)


def test_parts_move_by_their_own_clocks_with_the_sum_of_their_gradients() -> None:
    each = gradients(7)
    found = run(clocks(optax.sgd(0.1), {"kernel": 1, "bias": 3, "stack": 2}.get), each)  # type: ignore[arg-type]
    for i, ours in enumerate(found):
        close(ours["kernel"], -0.1 * each[i]["kernel"], 1e-5)
        for name, c in (("bias", 3), ("stack", 2)):
            if (i + 1) % c:
                np.testing.assert_array_equal(ours[name], 0)
            else:
                close(ours[name], -0.1 * sum(g[name] for g in each[i + 1 - c : i + 1]), 1e-5)
    # With one clock for all, it is the optimiser itself.
    adam = optax.adam(1e-2)
    close(run(clocks(adam, lambda path: 1), each), run(adam, each), 1e-6)


def test_levels_of_a_network_learn_in_a_compiled_stream(tiny_images: Any) -> None:
    stream = split_mnist(3, "domain", images=tiny_images, steps=6, batch_size=8)
    learner = compose(
        mlp((4, 4), 2, hidden=(6,)), clocks(optax.adam(1e-2), lambda path: 4 if "hidden" in path else 1), supervised()
    )
    result = run_stream(learner, stream, jax.random.key(0))
    assert np.isfinite(result.metrics["loss"]).all()
    for optimiser in (scale_by_delta_momentum(), scale_by_m3(period=2), scale_by_mlp_momentum(hidden=3)):
        chain = optax.chain(optax.clip_by_global_norm(1.0), optimiser, optax.scale(-1e-2))
        result = run_stream(compose(mlp((4, 4), 2, hidden=(6,)), chain, supervised()), stream, jax.random.key(0))
        assert (
            np.isfinite(result.metrics["loss"]).all() and result.metrics["loss"][0, -1] != result.metrics["loss"][0, 0]
        )


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: scale_by_delta_momentum(1.5), "decay is 1.5"),
        (lambda: scale_by_m3(period=0), "period is 0"),
        (lambda: scale_by_m3(form="other"), "form is 'other'"),  # type: ignore[arg-type]
        (lambda: scale_by_mlp_momentum(hidden=0), "hidden is 0"),
        (lambda: clocks(3, lambda path: 1), "optimiser is int"),
        (lambda: clocks(optax.sgd(0.1), lambda path: 0).init({"a": jnp.ones(2)}), "the period of 'a' is 0"),
    ],
)
def test_what_is_refused(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()
