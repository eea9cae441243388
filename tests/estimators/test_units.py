"""Resets of hidden units, and their claims."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_zoo import Batch, Context, Model
from cl_zoo.estimators.units import (
    check_units,
    lowest,
    reset_units,
    row_mean,
    unit_activations,
    unit_masks,
    weight_magnitude,
)
from cl_zoo.models import cnn, mlp
from cl_zoo.types import TrainState
from tests.tiny import same_bytes

KEY = jax.random.key(4)
X = jax.random.normal(jax.random.key(1), (7, 8, 8))
MODELS = {"mlp": mlp((8, 8), 3, hidden=(5, 4)), "cnn": cnn((8, 8), 3, channels=(2, 3), hidden=4)}


def context(model: Model, optimiser: Any = None) -> Context:
    return Context(model, optimiser or optax.sgd(0.1), None, lambda *_: jnp.zeros(()))


def moved(model: Model) -> Any:
    """Parameters that no initialisation gives."""
    params = model.init(jax.random.key(0), X)[0]
    return jax.tree.map(lambda leaf: leaf + 0.3 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), params)


def choose(model: Model, params: Any, group: int, *which: int) -> tuple[jax.Array, ...]:
    sizes = [params[members[0][0][0]]["bias"].shape[0] for members in model.units]
    return tuple(
        jnp.isin(jnp.arange(n), jnp.array(which)) if i == group else jnp.zeros(n, bool) for i, n in enumerate(sizes)
    )


def reset(model: Model, params: Any, chosen: Any) -> Any:
    return reset_units(context(model), params, optax.sgd(0.1).init(params), chosen, X, KEY)[0]


def test_means_are_over_rows_that_count_and_positions() -> None:
    h = jnp.array([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]], [[9.0, 9.0], [9.0, 9.0]]])
    np.testing.assert_allclose(row_mean(h, jnp.array([3.0, 1.0, 0.0])), [(3 * 2 + 6) / 4, (3 * 3 + 7) / 4])
    np.testing.assert_array_equal(row_mean(h, jnp.zeros(3)), [0, 0])


def test_lowest_takes_so_many_of_the_eligible() -> None:
    values, eligible = jnp.array([0.5, 0.1, 0.1, 0.0, 0.3]), jnp.array([True, True, True, False, True])
    for count, wanted in ((0, []), (1, [1]), (2, [1, 2]), (3, [1, 2, 4]), (9, [0, 1, 2, 4])):
        assert np.flatnonzero(lowest(values, eligible, jnp.float32(count))).tolist() == wanted


def test_weights_of_a_flattened_map_belong_to_its_channels() -> None:
    params = moved(MODELS["cnn"])
    conv, dense = MODELS["cnn"].units[:2]
    total, count = weight_magnitude(params, dense, "in")
    kernel = np.asarray(params["hidden"]["kernel"])  # 2 x 2 positions of 3 channels
    wanted = [sum(np.abs(kernel[p * 3 + i]).sum() for p in range(4)) for i in range(3)]
    np.testing.assert_allclose(total, wanted, rtol=1e-5)
    assert count == 16
    total, count = weight_magnitude(params, conv, "out")
    np.testing.assert_allclose(total, np.abs(np.asarray(params["conv_0"]["kernel"])).sum((0, 1, 2)), rtol=1e-5)
    assert count == 9


@pytest.mark.parametrize("name", list(MODELS))
def test_activations_are_what_the_next_layer_reads(name: str) -> None:
    model, params = MODELS[name], moved(MODELS[name])
    taps = model.apply(params, {}, X)[2]
    found = unit_activations("test", model.units, params, taps)
    shapes = {"mlp": [(7, 1, 5), (7, 1, 4)], "cnn": [(7, 16, 2), (7, 4, 3), (7, 1, 4)]}
    assert [h.shape for h in found] == shapes[name]
    if name == "cnn":  # channels stay channels where the map is flattened
        z = jax.nn.relu(taps["conv_1"][1]).reshape(7, 2, 2, 2, 2, 3).max((2, 4))
        np.testing.assert_allclose(found[1], z.reshape(7, 4, 3), rtol=1e-6)


@pytest.mark.parametrize(("name", "group"), [("mlp", 0), ("mlp", 1), ("cnn", 0), ("cnn", 1), ("cnn", 2)])
def test_what_is_lost_is_exactly_what_the_units_gave(name: str, group: int) -> None:
    model, params = MODELS[name], moved(MODELS[name])
    chosen = choose(model, params, group, 0, 1)
    new = reset(model, params, chosen)
    reader = "/".join(next(path for path, _, role in model.units[group] if role == "in")[:-1])
    taps = model.apply(params, {}, X)[2]
    h, z = taps[reader]
    gone = jnp.tile(chosen[group], h.shape[-1] // chosen[group].shape[0])
    # The reader is linear: the share of the chosen units is its answer to them alone, without the bias.
    alone = jax.tree.map(lambda leaf: leaf, params)
    alone[reader] = {"kernel": params[reader]["kernel"], "bias": jnp.zeros_like(params[reader]["bias"])}
    if name == "cnn" and reader.startswith("conv"):
        share = jax.lax.conv_general_dilated(
            jnp.where(gone, h, 0), alone[reader]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    else:
        share = jnp.where(gone, h, 0) @ alone[reader]["kernel"]
    assert np.abs(share).max() > 0.1
    np.testing.assert_allclose(model.apply(new, {}, X)[2][reader][1], z - share, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        model.apply(reset(model, new, chosen), {}, X)[0], model.apply(new, {}, X)[0], rtol=1e-5, atol=1e-6
    )


def test_units_that_nobody_reads_are_replaced_unseen() -> None:
    model, params = MODELS["mlp"], moved(MODELS["mlp"])
    params["hidden_1"]["kernel"] = params["hidden_1"]["kernel"].at[2].set(0)
    new = reset(model, params, choose(model, params, 0, 2))
    assert np.abs(new["hidden_0"]["kernel"] - params["hidden_0"]["kernel"])[:, 2].min() > 0
    np.testing.assert_allclose(model.apply(new, {}, X)[0], model.apply(params, {}, X)[0], rtol=1e-5, atol=1e-6)


def test_new_units_come_from_the_models_own_initialisation() -> None:
    model, params = MODELS["mlp"], moved(MODELS["mlp"])
    fresh = model.init(KEY, X)[0]
    chosen = (jnp.array([False, True, False, False, True]), jnp.array([True, False, False, False]))
    new = jax.tree.map(np.asarray, reset(model, params, chosen))
    for layer, mask in zip(("hidden_0", "hidden_1"), chosen, strict=True):
        np.testing.assert_array_equal(new[layer]["bias"], np.where(mask, fresh[layer]["bias"], params[layer]["bias"]))
    np.testing.assert_array_equal(
        new["hidden_0"]["kernel"], np.where(chosen[0], fresh["hidden_0"]["kernel"], params["hidden_0"]["kernel"])
    )
    middle = np.where(chosen[1], fresh["hidden_1"]["kernel"], params["hidden_1"]["kernel"])
    np.testing.assert_array_equal(new["hidden_1"]["kernel"], np.where(chosen[0][:, None], 0, middle))
    np.testing.assert_array_equal(new["output"]["kernel"], np.where(chosen[1][:, None], 0, params["output"]["kernel"]))
    np.testing.assert_array_equal(new["output"]["bias"], params["output"]["bias"])


def test_nothing_chosen_changes_no_byte() -> None:
    model, params = MODELS["mlp"], moved(MODELS["mlp"])
    same_bytes(reset(model, params, choose(model, params, 0)), params)


def masked() -> Any:
    """Adam for all layers but the second."""
    return optax.masked(optax.adam(0.1), {"hidden_0": True, "hidden_1": False, "output": True})


OPTIMISERS = {  # and how many moments it keeps of six parameters
    "sgd": (lambda: optax.sgd(0.1), 0),
    "momentum": (lambda: optax.sgd(0.1, momentum=0.9), 6),
    "chain": (lambda: optax.chain(optax.clip(1.0), optax.adamw(optax.linear_schedule(0.1, 0.0, 9))), 12),
    "injected": (lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.1), 12),
    "masked": (masked, 8),
    "adafactor": (lambda: optax.adafactor(0.1, min_dim_size_to_factor=2), 3),  # kernels are factored
}


@pytest.mark.parametrize("name", list(OPTIMISERS))
def test_moments_of_reset_weights_alone_start_afresh(name: str) -> None:
    make, expected = OPTIMISERS[name]
    model, optimiser = MODELS["mlp"], make()
    params = moved(model)
    chosen = choose(model, params, 0, 3)
    _, state = optimiser.update(jax.tree.map(jnp.ones_like, params), optimiser.init(params), params)
    new, after = reset_units(context(model, optimiser), params, state, chosen, X, KEY)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    touched = jax.tree.map(jnp.logical_or, *unit_masks(params, model.units, chosen))
    masks = [
        (jax.tree_util.keystr(path), mask, leaf.shape)
        for (path, mask), leaf in zip(
            jax.tree_util.tree_leaves_with_path(touched), jax.tree.leaves(params), strict=True
        )
    ]
    moments = 0
    for (path, then), now, start in zip(
        jax.tree_util.tree_leaves_with_path(state),
        jax.tree.leaves(after),
        jax.tree.leaves(optimiser.init(new)),
        strict=True,
    ):
        its = [m for at, m, shape in masks if jax.tree_util.keystr(path).endswith(at) and then.shape == shape]
        assert len(its) <= 1
        moments += len(its)
        np.testing.assert_array_equal(now, np.where(its[0], start, then) if its else then)
        assert not its or not its[0].any() or not np.array_equal(now, then)
    assert moments == expected


def test_models_without_units_or_taps_are_refused() -> None:
    model = MODELS["mlp"]
    batch = Batch(X, jnp.zeros(7, int), None, jnp.ones(7))
    zero = jnp.zeros((), jnp.int32)
    params, model_state = model.init(KEY, X)
    state = TrainState(zero, zero, KEY, params, model_state, (), {})
    check_units("redo", context(model), state, batch)
    with pytest.raises(ValueError, match="redo: the model has no units"):
        check_units("redo", context(dataclasses.replace(model, units=())), state, batch)
    blind = dataclasses.replace(model, apply_function=lambda *args, **options: (*model.apply(*args, **options)[:2], {}))
    with pytest.raises(ValueError, match=r"\(hidden_1\) has taps"):
        check_units("redo", context(blind), state, batch)
