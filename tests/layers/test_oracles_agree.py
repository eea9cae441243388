"""The oracles of the sequence layers agree with each other, in float64."""

import numpy as np
import pytest

from tests.oracles import sequence_layers as oracle
from tests.oracles.differences import agree, check_gradients, slopes

T, D, B = 11, 4, 4  # the last mini-batch has 3 tokens
RANDOM = np.random.default_rng(0)
Q, K, V = (RANDOM.normal(size=(T, D)) for _ in range(3))
KEYS = K / np.linalg.norm(K, axis=1, keepdims=True)
BETA, ALPHA, MOMENTUM, THETA = (RANDOM.uniform(0.1, 0.9, T) for _ in range(4))
LOG_DECAY = -RANDOM.uniform(0.1, 1, (T, D))
GAMMA, BIAS = RANDOM.normal(1, 0.3, D), RANDOM.normal(0, 0.3, D)
W0, B0 = RANDOM.normal(0, 0.5, (D, D)), RANDOM.normal(0, 0.5, D)
DEEP = [RANDOM.normal(0, 0.5, shape) for shape in ((D, 6), 6, (6, D), D)]
SWIGLU = [RANDOM.normal(0, 0.5, shape) for shape in ((D, 6), (6, D), (D, 6))]
GATE, DELTA = RANDOM.normal(size=T), RANDOM.normal(0, 0.3, B)
ETA = oracle.ttt_rates(GATE, DELTA, D, base=2.0)
RATES = RANDOM.uniform(0.05, 0.2, (T, 3))
LAYERS = {
    "softmax attention": lambda q, k, v: oracle.softmax_attention(q, k, v, 0.5),
    "softmax attention in a window": lambda q, k, v: oracle.softmax_attention(q, k, v, 0.5, window=3),
    "kernel regression": oracle.kernel_regression,
    "linear attention": oracle.linear_attention,
    "gated linear attention": lambda q, k, v: oracle.gated_linear_attention(q, k, v, LOG_DECAY),
    "delta rule": lambda q, k, v: oracle.delta_rule(q, k, v, BETA),
    "gated delta rule": lambda q, k, v: oracle.gated_delta_rule(q, k, v, BETA, LOG_DECAY[:, 0]),
    "decayed delta rule": lambda q, k, v: oracle.decayed_delta(q, k, v, ALPHA, THETA),
    "TTT-Linear": lambda q, k, v: oracle.ttt_linear(q, k, v, ETA, W0, B0, GAMMA, BIAS, B),
    "TTT-MLP": lambda q, k, v: oracle.ttt_mlp(q, k, v, ETA, *DEEP, GAMMA, BIAS, B),
    "Titans": lambda q, k, v: oracle.titans(q, k, v, [W0], ALPHA, MOMENTUM, THETA / 9, B),
    "LaCT": lambda q, k, v: oracle.lact(q, k, v, *SWIGLU, RATES, B, MOMENTUM, muon=True),
}


# All of them.


@pytest.mark.parametrize("name", LAYERS)
def test_no_output_sees_a_later_token(name: str) -> None:
    layer, at = LAYERS[name], 5
    whole = layer(Q, K, V)
    assert whole.shape == (T, D) and np.isfinite(whole).all()
    for position in range(3):
        changed = [Q.copy(), K.copy(), V.copy()]
        changed[position][at] += 1.0
        after = layer(*changed)
        np.testing.assert_array_equal(after[:at], whole[:at])
        assert np.abs(after[at:] - whole[at:]).max() > 1e-3
    for n in (1, 6, 9):  # incomplete mini-batches
        agree(layer(Q[:n], K[:n], V[:n]), whole[:n])


# Attention and linear memories.


def test_kernel_regression_is_softmax_attention() -> None:
    agree(oracle.kernel_regression(Q, K, V), oracle.softmax_attention(Q, K, V, scale=1.0))


def test_windows_of_attention() -> None:
    agree(oracle.softmax_attention(Q, K, V, 0.5, window=T), oracle.softmax_attention(Q, K, V, 0.5))
    agree(oracle.softmax_attention(Q, K, V, 0.5, window=1), V)
    seen = oracle.softmax_attention(Q, K, V, 0.5, window=3)
    for t in range(2, T):
        last = slice(t - 2, t + 1)
        agree(seen[t], oracle.softmax_attention(Q[last], K[last], V[last], 0.5)[-1])


def test_linear_attention_is_gated_without_decay() -> None:
    agree(oracle.gated_linear_attention(Q, K, V, np.zeros((T, D))), oracle.linear_attention(Q, K, V))


def test_gated_linear_attention_weighs_by_the_decay_since() -> None:
    z = np.zeros((T, D))
    for t in range(T):
        for s in range(t + 1):
            z[t] += (Q[t] * np.exp(LOG_DECAY[s + 1 : t + 1].sum(axis=0)) @ K[s]) * V[s]
    agree(oracle.gated_linear_attention(Q, K, V, LOG_DECAY), z)


