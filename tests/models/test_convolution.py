"""Convolutions: equal to an oracle in every order and mode, and in the fast form inside of loops."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax import lax

from cl_zoo import compose, supervised
from cl_zoo.models import cnn, from_linen, from_nnx, resnet26
from cl_zoo.models.convolution import CHUNK, conv_general_dilated
from cl_zoo.models.pooling import max_pool, mean_pool
from cl_zoo.models.rewriting import fast_convolutions
from cl_zoo.types import Batch, Model
from tests.compiled import slow_convolutions
from tests.oracles.convolution import Convolution
from tests.tiny import close, same_bytes

KEY = jax.random.key(0)


def drawn(random: np.random.Generator) -> Convolution:
    """Any convolution of 1 to 3 axes."""
    axes = int(random.integers(1, 4))
    numbers = lambda low, high: tuple(random.integers(low, high, axes).tolist())  # noqa: E731
    groups = int(random.choice([1, 1, 2, 3]))
    inputs = 1 if random.random() < 0.3 else int(random.integers(1, 4))
    kernel = (1,) * axes if random.random() < 0.15 else numbers(1, 4)
    outputs = groups * int(random.integers(1, 4))
    padding = ((0, 0),) * axes if random.random() < 0.4 else tuple(zip(numbers(0, 3), numbers(0, 3), strict=True))
    return Convolution(
        x_shape=(int(random.integers(1, 2 * CHUNK + 3)), *numbers(5, 8), groups * inputs),
        k_shape=(*kernel, inputs, outputs),
        strides=numbers(1, 3),
        padding=padding,
        x_dilation=numbers(1, 3) if random.random() < 0.3 else (1,) * axes,
        k_dilation=numbers(1, 3),
        groups=groups,
    )


def ours(c: Convolution):
    places = "DHW"[-len(c.strides) :]
    numbers = (f"N{places}C", f"{places}IO", f"N{places}C")
    return lambda x, k: conv_general_dilated(
        x, k, c.strides, c.padding, c.x_dilation, c.k_dilation, numbers, feature_group_count=c.groups
    )


def near(found, expected, tolerance) -> None:
    """As far apart as `tolerance` of the largest number."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    assert np.max(np.abs(found - expected), initial=0) <= tolerance * max(np.max(np.abs(expected), initial=0), 1)


def check(c: Convolution, random: np.random.Generator, dtype: type) -> None:
    """Values, first and second derivatives in every mode, alone and under vmap of one operand or both."""
    # Sums of n numbers are rounded about sqrt(n) times.
    terms = np.prod(c.y_shape()[:-1])
    tolerance = 1e-12 if dtype == np.float64 else 1e-6 * max(1, terms**0.5 / 8)
    draw = lambda shape: random.normal(size=shape).astype(dtype) / 4  # noqa: E731
    x, dx = draw((2, *c.x_shape)), draw(c.x_shape)
    k, dk = draw((2, *c.k_shape)), draw(c.k_shape)
    convolve = ours(c)

    def loss(x, k):
        return jnp.sum(jnp.sin(convolve(x, k)))

    gradient = jax.grad(loss, (0, 1))

    @jax.jit
    def all_of_them(x, k, dx, dk):
        def along(x, k):
            return sum(jnp.sum(g * d) for g, d in zip(gradient(x, k), (dx, dk), strict=True))

        one = (x[0], k[0])
        slope = lambda x, k: jax.jvp(loss, (x, k), (dx, dk))[1]  # noqa: E731
        return {
            "values": convolve(*one),
            "reverse": gradient(*one),
            "forward": slope(*one),
            "forward over reverse": jax.jvp(gradient, one, (dx, dk))[1],
            "reverse over reverse": jax.grad(along, (0, 1))(*one),
            "reverse over forward": jax.grad(slope, (0, 1))(*one),
            "forward over forward": jax.jvp(slope, one, (dx, dk))[1],
            "vmap of x": jax.vmap(gradient, (0, None))(x, k[0]),
            "vmap of k": jax.vmap(gradient, (None, 0))(x[0], k),
            "vmap of both": jax.vmap(gradient)(x, k),
            "vmap of each": jax.vmap(jax.vmap(gradient, (None, 0)), (0, None))(x, k),
            "reverse of vmap": jax.grad(lambda x, k: jnp.sum(jax.vmap(loss, (None, 0))(x, k)), (0, 1))(x[0], k),
        }

    found = all_of_them(x, k, dx, dk)
    wide = [v.astype(np.float64) for v in (x, k, dx, dk)]
    x, k, dx, dk = wide
    y, first, second = c.sine_loss(x[0], k[0], dx, dk)
    each = [[c.sine_loss(a, b, dx, dk)[1] for b in k] for a in x]
    near(found["values"], y, tolerance)
    slope = sum(np.sum(g * d) for g, d in zip(first, (dx, dk), strict=True))
    near(found["forward"], slope, tolerance * y.size**0.5)
    curvature = sum(np.sum(g * d) for g, d in zip(second, (dx, dk), strict=True))
    near(found["forward over forward"], curvature, tolerance * y.size**0.5)
    for which in range(2):
        near(found["reverse"][which], first[which], tolerance)
        for mode in ("forward over reverse", "reverse over reverse", "reverse over forward"):
            near(found[mode][which], second[which], tolerance)
        near(found["vmap of x"][which], np.stack([each[i][0][which] for i in range(2)]), tolerance)
        near(found["vmap of k"][which], np.stack([each[0][j][which] for j in range(2)]), tolerance)
        near(found["vmap of both"][which], np.stack([each[i][i][which] for i in range(2)]), tolerance)
        grid = np.stack([np.stack([each[i][j][which] for j in range(2)]) for i in range(2)])
        near(found["vmap of each"][which], grid, tolerance)
    near(found["reverse of vmap"][0], each[0][0][0] + each[0][1][0], tolerance)
    near(found["reverse of vmap"][1], np.stack([each[0][j][1] for j in range(2)]), tolerance)


