"""A decoder of tokens, with any sequence layer in any place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cl_zoo.layers.mixer import Mixer, linear, rms_norm
from cl_zoo.types import Array, Key, Model, PyTree, check_whole

__all__ = ["Decoder", "decoder"]


class Decoder(NamedTuple):
    """A network in the two forms of its layers, with one set of parameters.

    Attributes:
      model: all tokens of a row at once, `[B, T]` -> logits `[B, T, V]`: what learners take.
      start: `(params, batch_size, length) -> cache` of an empty sequence, for at most `length` tokens.
      step: `(params, cache, tokens [B]) -> (logits [B, V], cache)`: one more token.
    """

    model: Model
    start: Callable[[PyTree, int, int], PyTree]
    step: Callable[[PyTree, PyTree, Array], tuple[Array, PyTree]]


def decoder(
    vocabulary: int,
    mixers: Sequence[Mixer],
    *,
    layers: int,
    hidden: int,
    tied: bool = True,
    rematerialise: bool = False,
    dtype: Any = jnp.float32,
) -> Decoder:
    """Pre-norm blocks of a sequence layer and a SwiGLU network, on a residual stream.

        h = E[tokens]
        in each block:  h <- h + mixer(RMSNorm(h));   h <- h + (silu(u W_g) * (u W_u)) W_d,   u = RMSNorm(h)
        logits = RMSNorm(h) E^T   (tied),   or RMSNorm(h) W

    Blocks are scanned over: those with the same mixer are compiled once, however many there are, and their parameters
    are stacked.

    Args:
      vocabulary: V.
      mixers: the sequence layer of each block in turn, all of one width D; after the last comes the first again.
      layers: blocks, a multiple of the number of mixers.
      hidden: width of the SwiGLU networks.
      tied: whether the embedding also gives the logits.
      rematerialise: compute each round of blocks again in the backward pass, so that memory holds their inputs alone.
      dtype: of activations and of matrix products outside of what fast weights do; parameters, norms, logits and fast
        weights stay in float32.

    Returns:
      A `Decoder` with parameters "embedding" `[V, D]`, "blocks", "norm", and "head" if untied. There is one entry of
      "blocks" for each of P mixers, whose leaves have a leading axis layers / P.

    Raises:
      ValueError: sizes below 1, mixers of different widths, layers that are no multiple of their number; at the first
        trace, tokens that are not whole numbers.

    Source: Touvron et al. 2023 (Llama), arXiv 2302.13971; SwiGLU: Shazeer 2020, arXiv 2002.05202.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from cl_zoo.layers.ttt import ttt_linear
      >>> tokens = jnp.zeros((2, 10), jnp.int32)
      >>> net = decoder(256, [ttt_linear(16, 2)], layers=2, hidden=32)
      >>> params, model_state = net.model.init(jax.random.key(0), tokens)
      >>> net.model.apply(params, model_state, tokens)[0].shape
      (2, 10, 256)
    """
    for field, value in {"vocabulary": vocabulary, "layers": layers, "hidden": hidden}.items():
        check_whole("decoder", field, value, 1)
    widths = {mixer.width for mixer in mixers}
    if not mixers:
        raise ValueError("decoder: mixers is empty, but there must be at least one mixer")
    if len(widths) != 1:
        raise ValueError(f"decoder: mixers have the widths {sorted(widths)}, but all must have one")
    if layers % len(mixers):
        raise ValueError(f"decoder: layers is {layers}, but it must be a multiple of the {len(mixers)} mixers")
    (width,) = widths
    rounds = layers // len(mixers)
    names = [f"block_{i}" for i in range(len(mixers))]

    def init_block(mixer: Mixer, key: Key) -> PyTree:
        keys = jax.random.split(key, 4)
        inner = mixer.init(keys[0])
        depth = (2 * layers) ** -0.5  # so that the residual stream does not grow with the number of blocks
        return {
            "mixer": {**inner, "output": depth * inner["output"]} if "output" in inner else inner,
            "mixer_norm": {"scale": jnp.ones(width)},
            "ffn": {
                "gate": linear(keys[1], width, hidden),
                "up": linear(keys[2], width, hidden),
                "down": depth * linear(keys[3], hidden, width),
            },
            "ffn_norm": {"scale": jnp.ones(width)},
        }

    def init(key: Key, x: PyTree) -> tuple[PyTree, PyTree]:
        keys = jax.random.split(key, len(mixers) + 2)
        params = {
            "embedding": 0.02 * jax.random.normal(keys[0], (vocabulary, width)),
            "blocks": {
                name: jax.vmap(lambda k, mixer=mixer: init_block(mixer, k))(jax.random.split(key, rounds))
                for name, mixer, key in zip(names, mixers, keys[2:])
            },
            "norm": {"scale": jnp.ones(width)},
        }
        if not tied:
            params["head"] = linear(keys[1], width, vocabulary)
        return params, {}

    def ffn(params: PyTree, h: Array) -> Array:
        gate, up, down = (params[name].astype(h.dtype) for name in ("gate", "up", "down"))
        return (jax.nn.silu(h @ gate) * (h @ up)) @ down

    def logits(params: PyTree, h: Array) -> Array:
        h = rms_norm(h, params["norm"]["scale"])
        head = params["embedding"].T if tied else params["head"]
        return jnp.matmul(h, head.astype(h.dtype), preferred_element_type=jnp.promote_types(h.dtype, jnp.float32))

    def embed(params: PyTree, tokens: Array) -> Array:
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"decoder: tokens are {tokens.dtype}, but they must be whole numbers")
        table = params["embedding"]
        return table[tokens].astype(jnp.promote_types(dtype, table.dtype) if table.dtype == jnp.float64 else dtype)

    def apply(
        params: PyTree,
        model_state: PyTree,
        x: PyTree,
        *,
        task: Array | None = None,
        weight: Array | None = None,
        key: Key | None = None,
        train: bool = False,
        perturb: dict[str, Array] | None = None,
    ) -> tuple[PyTree, PyTree, dict[str, tuple[Array, Array]]]:
        def one_round(h: Array, blocks: PyTree) -> tuple[Array, None]:
            for name, mixer in zip(names, mixers):
                block = blocks[name]
                h = h + mixer.apply(block["mixer"], rms_norm(h, block["mixer_norm"]["scale"]))
                h = h + ffn(block["ffn"], rms_norm(h, block["ffn_norm"]["scale"]))
            return h, None

        body = jax.checkpoint(one_round) if rematerialise else one_round
        h, _ = jax.lax.scan(body, embed(params, x), params["blocks"])
        return logits(params, h), model_state, {}

    def start(params: PyTree, batch_size: int, length: int) -> PyTree:
        return {
            name: jax.vmap(lambda p, mixer=mixer: mixer.start(p, batch_size, length, dtype))(
                params["blocks"][name]["mixer"]
            )
            for name, mixer in zip(names, mixers)
        }

    def step(params: PyTree, cache: PyTree, tokens: Array) -> tuple[Array, PyTree]:
        def one_round(h: Array, each: tuple[PyTree, PyTree]) -> tuple[Array, PyTree]:
            blocks, caches = each
            new = {}
            for name, mixer in zip(names, mixers):
                block = blocks[name]
                mixed, new[name] = mixer.step(block["mixer"], caches[name], rms_norm(h, block["mixer_norm"]["scale"]))
                h = h + mixed
                h = h + ffn(block["ffn"], rms_norm(h, block["ffn_norm"]["scale"]))
            return h, new

        h, cache = jax.lax.scan(one_round, embed(params, tokens), (params["blocks"], cache))
        return logits(params, h), cache

    return Decoder(Model(init, apply), start, step)
