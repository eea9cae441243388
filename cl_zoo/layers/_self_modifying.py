"""Self-modifying Titans: memories that also make the keys, values and rates that they are written with."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from cl_zoo.checks import Count, checked
from cl_zoo.entries import LayerEntry
from cl_zoo.layers._linear_attention import widen
from cl_zoo.layers.fast_weights import FastLayer, forward, gradients
from cl_zoo.layers.mixer import Mixer, from_chunks, head_mixer, head_width, to_chunks
from cl_zoo.layers.norms import normalise
from cl_zoo.types import Array, Key, PyTree

__all__ = ["ENTRY", "SelfModifyingCache", "self_modifying_titans"]

Memories = dict[str, list[FastLayer]]
VECTORS, RATES = ("memory", "key", "value"), ("rate", "decay")


class SelfModifyingCache(NamedTuple):
    """Attributes:
    start: the memories at the start of the chunk, by which keys, values, rates and gradients are made.
    now: the memories now, of which "memory" answers.
    """

    start: Memories
    now: Memories


@checked
def self_modifying_titans(
    width: int,
    heads: int,
    *,
    depth: Literal[1, 2] = 2,
    chunk: Count = 8,
    expansion: Count = 2,
    objective: Literal["dot", "half l2", "l2"] = "dot",
    projection: bool = True,
    base_rate: Array | float = 1.0,
    stop_target: bool = False,
    convolution: int = 0,
) -> Mixer:
    """Five memories, all written at every token: one that answers, and those of keys, values, rate and decay.

        k = unit(M_key(x W_k)),   v = unit(M_value(x W_v)),   eta = base_rate sigmoid(M_rate(x W_k) + a),
        alpha = sigmoid(M_decay(x W_k) + b);     z = M_memory(q),   then for each of the five, u = M(v) its own target,

            W_1 <- (alpha I - eta k^T k) W_1 - eta grad_1 L,    W_2 <- alpha W_2 - eta grad_2 L
            L = - <M(k), u>  ("dot"),   1/2 |M(k) - u|^2  ("half l2"),   |M(k) - u|^2  ("l2")

    with W_1 what reads the row k. So each head learns how to learn, along the sequence. Keys, values, rates and
    gradients are those of the memories at the chunk's start. Of a linear memory (depth 1) and "dot" the rule is the
    gated delta rule, whose response to k becomes (alpha - eta) times what it was; with "half l2" the old answer is
    erased twice, alpha - 2 eta, with "l2" three times, unless `projection` is left out: then "half l2" is the delta
    rule.

    Args:
      width, heads: D, and H that divides it.
      depth: of the memories: 1, a matrix, or 2, x + silu(x W_1) W_2 (of rate and decay, which give one number, without
        the x).
      chunk: C, at least 1.
      expansion: hidden units of two layers, in widths of a head.
      objective: see above.
      projection: whether alpha I - eta k^T k stands before W_1 (delta gradient descent), or alpha.
      base_rate: the largest eta, at least 0; may be traced. Above 1, linear memories' responses can change their sign.
      stop_target: whether no gradient of training passes through the targets u. Steps along the sequence never do.
      convolution: width of short convolutions of q, k and v; 0 for none.

    Returns:
      A `Mixer`; the cache's state is a `SelfModifyingCache`, in float32. Before a continuum memory system
      (`layers.cms`) it is HOPE.

    Raises:
      ValueError: sizes below 1, another depth or objective, heads that do not divide the width.

    Source: Behrouz et al. 2025, arXiv 2512.24695, equations 83 to 97.

    Differences from the paper or its code: no code is published. Each head has memories of its own, behind projections
    of k and v; values and targets are unit vectors as keys are, and scaled by nothing else; both are read by the
    gradients' chunk; maps of rate and decay, and how the projection acts on two layers, are not said there; there is
    one chunk for all memories, and no momentum, of which the ablation speaks and no equation. The index of equation 90
    is not causal, and equation 92 has a sign slip.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> mixer = self_modifying_titans(8, 2, chunk=4)
      >>> mixer.apply(mixer.init(jax.random.key(0)), jnp.ones((1, 10, 8))).shape
      (1, 10, 8)
    """
    d = head_width("self_modifying_titans", width, heads)
    hidden = () if depth == 1 else (expansion * d,)

    def init(key: Key) -> dict[str, Any]:
        keys = iter(jax.random.split(key, 2 * len((*VECTORS, *RATES))))
        weights: dict[str, Any] = {}
        for name in (*VECTORS, *RATES):
            sizes = (d, *hidden, d if name in VECTORS else 1)
            weights[name] = {
                f"layer_{i}": jax.random.normal(next(keys), (heads, n_in, n_out)) / n_in**0.5 / (1 + 9 * (i == 1))
                for i, (n_in, n_out) in enumerate(zip(sizes, sizes[1:]))
            }
            if depth == 1 and name in ("key", "value"):  # as they are without memories
                weights[name]["layer_0"] = jnp.broadcast_to(jnp.eye(d), (heads, d, d)) + 0.0
        gates = {"rate": jnp.zeros(heads), "decay": jnp.full(heads, 4.0)}
        return {"weights": weights, "gates": gates}

    def memories(params: PyTree, batch_size: int) -> Memories:
        def wide(leaf: Array) -> FastLayer:
            (leaf,) = widen(leaf)
            return FastLayer(jnp.broadcast_to(leaf, (batch_size, *leaf.shape)))

        return {name: [wide(leaf) for leaf in layers.values()] for name, layers in params["weights"].items()}

    def answer(name: str, layers: list[FastLayer], x: Array) -> Array:
        """Of tokens `[..., C, d]`."""
        z = forward(layers, x, jax.nn.silu)[1][-1]
        return x + z if depth == 2 and name in VECTORS else z

    def made(params: PyTree, start: Memories, k: Array, v: Array) -> tuple[Array, Array, Array, dict[str, Any]]:
        """Keys, rates `[..., C, 1]`, and each memory's inputs and gradients of all layers, of tokens `[..., C, d]`."""
        gates = {n: params["gates"][n].reshape((-1, 1, 1)) for n in RATES}
        eta = base_rate * jax.nn.sigmoid(answer("rate", start["rate"], k) + gates["rate"])
        alpha = jax.nn.sigmoid(answer("decay", start["decay"], k) + gates["decay"])
        k, v = normalise(answer("key", start["key"], k)), normalise(answer("value", start["value"], v))
        written = {}
        for name, layers in start.items():
            target = answer(name, layers, v)
            if stop_target:
                target = jax.lax.stop_gradient(target)

            def slope(z: Array, name: str = name, target: Array = target) -> Array:
                if objective == "dot":
                    return -target
                z = k + z if depth == 2 and name in VECTORS else z
                return (2 if objective == "l2" else 1) * (z - target)

            written[name] = gradients(layers, k, slope, jax.nn.silu)
        return k, eta, alpha, written

    def write(now: Memories, k: Array, eta: Array, alpha: Array, written: dict[str, Any]) -> Memories:
        """The memories after one token: k `[..., d]`, eta and alpha `[..., 1]`, inputs and gradients `[..., n]`."""
        eta, alpha = eta[..., None], alpha[..., None]
        new: Memories = {}
        for name, layers in now.items():
            new[name] = []
            for i, (layer, x, g) in enumerate(zip(layers, *written[name], strict=True)):
                change = x[..., :, None] * g[..., None, :]
                if projection and i == 0:
                    change = change + k[..., :, None] * jnp.einsum("...d,...de->...e", k, layer.kernel)[..., None, :]
                new[name].append(FastLayer(alpha * layer.kernel - eta * change))
        return new

    def parallel(params: PyTree, q: Array, k: Array, v: Array, x: Array) -> Array:
        time = q.shape[-2]
        size = min(chunk, max(time, 1))
        q, k, v = (to_chunks(a, size) for a in (normalise(widen(q)[0]), *widen(k, v)))

        def one(now: Memories, each: tuple[Array, ...]) -> tuple[Memories, Array]:
            q, k, v = each

            def token(now: Memories, each: tuple[Any, ...]) -> tuple[Memories, Array]:
                q, rest = each
                return write(now, *rest), answer("memory", now["memory"], q[..., None, :])[..., 0, :]

            tokens = jax.tree.map(lambda a: jnp.moveaxis(a, 2, 0), (q, made(params, now, k, v)))
            now, z = jax.lax.scan(token, now, tokens)
            return now, jnp.moveaxis(z, 0, 2)

        _, z = jax.lax.scan(jax.checkpoint(one), memories(params, x.shape[0]), (q, k, v))
        return from_chunks(z, time)

    def start(params: PyTree, batch_size: int, length: int, dtype: Any) -> SelfModifyingCache:
        return SelfModifyingCache(memories(params, batch_size), memories(params, batch_size))

    def recur(
        params: PyTree, cache: SelfModifyingCache, position: Array, q: Array, k: Array, v: Array, x: Array
    ) -> tuple[Array, SelfModifyingCache]:
        q, k, v = (a[..., None, :] for a in widen(q, k, v))
        z = answer("memory", cache.now["memory"], normalise(q))[..., 0, :]
        now = write(cache.now, *jax.tree.map(lambda a: a[:, :, 0], made(params, cache.start, k, v)))
        last = position % chunk == chunk - 1
        begin = jax.tree.map(lambda new, old: jnp.where(last, new, old), now, cache.start)
        return z, SelfModifyingCache(begin, now)

    return head_mixer(
        "self_modifying_titans",
        width,
        heads,
        init=init,
        parallel=parallel,
        start=start,
        recur=recur,
        convolution=convolution,
    )


ENTRY = LayerEntry(
    name="self_modifying_titans",
    summary="networks that answer and that make keys, values and rates, all trained on each token",
    factory=self_modifying_titans,
    arguments={"chunk": 4},
    numbers=("base_rate",),
    papers=("behrouz2025nested",),
    state="constant",
)