@pytest.mark.parametrize("seed", range(6))
def test_convolutions_equal_the_oracle(seed: int) -> None:
    random = np.random.default_rng(seed)
    with jax.enable_x64(seed % 2 == 0):
        check(drawn(random), random, np.float64 if seed % 2 == 0 else np.float32)


@pytest.mark.long
@pytest.mark.parametrize("block", range(10))
def test_many_convolutions_equal_the_oracle(block: int) -> None:
    for seed in range(20):
        random = np.random.default_rng((7, block, seed))
        with jax.enable_x64(seed % 2 == 0):
            check(drawn(random), random, np.float64 if seed % 2 == 0 else np.float32)
        jax.clear_caches()


def test_groups_of_many_channels(monkeypatch) -> None:
    monkeypatch.setattr("cl_zoo.models.convolution.DENSE", 0)
    random = np.random.default_rng(0)
    check(Convolution((3, 6, 5, 4), (3, 2, 2, 6), (1, 2), ((1, 1), (0, 1)), (1, 1), (1, 1), 2), random, np.float32)


def test_other_orders_of_axes_and_named_padding() -> None:
    x, k = jax.random.normal(KEY, (2, 3, 9, 8)), jax.random.normal(KEY, (4, 3, 2, 3))
    for numbers, order in ((None, (0, 1, 2, 3)), (("NHCW", "OIHW", "CNWH"), (0, 2, 1, 3))):
        for padding in ("SAME", "VALID"):
            arguments = (jnp.transpose(x, order), k, (2, 1), padding)
            given = {"dimension_numbers": numbers, "rhs_dilation": (1, 2)}
            close(conv_general_dilated(*arguments, **given), lax.conv_general_dilated(*arguments, **given))


def test_what_lax_refuses_is_refused() -> None:
    with pytest.raises(ValueError, match="feature dimension"):
        conv_general_dilated(jnp.ones((1, 3, 4, 4)), jnp.ones((2, 5, 3, 3)), (1, 1), "SAME")


def test_complex_and_whole_numbers_and_batch_groups_go_to_lax() -> None:
    x, k = jnp.arange(32.0).reshape((2, 1, 4, 4)), jnp.arange(8.0).reshape((2, 1, 2, 2))
    for dtype in (jnp.complex64, jnp.int32):
        same_bytes(
            conv_general_dilated(x.astype(dtype), k.astype(dtype), (1, 1), "SAME"),
            lax.conv_general_dilated(x.astype(dtype), k.astype(dtype), (1, 1), "SAME"),
        )
    close(
        conv_general_dilated(x, k, (1, 1), "SAME", batch_group_count=2),
        lax.conv_general_dilated(x, k, (1, 1), "SAME", batch_group_count=2),
    )


def test_low_precision_is_added_up_in_float32() -> None:
    x, k = (jax.random.normal(KEY, shape) for shape in ((2, 16, 9, 9), (16, 16, 3, 3)))
    low = [v.astype(jnp.bfloat16) for v in (x, k)]
    found = conv_general_dilated(*low, (1, 1), "SAME")
    exact = conv_general_dilated(*(v.astype(jnp.float32) for v in low), (1, 1), "SAME")
    same_bytes(found, exact.astype(jnp.bfloat16))
    wide = conv_general_dilated(*low, (1, 1), "SAME", preferred_element_type=jnp.float32)
    same_bytes(wide, exact)
    gradient = jax.grad(lambda x: jnp.sum(conv_general_dilated(x, low[1], (1, 1), "SAME").astype(jnp.float32)))(low[0])
    assert gradient.dtype == jnp.bfloat16


