import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from cl_zoo.models import cnn, from_linen, from_nnx, mlp
from cl_zoo.models._mlp import fan_in_uniform
from tests.oracles.mlp import forward
from tests.tiny import close, same_bytes

ROWS = 3
MODELS = {
    "mlp": (lambda **options: mlp((4, 3), 5, hidden=(7, 6), **options), (4, 3)),
    "no hidden layer": (lambda **options: mlp((4, 3), 5, hidden=(), **options), (4, 3)),
    "cnn": (lambda **options: cnn((8, 8), 5, channels=(3, 4), hidden=6, **options), (8, 8)),
    "colour cnn": (lambda **options: cnn((5, 7, 2), 4, channels=(3,), hidden=6, **options), (5, 7, 2)),
}


@pytest.fixture(scope="module", params=MODELS)
def made(request):
    """A model, its parameters (biases not 0) and images."""
    make, shape = MODELS[request.param]
    model = make()
    x = np.random.default_rng(0).integers(0, 256, (ROWS, *shape)).astype(np.uint8)
    params, model_state = init(model, x)
    params = jax.tree.map(lambda leaf: leaf + 0.1 if leaf.ndim == 1 else leaf, params)
    return model, params, model_state, jnp.asarray(x)


def init(model, x, seed=0):
    return jax.jit(model.init)(jax.random.key(seed), x)


def outputs_of(model, params, model_state, x):
    return jax.jit(lambda *arguments: model.apply(*arguments)[0])(params, model_state, x)


def taps_of(model, params, model_state, x, perturb=None):
    """Outputs and taps."""
    return jax.jit(lambda p, s, x, perturb: model.apply(p, s, x, perturb=perturb)[::2])(params, model_state, x, perturb)


def layer(tree, name):
    for key in name.split("/"):
        tree = tree[key]
    return tree


# mlp and cnn


def test_shapes():
    params, model_state = init(mlp((4, 3), 5, hidden=(7, 6)), jnp.zeros((1, 4, 3)))
    assert jax.tree.map(jnp.shape, params) == {
        "hidden_0": {"kernel": (12, 7), "bias": (7,)},
        "hidden_1": {"kernel": (7, 6), "bias": (6,)},
        "output": {"kernel": (6, 5), "bias": (5,)},
    }
    assert model_state == {}
    params, model_state = init(cnn((9, 8, 2), 5, channels=(3, 4), hidden=6), jnp.zeros((1, 9, 8, 2)))
    assert jax.tree.map(jnp.shape, params) == {
        "conv_0": {"kernel": (3, 3, 2, 3), "bias": (3,)},
        "conv_1": {"kernel": (3, 3, 3, 4), "bias": (4,)},
        "hidden": {"kernel": (16, 6), "bias": (6,)},
        "output": {"kernel": (6, 5), "bias": (5,)},
    }
    assert model_state == {}


def test_mlp_equals_the_oracle():
    model, x = mlp((4,), 5, hidden=(7, 6)), np.random.default_rng(0).normal(size=(ROWS, 4)).astype(np.float32)
    params, model_state = init(model, x)
    outputs, taps = taps_of(model, params, model_state, x)
    expected, inputs = forward(jax.tree.map(np.asarray, params), x)
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
    for name, value in zip(("hidden_0", "hidden_1", "output"), inputs, strict=True):
        np.testing.assert_allclose(taps[name][0], value, rtol=1e-5, atol=1e-5)