def test_delta_rules_agree() -> None:
    delta = oracle.delta_rule(Q, KEYS, V, BETA)
    agree(oracle.gated_delta_rule(Q, KEYS, V, BETA, np.zeros(T)), delta)
    agree(oracle.decayed_delta(Q, KEYS, V, np.zeros(T), BETA), delta)


def test_gated_delta_is_the_decayed_one_where_its_values_are_scaled() -> None:
    gated = oracle.gated_delta_rule(Q, KEYS, (1 - ALPHA)[:, None] * V, THETA / (1 - ALPHA), np.log(1 - ALPHA))
    agree(gated, oracle.decayed_delta(Q, KEYS, V, ALPHA, THETA))
    unscaled = oracle.gated_delta_rule(Q, KEYS, V, THETA / (1 - ALPHA), np.log(1 - ALPHA))
    assert np.abs(unscaled - gated).max() > 1e-2


def test_a_delta_rule_of_rate_one_returns_what_it_just_wrote() -> None:
    agree(oracle.delta_rule(KEYS, KEYS, V, np.ones(T)), V)


def test_gated_delta_without_erasure_at_orthogonal_keys_is_gated_linear_attention() -> None:
    keys = np.eye(T)
    decay = np.repeat(LOG_DECAY[:, :1], T, axis=1)
    queries = RANDOM.normal(size=(T, T))
    agree(
        oracle.gated_delta_rule(queries, keys, V, np.ones(T), LOG_DECAY[:, 0]),
        oracle.gated_linear_attention(queries, keys, V, decay),
    )


# Test-time training.


def plain_ttt(q, k, v, eta, b, weight, offset=None):
    return oracle.ttt_linear(q, k, v, eta, weight, offset, None, None, b, norm=False, residual=False)


def test_batch_descent_from_zero_is_linear_attention() -> None:
    zero, one = np.zeros((D, D)), np.ones((T, T))
    agree(plain_ttt(Q, K, V, one, T, zero), oracle.linear_attention(Q, K, V))
    ahead = lambda x: np.concatenate([x, np.ones((T, 1))], axis=1)  # noqa: E731
    agree(plain_ttt(Q, K, V, one, T, zero, np.zeros(D)), oracle.linear_attention(ahead(Q), ahead(K), V))


def test_online_descent_is_the_delta_rule() -> None:
    agree(plain_ttt(Q, KEYS, V, BETA[:, None], 1, np.zeros((D, D))), oracle.delta_rule(Q, KEYS, V, BETA))


def test_ttt_at_rate_zero_is_its_first_network() -> None:
    layer_norm = lambda x: np.array([oracle.layer_norm(row, GAMMA, BIAS) for row in x])  # noqa: E731
    none = np.zeros((T, B))
    agree(oracle.ttt_linear(Q, K, V, none, W0, B0, GAMMA, BIAS, B), Q + layer_norm(Q @ W0 + B0))
    agree(plain_ttt(Q, K, V, none, B, W0, B0), Q @ W0 + B0)
    agree(
        oracle.ttt_mlp(Q, K, V, none, *DEEP, GAMMA, BIAS, B),
        Q + layer_norm(oracle.gelu(Q @ DEEP[0] + DEEP[1]) @ DEEP[2] + DEEP[3]),
    )


