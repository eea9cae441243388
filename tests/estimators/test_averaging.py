"""Means of two models, and statistics made anew."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from cl_zoo import Batch
from cl_zoo.estimators.alignment import permute, permute_statistics
from cl_zoo.estimators.averaging import interpolate, recompute_statistics
from cl_zoo.models import from_linen, from_nnx
from tests.tiny import same_bytes

KEY = jax.random.key(2)


class Normed(nnx.Module):
    """Two hidden layers, each normalised, with momenta of their own; and a frozen weight."""

    def __init__(self, rngs: nnx.Rngs, momenta: tuple[float, float] = (0.9, 0.99)):
        self.hidden = nnx.Linear(4, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, momentum=momenta[0], rngs=rngs)
        self.second = nnx.Linear(6, 5, rngs=rngs)
        self.norm_2 = nnx.BatchNorm(5, momentum=momenta[1], rngs=rngs)
        self.output = nnx.Linear(5, 3, rngs=rngs)
        self.frozen = nnx.Variable(jnp.array([1.0, 2.0, 3.0]))
        self.calls = nnx.Variable(jnp.array(7, jnp.int32))

    def __call__(self, x: Any, *, tap: Any) -> Any:
        x = nnx.relu(self.norm(tap("hidden", self.hidden, x)))
        x = nnx.relu(self.norm_2(tap("second", self.second, x)))
        return self.frozen.value * tap("output", self.output, x)


def layer_units(here: str, norm: str, after: str) -> Any:
    return tuple(((name, leaf), axis, "out") for name, leaf, axis in (
        (here, "kernel", 1), (here, "bias", 0), (norm, "scale", 0), (norm, "bias", 0))
    ) + (((after, "kernel"), 0, "in"),)  # fmt: skip


UNITS = (layer_units("hidden", "norm", "second"), layer_units("second", "norm_2", "output"))


class LinenNormed(linen.Module):
    @linen.compact
    def __call__(self, x: Any, *, train: bool) -> Any:
        x = linen.relu(linen.BatchNorm(use_running_average=not train, name="norm")(linen.Dense(6, name="hidden")(x)))
        x = linen.Dropout(0.5, deterministic=not train)(x)
        return linen.Dense(3)(x)


def rows(n: int = 6, b: int = 8) -> Batch:
    return Batch(5 + 3 * jax.random.normal(KEY, (n, b, 4)), None, None, jnp.ones((n, b)))


def test_statistics_are_the_mean_over_batches_whatever_the_momentum() -> None:
    model, batches = from_nnx(Normed), rows()
    params, model_state = model.init(KEY, batches.x[0])
    # From statistics that have nothing to do with the rows.
    stale = jax.tree.map(lambda leaf: leaf + 100 if leaf.ndim else leaf, model_state)
    stale = {**stale, "frozen": model_state["frozen"]}
    found = jax.jit(lambda p, s, b: recompute_statistics(model, p, s, b, KEY))(params, stale, batches)
    hidden = [np.asarray(x @ params["hidden"]["kernel"] + params["hidden"]["bias"], np.float64) for x in batches.x]
    np.testing.assert_allclose(found["norm"]["mean"], np.mean([h.mean(0) for h in hidden], 0), rtol=1e-3)
    np.testing.assert_allclose(found["norm"]["var"], np.mean([h.var(0) for h in hidden], 0), rtol=1e-3)
    second = []
    for h in hidden:
        z = (h - h.mean(0)) / np.sqrt(h.var(0) + 1e-5)
        z = np.maximum(z * params["norm"]["scale"] + params["norm"]["bias"], 0)
        second.append(z @ params["second"]["kernel"] + params["second"]["bias"])
    np.testing.assert_allclose(found["norm_2"]["mean"], np.mean([z.mean(0) for z in second], 0), rtol=2e-3, atol=1e-4)
    np.testing.assert_allclose(found["norm_2"]["var"], np.mean([z.var(0) for z in second], 0), rtol=2e-3)
    same_bytes(found["frozen"], model_state["frozen"])
    assert found["calls"].dtype == jnp.int32 and int(found["calls"]) == 7


def test_statistics_of_a_linen_module_with_dropout() -> None:
    model, batches = from_linen(LinenNormed()), rows()
    params, model_state = model.init(KEY, batches.x[0])
    found = recompute_statistics(model, params, model_state, batches, KEY)["batch_stats"]["norm"]
    hidden = batches.x @ params["hidden"]["kernel"]
    np.testing.assert_allclose(found["mean"], hidden.mean((0, 1)), rtol=1e-3)
    np.testing.assert_allclose(found["var"], hidden.var(1).mean(0), rtol=1e-3)


def test_batches_of_padding_do_not_count() -> None:
    model, batches = from_nnx(Normed), rows()
    params, model_state = model.init(KEY, batches.x[0])
    padded = jax.tree.map(lambda leaf: jnp.concatenate([leaf, jnp.zeros_like(leaf[:2])]), batches)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        recompute_statistics(model, params, model_state, padded, KEY),
        recompute_statistics(model, params, model_state, batches, KEY),
    )
    empty = batches._replace(weight=jnp.zeros_like(batches.weight))
    same_bytes(recompute_statistics(model, params, model_state, empty, KEY), model_state)


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_statistics_are_permuted_with_their_units(kind: str) -> None:
    batches = rows()
    if kind == "nnx":
        model, units = from_nnx(Normed), UNITS
    else:
        model, units = from_linen(LinenNormed()), (layer_units("hidden", "norm", "Dense_0"),)
    params, model_state = model.init(KEY, batches.x[0])
    noise = jax.random.uniform(KEY, (6,), minval=0.5, maxval=2.0)
    for norm in (model_state if kind == "nnx" else model_state["batch_stats"]).values():
        if isinstance(norm, dict):
            norm.update({name: (1 + leaf) * noise[: len(leaf)] for name, leaf in norm.items()})
    orders = tuple(jnp.roll(jnp.arange(n), 1) for n in (6, 5)[: len(units)])
    again = permute(params, units, orders), permute_statistics(model_state, units, orders)
    answers = [model.apply(p, s, batches.x[0])[0] for p, s in ((params, model_state), again)]
    np.testing.assert_allclose(answers[0], answers[1], rtol=1e-4, atol=1e-5)
    without = model.apply(again[0], model_state, batches.x[0])[0]
    assert not np.allclose(answers[0], without, atol=1e-3)


def test_interpolation_keeps_dtypes_and_its_ends_exactly() -> None:
    new = {"a": jax.random.normal(KEY, (5,)).astype(jnp.bfloat16), "b": jnp.array(3), "c": jnp.array([0.1, 0.2])}
    old = {"a": jnp.ones(5, jnp.bfloat16), "b": jnp.array(9), "c": jnp.array([5.0, 7.0])}
    mean = jax.jit(interpolate)(new, old, jnp.float32(0.25))
    assert [leaf.dtype for leaf in mean.values()] == [leaf.dtype for leaf in new.values()] and int(mean["b"]) == 3
    np.testing.assert_allclose(mean["c"], 0.75 * new["c"] + 0.25 * old["c"], rtol=1e-6)
    same_bytes(interpolate(new, old, 0.0), new)
    same_bytes(interpolate(new, old, 1.0), {**old, "b": new["b"]})
