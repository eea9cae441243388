"""Sequence layers, one head and one token at a time.

q, k are [T, d] and v is [T, e]; each function returns the outputs z [T, e]. A linear memory is S [d, e], from keys to
values, in row form: it is read as q S, and a perfect write of (k, v) makes k S = v.
"""

import numpy as np

EPSILON = 1e-6  # of layer normalisation


# Attention.


def softmax_attention(q, k, v, scale, window=None):
    """z_t = sum_s p_ts v_s,  p_t = softmax over s of scale q_t . k_s,  t - window < s <= t; without a window s <= t."""
    z = np.zeros((len(q), v.shape[1]))
    for t in range(len(q)):
        first = 0 if window is None else max(0, t - window + 1)
        logits = np.array([scale * (q[t] @ k[s]) for s in range(first, t + 1)])
        p = np.exp(logits - logits.max())
        p = p / p.sum()
        for s in range(first, t + 1):
            z[t] += p[s - first] * v[s]
    return z


def kernel_regression(q, k, v):
    """Nadaraya-Watson: z_t = sum_{s<=t} K(q_t, k_s) v_s / sum_{s<=t} K(q_t, k_s),  K(q, k) = exp(q . k)."""
    z = np.zeros((len(q), v.shape[1]))
    for t in range(len(q)):
        above, below = np.zeros(v.shape[1]), 0.0
        for s in range(t + 1):
            kernel = np.exp(q[t] @ k[s])
            above, below = above + kernel * v[s], below + kernel
        z[t] = above / below
    return z


def linear_attention(q, k, v):
    """z_t = sum_{s<=t} (q_t . k_s) v_s."""
    z = np.zeros((len(q), v.shape[1]))
    for t in range(len(q)):
        for s in range(t + 1):
            z[t] += (q[t] @ k[s]) * v[s]
    return z


# Linear memories, read after the write of the same token.


def memory(q, k, v, write):
    """S_0 = 0;  S_t = write(t, S_{t-1});  z_t = q_t S_t."""
    state, z = np.zeros((k.shape[1], v.shape[1])), []
    for t in range(len(q)):
        state = write(t, state)
        z.append(q[t] @ state)
    return np.array(z)


def gated_linear_attention(q, k, v, log_decay):
    """S_t = diag(exp(a_t)) S_{t-1} + k_t v_t^T,  a [T, d]: one decay for each row of S."""
    return memory(q, k, v, lambda t, state: np.diag(np.exp(log_decay[t])) @ state + np.outer(k[t], v[t]))


def delta_rule(q, k, v, beta):
    """S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,  beta [T]: v's error against k S, written at k."""
    return memory(q, k, v, lambda t, state: state + beta[t] * np.outer(k[t], v[t] - k[t] @ state))


def gated_delta_rule(q, k, v, beta, log_decay):
    """S_t = exp(a_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,  a [T]."""

    def write(t, state):
        erase = np.eye(k.shape[1]) - beta[t] * np.outer(k[t], k[t])
        return np.exp(log_decay[t]) * erase @ state + beta[t] * np.outer(k[t], v[t])

    return memory(q, k, v, write)


def decayed_delta(q, k, v, alpha, theta):
    """S_t = (1 - alpha_t) S_{t-1} - theta_t k_t (k_t S_{t-1} - v_t)^T;  alpha, theta [T]."""

    def write(t, state):
        return (1 - alpha[t]) * state - theta[t] * np.outer(k[t], k[t] @ state - v[t])

    return memory(q, k, v, write)


# Inner networks: forward(weights, x) is f(x), backward(weights, x, d) is d.f's gradient with respect to each weight.