def test_eight_devices_are_one() -> None:
    c = Convolution((16, 6, 6, 3), (3, 3, 3, 4), (1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1))
    x, k = jax.random.normal(KEY, c.x_shape), jax.random.normal(KEY, c.k_shape)
    gradient = jax.jit(jax.grad(lambda x, k: jnp.sum(jnp.sin(ours(c)(x, k))), (0, 1)))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    close(gradient(spread, k), gradient(x, k), 1e-5, 1e-5)


class NnxNet(nnx.Module):
    """A user's net, which knows nothing of this library."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, 6, (3, 3), rngs=rngs)
        self.depthwise = nnx.Conv(6, 6, (3, 3), feature_group_count=6, rngs=rngs)
        self.up = nnx.ConvTranspose(6, 4, (3, 3), strides=2, rngs=rngs)
        self.output = nnx.Linear(4, 5, rngs=rngs)

    def __call__(self, x):
        h = nnx.relu(self.depthwise(nnx.relu(self.conv(x))))
        return self.output(jnp.mean(self.up(h), (1, 2)))


class LinenNet(linen.Module):
    """Another, with a layer that is computed again for its gradient, and a loop over layers."""

    @linen.compact
    def __call__(self, x):
        h = linen.Conv(6, (3, 3), strides=2)(x)
        h = linen.remat(linen.Conv)(6, (3, 3), feature_group_count=6)(h)
        h = linen.scan(lambda layer, h: (nnx.relu(layer(h)), None), variable_broadcast="params", length=2,
                       split_rngs={"params": False})(linen.Conv(6, (3, 3)), h)[0]  # fmt: skip
        return linen.Dense(5)(jnp.mean(linen.ConvTranspose(4, (3, 3), strides=(2, 2))(h), (1, 2)))


X = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
NETS = {
    "nnx": lambda: from_nnx(NnxNet),
    "linen": lambda: from_linen(LinenNet()),
    "resnet": lambda: resnet26((8, 8, 3), 5, depth=8, groups=4),
    "cnn": lambda: cnn((8, 8, 3), 5, channels=(4, 4), hidden=5),
}


def gradient_of(apply, state):
    return jax.grad(lambda p: jnp.sum(apply(p, state, X)[0] ** 2))


@pytest.mark.parametrize("name", NETS)
def test_nets_convolve_in_the_fast_form_inside_of_loops(name: str) -> None:
    model = NETS[name]()
    params, state = jax.jit(model.init)(KEY, X)
    as_it_is = model.apply_function.__wrapped__  # type: ignore[attr-defined]

    def text(apply) -> str:
        def step(p, _):
            return jax.tree.map(lambda a, g: a - 0.1 * g, p, gradient_of(apply, state)(p)), None

        return jax.jit(lambda p: lax.scan(step, p, length=2)[0]).lower(params).compile().as_text()

    assert not slow_convolutions(text(model.apply))
    assert slow_convolutions(text(as_it_is)), "the test finds nothing where there is something"
    close(jax.jit(gradient_of(model.apply, state))(params), jax.jit(gradient_of(as_it_is, state))(params), 1e-4, 1e-4)


def bare_apply(params, model_state, x, **_):
    return jnp.mean(lax.conv(x, params, (1, 1), "SAME"), (2, 3)), model_state, {}


class Indexing(nnx.Module):
    """Reads places, writes places, and draws from a key, beside a convolution; some outputs are no arrays."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, task=None):
        h = self.dropout(self.conv(x)).reshape((len(x), -1))
        h = h[:, jnp.array([0, 5, 7])].at[:, jnp.array([1])].set(2.0)
        return {"h": h + jax.random.normal(jax.random.key(1), h.shape), "name": "net", "task": task}


def test_indexing_draws_and_what_is_no_array_pass_through() -> None:
    model = from_nnx(Indexing)
    params, state = model.init(KEY, X)

    def outputs(apply, task):
        found = apply(params, state, X, key=KEY, train=True, task=task)[0]
        assert found["name"] == "net" and found["task"] is task
        return found["h"]

    for task in (None, np.int32(1)):
        fast = jax.jit(lambda x, task=task: outputs(model.apply, task) + 0 * x[0, 0, 0, 0])(X)
        plain = jax.jit(lambda x, task=task: outputs(model.apply_function.__wrapped__, task) + 0 * x[0, 0, 0, 0])(X)  # type: ignore[attr-defined]
        close(fast, plain, 1e-4, 1e-4)


SMALL = Convolution((8, 6, 6, 3), (3, 3, 3, 8), (1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1))


