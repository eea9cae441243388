"""A decoder of tokens, with any sequence layer in any place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cl_zoo.checks import Count, checked
from cl_zoo.layers.mixer import Mixer, linear, product
from cl_zoo.layers.norms import EPSILON, rms_norm
from cl_zoo.types import Array, Key, Model, PyTree

__all__ = ["Decoder", "decoder", "unstacked"]


class Decoder(NamedTuple):
    """A network in the two forms of its layers, with one set of parameters.

    Attributes:
      model: all tokens of a sequence at once, `[B, T]` -> logits `[B, T, V]`: what learners take.
      start: `(params, batch_size, length, padding=None) -> cache` of an empty sequence, for at most `length` tokens;
        the first `padding` `i32[B]` tokens of each sequence are ignored.
      step: `(params, cache, tokens [B]) -> (logits [B, V], cache)`: one more token.
      extend: `(params, cache, tokens [B, T]) -> (logits [B, V] of the last, cache)`: T more tokens at once, where every
        mixer can; else one after another.
      hidden: `(params, tokens [B, T]) -> [B, T, D]`, the residual stream after all blocks.
      logits: `(params, [..., D]) -> [..., V]`: the output head alone, for some positions only where V is large.

    `start`, `step` and `extend` also take parameters whose blocks are `unstacked`; a cache of stacked ones has to be
    unstacked like them.
    """

    model: Model
    start: Callable[..., PyTree]
    step: Callable[[PyTree, PyTree, Array], tuple[Array, PyTree]]
    extend: Callable[[PyTree, PyTree, Array], tuple[Array, PyTree]]
    hidden: Callable[[PyTree, Array], Array]
    logits: Callable[[PyTree, Array], Array]


def check_decoder(owner: str, decoder: Any) -> None:
    """Refuses what is not a `Decoder`."""
    if not isinstance(decoder, Decoder):
        raise ValueError(
            f"{owner}: decoder is {type(decoder).__name__}, but it must be a Decoder, as decoder(...) makes and"
            " load_pretrained(...).decoder is"
        )


def unstacked(params: PyTree) -> PyTree:
    """A decoder's parameters, or its cache, with every block as a tree of its own instead of stacked blocks: nothing
    has to be sliced out of the stack for every decoded token."""

    def rows(blocks: PyTree) -> list[PyTree]:
        n = jax.tree.leaves(blocks)[0].shape[0]
        return [jax.tree.map(lambda leaf, i=i: leaf[i], blocks) for i in range(n)]

    if "blocks" in params:
        return params | {"blocks": unstacked(params["blocks"])}
    return {name: blocks if isinstance(blocks, list) else rows(blocks) for name, blocks in params.items()}


@checked
def decoder(
    vocabulary: Count,
    mixers: Sequence[Mixer],
    *,
    layers: Count,
    hidden: Count,
    tied: bool = True,
    rematerialise: bool = False,
    epsilon: float = EPSILON,
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
      mixers: the sequence layer of each block in turn, all of one width D; repeated in this order.
      layers: blocks, a multiple of the number of mixers.
      hidden: width of the SwiGLU networks.
      tied: whether the embedding also gives the logits.
      rematerialise: compute each round of blocks again in the backward pass, so that memory holds only their inputs.
      epsilon: of the RMSNorms.
      dtype: of activations and of matrix products outside fast weights; parameters, norms, logits and fast
        weights stay in float32.

    Returns:
      A `Decoder` with parameters "embedding" `[V, D]`, "blocks", "norm", and "head" if untied. There is one
      entry of "blocks" for each of P mixers, whose leaves have a leading axis layers / P.

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

    # What the backward pass keeps is written to memory and read again: the products alone.
    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
    def ffn(block: PyTree, h: Array) -> Array:
        params, h = block["ffn"], rms_norm(h, block["ffn_norm"]["scale"], epsilon)
        return product(jax.nn.silu(product(h, params["gate"])) * product(h, params["up"]), params["down"])

    def one_block(block: PyTree, h: Array, form: Callable[..., Any], *cache: PyTree) -> tuple[Array, PyTree]:
        u = rms_norm(h, block["mixer_norm"]["scale"], epsilon)
        mixed, new = form(block["mixer"], *cache, u) if cache else (form(block["mixer"], u), None)
        h = h + mixed
        return h + ffn(block, h), new

    def logits(params: PyTree, h: Array) -> Array:
        h = rms_norm(h, params["norm"]["scale"], epsilon)
        head = params["embedding"].T if tied else params["head"]
        rows = h.reshape((-1, width))  # see `product`
        wide = jnp.promote_types(h.dtype, jnp.float32)
        return jnp.matmul(rows, head.astype(h.dtype), preferred_element_type=wide).reshape((*h.shape[:-1], -1))

    def embed(params: PyTree, tokens: Array) -> Array:
        kind = getattr(tokens, "dtype", None)
        if kind is None:
            raise ValueError(
                f"decoder: x is {type(tokens).__name__}, but it must be tokens [B, T]; for Demonstrated, take"
                " answering(decoder)"
            )
        if not jnp.issubdtype(kind, jnp.integer):
            raise ValueError(f"decoder: tokens are {kind}, but they must be whole numbers")
        table = params["embedding"]
        table = jnp.asarray(table) if isinstance(table, np.ndarray) else table  # NumPy cannot be indexed by a tracer
        # A token that is none of the vocabulary is nan, not another token.
        rows = table.at[tokens.astype(jnp.uint32)].get(mode="fill", fill_value=jnp.nan)
        return rows.astype(jnp.promote_types(dtype, table.dtype) if table.dtype == jnp.float64 else dtype)

    def states(params: PyTree, tokens: Array) -> Array:
        def one_round(h: Array, blocks: PyTree) -> tuple[Array, None]:
            for name, mixer in zip(names, mixers):
                h, _ = one_block(blocks[name], h, mixer.apply)
            return h, None

        body = jax.checkpoint(one_round) if rematerialise else one_round
        return jax.lax.scan(body, embed(params, tokens), params["blocks"])[0]

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
        return logits(params, states(params, x)), model_state, {}

    def start(params: PyTree, batch_size: int, length: int, padding: Array | None = None) -> PyTree:
        def one(block: PyTree, mixer: Mixer) -> PyTree:
            return mixer.start(block["mixer"], batch_size, length, dtype, *(() if padding is None else (padding,)))

        return {
            name: [one(block, mixer) for block in blocks]
            if isinstance(blocks, list)
            else jax.vmap(lambda block, mixer=mixer: one(block, mixer))(blocks)
            for (name, blocks), mixer in zip(params["blocks"].items(), mixers)
        }

    def go_on(params: PyTree, cache: PyTree, tokens: Array, form: str) -> tuple[Array, PyTree]:
        """The residual stream after all blocks, and the cache."""

        def one_round(h: Array, each: tuple[PyTree, PyTree]) -> tuple[Array, PyTree]:
            blocks, caches = each
            new = {}
            for name, mixer in zip(names, mixers):
                h, new[name] = one_block(blocks[name], h, getattr(mixer, form), caches[name])
            return h, new

        h, blocks = embed(params, tokens), params["blocks"]
        if not isinstance(blocks[names[0]], list):
            return jax.lax.scan(one_round, h, (blocks, cache))
        new: dict[str, list[PyTree]] = {name: [] for name in names}
        for i in range(rounds):
            h, caches = one_round(
                h, ({name: blocks[name][i] for name in names}, {name: cache[name][i] for name in names})
            )
            for name in names:
                new[name].append(caches[name])
        return h, new

    def step(params: PyTree, cache: PyTree, tokens: Array) -> tuple[Array, PyTree]:
        h, cache = go_on(params, cache, tokens, "step")
        return logits(params, h), cache

    def extend(params: PyTree, cache: PyTree, tokens: Array) -> tuple[Array, PyTree]:
        if all(mixer.extend for mixer in mixers):
            h, cache = go_on(params, cache, tokens, "extend")
            return logits(params, h[:, -1]), cache
        cache, last = jax.lax.scan(lambda c, each: step(params, c, each)[::-1], cache, tokens.T)
        return last[-1], cache

    return Decoder(Model(init, apply), start, step, extend, states, logits)