def dual(q, k, v, eta, weights, gamma, bias, b):
    """TTT without a row's weights, in matrices: with G_n = dL/d(layer n's output), A = tril(Q_n K_n^T),

    Q_n W - (eta * A) G_n + b - (eta * tril(1)) G_n;   at the end W <- W - (eta_last * K_n)^T G_n.
    """
    z, weights = [], list(weights)
    for first in range(0, len(q), b):
        rows = slice(first, min(first + b, len(q)))
        rates = np.tril(eta[rows, : rows.stop - first])
        keys, queries = [k[rows]], q[rows]
        for n in range(0, len(weights), 2):
            keys.append((oracle.gelu(keys[-1]) if n else keys[-1]) @ weights[n] + weights[n + 1])
        d = [oracle.layer_norm(x, gamma, bias) - y for x, y in zip(keys[-1], v[rows] - k[rows])]
        g = np.array([oracle.layer_norm_backward(x, gamma, row) for x, row in zip(keys[-1], d)])
        gradients = [g]
        for n in range(len(weights) - 2, 0, -2):
            gradients.insert(0, gradients[0] @ weights[n].T * oracle.gelu_slope(keys[n // 2]))
        for n, g in zip(range(0, len(weights), 2), gradients):
            inputs = oracle.gelu(keys[n // 2]) if n else keys[0]
            queries = oracle.gelu(queries) if n else queries
            queries = queries @ weights[n] + weights[n + 1] - (rates * (queries @ inputs.T) + rates) @ g
            weights[n] = weights[n] - (rates[-1][:, None] * inputs).T @ g
            weights[n + 1] = weights[n + 1] - rates[-1] @ g
        z.extend(x + oracle.layer_norm(y, gamma, bias) for x, y in zip(q[rows], queries))
    return np.array(z)


@pytest.mark.parametrize("b", [1, B, T])
def test_primal_and_dual_ttt_agree(b: int) -> None:
    eta = oracle.ttt_rates(GATE, np.resize(DELTA, b), D)
    agree(oracle.ttt_linear(Q, K, V, eta, W0, B0, GAMMA, BIAS, b), dual(Q, K, V, eta, [W0, B0], GAMMA, BIAS, b))
    agree(oracle.ttt_mlp(Q, K, V, eta, *DEEP, GAMMA, BIAS, b), dual(Q, K, V, eta, DEEP, GAMMA, BIAS, b))


def test_ttt_gradients_against_differences() -> None:
    for net, weights in (
        ((oracle.affine, oracle.affine_backward), [W0, B0]),
        ((oracle.mlp, oracle.mlp_backward), DEEP),
    ):
        for norm, residual in ((True, True), (True, False), (False, False), (False, True)):

            def loss(weights, net=net, norm=norm, residual=residual):
                out = net[0](weights, K[0])
                out = oracle.layer_norm(out, GAMMA, BIAS) if norm else out
                return 0.5 * np.sum((out - (V[0] - K[0] if residual else V[0])) ** 2)

            check_gradients(loss, weights, oracle.ttt_gradient(weights, K[0], V[0], net, GAMMA, BIAS, norm, residual))


def test_layer_norm_gradient_against_differences() -> None:
    d = V[1]
    check_gradients(
        lambda x: oracle.layer_norm(x[0], GAMMA, BIAS) @ d, [K[1]], [oracle.layer_norm_backward(K[1], GAMMA, d)]
    )
    normal = oracle.layer_norm(K[1], 1.0, 0.0)
    assert abs(normal.mean()) < 1e-12 and abs(normal.var() - 1) < 1e-5


def test_rates_by_hand() -> None:
    # Position 1: 1/1 + 0; 2: 1/2 + 0.5; 3: 1/3 - 1 < 0. sigma(0) = 1/2, sigma(log 3) = 3/4. base / d = 2.
    gate = np.array([0.0, np.log(3), 0.0, np.log(3)])
    eta = oracle.ttt_rates(gate, np.array([0.0, 0.5, -1.0]), d=2, base=4.0)
    agree(eta, np.array([[1.0, 1.5, 1.0], [1.0, 1.5, 1.0], [0.0, 0.0, 0.0], [1.5, 0.0, 0.0]]))


def test_one_token_of_ttt_by_hand() -> None:
    # f(k) = 1 * 2 + 1 = 3, error 3 - 4 = -1; W <- 2 + 0.5 * 1, b <- 1 + 0.5; f(q) = 3 * 2.5 + 1.5.
    one = np.ones((1, 1))
    agree(plain_ttt(3 * one, one, 4 * one, 0.5 * one, 1, 2 * one, np.ones(1)), 9 * one)


# Titans.


def test_titans_of_one_matrix_without_momentum_is_the_decayed_delta_rule() -> None:
    zero = np.zeros((D, D))
    titans = oracle.titans(Q, KEYS, V, [zero], ALPHA, np.zeros(T), THETA / 2, 1)
    agree(titans, oracle.decayed_delta(Q, KEYS, V, ALPHA, THETA))


def test_titans_without_decay_and_momentum_is_ttt() -> None:
    none = np.zeros(T)
    eta = np.array([[2 * THETA[min(t - t % B + j, T - 1)] for j in range(B)] for t in range(T)])
    agree(oracle.titans(Q, K, V, [W0], none, none, THETA, B), plain_ttt(Q, K, V, eta, B, W0))


def test_titans_of_two_matrices_by_differences() -> None:
    """One mini-batch of three: the decay and the momentum, unrolled."""
    first, second = weights = [DEEP[0], DEEP[2]]
    pair = (oracle.silu, oracle.silu_slope)

    def forward(weights, x):
        return oracle.silu(x @ weights[0]) @ weights[1]

    g = []
    for t in range(3):
        loss = lambda weights, t=t: np.sum((forward(weights, K[t]) - V[t]) ** 2)  # noqa: E731
        g.append([slopes(lambda w, loss=loss: loss([w, second]), first)])
        g[t].append(slopes(lambda w, loss=loss: loss([first, w]), second))
    a, (_, e1, e2), th = 1 - ALPHA[:3], MOMENTUM[:3], THETA[:3]
    s = [[-th[0] * g[0][m] for m in range(2)]]
    s.append([e1 * s[0][m] - th[1] * g[1][m] for m in range(2)])
    s.append([e2 * s[1][m] - th[2] * g[2][m] for m in range(2)])
    end = [a[2] * a[1] * a[0] * weights[m] + a[2] * a[1] * s[0][m] + a[2] * s[1][m] + s[2][m] for m in range(2)]
    z = oracle.titans(Q[:3], K[:3], V[:3], weights, ALPHA, MOMENTUM, THETA, 3, pair)
    np.testing.assert_allclose(z[2], forward(end, Q[2]), rtol=1e-6, atol=1e-7)


# Large chunks.


def test_lact_gradient_against_differences() -> None:
    d = -V[0]
    check_gradients(lambda weights: oracle.swiglu(weights, K[0]) @ d, SWIGLU, oracle.swiglu_backward(SWIGLU, K[0], d))


def test_lact_at_rate_zero_is_its_first_network() -> None:
    first = np.array([oracle.swiglu(SWIGLU, x) for x in Q])
    none = np.zeros((T, 3))
    for muon in (False, True):
        agree(oracle.lact(Q, K, V, *SWIGLU, none, B, MOMENTUM, muon), first)
    agree(oracle.lact(Q, K, V, *SWIGLU, RATES, B)[:B], first[:B])
    agree(oracle.lact(Q, K, V, *SWIGLU, RATES, T + 1), first)
    assert np.abs(oracle.lact(Q, K, V, *SWIGLU, RATES, B)[B:] - first[B:]).max() > 1e-2


def test_a_chunk_of_lact_by_differences() -> None:
    """After two chunks: sums at the weights of the chunk's start, momentum, columns of the first norms, f(k) . v up."""
    b, now, before = 3, SWIGLU, [0.0, 0.0, 0.0]
    lengths = [np.linalg.norm(w, axis=0) for w in SWIGLU]
    for n in range(2):
        rows = range(n * b, (n + 1) * b)
        gradients = []
        for m in range(3):

            def loss(w, m=m, now=now, rows=rows):
                weights = [*now[:m], w, *now[m + 1 :]]
                return -sum(RATES[t, m] * oracle.swiglu(weights, K[t]) @ V[t] for t in rows)

            gradients.append(slopes(loss, now[m]) + MOMENTUM[n] * before[m])
        before = gradients
        now = [w - g for w, g in zip(now, gradients)]
        now = [w / np.linalg.norm(w, axis=0) * length for w, length in zip(now, lengths)]
        z = oracle.lact(Q, K, V, *SWIGLU, RATES, b, MOMENTUM)
        np.testing.assert_allclose(z[(n + 1) * b], oracle.swiglu(now, Q[(n + 1) * b]), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5)])
def test_newton_schulz_keeps_singular_vectors_and_brings_values_near_one(shape: tuple) -> None:
    g = np.random.default_rng(1).normal(size=shape)
    left, values, right = np.linalg.svd(g, full_matrices=False)
    x = values / (np.sqrt(np.sum(values**2)) + 1e-7)
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    agree(oracle.orthogonalise(g), left * x @ right)
    assert (x > 0.6).all() and (x < 1.3).all()


# On the way to q, k and v.


def test_short_convolution() -> None:
    kernel = RANDOM.normal(size=(3, D))
    y = oracle.short_convolution(Q, kernel)
    for channel in range(D):
        agree(y[:, channel], np.convolve(Q[:, channel], kernel[::-1, channel])[:T])
    agree(oracle.short_convolution(Q, np.array([[0.0] * D, [1.0] * D])), Q)


def test_rotary_knows_only_distances() -> None:
    x, y = np.tile(Q[:1], (T, 1)), np.tile(K[:1], (T, 1))
    products = oracle.rotary(x, np.arange(T) + 3) @ oracle.rotary(y, np.arange(T)).T
    for t in range(T - 1):
        agree(products[t + 1, t + 1], products[t, t])
    agree(oracle.rotary(Q, np.zeros(T)), Q)
    agree(np.linalg.norm(oracle.rotary(Q, np.arange(T)), axis=1), np.linalg.norm(Q, axis=1))
    # Of d = 2, one pair: a turn by the position's angle.
    agree(oracle.rotary(np.array([[1.0, 0.0]]), [np.pi / 2]), np.array([[0.0, 1.0]]))
    # Of d = 4, the second pair is (x_1, x_3), and turns theta^(-1/2) as fast.
    turned = oracle.rotary(np.array([[0.0, 1.0, 0.0, 0.0]]), [10.0], theta=100.0)
    agree(turned, np.array([[0.0, np.cos(1.0), 0.0, np.sin(1.0)]]))