def test_cnn_equals_loops():
    model, x = (
        cnn((4, 4), 2, channels=(2,), hidden=3),
        np.random.default_rng(0).normal(size=(2, 4, 4)).astype(np.float32),
    )
    params, model_state = init(model, x)
    kernel, bias = np.asarray(params["conv_0"]["kernel"]), np.asarray(params["conv_0"]["bias"]) + 0.1
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    z = np.zeros((2, 4, 4, 2))
    for row in range(4):
        for column in range(4):
            z[:, row, column] = (
                np.einsum("brc,rco->bo", padded[:, row : row + 3, column : column + 3], kernel[:, :, 0]) + bias
            )
    pooled = np.maximum(z, 0).reshape((2, 2, 2, 2, 2, 2)).max((2, 4)).reshape((2, 8))
    hidden = np.maximum(pooled @ params["hidden"]["kernel"] + params["hidden"]["bias"], 0)
    params["conv_0"]["bias"] = jnp.asarray(bias)
    outputs, taps = taps_of(model, params, model_state, x)
    np.testing.assert_allclose(taps["conv_0"][1], z, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(taps["hidden"][0], pooled, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        outputs, hidden @ params["output"]["kernel"] + params["output"]["bias"], rtol=1e-4, atol=1e-5
    )


def test_tap_names_are_the_paths_of_parameters(made):
    model, params, model_state, x = made
    _, taps = taps_of(model, params, model_state, x)
    assert set(taps) == set(params)
    for name, (into, z) in taps.items():
        kernel, bias = params[name]["kernel"], params[name]["bias"]
        assert into.shape[0] == ROWS and into.shape[-1] == kernel.shape[-2]
        assert z.shape[-1] == bias.shape[0]
        if kernel.ndim == 2:
            np.testing.assert_allclose(z, into @ kernel + bias, rtol=1e-4, atol=1e-5)


def test_perturb_is_added_to_the_pre_activation(made):
    model, params, model_state, x = made
    plain, taps = taps_of(model, params, model_state, x)
    for name, (_, z) in taps.items():
        added = jnp.asarray(np.random.default_rng(1).normal(size=z.shape), jnp.float32)
        outputs, perturbed = taps_of(model, params, model_state, x, {name: added})
        np.testing.assert_allclose(perturbed[name][1], z + added, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(perturbed[name][0], taps[name][0])
        assert not np.allclose(outputs, plain, atol=1e-3)


def test_gradient_to_perturb_is_the_cotangent(made):
    model, params, model_state, x = made
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(ROWS, params["output"]["bias"].shape[0])), jnp.float32)

    @jax.jit
    def gradients(params, perturb):
        def loss(params, perturb):
            outputs, _, taps = model.apply(params, model_state, x, perturb=perturb)
            return jnp.sum(jnp.sin(outputs) * weights), taps

        return jax.grad(loss, (0, 1), has_aux=True)(params, perturb)

    _, taps = taps_of(model, params, model_state, x)
    (to_params, cotangents), taps = gradients(params, {name: jnp.zeros_like(z) for name, (_, z) in taps.items()})
    for name, cotangent in cotangents.items():
        into, kernel = taps[name][0], params[name]["kernel"]
        if kernel.ndim == 2:
            expected = into.T @ cotangent
        else:
            padded = jnp.pad(into, ((0, 0), (1, 1), (1, 1), (0, 0)))
            height, width = into.shape[1:3]
            shifted = [[padded[:, r : r + height, c : c + width] for c in range(3)] for r in range(3)]
            expected = jnp.array([[jnp.einsum("bhwi,bhwo->io", part, cotangent) for part in row] for row in shifted])
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(to_params[name]["kernel"], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            to_params[name]["bias"], cotangent.reshape((-1, kernel.shape[-1])).sum(0), rtol=1e-4, atol=1e-5
        )


def permuted(params, group, order):
    """The parameters with the hidden units of one group in another order, as `Model.units` says."""
    params = jax.tree.map(np.asarray, params)
    for path, axis, _ in group:
        name, leaf = path
        blocks = params[name][leaf].shape[axis] // len(order)
        index = np.concatenate([block * len(order) + order for block in range(blocks)])
        params = {**params, name: {**params[name], leaf: params[name][leaf].take(index, axis)}}
    return params


