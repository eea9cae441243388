"""The laws that every sequence layer keeps. To be registered is to be tested."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cl_zoo import layer_catalogue
from cl_zoo.entries import LayerEntry
from cl_zoo.layers import Mixer
from cl_zoo.layers.attention import KeyValues
from tests.oracles import sequence_layers as oracle
from tests.tiny import kinds

WIDTH, HEADS, B, T = 8, 2, 2, 11  # three chunks of 4, the last of 3 tokens
D = WIDTH // HEADS
TOLERANCE = {"float64": 1e-10, "float32": 1e-5}  # of the largest number
KEY = jax.random.key(5)
NAMES = list(layer_catalogue())
WRITTEN = [name for name in NAMES if name not in ("softmax_attention", "window_attention")]
# What else changes the computation, for the two forms.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "ttt_linear": [{"average": False, "inner_norm": False, "base_rate": 0.3}],
    "titans": [{"momentum": False, "decay": False}],
    "lact": [{"momentum": False, "muon": True, "expansion": 2, "window": None}],
}


def make(entry: LayerEntry, **changes: Any) -> Mixer:
    return entry.factory(WIDTH, HEADS, **{**entry.arguments, **changes})


def with_all(entry: LayerEntry) -> Mixer:
    """With convolutions, and a gate where there is one."""
    takes = inspect.signature(entry.factory).parameters
    return make(entry, convolution=3, **({"gate": True} if "gate" in takes else {}))


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def off_centre(params: Any) -> Any:
    """No parameter at 0 or 1, where a mistake could hide."""
    leaves, tree = jax.tree.flatten(params)
    return tree.unflatten([np.asarray(leaf) + 0.1 * draw(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)])


def two_forms(mixer: Mixer) -> Any:
    """Compiled `(params, x) -> parallel, recurrent, cache at the start, cache at the end`."""

    def run(params: Any, x: Any) -> tuple[Any, Any, Any, Any]:
        start = mixer.start(params, x.shape[0], x.shape[1], x.dtype)
        end, z = jax.lax.scan(
            lambda cache, now: mixer.step(params, cache, now)[::-1], start, jnp.moveaxis(x, 1, 0)
        )  # fmt: skip
        return mixer.apply(params, x), jnp.moveaxis(z, 0, 1), start, end

    return jax.jit(run)


def close(ours: Any, wanted: Any, precision: str = "float32") -> None:
    ours, wanted = np.asarray(ours, float), np.asarray(wanted, float)
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=TOLERANCE[precision] * np.abs(wanted).max())


@pytest.fixture(scope="module", params=NAMES)
def layer(request: pytest.FixtureRequest) -> SimpleNamespace:
    """One entry, and its programs in float32, each compiled once."""
    entry = layer_catalogue()[request.param]
    mixer = make(entry)
    params, x = off_centre(jax.jit(mixer.init)(KEY)), jnp.asarray(draw(B, T, WIDTH))
    forms = two_forms(mixer)
    return SimpleNamespace(entry=entry, mixer=mixer, params=params, x=x, forms=forms, result=forms(params, x))


def test_parallel_form_is_a_scan_of_steps(layer: SimpleNamespace) -> None:
    parallel, recurrent, _, end = layer.result
    close(recurrent, parallel)
    assert int(end.position) == T
    others = [make(layer.entry, **changes) for changes in VARIANTS.get(layer.entry.name, [])]
    with jax.enable_x64(True):
        for mixer in (layer.mixer, with_all(layer.entry), *others):
            params = jax.tree.map(lambda leaf: leaf.astype(float), off_centre(jax.jit(mixer.init)(KEY)))
            parallel, recurrent, *_ = two_forms(mixer)(params, jnp.asarray(layer.x, jnp.float64))
            assert parallel.dtype == recurrent.dtype == "float64"
            close(recurrent, parallel, "float64")


@pytest.mark.parametrize("s", [2, 5, 8])
def test_no_output_sees_a_later_token(layer: SimpleNamespace, s: int) -> None:
    changed = layer.forms(layer.params, layer.x.at[:, s].add(1.0))
    for before, after in zip(layer.result[:2], changed[:2]):
        # Gated linear attention takes exponents from a chunk's middle: later decays cancel, up to rounding.
        rounding = 1e-5 if layer.entry.name == "gated_linear_attention" else 0
        np.testing.assert_allclose(after[:, :s], before[:, :s], rtol=0, atol=rounding)
        moved = np.abs(after - before).max(axis=(0, 2))
        reach = min(T, s + layer.entry.arguments.get("window", T)) if layer.entry.name == "window_attention" else T
        assert (moved[s:reach] > 2 * rounding + 1e-6).all()
        assert (moved[reach:] == 0).all()


def test_rows_do_not_see_each_other(layer: SimpleNamespace) -> None:
    changed = layer.forms(layer.params, layer.x.at[1].set(3.0))
    for before, after in zip(layer.result[:2], changed[:2]):
        np.testing.assert_array_equal(after[0], before[0])
        assert np.abs(after[1] - before[1]).max() > 1e-3


def test_vmap_over_rows_is_the_batch(layer: SimpleNamespace) -> None:
    one = jax.vmap(lambda row: layer.mixer.apply(layer.params, row[None])[0])
    close(jax.jit(one)(layer.x), layer.result[0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_step_keeps_the_kind_of_the_cache(layer: SimpleNamespace, dtype: Any) -> None:
    """And outputs have the dtype of the activations, while what is written along the sequence is in float32."""
    for mixer in (layer.mixer, with_all(layer.entry)):
        params = jax.eval_shape(mixer.init, KEY)
        x = jax.ShapeDtypeStruct((B, T, WIDTH), dtype)
        cache = jax.eval_shape(lambda params: mixer.start(params, B, T, dtype), params)  # noqa: B023
        z, after = jax.eval_shape(mixer.step, params, cache, jax.ShapeDtypeStruct((B, WIDTH), dtype))
        assert kinds(after) == kinds(cache)
        assert z.dtype == jax.eval_shape(mixer.apply, params, x).dtype == dtype
        assert z.shape == (B, WIDTH)
        is_window = lambda part: isinstance(part, KeyValues)  # noqa: E731
        for part in jax.tree.leaves(cache.state, is_leaf=is_window):
            for leaf in jax.tree.leaves(part):
                assert leaf.dtype == (dtype if is_window(part) else jnp.float32)


def test_cache_grows_where_it_says_so(layer: SimpleNamespace) -> None:
    def size(length: int) -> int:
        start = jax.eval_shape(lambda: layer.mixer.start(layer.params, B, length, jnp.float32))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(start))

    assert layer.entry.state in ("grows", "constant")
    assert (size(8) < size(100)) == (layer.entry.state == "grows")


def test_compiled_step_is_that_op_by_op_and_does_not_retrace(layer: SimpleNamespace) -> None:
    step = jax.jit(layer.mixer.step, donate_argnums=1)
    cache = layer.mixer.start(layer.params, B, T, "float32")  # no two leaves are one array: they are donated
    outputs = []
    for t in range(5):
        if t == 4:
            eager = layer.mixer.step(layer.params, cache, layer.x[:, t])
        z, cache = step(layer.params, cache, layer.x[:, t])
        outputs.append(z)
    assert step._cache_size() == 1
    close(jnp.stack(outputs, 1), layer.result[0][:, :5])
    close(eager[0], z)
    jax.tree.map(close, eager[1], cache)


def test_every_parameter_has_a_gradient(layer: SimpleNamespace) -> None:
    """Also where the input is all zeros, as in padding, it is finite."""
    mixer = with_all(layer.entry)
    params, towards = off_centre(mixer.init(KEY)), draw(B, T, WIDTH, seed=9)
    gradient = jax.jit(jax.grad(lambda params, x: jnp.sum(mixer.apply(params, x) * towards), argnums=(0, 1)))
    for path, leaf in jax.tree.leaves_with_path(gradient(params, layer.x)):
        assert np.isfinite(leaf).all(), path
        flat = np.abs(np.asarray(leaf)).reshape(leaf.shape[0] if leaf.ndim else 1, -1).max(axis=1)
        assert (flat > 1e-7).all(), path
    still = gradient(params, jnp.zeros_like(layer.x))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(still))


def test_bfloat16_is_near_float32(layer: SimpleNamespace) -> None:
    z = jax.jit(layer.mixer.apply)(layer.params, layer.x.astype(jnp.bfloat16))
    wanted = np.asarray(layer.result[0])
    assert np.abs(np.asarray(z, float) - wanted).mean() < 0.05 * np.abs(wanted).mean()


def test_one_token_and_zeros_are_finite(layer: SimpleNamespace) -> None:
    close(jax.jit(layer.mixer.apply)(layer.params, layer.x[:, :1]), layer.result[0][:, :1])
    for x in (jnp.zeros_like(layer.x), 1e4 * layer.x):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(layer.forms(layer.params, x)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("width", "heads", "arguments", "said"),
    [
        (8, 3, {}, "width is 8, but it must be a multiple of heads, 3"),
        (8, 0, {}, "heads is 0"),
        (0, 1, {}, "width is 0"),
        (8, 2, {"convolution": -1}, "convolution is -1"),
    ],
)
def test_impossible_sizes_are_refused(name: str, width: int, heads: int, arguments: Any, said: str) -> None:
    entry = layer_catalogue()[name]
    with pytest.raises(ValueError, match=said):
        entry.factory(width, heads, **{**entry.arguments, **arguments})


def test_an_odd_head_cannot_be_turned() -> None:
    mixer = layer_catalogue()["ttt_linear"].factory(6, 2)
    with pytest.raises(ValueError, match="rotary: a head is 3 wide, but it must be even"):
        jax.eval_shape(lambda: mixer.apply(mixer.init(KEY), jnp.zeros((1, 4, 6))))


# What is written.


def read_alone(params: Any, x: Any, name: str) -> np.ndarray:
    """The layer with the weights it begins with, in NumPy."""
    params, x = jax.tree.map(lambda leaf: np.asarray(leaf, float), (params, x))
    out = np.zeros((B, T, WIDTH))
    for b in range(B):
        for h in range(HEADS):
            q = (x[b] @ params["query"])[:, h * D : (h + 1) * D]
            fast = [params["weights"][f"layer_{i}"] for i in range(len(params["weights"]))]
            if name.startswith("ttt"):
                q = oracle.rotary(q, np.arange(T) % 4)
                leaves = [each[h] for layer in fast for each in (layer["kernel"], layer["bias"])]
                z = oracle.mlp(leaves, q) if len(fast) == 2 else oracle.affine(leaves, q)
                norm = params["inner_norm"]
                z = q + np.array([oracle.layer_norm(row, norm["scale"][h], norm["bias"][h]) for row in z])
            else:
                q = q / np.sqrt((q**2).sum(-1, keepdims=True) + 1e-6)
                leaves = [each[h] for each in fast]
                z = oracle.mlp(leaves, q, oracle.silu) if len(fast) == 2 else q @ leaves[0]
                z = z / np.sqrt((z**2).mean(-1, keepdims=True) + 1e-6) * params["norm"]["scale"][h * D : (h + 1) * D]
            out[b, :, h * D : (h + 1) * D] = z
    if name.startswith("ttt"):
        out = np.array(
            [[oracle.layer_norm(t, params["norm"]["scale"], params["norm"]["bias"]) for t in o] for o in out]
        )
    return out @ params["output"]


@pytest.mark.parametrize("name", [name for name in NAMES if layer_catalogue()[name].frozen])
def test_at_rate_zero_it_is_the_frozen_layer_and_rates_are_one_vmap(name: str) -> None:
    entry = layer_catalogue()[name]
    params, x = off_centre(make(entry).init(KEY)), draw(B, T, WIDTH)
    traces = []

    @jax.jit
    def run(rates: Any, x: Any) -> Any:
        traces.append(0)

        def one(rate: Any) -> Any:
            mixer = make(entry, **{**entry.frozen, "base_rate": rate})
            return mixer.apply(params, x)

        return jax.vmap(one)(rates)

    assert "base_rate" in entry.numbers and entry.frozen["base_rate"] == 0
    still, moving, ascending = run(jnp.array([0.0, 0.5, -0.5]), x)
    close(still, read_alone(params, x, name))
    assert np.abs(moving - still).max() > 1e-3 and np.abs(moving - ascending).max() > 1e-3
    run(jnp.array([0.1, 0.2, 0.3]), x)
    assert len(traces) == 1


@pytest.mark.parametrize("name", WRITTEN)
def test_state_moves_and_what_was_written_is_read(name: str) -> None:
    """Keys and values are shown again, and asked for by their keys: the answer is nearer to the value than before."""
    entry = layer_catalogue()[name]
    # LaCT's window sees its own token alone, before and after; the rate at which it begins is low.
    mixer = make(entry, **({"window": 1, "base_rate": 1.0} if name == "lact" else {}))
    params = mixer.init(KEY)
    params = params | {"query": params["key"], "output": jnp.eye(WIDTH)}
    rows, n = 16, 4
    x = draw(rows, n, WIDTH)
    parallel, _, start, end = two_forms(mixer)(params, jnp.asarray(np.tile(x, (1, 2, 1))))
    moved = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(start.state), jax.tree.leaves(end.state))]
    assert max(moved) > 1e-3

    values = (x @ np.asarray(params["value"])).reshape(rows, n, HEADS, D)

    def nearness(z: Any) -> float:
        """Mean cosine of the angle between a head's answer and the value."""
        z = np.asarray(z).reshape(values.shape)
        lengths = np.linalg.norm(z, axis=-1) * np.linalg.norm(values, axis=-1)
        return float(((z * values).sum(-1) / np.maximum(lengths, 1e-9)).mean())

    if entry.frozen:
        alone = nearness(jax.jit(make(entry, **entry.frozen).apply)(params, x))
    else:
        alone = nearness(parallel[:, :n]) if name == "lact" else 0.0
    assert nearness(parallel[:, n:]) > alone + 0.02
