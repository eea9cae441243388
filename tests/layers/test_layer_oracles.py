"""The cores of sequence layers against loops over tokens, and the identities that tie them to each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cl_zoo.layers._delta_rule import delta_rule_chunked, delta_rule_step
from cl_zoo.layers._lact import SwiGlu, lact_chunked, newton_schulz
from cl_zoo.layers._linear_attention import linear_attention_chunked, linear_attention_step
from cl_zoo.layers._rotary import rotary
from cl_zoo.layers._titans import titans_chunked, titans_start, titans_step
from cl_zoo.layers.attention import attend, attend_window
from cl_zoo.layers.fast_weights import FastLayer
from cl_zoo.layers.mixer import causal_convolution
from cl_zoo.layers.ttt_core import InnerLoss, ttt_chunked, ttt_start, ttt_step
from tests.oracles import sequence_layers as oracle

B, H, T, D, E = 2, 2, 19, 4, 3
TOLERANCE = {"float64": 1e-10, "float32": 1e-5}  # of the largest number


@pytest.fixture(params=list(TOLERANCE), autouse=True)
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test here is run in both."""
    with jax.enable_x64(request.param == "float64"):
        yield request.param


class Draws:
    """Random numbers that float32 holds exactly, as float64."""

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        return (scale * self.random.normal(size=shape)).astype(np.float32).astype(float)

    def between(self, low: float, high: float, *shape: int) -> np.ndarray:
        return self.random.uniform(low, high, shape).astype(np.float32).astype(float)

    def tokens(self, e: int = D) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Queries, keys of length at most 1, values: `[B, H, T, d]`, `[B, H, T, e]`."""
        k = self.normal(B, H, T, D)
        k = k / np.maximum(1, np.linalg.norm(k, axis=-1, keepdims=True))
        return self.normal(B, H, T, D), k.astype(np.float32).astype(float), self.normal(B, H, T, e)


def by_head(function: Callable[..., np.ndarray], *arrays: Any) -> np.ndarray:
    """An oracle for every row and head of `[B, H, ...]`."""
    heads = arrays[0].shape[1]
    rows = [[function(*(a[b, h] for a in arrays)) for h in range(heads)] for b in range(len(arrays[0]))]
    return np.array(rows)


def same(precision: str, ours: Any, wanted: Any, factor: float = 1.0) -> None:
    """Equal, relative to the largest number."""
    assert ours.dtype == precision
    ours, wanted = np.asarray(ours, float), np.asarray(wanted, float)
    assert ours.shape == wanted.shape
    assert np.abs(wanted).max() > 1e-2, "nothing is compared with nothing"
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=factor * TOLERANCE[precision] * np.abs(wanted).max())


def run(function: Callable[..., Any], *arrays: Any) -> Any:
    """Compiled, on arrays of the precision at hand."""
    return jax.jit(function)(*jax.tree.map(jnp.asarray, arrays))


def over_time(step: Callable[..., tuple[Any, Any]], state: Any, *arrays: Any) -> Any:
    """A scan of `step(state, t, *tokens)` over `[B, H, T, ...]`."""
    time = arrays[0].shape[2]
    tokens = tuple(jnp.moveaxis(a, 2, 0) for a in arrays)

    def one(state: Any, now: Any) -> tuple[Any, Any]:
        z, state = step(state, now[0], *now[1])
        return state, z

    return jnp.moveaxis(jax.lax.scan(one, state, (jnp.arange(time), tokens))[1], 0, 2)


def empty(k: Any, v: Any) -> Any:
    """S of an empty sequence."""
    return jnp.zeros((*k.shape[:2], k.shape[-1], v.shape[-1]), k.dtype)


# Attention.


@pytest.mark.parametrize("window", [None, 5, 1, 64])
def test_attention_with_shared_keys(precision: str, window: int | None) -> None:
    draws = Draws()
    q, k, v = draws.normal(B, 4, T, D), draws.normal(B, 2, T, D), draws.normal(B, 2, T, D)
    shared = [np.repeat(a, 2, axis=1) for a in (k, v)]
    for scale in (None, 0.7):
        used = D**-0.5 if scale is None else scale
        wanted = by_head(lambda q, k, v: oracle.softmax_attention(q, k, v, used, window), q, *shared)  # noqa: B023
        ours = (lambda *a: attend(*a, scale=scale)) if window is None else (  # noqa: B023
            lambda *a: attend_window(*a, window, scale=scale))  # noqa: B023  # fmt: skip
        same(precision, run(ours, q, k, v), wanted)


def test_kernel_regression_is_softmax_attention(precision: str) -> None:
    q, k, v = Draws().tokens()
    same(precision, run(lambda *a: attend(*a, scale=1.0), q, k, v), by_head(oracle.kernel_regression, q, k, v))


def test_rotary_and_convolution(precision: str) -> None:
    draws = Draws()
    x, positions, kernel = draws.normal(B, T, 6), np.arange(3, T + 3), draws.normal(4, 6)
    for theta in (1e4, 1e2):
        wanted = np.array([oracle.rotary(row, positions, theta) for row in x])
        same(precision, run(lambda x, p: rotary(x, p, theta), x, positions), wanted)  # noqa: B023
    wanted = np.array([oracle.short_convolution(row, kernel) for row in x])
    same(precision, run(causal_convolution, x, kernel), wanted)


# Matrices.


@pytest.mark.parametrize("chunk", [1, 8, 64])
def test_linear_attention(precision: str, chunk: int) -> None:
    q, k, v = Draws().tokens(E)
    both = run(
        lambda q, k, v: (
            linear_attention_chunked(q, k, v, chunk=chunk),
            over_time(lambda s, t, *a: linear_attention_step(s, *a), empty(k, v), q, k, v),
        ),
        q, k, v,
    )  # fmt: skip
    for ours in both:
        same(precision, ours, by_head(oracle.linear_attention, q, k, v))


@pytest.mark.parametrize("lowest", [-1.0, -10.0])
def test_gated_linear_attention(precision: str, lowest: float) -> None:
    draws = Draws()
    q, k, v = draws.tokens(E)
    a = draws.between(lowest, 0, B, H, T, D)
    both = run(
        lambda q, k, v, a: (
            linear_attention_chunked(q, k, v, a),
            over_time(lambda s, t, *token: linear_attention_step(s, *token), empty(k, v), q, k, v, a),
        ),
        q, k, v, a,
    )  # fmt: skip
    for ours in both:
        same(precision, ours, by_head(oracle.gated_linear_attention, q, k, v, a))


def test_gated_linear_attention_at_its_strongest_decay_is_finite(precision: str) -> None:
    """And so are its gradients: exponents are taken from a chunk's middle."""
    q, k, v = Draws().tokens(E)
    a = np.full((B, H, T, D), -1e3)

    def with_gradients(*arrays: Any) -> Any:
        z, pull = jax.vjp(linear_attention_chunked, *arrays)
        return z, pull(jnp.ones_like(z))

    z, gradients = run(with_gradients, q, k, v, a)
    same(precision, z, by_head(oracle.gated_linear_attention, q, k, v, np.full_like(a, -10)))
    assert all(np.isfinite(leaf).all() for leaf in gradients)


