"""A decoder of tokens, with any sequence layer in any place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cl_zoo.checks import Count, check_whole, checked
from cl_zoo.layers.feed_forward import swiglu
from cl_zoo.layers.mixer import Mixer, linear
from cl_zoo.layers.norms import EPSILON, rms_norm
from cl_zoo.types import Array, Key, Model, PyTree

__all__ = ["Decoder", "decoder", "unstacked"]


class Decoder(NamedTuple):
    """A network in the two forms of its layers, with one set of parameters.

    Attributes:
      model: all tokens of a sequence at once, `[B, T]` -> logits `[B, T, V]`: what learners take.
      start: `(params, batch_size, length, padding=None, prefix=None) -> cache` of an empty sequence, for at most
        `length` tokens; the first `padding` `i32[B]` tokens of each sequence are ignored. With a `prefix`, keys and
        values for softmax attention (`{group: {layer: (k [n, G, d, P], v [n, G, P, d])}}`, rotated), every sequence
        begins after those P places, which count towards `length`.
      step: `(params, cache, tokens [B]) -> (logits [B, V], cache)`: one more token.
      extend: `(params, cache, tokens [B, T]) -> (h [B, T, D], cache)`: T more tokens, at once where every layer can,
        else one after another; h as `hidden` gives it.
      hidden: `(params, tokens [B, T]) -> [B, T, D]`, the residual stream after all blocks.
      logits: `(params, [..., D]) -> [..., V]`: the output head alone, for some positions only where V is large.
      embed: `(params, tokens) -> [..., D]`, the residual stream before all blocks.
      through: `(params, h [B, T, D], cache=None, *, groups=None) -> (h, cache)`, through the blocks of these groups, by
        name, or of all: each sequence from its beginning, or going on from a cache of these groups.
      groups: `(name, ((layer's name, Mixer), ...))` of each group, in order.

    `start`, `step` and `extend` also take parameters whose blocks are `unstacked`; a cache of stacked ones has to be
    unstacked like them.
    """

    model: Model
    start: Callable[..., PyTree]
    step: Callable[[PyTree, PyTree, Array], tuple[Array, PyTree]]
    extend: Callable[[PyTree, PyTree, Array], tuple[Array, PyTree]]
    hidden: Callable[[PyTree, Array], Array]
    logits: Callable[[PyTree, Array], Array]
    embed: Callable[[PyTree, Array], Array]
    through: Callable[..., tuple[Array, PyTree]]
    groups: tuple[tuple[str, tuple[tuple[str, Mixer], ...]], ...]


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
    groups: Sequence[Any],
    *,
    tied: bool = True,
    sandwich: bool = False,
    rematerialise: bool = False,
    epsilon: float = EPSILON,
    dtype: Any = jnp.float32,
) -> Decoder:
    """Blocks of layers on a residual stream, each behind a norm: a sequence layer and a feed-forward network, or more.

        h = E[tokens]
        in each block, for each of its layers:  h <- h + layer(RMSNorm(h)),   or with `sandwich`
                                                h <- h + RMSNorm(layer(RMSNorm(h)))
        logits = RMSNorm(h) E^T   (tied),   or RMSNorm(h) W

    The blocks of a group are scanned over: they are compiled once, however many there are, and their parameters are
    stacked.

    Args:
      vocabulary: V.
      groups: `(mixer, ffn, n)`: n blocks of a sequence layer "mixer" and a feed-forward network "ffn", a layer or the
        hidden width of a `swiglu`. Or `({name: layer, ...}, n)`: n blocks of these layers in this order. All layers
        have one width D.
      tied: whether the embedding also gives the logits.
      sandwich: whether there is a second norm after each layer.
      rematerialise: compute each block again in the backward pass, so that memory holds only their inputs.
      epsilon: of the RMSNorms.
      dtype: of activations and of matrix products outside fast weights; parameters, norms, logits and fast
        weights stay in float32.

    Returns:
      A `Decoder` with parameters "embedding" `[V, D]`, "blocks", "norm", and "head" if untied. There is one entry
      "block_i" of "blocks" for each group, whose leaves have a leading axis n: each layer's parameters under its name,
      and its norms beside.

    Raises:
      ValueError: sizes below 1, no groups, layers of different widths or none; at the first trace, tokens that are not
        whole numbers.

    Source: Touvron et al. 2023 (Llama), arXiv 2302.13971; sandwich norms: Ding et al. 2021, arXiv 2105.13290.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from cl_zoo.layers.ttt import ttt_linear
      >>> tokens = jnp.zeros((2, 10), jnp.int32)
      >>> net = decoder(256, [(ttt_linear(16, 2), 32, 2)])  # 2 blocks, with SwiGLU networks of 32 hidden units
      >>> params, model_state = net.model.init(jax.random.key(0), tokens)
      >>> net.model.apply(params, model_state, tokens)[0].shape
      (2, 10, 256)
    """
    layers_of, counts = _settled(groups)
    width = next(iter(layers_of["block_0"].values())).width
    total = sum(len(layers) * counts[name] for name, layers in layers_of.items())

    def init_block(layers: Mapping[str, Mixer], key: Key) -> PyTree:
        # Of a sequence layer and a SwiGLU network, all draws are parts of one split of the block's key.
        keys = [jax.random.split(key, 4)[0], key, *(jax.random.fold_in(key, i) for i in range(2, len(layers)))]
        block: dict[str, PyTree] = {}
        for (name, layer), k in zip(layers.items(), keys):
            params = layer.init(k)
            # So that the residual stream does not grow with the number of layers.
            scaled = {last: total**-0.5 * params[last] for last in ("output", "down") if last in params}
            block |= {name: params | scaled, f"{name}_norm": {"scale": jnp.ones(width)}}
            if sandwich:
                block[f"{name}_post_norm"] = {"scale": jnp.ones(width)}
        return block

    def init(key: Key, x: PyTree) -> tuple[PyTree, PyTree]:
        keys = jax.random.split(key, len(layers_of) + 2)
        params = {
            "embedding": 0.02 * jax.random.normal(keys[0], (vocabulary, width)),
            "blocks": {
                name: jax.vmap(lambda k, layers=layers: init_block(layers, k))(jax.random.split(key, counts[name]))
                for (name, layers), key in zip(layers_of.items(), keys[2:])
            },
            "norm": {"scale": jnp.ones(width)},
        }
        if not tied:
            params["head"] = linear(keys[1], width, vocabulary)
        return params, {}

    def sublayer(name: str, form: Callable[..., Any], block: PyTree, h: Array, *cache: PyTree) -> tuple[Array, PyTree]:
        u = rms_norm(h, block[f"{name}_norm"]["scale"], epsilon)
        y, new = form(block[name], *cache, u) if cache else (form(block[name], u), None)
        return rms_norm(y, block[f"{name}_post_norm"]["scale"], epsilon) if sandwich else y, new

    def one_block(
        layers: Mapping[str, Mixer], block: PyTree, h: Array, form: str, caches: PyTree = None
    ) -> tuple[Array, PyTree]:
        new = {}
        for name, layer in layers.items():
            run: Callable[..., tuple[Array, PyTree]] = functools.partial(sublayer, name, getattr(layer, form))
            if layer.memoryless:
                # What the backward pass keeps is written to memory and read again: the products alone.
                run = jax.checkpoint(run, policy=jax.checkpoint_policies.dots_saveable)
            y, new[name] = run(block, h, *(() if caches is None else (caches[name],)))
            h = h + y
        return h, new

    def logits(params: PyTree, h: Array) -> Array:
        h = rms_norm(h, params["norm"]["scale"], epsilon)
        head = params["embedding"].T if tied else params["head"]
        rows = h.reshape((-1, width))  # see `product`
        wide = jnp.promote_types(h.dtype, jnp.float32)
        return jnp.matmul(rows, head.astype(h.dtype), preferred_element_type=wide).reshape((*h.shape[:-1], -1))

    def kind_of(params: PyTree) -> Any:
        """Of activations."""
        return jnp.float64 if params["embedding"].dtype == jnp.float64 else dtype

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
        return rows.astype(kind_of(params))

    def go_on(
        params: PyTree, h: Array, form: str, cache: PyTree = None, groups: Sequence[str] | None = None
    ) -> tuple[Array, PyTree]:
        """The residual stream after these groups' blocks, and their cache."""
        new: dict[str, PyTree] = {}
        for name in layers_of if groups is None else groups:
            layers, blocks = layers_of[name], params["blocks"][name]

            def body(h: Array, each: tuple[PyTree, ...], layers: Mapping[str, Mixer] = layers) -> tuple[Array, PyTree]:
                return one_block(layers, each[0], h, form, *each[1:])

            if isinstance(blocks, list):
                new[name] = []
                for each in zip(blocks, *(() if cache is None else (cache[name],)), strict=True):
                    h, one = body(h, each)
                    new[name].append(one)
            else:
                step = jax.checkpoint(body) if rematerialise and cache is None else body
                h, new[name] = jax.lax.scan(step, h, (blocks, *(() if cache is None else (cache[name],))))
        return h, new

    def through(
        params: PyTree, h: Array, cache: PyTree = None, *, groups: Sequence[str] | None = None
    ) -> tuple[Array, PyTree]:
        if cache is None:
            return go_on(params, h, "apply", groups=groups)[0], None
        if all(layer.extend for name in groups or layers_of for layer in layers_of[name].values()):
            return go_on(params, h, "extend", cache, groups)
        cache, h = jax.lax.scan(
            lambda c, one: go_on(params, one, "step", c, groups)[::-1], cache, jnp.swapaxes(h, 0, 1)
        )
        return jnp.swapaxes(h, 0, 1), cache

    def hidden(params: PyTree, tokens: Array) -> Array:
        return through(params, embed(params, tokens))[0]

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
        return logits(params, hidden(params, x)), model_state, {}

    def start(
        params: PyTree, batch_size: int, length: int, padding: Array | None = None, prefix: PyTree = None
    ) -> PyTree:
        def one(layers: Mapping[str, Mixer], block: PyTree, prefixes: PyTree) -> PyTree:
            found = {}
            for name, layer in layers.items():
                options = {} if padding is None else {"padding": padding}
                if name in prefixes:
                    options["prefix"] = prefixes[name]
                found[name] = layer.start(block[name], batch_size, length, kind_of(params), **options)
            return found

        for name, prefixes in (prefix or {}).items():
            if name not in layers_of or set(prefixes) - set(layers_of[name]):
                have = {group: list(layers) for group, layers in layers_of.items()}
                raise ValueError(f"decoder: prefix names {list(prefixes)} of {name!r}, but the layers are {have}")
        cache = {}
        for name, layers in layers_of.items():
            blocks, prefixes = params["blocks"][name], (prefix or {}).get(name, {})
            if isinstance(blocks, list):
                rows = [jax.tree.map(lambda leaf, i=i: leaf[i], prefixes) for i in range(len(blocks))]
                cache[name] = [one(layers, block, row) for block, row in zip(blocks, rows)]
            else:
                cache[name] = jax.vmap(functools.partial(one, layers))(blocks, prefixes)
        return cache

    def step(params: PyTree, cache: PyTree, tokens: Array) -> tuple[Array, PyTree]:
        h, cache = go_on(params, embed(params, tokens), "step", cache)
        return logits(params, h), cache

    def extend(params: PyTree, cache: PyTree, tokens: Array) -> tuple[Array, PyTree]:
        return through(params, embed(params, tokens), cache)

    listed = tuple((name, tuple(layers.items())) for name, layers in layers_of.items())
    return Decoder(Model(init, apply), start, step, extend, hidden, logits, embed, through, listed)