def gelu(x):
    """x/2 (1 + tanh u),  u = sqrt(2/pi) (x + 0.044715 x^3)."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_slope(x):
    """(1 + tanh u)/2 + x/2 (1 - tanh^2 u) sqrt(2/pi) (1 + 3 * 0.044715 x^2)."""
    tanh = np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
    return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def silu_slope(x):
    """sigma(x) (1 + x (1 - sigma(x)))."""
    return sigmoid(x) * (1 + x * (1 - sigmoid(x)))


def affine(weights, x):
    """x W + b; weights are [W, b], or [W] where there is no b."""
    return x @ weights[0] + sum(weights[1:])


def affine_backward(weights, x, d):
    """dW = x^T d,  db = d."""
    return [np.outer(x, d), d][: len(weights)]


def mlp(weights, x, activation=gelu):
    """activation(x W1 + b1) W2 + b2; weights are [W1, b1, W2, b2], or [W1, W2]."""
    half = len(weights) // 2
    return affine(weights[half:], activation(affine(weights[:half], x)))


def mlp_backward(weights, x, d, activation=gelu, slope=gelu_slope):
    """With a = x W1 + b1:  dW2 = activation(a)^T d, db2 = d,  da = (d W2^T) * slope(a),  dW1 = x^T da, db1 = da."""
    half = len(weights) // 2
    a = affine(weights[:half], x)
    da = (d @ weights[half].T) * slope(a)
    return affine_backward(weights[:half], x, da) + affine_backward(weights[half:], activation(a), d)


def layer_norm(x, gamma, bias):
    """gamma * x_hat + bias,  x_hat = (x - mean) / sqrt(variance + epsilon)."""
    return gamma * (x - x.mean()) / np.sqrt(x.var() + EPSILON) + bias


def layer_norm_backward(x, gamma, d):
    """With g = gamma * d:  dx = (g - mean(g) - x_hat mean(g * x_hat)) / sqrt(variance + epsilon)."""
    deviation = np.sqrt(x.var() + EPSILON)
    x_hat, g = (x - x.mean()) / deviation, gamma * d
    return (g - g.mean() - x_hat * (g * x_hat).mean()) / deviation


# Test-time training.


def ttt_rates(gate, delta, d, base=1.0):
    """eta[t, j] = base max(0, 1/i + delta_i) sigma(gate_s) / d [T, b].

    i = 1, ..., b is the place of the row t in its mini-batch, s the token at place j of the same mini-batch; gate is
    [T], delta [b]. Places after the last token have rate 0.
    """
    b = len(delta)
    eta = np.zeros((len(gate), b))
    for t in range(len(gate)):
        i, first = t % b + 1, t - t % b
        for j in range(min(b, len(gate) - first)):
            eta[t, j] = base * max(0.0, 1 / i + delta[i - 1]) * sigmoid(gate[first + j]) / d
    return eta


def ttt_gradient(weights, k, v, net, gamma, bias, norm, residual):
    """Gradient of 1/2 || LN(f(k)) - (v - k) ||^2 of one token; without norm f(k), without residual v."""
    forward, backward = net
    raw = forward(weights, k)
    d = (layer_norm(raw, gamma, bias) if norm else raw) - (v - k if residual else v)
    return backward(weights, k, layer_norm_backward(raw, gamma, d) if norm else d)


def ttt(q, k, v, eta, weights, net, gamma, bias, mini_batch, norm, residual):
    """Row t, at place i of its mini-batch, reads z_t = q_t + LN(f(q_t; W_t)) from weights of its own:

        W_t = W - sum_{j<=i} eta[t, j] grad_j(W),

    W the weights of the last row of the mini-batch before.
    """
    z, now = [], weights
    for t in range(len(q)):
        i = t % mini_batch
        if i == 0:
            start, gradients = now, []
        gradients.append(ttt_gradient(start, k[t], v[t], net, gamma, bias, norm, residual))
        now = [w - sum(eta[t, j] * gradients[j][m] for j in range(i + 1)) for m, w in enumerate(start)]
        out = net[0](now, q[t])
        out = layer_norm(out, gamma, bias) if norm else out
        z.append(q[t] + out if residual else out)
    return np.array(z)


def ttt_linear(q, k, v, eta, W0, b0, gamma, bias, mini_batch, norm=True, residual=True):
    """f(x) = x W + b; with b0 None, f(x) = x W. Without norm, gamma and bias are not read."""
    weights = [W0] if b0 is None else [W0, b0]
    return ttt(q, k, v, eta, weights, (affine, affine_backward), gamma, bias, mini_batch, norm, residual)


def ttt_mlp(q, k, v, eta, W1, b1, W2, b2, gamma, bias, mini_batch, norm=True, residual=True):
    """f(x) = gelu(x W1 + b1) W2 + b2."""
    return ttt(q, k, v, eta, [W1, b1, W2, b2], (mlp, mlp_backward), gamma, bias, mini_batch, norm, residual)


def titans(q, k, v, weights, alpha, eta, theta, mini_batch, activation=None):
    """z_t = M_t(q_t);  M_t = (1 - alpha_t) M_{t-1} + s_t,  s_t = eta_t s_{t-1} - theta_t g_t,  s_0 = 0.

    g_t is the gradient of || M(k_t) - v_t ||^2 at the memory at the end of the mini-batch before. M is x W, or with
    two weights activation(x W1) W2; activation is the pair of the function and its slope. alpha, eta, theta are [T].
    """
    z, now, momentum = [], weights, [np.zeros_like(w) for w in weights]
    for t in range(len(q)):
        if t % mini_batch == 0:
            start = now
        if len(weights) == 1:
            gradient = affine_backward(start, k[t], 2 * (affine(start, k[t]) - v[t]))
        else:
            gradient = mlp_backward(start, k[t], 2 * (mlp(start, k[t], activation[0]) - v[t]), *activation)
        momentum = [eta[t] * s - theta[t] * g for s, g in zip(momentum, gradient)]
        now = [(1 - alpha[t]) * w + s for w, s in zip(now, momentum)]
        z.append(affine(now, q[t]) if len(weights) == 1 else mlp(now, q[t], activation[0]))
    return np.array(z)


# Large chunks.


def swiglu(weights, x):
    """f(x) = (silu(x W0) * (x W2)) W1; weights are [W0, W1, W2]."""
    W0, W1, W2 = weights
    return (silu(x @ W0) * (x @ W2)) @ W1


def swiglu_backward(weights, x, d):
    """With a = x W0, c = x W2, dh = d W1^T:

    dW0 = x^T (dh * c * slope(a)),  dW1 = (silu(a) * c)^T d,  dW2 = x^T (dh * silu(a)).
    """
    W0, W1, W2 = weights
    a, c, dh = x @ W0, x @ W2, d @ W1.T
    return [np.outer(x, dh * c * silu_slope(a)), np.outer(silu(a) * c, d), np.outer(x, dh * silu(a))]


def orthogonalise(gradient, epsilon=1e-7):
    """Five Newton-Schulz steps X <- a X + (b A + c A^2) X, A = X X^T, from G / |G|_F; tall matrices are transposed."""
    if gradient.shape[0] > gradient.shape[1]:
        return orthogonalise(gradient.T, epsilon).T
    x = gradient / (np.sqrt(np.sum(gradient**2)) + epsilon)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def lact(q, k, v, W0, W1, W2, rates, chunk, momentum=None, muon=False):
    """z_t = f(q_t) with the weights at the start of t's chunk; after a whole chunk, for each matrix m,

        G = sum_t rates[t, m] d(-f(k_t) . v_t)/dW_m,  G <- beta_n G_before + G,  W_m <- W_m - G (or - NS(G)),

    and each column of W_m is scaled back to the norm it had at first. rates are [T, 3], in the order W0, W1, W2;
    momentum is beta [chunks] or None. G_before is the G of the chunk before, ahead of Newton-Schulz; at first 0.
    """
    now = [W0, W1, W2]
    norms = [np.sqrt((w**2).sum(axis=0)) for w in now]
    before, z = [np.zeros_like(w) for w in now], []
    for t in range(len(q)):
        if t % chunk == 0:
            total = [np.zeros_like(w) for w in now]
        z.append(swiglu(now, q[t]))
        gradient = swiglu_backward(now, k[t], -v[t])
        total = [total[m] + rates[t, m] * gradient[m] for m in range(3)]
        if t % chunk == chunk - 1:
            if momentum is not None:
                total = before = [momentum[t // chunk] * before[m] + total[m] for m in range(3)]
            moved = [now[m] - (orthogonalise(total[m]) if muon else total[m]) for m in range(3)]
            now = [w * norm / np.sqrt((w**2).sum(axis=0)) for w, norm in zip(moved, norms)]
    return np.array(z)


# On the way to q, k and v.


def short_convolution(x, kernel):
    """y_t = sum_j kernel_j * x_{t-(w-1)+j}, j = 0, ..., w-1: the last row of kernel [w, D] meets the present token."""
    w, y = len(kernel), np.zeros_like(x)
    for t in range(len(x)):
        for j in range(w):
            if t - (w - 1) + j >= 0:
                y[t] += kernel[j] * x[t - (w - 1) + j]
    return y


def rotary(x, positions, theta=1e4):
    """The pair (x_i, x_{i+d/2}) turns by the angle position theta^(-2i/d)."""
    half, y = x.shape[1] // 2, np.zeros_like(x)
    for t in range(len(x)):
        for i in range(half):
            angle = positions[t] * theta ** (-2 * i / x.shape[1])
            y[t, i] = x[t, i] * np.cos(angle) - x[t, i + half] * np.sin(angle)
            y[t, i + half] = x[t, i + half] * np.cos(angle) + x[t, i] * np.sin(angle)
    return y


# Self-modifying memories.


def memory_network(weights, x, residual):
    """x W, or x + silu(x W1) W2; without the x where it gives one number."""
    if len(weights) == 1:
        return x @ weights[0]
    y = silu(x @ weights[0]) @ weights[1]
    return x + y if residual else y


def memory_gradient(weights, x, d):
    """Of <d, M(x)> with respect to the weights: written out, unit by unit."""
    if len(weights) == 1:
        return [np.outer(x, d)]
    first, second = weights
    pre = x @ first
    of_second = np.zeros_like(second)
    of_first = np.zeros_like(first)
    for j in range(len(pre)):
        of_second[j] = silu(pre[j]) * d
        for i in range(len(x)):
            of_first[i, j] = x[i] * silu_slope(pre[j]) * (second[j] @ d)
    return [of_first, of_second]


def self_modifying(q, k, v, memories, bias, chunk, objective="dot", projection=True, base_rate=1.0):
    """z_t = M_memory(unit q_t), then every memory takes a step of delta gradient descent; `memories` by name, `bias` of
    "rate" and "decay"."""

    def unit(x):
        return x / np.sqrt(x @ x + 1e-6)

    now = {name: [w.copy() for w in weights] for name, weights in memories.items()}
    z = []
    for t in range(len(q)):
        if t % chunk == 0:
            begin = {name: [w.copy() for w in weights] for name, weights in now.items()}

        def m(name, x, weights=begin):
            return memory_network(weights[name], x, name in ("memory", "key", "value"))

        eta = base_rate * sigmoid(m("rate", k[t])[0] + bias["rate"])
        alpha = sigmoid(m("decay", k[t])[0] + bias["decay"])
        key, value = unit(m("key", k[t])), unit(m("value", v[t]))
        z.append(memory_network(now["memory"], unit(q[t]), True))
        for name in now:
            target = m(name, value)
            d = -target if objective == "dot" else (1 if objective == "half l2" else 2) * (m(name, key) - target)
            gradient = memory_gradient(begin[name], key, d)
            for i, w in enumerate(now[name]):
                kept = alpha * w - (eta * np.outer(key, key @ w) if projection and i == 0 else 0)
                now[name][i] = kept - eta * gradient[i]
    return np.array(z)
