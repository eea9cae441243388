"""End-to-end test-time training: its identities, and the equation written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_zoo import compose, supervised
from cl_zoo.language import decoder, generate, ttt_e2e, unstacked
from cl_zoo.layers import delta_rule, softmax_attention, swiglu, window_attention
from cl_zoo.losses import next_token_loss, token_losses
from cl_zoo.types import Batch

V, D, B, T, CHUNK = 7, 8, 3, 14, 4  # three chunks of four tokens, and two more
TOKENS = jax.random.randint(jax.random.key(0), (B, T), 0, V)
TARGETS = jnp.concatenate([TOKENS[:, 1:], jnp.full((B, 1), -1)], axis=1)


def net(window: int = 5, prime: int = 6, **options: Any) -> Any:
    mixer = window_attention(D, 2, window=window, qk_norm=True)
    return decoder(V, [(mixer, 12, 1), ({"mixer": mixer, "prime": prime, "ffn": 10}, 2)], sandwich=True, **options)


def drawn(made: Any) -> Any:
    """Parameters, none of them at 0 or 1, as large as to make losses differ."""
    params, _ = made.model.init(jax.random.key(1), TOKENS)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return tree.unflatten([leaf + 0.3 * jax.random.normal(k, leaf.shape, leaf.dtype) for leaf, k in zip(leaves, keys)])


def double(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)


def logits(made: Any, params: Any, tokens: Any = TOKENS) -> Any:
    return made.model.apply(params, {"updates": jnp.zeros((), jnp.int32)}, tokens)[0]


def outer(made: Any) -> Any:
    """The loss of training."""
    return lambda params: jnp.mean(next_token_loss(logits(made, params), TARGETS))


def close(found: Any, wanted: Any, tolerance: float = 1e-10) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def written_out(made: Any, params: Any, row: Any, *, clip: float = 1.0, order: int = 2) -> Any:
    """Logits of one sequence `[T]`, by whole sequences: nothing is cached or scanned. Each chunk is read by the weights
    of its time, in one pass over all that came before."""
    block = params["blocks"]["block_1"]
    layers = dict(dict(made.groups)["block_1"])
    history = [block["prime"]]

    def norm(x: Any, scale: Any) -> Any:
        return scale * x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)

    def forward(current: Any, upto: int) -> Any:
        """Logits of the tokens before `upto`, the last chunk by `current`."""
        h, _ = made.through(params, made.embed(params, row[None, :upto]), groups=["block_0"])
        for i in range(2):
            one = jax.tree.map(lambda leaf, i=i: leaf[i], block)

            def prime(u: Any, i: int = i) -> Any:
                found = []
                for n, first in enumerate(range(0, upto, CHUNK)):
                    own = jax.tree.map(lambda leaf: leaf[i], history[n] if first + CHUNK < upto else current)
                    piece = u[:, first : first + CHUNK]
                    found.append((jax.nn.silu(piece @ own["gate"]) * (piece @ own["up"])) @ own["down"])
                return jnp.concatenate(found, axis=1)

            for name in ("mixer", "prime", "ffn"):
                u = norm(h, one[f"{name}_norm"]["scale"])
                y = prime(u) if name == "prime" else layers[name].apply(one[name], u)
                h = h + norm(y, one[f"{name}_post_norm"]["scale"])
        return made.logits(params, h)[0]

    for upto in range(CHUNK, T, CHUNK):

        def loss(current: Any, upto: int = upto) -> Any:
            each = token_losses(forward(current, upto)[None], row[None, 1 : upto + 1])[0]
            return jnp.mean(each[upto - CHUNK :])

        gradient = jax.grad(loss)(history[-1])
        gradient = jax.lax.stop_gradient(gradient) if order == 1 else gradient
        size = jnp.minimum(1.0, clip / optax.global_norm(gradient))
        history.append(jax.tree.map(lambda w, g, size=size: w - size * g, history[-1], gradient))
    return forward(history[-1], T)


@pytest.mark.parametrize("order", [pytest.param(1, marks=pytest.mark.long), 2])
def test_it_is_its_equation_and_so_is_its_gradient(order: int) -> None:
    with jax.enable_x64(True):
        made = net()
        params = double(drawn(made))
        learning = ttt_e2e(made, {"prime": CHUNK}, order=order)  # type: ignore[arg-type]

        def wanted(params: Any) -> Any:
            rows = written_out(made, params, TOKENS[0], order=order)[None]
            return jnp.mean(next_token_loss(rows, TARGETS[:1])), rows

        def found(params: Any) -> Any:
            rows = logits(learning, params, TOKENS[:1])
            return jnp.mean(next_token_loss(rows, TARGETS[:1])), rows

        ours, theirs = (jax.jit(jax.value_and_grad(f, has_aux=True))(params) for f in (found, wanted))
        close(ours, theirs, 1e-9)


def test_without_a_rate_it_is_the_decoder() -> None:
    made = net()
    params = drawn(made)
    still = ttt_e2e(made, {"prime": CHUNK}, rate=0.0)
    close(logits(still, params), logits(made, params), 1e-5)
    with jax.enable_x64(True):
        params = double(params)
        close(logits(still, params), logits(made, params))
        close(jax.grad(outer(still))(params), jax.grad(outer(made))(params))


def test_one_chunk_is_no_learning_and_a_window_of_all_is_full_attention() -> None:
    with jax.enable_x64(True):
        made = net(window=T)
        params = double(drawn(made))
        whole = ttt_e2e(made, {"prime": T})
        close(logits(whole, params), logits(made, params))
        close(jax.grad(outer(whole))(params), jax.grad(outer(made))(params))
        mixer = softmax_attention(D, 2, qk_norm=True)
        full = decoder(V, [(mixer, 12, 1), ({"mixer": mixer, "prime": 6, "ffn": 10}, 2)], sandwich=True)
        close(logits(ttt_e2e(made, {"prime": CHUNK}), params), logits(ttt_e2e(full, {"prime": CHUNK}), params))


def test_the_outer_gradient_is_that_of_finite_differences() -> None:
    """Through three chunks and the cache that they write."""
    with jax.enable_x64(True):
        made = net()
        params = double(drawn(made))
        learning = ttt_e2e(made, {"prime": CHUNK})
        loss, gradient = jax.jit(outer(learning)), jax.jit(jax.grad(outer(learning)))(params)
        leaves, tree = jax.tree.flatten(params)
        for seed in range(2):
            random = np.random.default_rng(seed)
            along = tree.unflatten([jnp.asarray(random.normal(size=leaf.shape)) for leaf in leaves])
            slope = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(along)))
            above, below = (jax.tree.map(lambda p, d, s=s: p + s * d, params, along) for s in (1e-7, -1e-7))
            np.testing.assert_allclose(slope, (loss(above) - loss(below)) / 2e-7, rtol=1e-6)
        first = jax.grad(outer(ttt_e2e(made, {"prime": CHUNK}, order=1)))(params)
        a, b = (g["blocks"]["block_1"]["prime"]["up"] for g in (first, gradient))
        assert np.abs(a - b).max() > 1e-4


@pytest.mark.long
def test_rematerialising_changes_nothing() -> None:
    with jax.enable_x64(True):
        made = net()
        params = double(drawn(made))
        a, b = (ttt_e2e(made, {"prime": CHUNK}, rematerialise=on) for on in (True, False))
        close(jax.grad(outer(a))(params), jax.grad(outer(b))(params))


def test_sequences_do_not_see_each_other() -> None:
    made = ttt_e2e(net(), {"prime": CHUNK})
    params = drawn(made)
    twice = jnp.stack([TOKENS[0], TOKENS[1], TOKENS[0]])
    found = logits(made, params, twice)
    np.testing.assert_array_equal(found[0], found[2])
    other = logits(made, params, twice.at[1].set(0))
    np.testing.assert_array_equal(found[0], other[0])
    assert np.abs(found[1] - other[1]).max() > 1e-2


def test_learning_changes_what_comes_after_the_first_chunk_alone() -> None:
    made = net()
    params = drawn(made)
    plain, learning = logits(made, params), logits(ttt_e2e(made, {"prime": CHUNK}), params)
    close(plain[:, :CHUNK], learning[:, :CHUNK], 1e-5)
    assert (np.abs(plain - learning)[:, CHUNK:].max(axis=(0, 2)) > 1e-3).all()


@pytest.mark.parametrize(
    ("fast", "apart"),
    [
        ({"prime": CHUNK}, False),
        pytest.param({"ffn": 1}, False, marks=pytest.mark.long),
        pytest.param({"prime": 2, "ffn/up": 4}, True, marks=pytest.mark.long),
    ],
)
def test_token_by_token_and_in_pieces_is_all_at_once(fast: dict[str, int], apart: bool) -> None:
    with jax.enable_x64(True):
        made = ttt_e2e(net(), fast)
        params = double(drawn(made))
        wanted = logits(made, params)
        used = unstacked(params) if apart else params
        start = made.start(used, B, T)
        step = jax.jit(lambda c: jax.lax.scan(lambda c, t: made.step(used, c, t)[::-1], c, TOKENS.T))
        close(jnp.swapaxes(step(start)[1], 0, 1), wanted, 1e-9)
        for cuts in ((0, 1, 6, 14), (0, 8, 14)):
            cache, states = start, []
            for a, b in zip(cuts, cuts[1:]):
                h, cache = jax.jit(made.extend)(used, cache, TOKENS[:, a:b])
                states.append(h)
            close(made.logits(params, jnp.concatenate(states, axis=1)), wanted, 1e-9)
        close(made.hidden(params, TOKENS), jnp.concatenate(states, axis=1), 1e-9)


def test_a_slow_clock_keeps_its_weights_and_then_takes_the_sum() -> None:
    with jax.enable_x64(True):
        made = ttt_e2e(net(), {"prime": 2, "ffn": 4}, clip=1e9)
        params = double(drawn(made))
        step = jax.jit(made.step)
        cache, ffn, sums = made.start(params, B, T), [], []
        for t in range(10):
            _, cache = step(params, cache, TOKENS[:, t])
            ffn.append(cache.fast["block_1"]["ffn"]["up"])
            sums.append(cache.sums["block_1"]["ffn"]["up"])
        for t in (3, 7):  # the token after closes a chunk of the slow clock
            np.testing.assert_array_equal(ffn[t], ffn[t - 3])
            assert np.abs(ffn[t + 1] - ffn[t]).max() > 1e-4
            np.testing.assert_array_equal(sums[t + 1], 0)
        # Its first gradient waits, and the second is added to it: that of the fast weights' second chunk.
        alone = ttt_e2e(net(), {"prime": 2, "ffn": 2}, clip=1e9, rate=1.0)
        first = alone.start(params, B, T)
        for t in range(3):
            _, first = step_of(alone)(params, first, TOKENS[:, t])
        close(sums[2], ffn[0] - first.fast["block_1"]["ffn"]["up"], 1e-9)
        assert np.abs((ffn[3] - ffn[4]) - sums[3]).max() > 1e-4


def step_of(made: Any) -> Any:
    return jax.jit(made.step)


def test_every_fast_weight_moves_and_the_cache_keeps_its_size() -> None:
    made = ttt_e2e(net(), {"prime": CHUNK})
    params = drawn(made)
    start = made.start(params, B, 10_000)
    assert {leaf.dtype for leaf in jax.tree.leaves(start.fast)} == {jnp.dtype("float32")}
    step, cache = jax.jit(made.step), start
    for t in range(CHUNK + 1):
        _, cache = step(params, cache, TOKENS[:, t])
    for old, new in zip(jax.tree.leaves(start.fast), jax.tree.leaves(cache.fast), strict=True):
        assert (np.abs(new - old).max(axis=(-1, -2)) > 1e-6).all()
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(made.start(params, B, n))) for n in (20, 10_000)]
    assert sizes[0] == sizes[1]
    kinds = [[(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(c)] for c in (start, cache)]
    assert kinds[0] == kinds[1]


def test_it_generates_and_goes_on_learning() -> None:
    made = ttt_e2e(net(), {"prime": CHUNK})
    params = drawn(made)
    found = generate(made, params, TOKENS, jax.random.key(3), length=7, temperature=0)
    rows = TOKENS
    for _ in range(7):
        rows = jnp.concatenate([rows, jnp.argmax(logits(made, params, rows)[:, -1:], axis=-1)], axis=1)
    np.testing.assert_array_equal(found.tokens, rows[:, T:])


def test_it_learns_as_any_model_does_with_a_rate_that_warms_up() -> None:
    made = ttt_e2e(net(), {"prime": CHUNK}, warm_up=4)
    learner = compose(made.model, optax.adam(1e-2), supervised(next_token_loss))
    x = jnp.arange(B * T).reshape(B, T) % V
    batch = Batch(x, (x + 1) % V, None, jnp.ones(B))
    state = learner.init(jax.random.key(0), batch)
    update = jax.jit(learner.update)
    losses, updates = [], []
    for _ in range(25):
        state, metrics = update(state, batch)
        losses.append(float(metrics["loss"]))
        updates.append(int(state.model_state["updates"]))
    assert losses[-1] < losses[0] - 0.2 and updates == [1, 2, 3, *[4] * 22]
    # The first update has 0.1 + 0.9 / 4 of the rate; evaluation all of it.
    params, first = drawn(made), {"updates": jnp.int32(0)}
    slower, whole = (ttt_e2e(net(), {"prime": CHUNK}, rate=rate) for rate in (0.325, 1.0))
    close(made.model.apply(params, first, TOKENS, train=True)[0], logits(slower, params), 1e-5)
    close(made.model.apply(params, first, TOKENS)[0], logits(whole, params), 1e-5)


def test_steps_are_clipped_by_sequence_and_nothing_to_predict_is_no_step() -> None:
    with jax.enable_x64(True):
        made = net()
        params = double(drawn(made))
        clipped = ttt_e2e(made, {"prime": CHUNK}, clip=1e-3)
        start = cache = clipped.start(params, B, T)
        for t in range(CHUNK + 1):
            _, cache = step_of(clipped)(params, cache, TOKENS[:, t])
        for row in range(B):
            change = jax.tree.map(lambda a, b, row=row: (a - b)[row], cache.fast, start.fast)
            np.testing.assert_allclose(optax.global_norm(change), 1e-3, rtol=1e-9)
        alone = ttt_e2e(made, {"prime": 1})  # the last chunk has no token to predict
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.grad(outer(alone))(params)))


@pytest.mark.parametrize(
    ("fast", "options", "said"),
    [
        ({}, {}, "fast is empty"),
        ({"prime": 0}, {}, "the period of 'prime' is 0"),
        ({"prime": 4, "ffn": 6}, {}, "the period of 'ffn' is 6, but it must be a multiple of the least, 4"),
        ({"primo": 4}, {}, "fast names 'primo', but the layers of blocks are ffn, mixer, prime"),
        ({"prime": 4}, {"rate": -1.0}, "rate is -1"),
        ({"prime": 4}, {"clip": 0.0}, "clip is 0"),
        ({"prime": 4}, {"order": 3}, "order is 3"),
        ({"prime": 4}, {"warm_up": -1}, "warm_up is -1"),
    ],
)
def test_what_is_refused(fast: dict[str, int], options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ttt_e2e(net(), fast, **options)


def test_layers_that_read_one_token_at_a_time_are_refused_above_what_learns() -> None:
    low = [(delta_rule(D, 2), 12, 1)]
    high = [({"mixer": window_attention(D, 2, window=3), "prime": swiglu(D, 6), "ffn": 12}, 1)]
    made = ttt_e2e(decoder(V, low + high), {"prime": CHUNK})
    params = drawn(made)
    _, cache = made.extend(params, made.start(params, B, T), TOKENS)
    assert np.isfinite(logits(made, params)).all() and int(cache.position) == T
    with pytest.raises(ValueError, match="delta_rule cannot read many tokens at once"):
        ttt_e2e(decoder(V, high + low), {"prime": CHUNK})
    with pytest.raises(ValueError, match="fast names 'prime/middle', but there is no 'middle'"):
        logits(ttt_e2e(decoder(V, low + high), {"prime/middle": 4}), params)
    with pytest.raises(ValueError, match="padding or a prefix"):
        made.start(params, B, T, jnp.zeros(B, jnp.int32))


def test_a_document_goes_on_from_a_saved_cache_to_the_bit(tmp_path: Path) -> None:
    made = ttt_e2e(net(), {"prime": CHUNK})
    params, step = drawn(made), step_of(made)
    cache = made.start(params, B, T)
    for t in range(T):
        if t == 6:  # in the middle of a chunk
            leaves, tree = jax.tree.flatten(cache)
            np.savez(tmp_path / "cache.npz", *leaves)
        wanted, cache = step(params, cache, TOKENS[:, t])
    with np.load(tmp_path / "cache.npz", allow_pickle=False) as file:
        again = tree.unflatten([jnp.asarray(file[name]) for name in file.files])
    for t in range(6, T):
        found, again = step(params, again, TOKENS[:, t])
    np.testing.assert_array_equal(found, wanted)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(a, b)