@pytest.mark.parametrize("split", ["examples", "kernel"])
def test_inside_of_shard_map(split: str) -> None:
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    x, k = jax.random.normal(KEY, SMALL.x_shape), jax.random.normal(KEY, SMALL.k_shape)
    spec, everywhere = jax.sharding.PartitionSpec, jax.sharding.PartitionSpec()
    if split == "examples":
        specs = (spec("d"), everywhere)
        gradient = jax.grad(lambda x, k: lax.psum(jnp.sum(jnp.sin(ours(SMALL)(x, k))), "d"), 1)
    else:
        specs = (everywhere, spec(None, None, None, "d"))
        gradient = jax.grad(lambda x, k: jnp.sum(jnp.sin(ours(SMALL)(x, k))))
    found = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=specs, out_specs=everywhere))(x, k)
    whole = jax.grad(lambda x, k: jnp.sum(jnp.sin(ours(SMALL)(x, k))), 1 if split == "examples" else 0)(x, k)
    close(found, whole, 1e-4, 1e-4)


def test_modes_of_jax() -> None:
    x, k = jax.random.normal(KEY, SMALL.x_shape), jax.random.normal(KEY, SMALL.k_shape)
    value = lambda x, k: jnp.sum(jnp.sin(ours(SMALL)(x, k)))  # noqa: E731
    expected = jax.grad(value, (0, 1))(x, k)
    with jax.disable_jit():
        close(jax.grad(value, (0, 1))(x, k), expected, 1e-4, 1e-4)
    depthwise = jax.random.normal(KEY, (3, 3, 1, 3))
    groups = Convolution((8, 6, 6, 3), (3, 3, 1, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1), 3)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        low = [v.astype(jnp.bfloat16) for v in (x, k)]
        jax.jit(jax.grad(lambda x, k: jnp.sum(ours(SMALL)(x, k)), (0, 1)))(*low)
        jax.jit(jax.grad(lambda x, k: jnp.sum(ours(groups)(x, k)), (0, 1)))(x, depthwise)
    none = jax.vmap(jax.grad(value, (0, 1)), (0, None))(jnp.zeros((0, *x.shape)), k)
    assert [leaf.shape for leaf in none] == [(0, *x.shape), (0, *k.shape)]


def test_plain_convolutions_are_told_of() -> None:
    plain = Model(lambda key, x: (jnp.ones((5, 3, 3, 3)), {}), bare_apply)
    batch = Batch(jnp.ones((2, 3, 4, 4)), jnp.zeros(2, jnp.int32), None, jnp.ones(2))
    with pytest.warns(UserWarning, match=r"fast_convolutions\(apply\)"):
        compose(plain, optax.sgd(0.1), supervised()).init(KEY, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = dataclasses.replace(plain, apply_function=fast_convolutions(bare_apply))
        jax.jit(compose(fast, optax.sgd(0.1), supervised()).init)(KEY, batch)


def test_rewritten_functions_keep_branches_loops_and_their_own_derivatives() -> None:
    kernel = jnp.ones((2, 2, 3, 3)) / 9

    @jax.custom_jvp
    def own(x):
        return lax.conv(x, kernel, (1, 1), "SAME")

    own.defjvp(lambda primals, tangents: (own(*primals), 7 * tangents[0]))

    def function(x, flag):
        y = lax.cond(x[0, 0, 0, 0] > 0, lambda x: lax.conv(x, kernel, (1, 1), "SAME"), lambda x: -x, x)
        y = nnx.max_pool(jnp.moveaxis(y, 1, -1), (2, 1), (2, 1)).repeat(2, 1).transpose((0, 3, 1, 2))
        y = nnx.max_pool(y, (3, 1), (1, 1), "SAME")
        y = lax.while_loop(lambda y: jnp.sum(y) < 40, lambda y: 2 * lax.conv(y, kernel, (1, 1), "SAME") + 1, y)
        return {"b": own(y), "a": y if flag else x}

    for x in (jnp.ones((1, 2, 4, 4)), -jnp.ones((1, 2, 4, 4))):
        found = jax.jit(lambda x: fast_convolutions(function)(x, True))(x)
        expected = jax.jit(lambda x: function(x, True))(x)
        close(found, expected)
    slope = jax.jit(lambda x: jax.jvp(fast_convolutions(own), (x,), (jnp.ones_like(x),))[1])
    same_bytes(slope(x), 7 * jnp.ones_like(x))


@pytest.mark.parametrize("window", [(2, 2), (3, 2)])
@pytest.mark.parametrize(("ours", "theirs"), [(max_pool, nnx.max_pool), (mean_pool, nnx.avg_pool)])
def test_pooling(ours, theirs, window: tuple[int, int]) -> None:
    x = jnp.round(2 * jax.random.normal(KEY, (2, 7, 5, 3)))  # with ties

    def value_and_slope(pool):
        return jax.vjp(pool, x)[1](pool(x))[0], pool(x)

    close(value_and_slope(lambda x: ours(x, window)), value_and_slope(lambda x: theirs(x, window, window)))
