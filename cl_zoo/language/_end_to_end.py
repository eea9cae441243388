"""End-to-end test-time training: a decoder whose feed-forward networks go on learning along each sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from cl_zoo.checks import NonNegative, Positive, check_whole, checked
from cl_zoo.language._decoder import Decoder, check_decoder
from cl_zoo.losses import IGNORED, token_losses, weighted_mean
from cl_zoo.types import Array, Key, Model, PyTree

__all__ = ["EndToEndCache", "ttt_e2e"]


class EndToEndCache(NamedTuple):
    """Attributes:
    position: `i32[]`, tokens seen.
    below: of the blocks below the first that learns.
    fast, sums: fast weights, and the gradients that those of slower clocks have not yet taken, of each sequence.
    first, now: of the blocks that learn and those above, at the beginning of the chunk, and now; of each sequence.
    h: `[B, b, D]`, what the chunk's tokens are below those blocks.
    tokens: `i32[B, b]`, the chunk's.
    """

    position: Array
    below: PyTree
    fast: PyTree
    sums: PyTree
    first: PyTree
    now: PyTree
    h: Array
    tokens: Array


@checked
def ttt_e2e(
    decoder: Decoder,
    fast: Mapping[str, int],
    *,
    rate: NonNegative = 1.0,
    clip: Positive = 1.0,
    warm_up: int = 0,
    order: Literal[1, 2] = 2,
    rematerialise: bool = True,
) -> Decoder:
    """The same decoder, some of whose weights take a step of gradient descent after every b tokens of a sequence.

        W_0 = W;   W_i = W_{i-1} - rate * clip(grad_W mean_t loss(x_{t+1} | x_<=t; W_{i-1})),   t in the chunk i

    Every token is predicted before it is learned from. Each sequence has fast weights of its own, which begin from the
    decoder's parameters, in float32. Training goes through those steps, and through keys and values that older weights
    wrote: so the parameters become weights to learn from. Only the blocks from the first with fast weights on are run
    chunk by chunk; no gradient of the steps passes below them.

    Baselines, with the same parameters: rate 0 is the decoder itself; parameters that were trained with rate 0 are
    dynamic evaluation.

    Args:
      decoder: with fast weights in its last groups. All layers from there on must read many tokens at once
        (`window_attention`, `softmax_attention`, feed-forward networks).
      fast: `{path: C}`, which parameters of a block move: a layer's name ("prime"), or a path within it
        ("ffn/level_0"); and after how many tokens each time. b is the least C, and all others are multiples of it:
        those take the sum of their chunks' gradients, each at the weights of its time.
      rate: of the steps, at least 0; may be traced.
      clip: the largest global norm of a sequence's gradient, all fast weights together; above 0.
      warm_up: training updates in which the rate grows from a tenth of it; evaluation always has the whole.
      order: 1 takes the steps' gradients as constants.
      rematerialise: compute each chunk again in the backward pass, so that memory holds only what is carried.

    Returns:
      A `Decoder` with the same parameters. `step` and `extend` gather a chunk, and learn from it when the token after
      it comes; their cache is an `EndToEndCache`, whose size does not grow with windows of attention. `embed` and
      `through` are the decoder's own. With `warm_up`, `model_state` counts the updates.

    Raises:
      ValueError: no fast weights, or a path that no block has; periods below 1, or that are no multiples of the least;
        layers that cannot read many tokens at once; at `start`, padding or a prefix.

    Source: Tandon et al. 2025, arXiv 2512.23675; periods: Behrouz et al. 2025 (a continuum memory system, along the
    sequence), arXiv 2512.24695; dynamic evaluation: Krause et al. 2018, arXiv 1709.07432.

    Differences from the paper or its code: the inner rate, its warm-up and the clip are the code's alone; there the
    rate is that of the step after. Keys are rotated by their positions in the sequence, where the code takes those in
    the window: equal, up to rounding. A chunk without a token to predict takes no step, where the code divides 0 by 0.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from cl_zoo.language import decoder
      >>> from cl_zoo.layers import window_attention
      >>> mixer = window_attention(16, 2, window=8)
      >>> net = decoder(256, [(mixer, 32, 3), ({"mixer": mixer, "prime": 24, "ffn": 24}, 1)])
      >>> learning = ttt_e2e(net, {"prime": 4})
      >>> tokens = jnp.zeros((2, 10), jnp.int32)
      >>> params, model_state = learning.model.init(jax.random.key(0), tokens)
      >>> learning.model.apply(params, model_state, tokens)[0].shape
      (2, 10, 256)
    """
    check_decoder("ttt_e2e", decoder)
    check_whole("ttt_e2e", "warm_up", warm_up, 0)
    names = [name for name, _ in decoder.groups]
    paths = _paths(decoder, fast)
    suffix = names[min(names.index(group) for group in paths) :]
    below = names[: len(names) - len(suffix)]
    slow = [layer.name for name, layers in decoder.groups if name in suffix for _, layer in layers if not layer.extend]
    if slow:
        raise ValueError(
            f"ttt_e2e: {slow[0]} cannot read many tokens at once, as all layers from the first fast on must"
        )
    b = min(fast.values())

    def starts(params: PyTree) -> PyTree:
        """Of one sequence: `{group: {path: weights}}`, in float32 at least."""
        found = {group: {path: _get(params["blocks"][group], path) for path in own} for group, own in paths.items()}
        return jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), found)

    def joined(params: PyTree, weights: PyTree) -> PyTree:
        blocks = dict(params["blocks"])
        for group, own in weights.items():
            for path, value in own.items():
                blocks[group] = _put(blocks[group], path, value)
        return params | {"blocks": blocks}

    def read(
        params: PyTree, weights: PyTree, caches: PyTree, h: Array, targets: Array
    ) -> tuple[Array, tuple[Array, Array, PyTree]]:
        """The mean loss of a chunk `[b, D]`, `[b]` of one sequence; its states and logits, and the caches after it."""
        whole = joined(params, weights)
        h, caches = decoder.through(whole, h[None], caches, groups=suffix)
        logits = decoder.logits(whole, h)
        each = token_losses(logits, targets[None])
        return weighted_mean(each, (targets != IGNORED)[None].astype(each.dtype)), (h[0], logits[0], caches)

    def moved(
        weights: PyTree, sums: PyTree, gradient: PyTree, count: Array, scale: Array | float
    ) -> tuple[PyTree, PyTree]:
        """Weights and sums after chunk number `count`, from 1 on."""
        if order == 1:
            gradient = jax.lax.stop_gradient(gradient)
        squares = sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradient))
        norm = jnp.sqrt(jnp.where(squares > 0, squares, 1.0))
        within = jnp.where((squares > 0) & (norm > clip), clip / norm, 1.0)
        new: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
        for group, own in weights.items():
            for each in new:
                each[group] = {}
            for path, value in own.items():
                change = jax.tree.map(lambda g: scale * within * g, gradient[group][path])
                if path in sums[group]:
                    total = jax.tree.map(jnp.add, sums[group][path], change)
                    due = count % (fast[path] // b) == 0
                    change = jax.tree.map(lambda t, due=due: jnp.where(due, t, 0), total)
                    new[1][group][path] = jax.tree.map(lambda t, due=due: jnp.where(due, 0, t), total)
                new[0][group][path] = jax.tree.map(jnp.subtract, value, change)
        return new

    def no_sums(weights: PyTree) -> PyTree:
        return {
            group: {path: jax.tree.map(jnp.zeros_like, value) for path, value in own.items() if fast[path] > b}
            for group, own in weights.items()
        }

    def chunked(params: PyTree, tokens: Array, scale: Array | float) -> tuple[Array, Array]:
        """h `[B, T, D]` and logits `[B, T, V]`."""
        batch_size, time = tokens.shape
        h = decoder.embed(params, tokens)
        if below:
            h, _ = decoder.through(params, h, groups=below)
        targets = jnp.concatenate([tokens[:, 1:], jnp.full((batch_size, 1), IGNORED, tokens.dtype)], axis=1)
        padding, weights = -time % b, starts(params)
        # What is read after the end changes nothing before it.
        h = jnp.pad(h, ((0, 0), (0, padding), (0, 0))).reshape((batch_size, -1, b, h.shape[-1]))
        targets = jnp.pad(targets, ((0, 0), (0, padding)), constant_values=IGNORED).reshape((batch_size, -1, b))
        everything = decoder.start(params, 1, time + padding)
        caches = {group: everything[group] for group in suffix}

        def step(carry: tuple[PyTree, ...], each: tuple[Array, ...]) -> tuple[tuple[PyTree, ...], tuple[Array, Array]]:
            weights, sums, caches = carry
            h, targets, count = each
            (_, (h, logits, caches)), gradient = jax.value_and_grad(read, argnums=1, has_aux=True)(
                params, weights, caches, h, targets
            )
            return (*moved(weights, sums, gradient, count, scale), caches), (h, logits)

        body = jax.checkpoint(step) if rematerialise else step

        def one(h: Array, targets: Array) -> tuple[Array, Array]:
            carry = (weights, no_sums(weights), caches)
            return jax.lax.scan(body, carry, (h, targets, jnp.arange(1, len(h) + 1)))[1]

        found = jax.vmap(one)(h, targets)
        h, logits = (a.reshape((batch_size, -1, a.shape[-1]))[:, :time] for a in found)
        return h, logits

    def init(key: Key, x: PyTree, **options: Any) -> tuple[PyTree, PyTree]:
        params, _ = decoder.model.init_function(key, x, **options)
        return params, {"updates": jnp.zeros((), jnp.int32)} if warm_up else {}

    def apply(
        params: PyTree, model_state: PyTree, x: PyTree, *, train: bool = False, **options: Any
    ) -> tuple[PyTree, PyTree, dict[str, tuple[Array, Array]]]:
        scale = rate
        if warm_up and train:
            done = model_state["updates"] + 1
            scale = rate * jnp.minimum(1.0, 0.1 + 0.9 * done / warm_up)
            model_state = {"updates": jnp.minimum(done, warm_up)}
        return chunked(params, x, scale)[1], model_state, {}

    def start(
        params: PyTree, batch_size: int, length: int, padding: Array | None = None, prefix: PyTree = None
    ) -> EndToEndCache:
        if padding is not None or prefix is not None:
            raise ValueError("ttt_e2e: padding or a prefix cannot be learned from; give sequences of one length alone")
        everything = decoder.start(params, batch_size, length)
        alone = decoder.start(params, 1, length)
        weights = starts(params)
        every = lambda tree: jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (batch_size, *leaf.shape)), tree)  # noqa: E731
        first, now = (every({group: alone[group] for group in suffix}) for _ in range(2))  # not one array: donation
        blank = jax.eval_shape(decoder.embed, params, jax.ShapeDtypeStruct((batch_size, b), jnp.int32))
        return EndToEndCache(
            jnp.zeros((), jnp.int32),
            {group: everything[group] for group in below},
            every(weights),
            every(no_sums(weights)),
            first,
            now,
            jnp.zeros(blank.shape, blank.dtype),
            jnp.zeros((batch_size, b), jnp.int32),
        )

    def learned(params: PyTree, cache: EndToEndCache, following: Array) -> EndToEndCache:
        """After the chunk, now that the token after it is known."""
        targets = jnp.concatenate([cache.tokens[:, 1:], following[:, None]], axis=1)

        def one(weights: PyTree, sums: PyTree, caches: PyTree, h: Array, targets: Array) -> tuple[PyTree, PyTree]:
            gradient, _ = jax.grad(read, argnums=1, has_aux=True)(params, weights, caches, h, targets)
            return moved(weights, sums, gradient, cache.position // b, rate)

        weights, sums = jax.vmap(one)(cache.fast, cache.sums, cache.first, cache.h, targets)
        return cache._replace(fast=weights, sums=sums, first=cache.now)

    def piece(params: PyTree, cache: EndToEndCache, tokens: Array) -> tuple[Array, EndToEndCache]:
        """Tokens `[B, m]` that lie within one chunk: states `[B, m, D]`, and the cache after them."""
        tokens = tokens.astype(jnp.int32)
        place = cache.position % b
        cache = jax.lax.cond(
            (place == 0) & (cache.position > 0), lambda c: learned(params, c, tokens[:, 0]), lambda c: c, cache
        )
        h, new = decoder.embed(params, tokens), cache.below
        if below:
            h, new = decoder.through(params, h, cache.below, groups=below)

        def one(weights: PyTree, caches: PyTree, h: Array) -> tuple[Array, PyTree]:
            z, caches = decoder.through(joined(params, weights), h[None], caches, groups=suffix)
            return z[0], caches

        z, now = jax.vmap(one)(cache.fast, cache.now, h)
        return z, cache._replace(
            position=cache.position + tokens.shape[1],
            below=new,
            now=now,
            h=jax.lax.dynamic_update_slice_in_dim(cache.h, h, place, 1),
            tokens=jax.lax.dynamic_update_slice_in_dim(cache.tokens, tokens, place, 1),
        )

    def pieces(params: PyTree, cache: EndToEndCache, tokens: Array, m: int) -> tuple[Array, EndToEndCache]:
        """m tokens at a time, and what is left of them."""
        batch_size, time = tokens.shape
        whole = time - time % m

        def go_on(cache: EndToEndCache, each: Array) -> tuple[EndToEndCache, Array]:
            return piece(params, cache, each)[::-1]

        each = jnp.swapaxes(tokens[:, :whole].reshape((batch_size, -1, m)), 0, 1)
        cache, z = jax.lax.scan(go_on, cache, each)
        z = jnp.swapaxes(z, 0, 1).reshape((batch_size, whole, -1))
        if whole == time:
            return z, cache
        last, cache = piece(params, cache, tokens[:, whole:])
        return jnp.concatenate([z, last], axis=1), cache

    def extend(params: PyTree, cache: EndToEndCache, tokens: Array) -> tuple[Array, EndToEndCache]:
        if tokens.shape[1] == 1 or b == 1:
            return pieces(params, cache, tokens, 1)
        aligned = cache.position % b == 0
        ways: list[Callable[..., Any]] = [lambda c, m=m: pieces(params, c, tokens, m) for m in (b, 1)]
        return jax.lax.cond(aligned, *ways, cache)

    def one_more(params: PyTree, cache: EndToEndCache, tokens: Array) -> tuple[Array, EndToEndCache]:
        h, cache = piece(params, cache, tokens[:, None])
        return decoder.logits(params, h[:, 0]), cache

    def hidden(params: PyTree, tokens: Array) -> Array:
        return chunked(params, tokens, rate)[0]

    model = Model(init, apply, takes_weights=decoder.model.takes_weights)
    return decoder._replace(model=model, start=start, step=one_more, extend=extend, hidden=hidden)


def _paths(decoder: Decoder, fast: Mapping[str, int]) -> dict[str, list[str]]:
    """Which paths of which groups move."""
    if not fast:
        raise ValueError('ttt_e2e: fast is empty, but it must name what moves, as {"prime": 16}')
    for path, period in fast.items():
        check_whole("ttt_e2e", f"the period of {path!r}", period, 1)
        if period % min(fast.values()):
            raise ValueError(
                f"ttt_e2e: the period of {path!r} is {period}, but it must be a multiple of the least,"
                f" {min(fast.values())}"
            )
    found: dict[str, list[str]] = {}
    for group, layers in decoder.groups:
        own = [path for path in fast if path.split("/")[0] in dict(layers)]
        if own:
            found[group] = own
    there = {path for own in found.values() for path in own}
    if absent := [path for path in fast if path not in there]:
        have = sorted({name for _, layers in decoder.groups for name, _ in layers})
        raise ValueError(f"ttt_e2e: fast names {absent[0]!r}, but the layers of blocks are {', '.join(have)}")
    return found


def _get(blocks: PyTree, path: str) -> PyTree:
    """What lies there, in stacked blocks or in each of them."""
    if isinstance(blocks, list):
        return [_get(block, path) for block in blocks]
    for level in path.split("/"):
        if not isinstance(blocks, dict) or level not in blocks:
            raise ValueError(f"ttt_e2e: fast names {path!r}, but there is no {level!r}")
        blocks = blocks[level]
    return blocks


def _put(blocks: PyTree, path: str, value: PyTree) -> PyTree:
    if isinstance(blocks, list):
        return [_put(block, path, one) for block, one in zip(blocks, value, strict=True)]
    level, _, rest = path.partition("/")
    return blocks | {level: _put(blocks[level], rest, value) if rest else value}