def test_permuted_units_leave_the_function_unchanged(made):
    model, params, model_state, x = made
    outputs = outputs_of(model, params, model_state, x)
    for group in model.units:
        (name, leaf), axis, role = group[0]
        assert role == "out"
        order = np.roll(np.arange(params[name][leaf].shape[axis]), 1)
        again = permuted(params, group, order)
        assert not np.array_equal(again[name][leaf], params[name][leaf])
        np.testing.assert_allclose(outputs_of(model, again, model_state, x), outputs, rtol=1e-4, atol=1e-5)
        one_left_out = permuted(params, group[:-1], order)
        assert not np.allclose(outputs_of(model, one_left_out, model_state, x), outputs, atol=1e-3)


def test_units_cover_every_hidden_layer_once(made):
    model, params, _, _ = made
    made_by = [path for group in model.units for path, _, role in group if role == "out"]
    read_by = [path for group in model.units for path, _, role in group if role == "in"]
    assert sorted(made_by) == sorted((name, leaf) for name in params if name != "output" for leaf in ("kernel", "bias"))
    assert len(read_by) == len(set(read_by)) == len(params) - 1
    for group in model.units:
        sizes = [layer(params, "/".join(path)).shape[axis] for path, axis, _ in group]
        assert sizes[0] == sizes[1] and sizes[2] % sizes[0] == 0


def test_uint8_equals_floats_in_0_to_1(made):
    model, params, model_state, x = made
    close(
        outputs_of(model, params, model_state, x), outputs_of(model, params, model_state, x.astype(jnp.float32) / 255)
    )


def test_another_preprocess():
    make, shape = MODELS["mlp"]
    model, x = make(preprocess=lambda x: 2 * x), jnp.ones((ROWS, *shape))
    params, model_state = init(model, x)
    close(model.apply(params, model_state, x)[0], make().apply(params, model_state, 2 * x)[0])


def test_keys_of_init(made):
    model, _, _, x = made
    a, b, c = (init(model, x, seed)[0] for seed in (1, 1, 2))
    same_bytes(a, b)
    for name in a:
        assert not np.allclose(a[name]["kernel"], c[name]["kernel"])


