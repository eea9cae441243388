"""Self-distillation against NumPy, and its limits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_zoo import Batch, compose, context_distillation, dft, offline_distillation, run_stream, sdft
from cl_zoo._learner import _key
from cl_zoo.language import Demonstrated, answer_logits, answering, decoder, generate
from cl_zoo.layers import softmax_attention
from cl_zoo.losses import divergence, dynamic_fine_tuning_loss
from cl_zoo.streams import SymbolWorld
from cl_zoo.wrappers import lora, merge_adapters
from tests.oracles import self_distillation as oracle
from tests.tiny import same_bytes

DIRECTIONS = ("forward", "reverse", "jsd")
V, N, RATE = 13, 4, 0.5
NET = decoder(V, [(softmax_attention(8, 2), 12, 2)])
KEY = jax.random.key(5)


def rows(b: int = 6) -> Batch:
    keys = jax.random.split(jax.random.key(2), 3)
    prompt, shown, answer = (jax.random.randint(k, (b, n), 0, V) for k, n in zip(keys, (5, 9, N)))
    padding, shown_padding = jnp.arange(b) % 4, 3 - jnp.arange(b) % 4
    weight = jnp.ones(b).at[-1].set(0).at[0].set(0.5)
    return Batch(Demonstrated(prompt, padding, shown, shown_padding, answer), answer, None, weight)


def prepared(component: Any, model: Any = None) -> tuple[Any, Any]:
    """A learner under plain gradient descent, and its state after an update, so that the teacher is not the student."""
    learner = compose(model or answering(NET), optax.sgd(RATE), component)
    state = learner.init(KEY, rows())
    state = state._replace(params=jax.tree.map(lambda leaf: 3 * leaf, state.params))
    return learner, state


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_divergences_and_their_gradients_are_those_of_numpy(direction: str) -> None:
    random = np.random.default_rng(0)
    s, t = 2 * random.normal(size=(2, 7, V))
    with jax.enable_x64(True):
        found, pull = jax.vjp(lambda s: divergence(s, jnp.asarray(t), direction), jnp.asarray(s))
        (gradient,) = pull(jnp.ones(7))
    np.testing.assert_allclose(found, oracle.divergence(s, t, direction), rtol=1e-12)
    np.testing.assert_allclose(gradient, oracle.divergence_gradient(s, t, direction), atol=1e-12)
    value, pull = jax.vjp(lambda s: divergence(s, jnp.float32(t), direction), jnp.float32(t))
    np.testing.assert_allclose(value, 0, atol=1e-7)
    np.testing.assert_allclose(pull(jnp.ones(7))[0], 0, atol=1e-7)


def test_dynamic_fine_tuning_is_that_of_numpy() -> None:
    random = np.random.default_rng(1)
    s, y = 2 * random.normal(size=(3, N, V)), random.integers(-1, V, (3, N))
    y[2] = -1
    with jax.enable_x64(True):
        found, pull = jax.vjp(lambda s: dynamic_fine_tuning_loss(s, jnp.asarray(y)), jnp.asarray(s, jnp.float32))
        (gradient,) = pull(jnp.ones(3, found.dtype))
    for i in range(3):
        loss, wanted = oracle.dynamic_fine_tuning_loss(s[i], y[i])
        np.testing.assert_allclose(found[i], loss, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(gradient[i], wanted, atol=1e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("skip", [0, 2])
def test_an_update_is_that_of_numpy(direction: str, skip: int) -> None:
    """Loss, step of the student and of the teacher, from the tokens that were drawn."""
    learner, state = prepared(sdft(length=N, direction=direction, skip=skip, decay=0.75, stop=(11, 12)))
    batch, theta, phi = rows(), state.params, state.parts["sdft"].teacher
    x = batch.x
    after, metrics = jax.jit(learner.update)(state, batch)
    key = _key(state.key, 0, "loss", "sdft")
    said = generate(NET, theta, x.prompt, key, padding=x.padding, length=N, stop=(11, 12))
    assert 0 < said.mask.sum() < said.mask.size
    students, pull = jax.vjp(lambda p: answer_logits(NET, p, x.prompt, x.padding, said.tokens), theta)
    teachers = answer_logits(NET, phi, x.shown, x.shown_padding, said.tokens)
    arguments = (*(np.asarray(a, float) for a in (students, teachers, said.mask)), skip, np.asarray(batch.weight))
    loss = oracle.self_distillation_loss(*arguments, direction)
    assert loss > 1e-2
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-4)
    counted = np.asarray(batch.weight) @ np.asarray(said.mask.sum(1)) / batch.weight.sum()
    np.testing.assert_allclose(metrics["sdft/tokens"], counted, rtol=1e-5)
    (gradient,) = pull(jnp.asarray(oracle.self_distillation_gradient(*arguments, direction), jnp.float32))
    wanted = jax.tree.map(lambda p, g: p - RATE * g, theta, gradient)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), after.params, wanted)
    teacher = {"0": np.asarray(phi["embedding"])}, {"0": np.asarray(after.params["embedding"])}
    moved = oracle.moving_average(*teacher, 0.25)["0"]
    np.testing.assert_allclose(after.parts["sdft"].teacher["embedding"], moved, atol=1e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_teacher_that_is_the_student_teaches_nothing(direction: str) -> None:
    learner, state = prepared(sdft(length=N, direction=direction, teacher="live", skip=0))
    batch = rows()
    alike = batch._replace(x=batch.x._replace(shown=batch.x.prompt, shown_padding=batch.x.padding))
    after, metrics = jax.jit(learner.update)(state, alike)
    assert abs(float(metrics["loss"])) < 1e-6
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after.params, state.params)
    assert jax.jit(learner.update)(state, batch)[1]["loss"] > 1e-2


def test_rates_of_the_teacher() -> None:
    for rate, place in ((0.0, 0), (1.0, 1)):
        learner, state = prepared(sdft(length=N, skip=0, decay=1 - rate))
        state = state._replace(parts={"sdft": state.parts["sdft"]._replace(teacher=state.params)})
        after, _ = jax.jit(learner.update)(state, rows())
        wanted = (state, after)[place].params
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), after.parts["sdft"].teacher, wanted)
    frozen, state = prepared(sdft(length=N, skip=0, teacher="frozen"))
    same_bytes(jax.jit(frozen.update)(state, rows())[0].parts["sdft"], state.parts["sdft"])
    _, state = prepared(sdft(length=N, skip=0, teacher="live"))
    assert not jax.tree.leaves(state.parts)


def test_cold_draws_are_greedy() -> None:
    losses = []
    for temperature in (0.0, 1e-6):
        learner, state = prepared(sdft(length=N, skip=0, temperature=temperature))
        losses.append(jax.jit(learner.update)(state, rows())[1]["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-5)
    warm, state = prepared(sdft(length=N, skip=0))
    assert abs(jax.jit(warm.update)(state, rows())[1]["loss"] - losses[0]) > 1e-3


@pytest.mark.parametrize("make", [context_distillation, offline_distillation])
def test_off_policy_distillation_learns_from_what_the_teacher_says(make: Any) -> None:
    component = make(length=N, stop=(11, 12))
    learner, state = prepared(component)
    batch, phi = rows(), state.parts[component.name].teacher
    x = batch.x
    _, metrics = jax.jit(learner.update)(state, batch)
    key = _key(state.key, 0, "loss", component.name)
    said = generate(NET, phi, x.shown, key, padding=x.shown_padding, length=N, stop=(11, 12))
    s = np.asarray(answer_logits(NET, state.params, x.prompt, x.padding, said.tokens), float)
    t = np.asarray(answer_logits(NET, phi, x.shown, x.shown_padding, said.tokens), float)
    mask, weight = np.asarray(said.mask), np.asarray(batch.weight)
    if make is context_distillation:
        wanted = oracle.self_distillation_loss(s, t, mask, 0, weight, "forward")
    else:
        chosen = np.take_along_axis(oracle.log_softmax(s), np.asarray(said.tokens)[..., None], -1)[..., 0]
        wanted = weight @ (-(chosen * mask).sum(1) / mask.sum(1)) / weight.sum()
    np.testing.assert_allclose(metrics["loss"], wanted, rtol=1e-4)


def test_adapters_alone_are_distilled() -> None:
    world = SymbolWorld(symbols=5, known=1, new=2, length=2, pairs=2)
    stream = world.skills(steps=5, batch_size=8, examples=40, tests=30)
    net = decoder(world.vocabulary, [(softmax_attention(8, 2), 8, 1)])
    weights, _ = net.model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    learner = compose(lora(answering(net), 2), optax.adam(1e-2), sdft(length=3, skip=0, decay=0.9)).bind(weights)
    result = run_stream(learner, stream, KEY)
    own = {leaf.shape for leaf in jax.tree.leaves(weights)}
    assert not own & {leaf.shape for leaf in jax.tree.leaves((result.state.params, result.state.parts))}
    assert not jax.tree.leaves(result.state.model_state)
    teacher = result.state.parts["sdft"].teacher
    assert jax.tree.structure(teacher) == jax.tree.structure(result.state.params)
    moved = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(teacher), jax.tree.leaves(result.state.params))]
    assert max(moved) > 1e-4
    assert np.isfinite(result.metrics["loss"]).all()


def test_a_model_that_a_wrapper_hides_is_still_found() -> None:
    """The answers are drawn from the adapted net, not from the frozen one."""
    weights, _ = NET.model.init(jax.random.key(1), jnp.zeros((1, 1), jnp.int32))
    weights = jax.tree.map(lambda leaf: 3 * leaf, weights)
    model = lora(answering(NET), 2).bind(weights)
    learner, state = prepared(sdft(length=N, skip=0, temperature=0), model)
    loud = jax.tree.map(lambda leaf: leaf + jnp.cos(jnp.arange(leaf.size).reshape(leaf.shape)), state.params)
    quiet, changed = (jax.jit(learner.update)(state._replace(params=p), rows())[1] for p in (state.params, loud))
    assert abs(quiet["loss"] - changed["loss"]) > 1e-3
    key = _key(state.key, 0, "loss", "sdft")
    x, full = rows().x, merge_adapters(model, loud, weights)
    said = generate(NET, full, x.prompt, key, padding=x.padding, length=N, temperature=0)
    counted = np.asarray(rows().weight) @ np.asarray(said.mask.sum(1)) / rows().weight.sum()
    np.testing.assert_allclose(changed["sdft/tokens"], counted, rtol=1e-5)


def test_what_is_refused() -> None:
    for wrong, field in (
        ({"direction": "sideways"}, "direction"),
        ({"teacher": "old"}, "teacher"),
        ({"decay": 2.0}, "decay"),
        ({"skip": 4}, "skip"),
        ({"length": 0}, "length"),
        ({"temperature": -1.0}, "temperature"),
        ({"stop": 2}, "stop is 2, but it must be a sequence"),
        ({"stop": "end"}, "stop is 'end'"),
    ):
        with pytest.raises(ValueError, match=field):
            sdft(**({"length": N} | wrong))
    bare = compose(NET.model, optax.sgd(0.1), sdft(length=N))
    with pytest.raises(ValueError, match="sdft: the model is not made of a decoder, as answering"):
        bare.init(KEY, Batch(jnp.zeros((2, 3), jnp.int32), None, None, jnp.ones(2)))
    learner = compose(answering(NET), optax.sgd(0.1), sdft(length=N))
    with pytest.raises(ValueError, match="must be Demonstrated"):
        learner.init(KEY, Batch(jnp.zeros((2, 3), jnp.int32), None, None, jnp.ones(2)))
    assert dft().name == "dft"