@pytest.mark.parametrize("chunk", [1, 8, 64])
@pytest.mark.parametrize("decay", [False, True])
def test_delta_rule(precision: str, chunk: int, decay: bool) -> None:
    draws = Draws()
    q, k, v = draws.tokens(E)
    arrays = [q, k, v, draws.between(0, 1, B, H, T)] + [draws.between(-2, 0, B, H, T)] * decay
    both = run(
        lambda *a: (
            delta_rule_chunked(*a, chunk=chunk),
            over_time(lambda s, t, *token: delta_rule_step(s, *token), empty(a[1], a[2]), *a),
        ),
        *arrays,
    )
    for ours in both:
        same(precision, ours, by_head(oracle.gated_delta_rule if decay else oracle.delta_rule, *arrays))


# Test-time training.


def fast(draws: Draws, *sizes: int, bias: bool = True) -> list[FastLayer]:
    """Weights of every row and head."""
    return [
        FastLayer(draws.normal(B, H, n, m, scale=n**-0.5), draws.normal(B, H, m, scale=0.3) if bias else None)
        for n, m in zip(sizes, sizes[1:])
    ]


def ttt_case(b: int, depth: int, norm: bool) -> tuple[Any, ...]:
    """Tokens, weights, logits of rates and offsets, LN's numbers."""
    draws = Draws(b)
    weights = fast(draws, *(D, 3 * D, D) if depth == 2 else (D, D))
    gate, delta = draws.normal(B, H, T), draws.normal(b, scale=0.3)
    scale, bias = draws.between(0.5, 1.5, B, H, D), draws.normal(B, H, D, scale=0.3)
    return draws.tokens(), weights, gate, delta, InnerLoss(scale, bias) if norm else InnerLoss()


