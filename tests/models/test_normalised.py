"""Networks with normalisation, residual networks, and the rotation head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cl_zoo.estimators.alignment import permute, permute_statistics
from cl_zoo.estimators.units import group_size
from cl_zoo.models import cnn, mlp, resnet26, resnet_tail
from cl_zoo.models.normalisation import normalise, normalising
from cl_zoo.wrappers import with_rotation_head
from tests.tiny import close, same_bytes

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(6, 4, 4)).astype(np.float32)
COLOUR = np.random.default_rng(0).normal(size=(3, 8, 8, 3)).astype(np.float32)
NORMED = {
    "mlp, batch": mlp((4, 4), 3, hidden=(6, 5), norm="batch"),
    "mlp, layer": mlp((4, 4), 3, hidden=(6, 5), norm="layer"),
    "cnn, batch": cnn((4, 4), 3, channels=(4,), hidden=6, norm="batch"),
    "cnn, one group": cnn((4, 4), 3, channels=(4,), hidden=6, norm="group", groups=1),
    "rotation head": with_rotation_head(
        mlp((4, 4), 3, hidden=(6, 5), norm="batch"), mlp((5,), 4, hidden=(3,), norm="batch"), "output"
    ),
    "rotation head on a map": with_rotation_head(
        cnn((4, 4), 3, channels=(4, 3), hidden=6), cnn((2, 2, 4), 4, channels=(2,), hidden=3), "conv_1"
    ),
}


def start(model, x=X):
    """Parameters and statistics, moved off their first values."""
    params, model_state = jax.jit(model.init)(KEY, x)
    draw = lambda leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape)  # noqa: E731
    return jax.tree.map(draw, params), jax.tree.map(draw, model_state)


def normalised(z, axes, layer, mean=None, var=None):
    mean = z.mean(axes, keepdims=True) if mean is None else mean
    var = z.var(axes, keepdims=True) if var is None else var
    return (z - mean) / np.sqrt(var + 1e-5) * np.asarray(layer["scale"]) + np.asarray(layer["bias"])


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_mlp_equals_its_equation(norm, train):
    model = mlp((4, 4), 3, hidden=(6,), norm=norm)
    params, state = start(model)
    outputs, after, taps = model.apply(params, state, X, train=train)
    z = X.reshape((6, 16)) @ params["hidden_0"]["kernel"] + params["hidden_0"].get("bias", 0.0)
    np.testing.assert_allclose(taps["hidden_0"][1], z, rtol=1e-4, atol=1e-5)
    running = state["norm_0"] if norm == "batch" and not train else {}
    h = np.maximum(normalised(np.asarray(z), 0 if norm == "batch" else 1, params["norm_0"], **running), 0)
    np.testing.assert_allclose(taps["output"][0], h, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(outputs, h @ params["output"]["kernel"] + params["output"]["bias"], rtol=1e-4, atol=1e-5)
    if norm == "batch":
        moved = {"mean": np.asarray(z).mean(0), "var": np.asarray(z).var(0)} if train else state["norm_0"]
        for name, value in moved.items():
            np.testing.assert_allclose(after["norm_0"][name], 0.9 * state["norm_0"][name] + 0.1 * value, rtol=1e-4)


def test_group_norm_equals_its_equation():
    model = cnn((4, 4), 3, channels=(4,), hidden=6, norm="group", groups=2)
    params, state = start(model)
    assert state == {} and model.units == ()
    _, _, taps = model.apply(params, state, X)
    z = np.asarray(taps["conv_0"][1]).reshape((6, 4, 4, 2, 2))
    z = (z - z.mean((1, 2, 4), keepdims=True)) / np.sqrt(z.var((1, 2, 4), keepdims=True) + 1e-5)
    h = np.maximum(z.reshape((6, 4, 4, 4)) * params["norm_0"]["scale"] + params["norm_0"]["bias"], 0)
    pooled = h.reshape((6, 2, 2, 2, 2, 4)).max((2, 4)).reshape((6, 16))
    np.testing.assert_allclose(taps["hidden"][0], pooled, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NORMED)
def test_permuted_units_leave_the_function_unchanged(name):
    model = NORMED[name]
    params, state = start(model)
    orders = [jnp.roll(jnp.arange(group_size(params, group)), 1) for group in model.units]
    moved = permute(params, model.units, orders), permute_statistics(state, model.units, orders)

    @jax.jit
    def answers(params, state):
        outputs, _, taps = model.apply(params, state, X)
        return outputs, [z for layer, (_, z) in taps.items() if layer.endswith("output")]

    close(answers(*moved), answers(params, state), 1e-4, 1e-5)
    statistics_left = np.allclose(answers(moved[0], state)[0], answers(params, state)[0], 1e-4, 1e-5)
    assert model.units and statistics_left != bool(jax.tree.leaves(state))


@pytest.mark.parametrize("name", [name for name in NORMED if "batch" in name])
def test_rows_of_weight_zero_take_no_part_in_statistics(name):
    model = NORMED[name]
    params, state = start(model)
    weight = jnp.array([1.0, 1, 1, 1, 0, 0])
    train = jax.jit(lambda x, w: model.apply(params, state, x, weight=w, train=True)[:2])
    outputs, after = train(X, weight)
    spoilt, spoilt_after = train(X + 100 * (1 - weight)[:, None, None], weight)
    same_bytes((outputs[:4], after), (spoilt[:4], spoilt_after))
    alone, alone_after = train(X[:4], weight[:4])
    close((outputs[:4], after), (alone, alone_after), 1e-4, 1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(train(X, 0 * weight)))


@pytest.mark.parametrize("kind", ["batch", "group"])
@pytest.mark.parametrize("shape", [(5, 12), (5, 3, 4, 12)])
def test_normalising_is_what_the_layers_do(kind: str, shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    x, scale, bias = (jnp.asarray(random.normal(size=s), jnp.float32) for s in (shape, 12, 12))
    weight = jnp.array([1.0, 0.5, 1, 1, 0])
    counts = (weight > 0).reshape((5,) + (1,) * (len(shape) - 1))

    def run(x, scale, bias, by_layer: bool):
        layer = normalising(kind, 12, 4, nnx.Rngs(0))
        layer.scale, layer.bias = nnx.Param(scale), nnx.Param(bias)
        if not by_layer:
            y = normalise(layer, x, weight)
        else:
            y = layer(x, mask=counts) if kind == "batch" else layer(x)
        statistics = (layer.mean[...], layer.var[...]) if kind == "batch" else ()
        return jnp.where(counts, y, 0), statistics

    def all_of(by_layer: bool):
        def loss(x, scale, bias):
            y, statistics = run(x, scale, bias, by_layer)
            return jnp.sum(jnp.sin(y)), (y, statistics)

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(x, scale, bias)

    close(all_of(False), all_of(True), 1e-4, 1e-5)


def test_residual_network():
    model = resnet26((8, 8, 3), 5, depth=8)
    params, state = jax.jit(model.init)(KEY, COLOUR)
    outputs, _, taps = jax.jit(lambda p: model.apply(p, state, COLOUR))(params)
    assert outputs.shape == (3, 5) and state == {} and list(taps)[-1] == "output"
    sizes = [taps[f"group_{i}"][1].shape[1:] for i in (1, 2, 3)]
    assert sizes == [(8, 8, 16), (4, 4, 32), (2, 2, 64)]

    # A block: what its convolutions put out, on its input pooled and padded.
    x, y = taps["group_2"]
    pooled = np.asarray(x).reshape((3, 4, 2, 4, 2, 16)).mean((2, 4))
    block = params["group_2"]["block_0"]
    z = taps["group_2/block_0/conv_1"][1]
    np.testing.assert_allclose(y, np.pad(pooled, ((0, 0),) * 3 + ((0, 16),)) + z, rtol=1e-4, atol=1e-4)
    h = np.asarray(x).reshape((3, 8, 8, 8, 2))
    h = (h - h.mean((1, 2, 4), keepdims=True)) / np.sqrt(h.var((1, 2, 4), keepdims=True) + 1e-5)
    h = np.maximum(h.reshape((3, 8, 8, 16)), 0)
    np.testing.assert_allclose(taps["group_2/block_0/conv_0"][0], h, rtol=1e-4, atol=1e-4)
    padded = np.pad(h, ((0, 0), (1, 1), (1, 1), (0, 0)))
    corner = np.einsum("brcd,rcdo->bo", padded[:, 2:5, 4:7], block["conv_0"]["kernel"])
    np.testing.assert_allclose(taps["group_2/block_0/conv_0"][1][:, 1, 2], corner, rtol=1e-3, atol=1e-3)
    kernels = [leaf for leaf in jax.tree.leaves(jax.eval_shape(resnet26((32, 32, 3), 10).init, KEY,
        jnp.zeros((1, 32, 32, 3)))[0]) if leaf.ndim == 4]  # fmt: skip
    assert len(kernels) == 25  # and one dense layer: 26


def test_the_tail_beside_a_residual_network_is_its_last_group():
    model = with_rotation_head(resnet26((8, 8, 3), 5, depth=8), resnet_tail(4, depth=8), "group_3")
    params, state = jax.jit(model.init)(KEY, COLOUR)
    main = {name: params["params"][name] for name in ("group_3", "norm")}
    head = {name: params["rotation_head"][name] for name in ("group_3", "norm")}
    assert jax.tree.map(jnp.shape, main) == jax.tree.map(jnp.shape, head)
    copied = {**params, "rotation_head": {**params["rotation_head"], **main}}
    names = []

    @jax.jit
    def taps_of(params):
        taps = model.apply(params, state, COLOUR)[2]
        names.extend(taps)  # what leaves a compiled program comes sorted
        return taps

    taps = taps_of(copied)
    np.testing.assert_allclose(taps["rotation_head/output"][0], taps["params/output"][0], rtol=1e-5, atol=1e-6)
    assert (names[0], names[-2], names[-1]) == ("params/conv", "rotation_head/output", "params/output")


def test_rotation_head_reads_the_trunk_and_changes_no_answer():
    plain, head = mlp((4, 4), 3, hidden=(6, 5)), mlp((5,), 4, hidden=(3,))
    model = with_rotation_head(plain, head, "output")
    params, state = start(model)
    same_bytes(jax.jit(model.init)(KEY, X)[0]["params"], jax.jit(plain.init)(KEY, X)[0])
    outputs, _, taps = model.apply(params, state, X)
    wanted, _, plain_taps = plain.apply(params["params"], {}, X)
    close(outputs, wanted)
    close(taps["rotation_head/output"][1], head.apply(params["rotation_head"], {}, plain_taps["output"][0])[0])
    assert list(taps) == [
        "params/hidden_0", "params/hidden_1", "rotation_head/hidden_0", "rotation_head/output", "params/output"
    ]  # fmt: skip
    for name in taps:
        perturb = {name: jnp.ones_like(taps[name][1])}
        close(model.apply(params, state, X, perturb=perturb)[2][name][1], taps[name][1] + 1)

    gradient = jax.grad(lambda p: jnp.sum(model.apply(p, state, X)[2]["rotation_head/output"][1] ** 2))(params)
    assert not np.any(gradient["params"]["output"]["kernel"])
    assert np.any(gradient["params"]["hidden_1"]["kernel"]) and np.any(gradient["rotation_head"]["hidden_0"]["kernel"])


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda: mlp((4,), 2, norm="group"), ["mlp", "norm", "'group'", "'batch'", "'layer'"]),
        (lambda: cnn((8, 8), 2, channels=(6,), norm="group", groups=4), ["cnn", "6 channels", "4 groups"]),
        (lambda: resnet26((8, 8), 2, norm=None), ["resnet26", "norm", "None"]),
        (lambda: resnet26((8, 8), 2, depth=9), ["resnet26", "depth", "9", "6 n + 2"]),
        (lambda: resnet26((8, 6), 2), ["resnet26", "input_shape", "(8, 6)"]),
        (lambda: resnet_tail(0), ["resnet_tail", "outputs", "0"]),
        (lambda: with_rotation_head(mlp((4, 4), 2), mlp((9,), 4), "none_such").init(KEY, X), ["reads", "hidden_0"]),
        (lambda: with_rotation_head(mlp((4, 4), 2), mlp((256,), 5), "output").init(KEY, X), ["5 outputs", "4"]),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert all(word in str(error.value) for word in words), str(error.value)