def test_a_wrong_input_shape_is_refused(made):
    model, params, model_state, x = made
    wrong = jnp.zeros((ROWS, 6, 5))
    for call in (lambda: model.apply(params, model_state, wrong), lambda: model.init(jax.random.key(0), wrong)):
        with pytest.raises(ValueError) as error:
            call()
        assert str(x.shape[1:]) in str(error.value) and "(6, 5)" in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda: mlp((4,), 0), ["mlp", "outputs", "0"]),
        (lambda: mlp((4,), 2, hidden=(3, 0)), ["mlp", "hidden", "0"]),
        (
            lambda: mlp((4,), 2, initialiser="zeros"),
            ["mlp", "initialiser", "'zeros'", "lecun_normal", "fan_in_uniform"],
        ),
        (lambda: mlp((0,), 2), ["mlp", "input_shape", "0"]),
        (lambda: cnn((8, 8), 0), ["cnn", "outputs", "0"]),
        (lambda: cnn((8, 8), 2, hidden=-1), ["cnn", "hidden", "-1"]),
        (lambda: cnn((8, 8), 2, channels=(4, 0)), ["cnn", "channels", "0"]),
        (lambda: cnn((8, 7), 2, channels=(2, 2, 2)), ["cnn", "input_shape", "(8, 7)", "3 times"]),
        (lambda: cnn((8, 8, 0), 2), ["cnn", "input_shape", "0"]),
        (lambda: cnn((8,), 2), ["cnn", "input_shape", "(8,)"]),
    ],
)
def test_bad_sizes_are_refused(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert all(word in str(error.value) for word in words), str(error.value)


def test_fan_in_uniform_stays_within_its_bounds():
    kernel = fan_in_uniform(jax.random.key(0), (3, 3, 4, 50))
    assert kernel.dtype == jnp.float32
    assert 0.98 / 6 < float(kernel.max()) <= 1 / 6 and -1 / 6 <= float(kernel.min()) < -0.98 / 6
    assert abs(float(kernel.mean())) < 4 / 6 / np.sqrt(3 * kernel.size)
    bias = fan_in_uniform(jax.random.key(0), (2000,), fan_in=4)
    assert 0.48 < float(jnp.abs(bias).max()) <= 0.5


def test_fan_in_uniform_mlp():
    params, _ = init(mlp((25,), 100, hidden=(100,), initialiser="fan_in_uniform"), jnp.zeros((1, 25)))
    for name, bound in (("hidden_0", 0.2), ("output", 0.1)):
        for leaf in params[name].values():
            assert 0.95 * bound < float(jnp.abs(leaf).max()) <= bound


def test_lecun_normal_mlp():
    params, _ = init(mlp((100,), 10, hidden=(200,)), jnp.zeros((1, 100)))
    assert float(jnp.std(params["hidden_0"]["kernel"])) == pytest.approx(0.1, rel=0.05)
    assert not np.any(params["hidden_0"]["bias"]) and not np.any(params["output"]["bias"])


# Modules of other people


class LinenMlp(linen.Module):
    @linen.compact
    def __call__(self, x, *, tap):
        for name, width in (("first", 7), ("second", 6)):
            x = linen.relu(tap(name, linen.Dense(width, name=name), x))
        return tap("last", linen.Dense(5, name="last"), x)


def test_linen_mlp_equals_mlp():
    ours, theirs = mlp((4,), 5, hidden=(7, 6)), from_linen(LinenMlp(), input_shape=(4,))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, 4)), jnp.float32)
    params, model_state = init(theirs, x)
    assert model_state == {}
    names = {"first": "hidden_0", "second": "hidden_1", "last": "output"}
    perturb = {name: jnp.full((ROWS, leaf["bias"].shape[0]), 0.3) for name, leaf in params.items()}

    def results(model, rename, params):
        def loss(params, perturb):
            outputs, _, taps = model.apply(params, {}, x, perturb=perturb)
            return jnp.sum(jnp.sin(outputs)), (outputs, taps)

        params = {rename[name]: leaf for name, leaf in params.items()}
        result = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(
            params, {rename[name]: leaf for name, leaf in perturb.items()}
        )
        back = {new: old for old, new in rename.items()}
        (to_params, cotangents), (outputs, taps) = result
        return outputs, *({back[name]: leaf for name, leaf in tree.items()} for tree in (to_params, cotangents, taps))

    close(results(theirs, {name: name for name in names}, params), results(ours, names, params))


def test_linen_checks_the_input_shape():
    model = from_linen(LinenMlp(), input_shape=(4,))
    with pytest.raises(ValueError, match=r"\(4,\).*\(3,\)"):
        model.init(jax.random.key(0), jnp.zeros((1, 3)))


class NnxNoisy(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(6, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.drop_again = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.dense(x))
        return jnp.concatenate([self.drop(x), self.drop_again(x)], -1)


class LinenNoisy(linen.Module):
    @linen.compact
    def __call__(self, x, *, train):
        x = linen.BatchNorm(use_running_average=not train)(linen.Dense(8)(x))
        drops = [linen.Dropout(0.5, deterministic=not train)(x) for _ in range(2)]
        return jnp.concatenate(drops, -1)


@pytest.fixture(scope="module", params=["nnx", "linen"])
def noisy(request):
    model = from_nnx(NnxNoisy) if request.param == "nnx" else from_linen(LinenNoisy())
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 6)), jnp.float32)
    params, model_state = init(model, x)

    def apply(key=None, *, train=False, model_state=model_state):
        return model.apply(params, model_state, x, key=key, train=train)[:2]

    return jax.jit(apply, static_argnames="train"), model_state