def dual_and_primal(b: int, case: tuple[Any, ...]) -> tuple[Any, Any]:
    (q, k, v), weights, gate, delta, loss = case

    def both(q: Any, k: Any, v: Any, weights: Any, gate: Any, delta: Any, loss: Any) -> tuple[Any, Any]:
        row_rate = jnp.maximum(1 / jnp.arange(1, b + 1, dtype=q.dtype) + delta, 0)
        token_rate = jax.nn.sigmoid(gate) / D
        dual = ttt_chunked(q, k, v, weights, row_rate, token_rate, loss, mini_batch=b)
        primal = over_time(
            lambda cache, t, q, k, v, rate: ttt_step(cache, t % b, q, k, v, row_rate, rate, loss),
            ttt_start(weights), q, k, v, token_rate,
        )  # fmt: skip
        return dual, primal

    return run(both, q, k, v, weights, gate, delta, loss)


@pytest.mark.parametrize("b", [1, 4, 16, T])
@pytest.mark.parametrize("depth", [1, 2])
def test_ttt_dual_form_primal_form_and_oracle_agree(precision: str, b: int, depth: int) -> None:
    case = (q, k, v), weights, gate, delta, loss = ttt_case(b, depth, norm=True)
    leaves = [leaf for layer in weights for leaf in layer]

    def loop(q: Any, k: Any, v: Any, gate: Any, scale: Any, bias: Any, *leaves: Any) -> Any:
        eta = oracle.ttt_rates(gate, delta, D)
        function = oracle.ttt_linear if depth == 1 else oracle.ttt_mlp
        return function(q, k, v, eta, *leaves, scale, bias, b)

    wanted = by_head(loop, q, k, v, gate, loss.scale, loss.bias, *leaves)
    dual, primal = dual_and_primal(b, case)
    same(precision, dual, wanted)
    same(precision, primal, wanted)
    same(precision, primal, dual)


@pytest.mark.parametrize("depth", [1, 2])
def test_ttt_without_norm(precision: str, depth: int) -> None:
    case = (q, k, v), weights, gate, delta, _ = ttt_case(4, depth, norm=False)

    def loop(q: Any, k: Any, v: Any, gate: Any, *leaves: Any) -> Any:
        function = oracle.ttt_linear if depth == 1 else oracle.ttt_mlp
        eta = oracle.ttt_rates(gate, delta, D)
        return function(q, k, v, eta, *leaves, None, None, 4, norm=False, residual=False)

    wanted = by_head(loop, q, k, v, gate, *(leaf for layer in weights for leaf in layer))
    for ours in dual_and_primal(4, case):
        same(precision, ours, wanted)


def from_zero(k: Any) -> list[FastLayer]:
    return [FastLayer(empty(k, k))]


@pytest.mark.parametrize("mini_batch", [T, 3 * T])
def test_batch_gradient_ttt_is_linear_attention(precision: str, mini_batch: int) -> None:
    """Rate 1/2 on ||k W - v||^2 is rate 1 on half of it."""
    q, k, v = Draws().tokens()
    ttt, linear = run(
        lambda q, k, v: (
            ttt_chunked(
                q, k, v, from_zero(k), jnp.ones(mini_batch), jnp.ones(k.shape[:-1]), InnerLoss(), mini_batch=mini_batch
            ),
            linear_attention_chunked(q, k, v, chunk=8),
        ),
        q, k, v,
    )  # fmt: skip
    same(precision, ttt, linear)
    same(precision, ttt, by_head(oracle.linear_attention, q, k, v))


def test_online_ttt_is_the_delta_rule(precision: str) -> None:
    draws = Draws()
    q, k, v = draws.tokens()
    beta = draws.between(0, 1, B, H, T)
    ttt, delta = run(
        lambda q, k, v, beta: (
            ttt_chunked(q, k, v, from_zero(k), jnp.ones(1), beta, InnerLoss(), mini_batch=1),
            delta_rule_chunked(q, k, v, beta, chunk=8),
        ),
        q, k, v, beta,
    )  # fmt: skip
    same(precision, ttt, delta)


def test_decays_of_one_leave_the_plain_rules(precision: str) -> None:
    draws = Draws()
    q, k, v = draws.tokens(E)
    beta = draws.between(0, 1, B, H, T)
    gated_delta, delta, gated_linear, linear = run(
        lambda q, k, v, beta: (
            delta_rule_chunked(q, k, v, beta, jnp.zeros_like(beta), chunk=8),
            delta_rule_chunked(q, k, v, beta, chunk=8),
            linear_attention_chunked(q, k, v, jnp.zeros_like(k)),
            linear_attention_chunked(q, k, v, chunk=8),
        ),
        q, k, v, beta,
    )  # fmt: skip
    same(precision, gated_delta, delta)
    same(precision, gated_linear, linear)


