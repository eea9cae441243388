"""The neural memory of Titans: a network that learns what surprises it, with momentum, and forgets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from cl_zoo.checks import Count, checked
from cl_zoo.entries import LayerEntry
from cl_zoo.layers._linear_attention import widen
from cl_zoo.layers.fast_weights import (
    FastLayer,
    Movement,
    dense,
    forward,
    gradients,
    move,
    read,
    scaled,
    token_gradient,
)
from cl_zoo.layers.mixer import Mixer, causal_mask, from_chunks, head_mixer, head_width, linear, product, to_chunks
from cl_zoo.layers.norms import normalise
from cl_zoo.types import Array, Key, PyTree

__all__ = ["ENTRY", "TitansCache", "titans", "titans_chunked", "titans_start", "titans_step"]


class TitansCache(NamedTuple):
    """Attributes:
    start: the memory at the start of the chunk, where gradients are taken.
    memory: M now.
    surprise: s now; None without momentum.
    """

    start: list[FastLayer]
    memory: list[FastLayer]
    surprise: list[FastLayer] | None


def _decays(log: Array) -> Array:
    """prod_{i < j <= t} a_j for all t >= i, 0 elsewhere: `[..., C]` of log a -> `[..., C, C]`."""
    total = jnp.cumsum(log, axis=-1)
    return jnp.exp(jnp.where(causal_mask(log.shape[-1]), total[..., :, None] - total[..., None, :], -jnp.inf))


def titans_chunked(
    q: Array,
    k: Array,
    v: Array,
    weights: Sequence[FastLayer],
    rate: Array,
    log_keep: Array,
    log_momentum: Array | None,
    *,
    chunk: int,
    activation: Callable[[Array], Array] = jax.nn.silu,
) -> Array:
    """The dual form of the memory's recurrence, a scan over chunks.

        s_t = eta_t s_{t-1} - theta_t g_t,   M_t = (1 - alpha_t) M_{t-1} + s_t,   z_t = M_t(q_t),

    g_t the gradient of ||M(k_t) - v_t||^2 at the memory M from the chunk's start. Both recurrences are linear, so
    within a chunk M_t = keep_t M + carry_t s - sum_i (K E)_ti theta_i g_i, with K and E the matrices of products of
    1 - alpha and of eta.

    Args:
      q, k, v: `[..., T, d]`.
      weights: of the memory at the start, one layer or two, without biases.
      rate: theta, `[..., T]`.
      log_keep: log(1 - alpha), `[..., T]`, at most 0.
      log_momentum: log eta, `[..., T]`, at most 0; None is no momentum.
      chunk: C; 1 takes each gradient at the memory that the token before left.
      activation: between two layers.

    Returns:
      `[..., T, d]`.

    Source: Behrouz et al. 2025, arXiv 2501.00663.
    """
    time = q.shape[-2]
    size = min(chunk, max(time, 1))
    q, k, v = (to_chunks(a, size) for a in (q, k, v))
    rate, log_keep = (to_chunks(a, size, -1) for a in (rate, log_keep))
    between, keep = _decays(log_keep), jnp.exp(jnp.cumsum(log_keep, axis=-1))
    if log_momentum is None:
        movements = Movement(between * rate[..., None, :], keep)
        surprise = None
    else:
        log_momentum = to_chunks(log_momentum, size, -1)
        momenta, since = _decays(log_momentum), jnp.exp(jnp.cumsum(log_momentum, axis=-1))
        carry = (between @ since[..., None])[..., 0]
        movements = Movement(
            (between @ momenta) * rate[..., None, :], keep, carry, momenta[..., -1, :] * rate, since[..., -1]
        )
        surprise = jax.tree.map(jnp.zeros_like, list(weights))

    def step(carry: tuple[Any, Any], chunk: tuple[Any, ...]) -> tuple[tuple[Any, Any], Array]:
        layers, surprise = carry
        q, k, v, movement = chunk
        of_keys, of_queries = dense(layers[0], k, q)
        inputs, found = gradients(layers, k, lambda z: 2 * (z - v), activation, of_keys)
        z = read(layers, surprise, movement, inputs, found, q, activation, of_queries)
        return move(layers, surprise, movement, inputs, found), z

    _, z = jax.lax.scan(jax.checkpoint(step), (list(weights), surprise), (q, k, v, movements))
    return from_chunks(z, time)


def titans_start(weights: Sequence[FastLayer], momentum: bool) -> TitansCache:
    """The cache of an empty sequence."""
    layers = list(weights)
    now = jax.tree.map(jnp.copy, layers)  # not the same arrays: a cache is donated
    return TitansCache(layers, now, jax.tree.map(jnp.zeros_like, layers) if momentum else None)


def titans_step(
    cache: TitansCache,
    place: Array,
    q: Array,
    k: Array,
    v: Array,
    rate: Array,
    log_keep: Array,
    log_momentum: Array | None,
    *,
    chunk: int,
    activation: Callable[[Array], Array] = jax.nn.silu,
) -> tuple[Array, TitansCache]:
    """One more token, in place `place` `i32[]` of its chunk: q, k, v `[..., d]`, rates `[...]`."""
    found = scaled(-rate, token_gradient(cache.start, k, lambda z: 2 * (z - v[..., None, :]), activation))
    surprise = cache.surprise
    if surprise is not None and log_momentum is not None:
        found = surprise = jax.tree.map(jnp.add, scaled(jnp.exp(log_momentum), surprise), found)
    memory = jax.tree.map(jnp.add, scaled(jnp.exp(log_keep), cache.memory), found)
    z = forward(memory, q[..., None, :], activation)[1][-1][..., 0, :]
    last = place == chunk - 1
    start = jax.tree.map(lambda new, old: jnp.where(last, new, old), memory, cache.start)
    return z, TitansCache(start, memory, surprise)


@checked
def titans(
    width: int,
    heads: int,
    *,
    depth: Literal[1, 2] = 2,
    chunk: Count = 16,
    expansion: Count = 2,
    base_rate: Array | float = 0.005,
    momentum: bool = True,
    decay: bool = True,
    convolution: int = 0,
) -> Mixer:
    """A memory network M that takes a step of gradient descent for every token.

        s_t = eta_t s_{t-1} - theta_t grad ||M(k_t) - v_t||^2;   M_t = (1 - alpha_t) M_{t-1} + s_t;   z_t = M_t(q_t)
        theta_t = base_rate sigmoid(x_t w + a),   eta_t = sigmoid(x_t w' + a'),   alpha_t = sigmoid(x_t w'' + a'')

    s is the surprise, past and momentary; queries and keys are scaled to length 1, values by 1 / sqrt(d). Gradients
    are taken at the memory from the start of a chunk. The memory that a sequence begins with is learned.

    Args:
      width, heads: D, and H that divides it.
      depth: of the memory: 1, a matrix, or 2, with SiLU between.
      chunk: C, at least 1.
      expansion: hidden units of two layers, in widths of a head.
      base_rate: the highest theta, at least 0 (0: the memory is never written); may be traced. A chunk's gradients add
        up, and momentum adds to them: with one layer, similar tokens are stable while 2 C base_rate / (1 - eta) is
        below 2. With two the loss is steeper, and nothing bounds it: at a learning rate of 4e-3, a language model of
        four such layers diverged with 0.02 and with 0.005.
      momentum, decay: False leaves out eta, and alpha.
      convolution: width of short convolutions of q, k and v; 0 for none.

    Returns:
      A `Mixer`; the cache's state is a `TitansCache`, the memory in float32. It is the memory alone: how it is combined
      with attention (as context, gate or layer) is the model's choice.

    Raises:
      ValueError: sizes below 1, another depth, heads that do not divide the width.

    Source: Behrouz et al. 2025, arXiv 2501.00663.

    Differences from the paper or its code: no code is published. Each head has a memory of its own; rates are one
    number a head; values are scaled, as a memory of two layers diverges on long ones; no persistent tokens, no gate;
    heads' outputs are RMS-normalised. At the start alpha is about 0.02.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> mixer = titans(8, 2, chunk=4)
      >>> mixer.apply(mixer.init(jax.random.key(0)), jnp.ones((1, 10, 8))).shape
      (1, 10, 8)
    """
    d = head_width("titans", width, heads)
    sizes = (d, d) if depth == 1 else (d, expansion * d, d)
    gates = {"rate": 0.0, **({"momentum": 0.0} if momentum else {}), **({"decay": -4.0} if decay else {})}

    def init(key: Key) -> dict[str, Any]:
        keys = jax.random.split(key, len(sizes) - 1 + len(gates))
        layers = {
            f"layer_{i}": jax.random.normal(k, (heads, n_in, n_out)) / n_in**0.5
            for i, (n_in, n_out, k) in enumerate(zip(sizes, sizes[1:], keys))
        }
        return {
            "weights": layers,
            "gates": {
                name: {"kernel": linear(k, width, heads), "bias": jnp.full(heads, bias)}
                for (name, bias), k in zip(gates.items(), keys[len(sizes) - 1 :])
            },
        }

    def memory(params: PyTree, batch_size: int) -> list[FastLayer]:
        wide = [widen(params["weights"][f"layer_{i}"])[0] for i in range(len(sizes) - 1)]
        return [FastLayer(jnp.broadcast_to(leaf, (batch_size, *leaf.shape))) for leaf in wide]

    def rates(params: PyTree, x: Array) -> tuple[Array, Array, Array | None]:
        """theta, log(1 - alpha), log eta: `[B, H, ...]`."""
        logits = {}
        for name, gate in params["gates"].items():
            (logit,) = widen(product(x, gate["kernel"]))
            logits[name] = jnp.moveaxis(logit + gate["bias"], -1, 1)
        rate = base_rate * jax.nn.sigmoid(logits["rate"])
        log_keep = jax.nn.log_sigmoid(-logits["decay"]) if decay else jnp.zeros_like(rate)
        return rate, log_keep, jax.nn.log_sigmoid(logits["momentum"]) if momentum else None

    def unit(q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        q, k, v = widen(q, k, v)
        return normalise(q), normalise(k), v / v.shape[-1] ** 0.5

    def parallel(params: PyTree, q: Array, k: Array, v: Array, x: Array) -> Array:
        return titans_chunked(*unit(q, k, v), memory(params, x.shape[0]), *rates(params, x), chunk=chunk)

    def start(params: PyTree, batch_size: int, length: int, dtype: Any) -> TitansCache:
        return titans_start(memory(params, batch_size), momentum)

    def recur(
        params: PyTree, cache: TitansCache, position: Array, q: Array, k: Array, v: Array, x: Array
    ) -> tuple[Array, TitansCache]:
        return titans_step(cache, position % chunk, *unit(q, k, v), *rates(params, x), chunk=chunk)

    return head_mixer(
        "titans", width, heads, init=init, parallel=parallel, start=start, recur=recur, convolution=convolution
    )


ENTRY = (
    LayerEntry(
        name="titans",
        summary="a network with one hidden layer, trained by gradient descent with momentum and decay of each token",
        factory=titans,
        arguments={"chunk": 4},
        numbers=("base_rate",),
        papers=("behrouz2025titans",),
        state="constant",
        frozen={"base_rate": 0.0, "decay": False},
    ),
    LayerEntry(
        name="titans_linear",
        summary="a matrix, trained by gradient descent with momentum and decay of each token",
        factory=titans,
        arguments={"depth": 1, "chunk": 4},
        numbers=("base_rate",),
        papers=("behrouz2025titans",),
        state="constant",
        frozen={"base_rate": 0.0, "decay": False},
    ),
)
