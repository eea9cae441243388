"""Self-distillation: the student's next-token distribution is drawn to a teacher's, token by token.

At each position p = softmax(s) for the student's logits s, q = softmax(t) for the teacher's; natural logarithms.
Logits are finite; float64 throughout.
"""

import numpy as np


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logarithm of the softmax over the last axis."""
    logits = np.asarray(logits, dtype=np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def kl(log_a: np.ndarray, log_b: np.ndarray) -> float:
    """KL(a || b) = sum_v a_v log(a_v / b_v), from the two log probabilities."""
    return float(np.sum(np.exp(log_a) * (log_a - log_b)))


def log_mixture(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """log m, where m = (p + q) / 2."""
    return np.logaddexp(log_p, log_q) - np.log(2.0)


def divergence(s: np.ndarray, t: np.ndarray, direction: str) -> np.ndarray:
    """Per position: KL(q || p) 'forward', KL(p || q) 'reverse', (KL(p || m) + KL(q || m)) / 2 'jsd'. [L, V] -> [L]."""
    log_p, log_q = log_softmax(s), log_softmax(t)
    out = np.zeros(len(log_p))
    for i, (lp, lq) in enumerate(zip(log_p, log_q, strict=True)):
        if direction == "forward":
            out[i] = kl(lq, lp)
        elif direction == "reverse":
            out[i] = kl(lp, lq)
        elif direction == "jsd":
            lm = log_mixture(lp, lq)
            out[i] = (kl(lp, lm) + kl(lq, lm)) / 2
        else:
            raise ValueError(direction)
    return out


def divergence_gradient(s: np.ndarray, t: np.ndarray, direction: str) -> np.ndarray:
    """Gradient of each position's divergence to its student logits; the teacher is fixed. [L, V] -> [L, V].

    Used below: dp_v/ds_j = p_v (1[v=j] - p_j), so where dD/dp_v = g_v, dD/ds_j = p_j (g_j - sum_v p_v g_v).
    Adding one constant to every g_v changes nothing.
    """
    log_p, log_q = log_softmax(s), log_softmax(t)
    out = np.zeros(log_p.shape)
    for i, (lp, lq) in enumerate(zip(log_p, log_q, strict=True)):
        p, q = np.exp(lp), np.exp(lq)
        if direction == "forward":
            # D = const - sum_v q_v log p_v = const - sum_v q_v s_v + log sum_v exp(s_v), since sum_v q_v = 1;
            # so dD/ds_j = p_j - q_j.
            out[i] = p - q
            continue
        if direction == "reverse":
            # D = sum_v p_v (log p_v - log q_v): g_v = log(p_v / q_v) + 1, whose 1 falls away.
            g = lp - lq
        elif direction == "jsd":
            # dm_v/dp_v = 1/2, so g_v = (log(p_v / m_v) + 1 - p_v / (2 m_v) - q_v / (2 m_v)) / 2; as p_v + q_v = 2 m_v,
            # g_v = log(p_v / m_v) / 2.
            g = (lp - log_mixture(lp, lq)) / 2
        else:
            raise ValueError(direction)
        out[i] = p * (g - np.sum(p * g))
    return out


def counted(mask: np.ndarray, skip: int) -> list[int]:
    """Positions of one row that count: mask 1 and index >= skip."""
    return [i for i in range(len(mask)) if mask[i] == 1 and i >= skip]


def self_distillation_loss(
    s: np.ndarray, t: np.ndarray, mask: np.ndarray, skip: int, weight: np.ndarray, direction: str
) -> float:
    """sum_b w_b l_b / sum_b w_b; l_b is the row's mean divergence over the tokens that count, 0 if none does."""
    weight = np.asarray(weight, dtype=np.float64)
    total = 0.0
    for b in range(len(s)):
        kept = counted(mask[b], skip)
        if kept:
            total += weight[b] * divergence(s[b][kept], t[b][kept], direction).sum() / len(kept)
    return float(total / weight.sum())


def self_distillation_gradient(
    s: np.ndarray, t: np.ndarray, mask: np.ndarray, skip: int, weight: np.ndarray, direction: str
) -> np.ndarray:
    """Gradient of self_distillation_loss to s, [B, N, V]: w_b / (sum w * n_b) per token that counts, 0 elsewhere."""
    weight = np.asarray(weight, dtype=np.float64)
    out = np.zeros(np.shape(s))
    for b in range(len(s)):
        kept = counted(mask[b], skip)
        if kept:
            out[b, kept] = weight[b] / weight.sum() * divergence_gradient(s[b][kept], t[b][kept], direction) / len(kept)
    return out


def dynamic_fine_tuning_loss(s: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
    """One row's mean of -c_i log p_i(y_i) over tokens with y_i >= 0 (0 if none), and its gradient to s, [N, V].

    c_i = p_i(y_i) is a constant to the gradient: c_i (p_i - onehot(y_i)) / n.
    """
    log_p = log_softmax(s)
    scored = [i for i in range(len(y)) if y[i] >= 0]
    loss, gradient = 0.0, np.zeros(log_p.shape)
    for i in scored:
        c = np.exp(log_p[i, y[i]])
        loss -= c * log_p[i, y[i]] / len(scored)
        gradient[i] = np.exp(log_p[i])
        gradient[i, y[i]] -= 1.0
        gradient[i] *= c / len(scored)
    return float(loss), gradient


def moving_average(
    teacher: dict[str, np.ndarray], student: dict[str, np.ndarray], rate: float
) -> dict[str, np.ndarray]:
    """The teacher a step nearer the student: teacher + rate (student - teacher), entry by entry."""
    out = {}
    for name in teacher:
        old, new = np.asarray(teacher[name], dtype=np.float64), np.asarray(student[name], dtype=np.float64)
        out[name] = old + rate * (new - old)
    return out