# Titans.


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("chunk", [1, 8])
def test_titans(precision: str, depth: int, momentum: bool, chunk: int) -> None:
    draws = Draws()
    q, k, v = draws.tokens()
    weights = fast(draws, *(D, 2 * D, D) if depth == 2 else (D, D), bias=False)
    alpha, eta, theta = (draws.between(low, high, B, H, T) for low, high in ((0, 0.5), (0.1, 0.9), (0, 0.1)))

    def both(q: Any, k: Any, v: Any, weights: Any, alpha: Any, eta: Any, theta: Any) -> Any:
        rates = (theta, jnp.log1p(-alpha)) + ((jnp.log(eta),) if momentum else ())

        def step(cache: Any, t: Any, q: Any, k: Any, v: Any, *rates: Any) -> Any:
            rates = rates if momentum else (*rates, None)
            return titans_step(cache, t % chunk, q, k, v, *rates, chunk=chunk)

        dual = titans_chunked(q, k, v, weights, *(rates if momentum else (*rates, None)), chunk=chunk)
        return dual, over_time(step, titans_start(weights, momentum), q, k, v, *rates)

    def loop(q: Any, k: Any, v: Any, alpha: Any, eta: Any, theta: Any, *kernels: Any) -> Any:
        activation = (oracle.silu, oracle.silu_slope)
        return oracle.titans(q, k, v, list(kernels), alpha, eta * momentum, theta, chunk, activation)

    wanted = by_head(loop, q, k, v, alpha, eta, theta, *(layer.kernel for layer in weights))
    for ours in run(both, q, k, v, weights, alpha, eta, theta):
        same(precision, ours, wanted)


def test_linear_titans_without_momentum_is_the_decayed_delta_rule(precision: str) -> None:
    """The loss of Titans has no 1/2: its rate counts twice."""
    draws = Draws()
    q, k, v = draws.tokens()
    alpha, theta = draws.between(0, 0.5, B, H, T), draws.between(0, 1, B, H, T)
    ours = run(
        lambda q, k, v, alpha, theta: titans_chunked(
            q, k, v, from_zero(k), theta / 2, jnp.log1p(-alpha), None, chunk=1
        ),
        q, k, v, alpha, theta,
    )  # fmt: skip
    same(precision, ours, by_head(oracle.decayed_delta, q, k, v, alpha, theta))


# Large chunks.


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("muon", [False, True])
def test_lact(precision: str, momentum: bool, muon: bool) -> None:
    draws, chunk, h = Draws(), 4, 6
    q, k, v = draws.tokens()
    weights = SwiGlu(*(draws.normal(B, H, n, m, scale=n**-0.5) for n, m in ((D, h), (D, h), (h, D))))
    rates, beta = draws.between(0, 0.5, B, H, T, 3), draws.between(0, 1, B, H, T)

    def loop(q: Any, k: Any, v: Any, gate: Any, up: Any, down: Any, rates: Any, beta: Any) -> Any:
        mean = [beta[i : i + chunk].mean() for i in range(0, T, chunk)]
        order = rates[:, [0, 2, 1]]  # there: gate, down, up
        return oracle.lact(q, k, v, gate, down, up, order, chunk, mean if momentum else None, muon)

    ours = run(
        lambda q, k, v, weights, rates, beta: lact_chunked(
            q, k, v, weights, rates, beta if momentum else None, chunk=chunk, muon=muon
        ),
        q, k, v, weights, rates, beta,
    )  # fmt: skip
    # Newton-Schulz makes small singular values up to 3.4^5 times as large, and their errors.
    same(precision, ours, by_head(loop, q, k, v, *weights, rates, beta), factor=20 if muon else 1)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5)])
def test_newton_schulz(precision: str, shape: tuple[int, int]) -> None:
    matrix = Draws().normal(B, H, *shape)
    ours = run(newton_schulz, matrix)
    same(precision, ours, by_head(oracle.orthogonalise, matrix))
    assert np.linalg.svd(np.asarray(ours), compute_uv=False).min() > 0.3
    still, pull = jax.vjp(newton_schulz, jnp.zeros(shape))
    assert not still.any() and np.isfinite(pull(jnp.ones(shape))[0]).all()