def _settled(groups: Sequence[Any]) -> tuple[dict[str, dict[str, Mixer]], dict[str, int]]:
    """The layers of a block, and the number of blocks, of each group by its name."""
    if not groups:
        raise ValueError("decoder: groups is empty, but there must be at least one, as [(mixer, hidden, n)]")
    layers_of: dict[str, dict[str, Mixer]] = {}
    counts: dict[str, int] = {}
    for i, group in enumerate(groups):
        if isinstance(group, Mixer) or not isinstance(group, tuple) or len(group) not in (2, 3):
            raise ValueError(
                f"decoder: groups[{i}] is {_told(group)}, but it must be (mixer, ffn, n) or ({{name: layer}}, n)"
            )
        layers, n = ({"mixer": group[0], "ffn": group[1]}, group[2]) if len(group) == 3 else group
        check_whole("decoder", f"n of groups[{i}]", n, 1)
        if not isinstance(layers, Mapping) or not layers:
            raise ValueError(f"decoder: groups[{i}] has {_told(layers)}, but it must be layers by name")
        widths = [layer.width for layer in layers.values() if isinstance(layer, Mixer)]
        made = {}
        for name, layer in layers.items():
            if isinstance(layer, int) and not isinstance(layer, bool) and widths:
                layer = swiglu(widths[0], layer)
            if not isinstance(layer, Mixer):
                raise ValueError(
                    f"decoder: {name!r} of groups[{i}] is {_told(layer)}, but it must be a layer, or the hidden width"
                    " of a SwiGLU network beside one"
                )
            if not isinstance(name, str) or not name.isidentifier() or name.endswith("_norm"):
                raise ValueError(
                    f"decoder: a layer of groups[{i}] is named {name!r}, but it must be a word, and not end in _norm"
                )
            made[name] = layer
        layers_of[f"block_{i}"], counts[f"block_{i}"] = made, int(n)
    widths = sorted({layer.width for layers in layers_of.values() for layer in layers.values()})
    if len(widths) != 1:
        raise ValueError(f"decoder: layers have the widths {widths}, but all must have one")
    return layers_of, counts


def _told(value: Any) -> str:
    return f"a {value.name} layer" if isinstance(value, Mixer) else repr(value)[:60]