def test_model_state_changes_only_in_training(noisy):
    apply, model_state = noisy
    same_bytes(apply()[1], model_state)
    same_bytes(apply(jax.random.key(1))[1], model_state)
    trained = apply(jax.random.key(1), train=True)[1]
    assert jax.tree.structure(trained) == jax.tree.structure(model_state)
    for old, new in zip(jax.tree.leaves(model_state), jax.tree.leaves(trained), strict=True):
        assert old.shape == new.shape and old.dtype == new.dtype and not np.allclose(old, new)


def test_model_state_is_used_in_evaluation(noisy):
    apply, _ = noisy
    trained = apply(jax.random.key(1), train=True)[1]
    assert not np.allclose(apply()[0], apply(model_state=trained)[0], atol=1e-3)


def test_dropout_is_drawn_from_the_key(noisy):
    apply, _ = noisy
    a, again, b = (np.asarray(apply(jax.random.key(seed), train=True)[0]) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, again)
    assert np.any((a == 0) != (b == 0))
    assert 0.35 < np.mean(a == 0) < 0.65


def test_two_dropouts_draw_apart(noisy):
    apply, _ = noisy
    a = np.asarray(apply(jax.random.key(1), train=True)[0])
    assert np.any((a[:, :8] == 0) != (a[:, 8:] == 0))


def test_dropout_is_off_in_evaluation(noisy):
    apply, _ = noisy
    plain = apply()[0]
    assert not np.any(plain == 0)
    np.testing.assert_array_equal(plain, apply(jax.random.key(1))[0])


def test_a_module_that_takes_task_and_weight_is_given_them():
    class Told(nnx.Module):
        def __init__(self, rngs):
            self.scale = nnx.Param(jnp.ones(()))

        def __call__(self, x, *, task, weight):
            return self.scale * x + task + 10 * weight

    model = from_nnx(Told)
    x, task, weight = jnp.zeros(2), jnp.array([1, 2]), jnp.array([0.0, 1.0])
    params, model_state = init(model, x)
    assert model.apply(params, model_state, x, task=task, weight=weight)[0].tolist() == [1.0, 12.0]


def test_taps_of_nested_modules_are_named_by_the_path():
    class Inner(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(4, 3, rngs=rngs)

    class Outer(nnx.Module):
        def __init__(self, rngs):
            self.inner = Inner(rngs)

        def __call__(self, x, *, tap):
            return tap("inner/dense", self.inner.dense, x)

    model, x = from_nnx(Outer), jnp.ones((2, 4))
    params, model_state = init(model, x)
    _, _, taps = model.apply(params, model_state, x)
    into, z = taps["inner/dense"]
    close(z, into @ layer(params, "inner/dense")["kernel"] + layer(params, "inner/dense")["bias"])


def test_a_module_without_tap_has_no_taps():
    model = from_nnx(lambda rngs: nnx.Linear(4, 3, rngs=rngs))
    params, model_state = model.init(jax.random.key(0), jnp.ones((2, 4)))
    outputs, _, taps = model.apply(params, model_state, jnp.ones((2, 4)))
    assert taps == {} and model.units == ()
    close(outputs, jnp.ones((2, 4)) @ params["kernel"] + params["bias"])


def test_apply_does_not_change_its_arguments(noisy):
    apply, model_state = noisy
    before = jax.tree.map(np.array, model_state)
    apply(jax.random.key(1), train=True)
    same_bytes(jax.tree.map(jnp.asarray, before), model_state)


def test_xavier_uniform_of_mammoth() -> None:
    """U(-a, a), a = sqrt(6 / (in + out)), and biases 0."""
    params, _ = mlp((30,), 4, hidden=(50,), initialiser="xavier_uniform").init(jax.random.key(0), jnp.zeros((1, 30)))
    for layer, n_in, n_out in (("hidden_0", 30, 50), ("output", 50, 4)):
        kernel, bound = np.asarray(params[layer]["kernel"]), (6 / (n_in + n_out)) ** 0.5
        assert 0.95 * bound < np.abs(kernel).max() <= bound and not params[layer]["bias"].any()
        np.testing.assert_allclose(kernel.var(), bound**2 / 3, rtol=0.2)
