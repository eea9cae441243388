"""What learns from test images does what its paper claims."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_zoo import Batch, compose, supervised, tent, ttt
from cl_zoo._learner import _key
from cl_zoo.algorithms.ttt import crop_and_flip, quarter_turns
from cl_zoo.models import mlp
from cl_zoo.streams import split_mnist
from cl_zoo.wrappers import with_rotation_head
from tests.tiny import close, same_bytes

KEY = jax.random.key(0)
HEADED = with_rotation_head(mlp((4, 4), 3, hidden=(6, 5)), mlp((5,), 4, hidden=(3,)), "output")
X = jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, 4, 4)), jnp.uint8)
BATCH = Batch(X, jnp.array([0, 1, 2, 0]), None, jnp.array([1.0, 1.0, 1.0, 0.0]))


def start(model: Any, *components: Any) -> tuple[Any, Any]:
    learner = compose(model, optax.sgd(0.1), supervised(), *components)
    return learner, jax.jit(learner.init)(KEY, BATCH)


def mean_cross_entropy(z: Any, y: Any) -> Any:
    return -jnp.mean(jax.nn.log_softmax(z)[jnp.arange(y.shape[0]), y])


def rotation_logits(params: Any, x: Any) -> Any:
    """Of HEADED, written out."""
    h = x.reshape((x.shape[0], -1)).astype(jnp.float32) / 255
    net, head = params["params"], params["rotation_head"]
    for layer in (net["hidden_0"], net["hidden_1"], head["hidden_0"]):
        h = jax.nn.relu(h @ layer["kernel"] + layer["bias"])
    return h @ head["output"]["kernel"] + head["output"]["bias"]


def test_turns_are_exact() -> None:
    image = np.arange(18, dtype=np.uint8).reshape((1, 3, 3, 2))
    turned = quarter_turns("ttt", jnp.asarray(image))
    assert turned.dtype == jnp.uint8
    for turns in range(4):
        np.testing.assert_array_equal(turned[turns, 0], np.rot90(image[0], turns))
    with pytest.raises(ValueError, match=r"ttt: x is of shape \(2, 3, 4\), but it must be square images"):
        quarter_turns("ttt", jnp.zeros((2, 3, 4)))
    with pytest.raises(ValueError, match="square"):
        quarter_turns("ttt", jnp.zeros((2, 9)))


def test_crops_and_mirrors_are_shifts_with_zeros() -> None:
    image = np.arange(1, 17, dtype=np.uint8).reshape((4, 4))
    found = np.asarray(crop_and_flip(1)(jnp.tile(image, (200, 1, 1)), KEY))
    assert found.dtype == np.uint8
    padded = np.pad(image, 1)
    shifts = [padded[r : r + 4, c : c + 4] for r in range(3) for c in range(3)]
    wanted = {shift.tobytes() for shift in shifts} | {shift[:, ::-1].tobytes() for shift in shifts}
    assert {each.tobytes() for each in found} == wanted
    unmirrored = np.asarray(crop_and_flip(1, flip=False)(jnp.tile(image, (200, 1, 1)), KEY))
    assert {each.tobytes() for each in unmirrored} == {shift.tobytes() for shift in shifts}


def test_training_adds_the_mean_loss_over_four_turns_of_rows_that_count() -> None:
    learner, state = start(HEADED, ttt(joint=0.5))
    plain, _ = start(HEADED)
    after, metrics = jax.jit(learner.update)(state, BATCH)
    without, _ = jax.jit(plain.update)(state._replace(parts={}), BATCH)
    rows = np.concatenate([np.rot90(np.asarray(X[:3]), turns, (1, 2)) for turns in range(4)])
    turns = jnp.repeat(jnp.arange(4), 3)

    def loss(params: Any) -> Any:
        return mean_cross_entropy(rotation_logits(params, jnp.asarray(rows)), turns)

    np.testing.assert_allclose(metrics["ttt/rotation"], loss(state.params), rtol=1e-5)
    step = jax.tree.map(lambda g: -0.1 * 0.5 * g, jax.grad(loss)(state.params))
    close(after.params, jax.tree.map(jnp.add, without.params, step), 1e-4, 1e-6)


def test_test_time_steps_equal_a_loop() -> None:
    """Plain gradient descent on views drawn as the component draws them, one after another."""
    component = ttt(learning_rate=0.3, steps=3, views=5, augment=crop_and_flip(1))
    learner, state = start(HEADED, component)
    adapt = jax.jit(learner.adapt)
    once, _ = adapt(state, BATCH)
    after, outputs = adapt(once, BATCH)

    params = once.params
    key = jax.random.fold_in(_key(state.key, 0, "adapt", "ttt"), 1)  # of the second call
    for i in range(3):
        augment_key, turn_key = jax.random.split(jax.random.fold_in(key, i))
        blanked = X.at[3].set(0)
        views = crop_and_flip(1)(jnp.tile(blanked, (5, 1, 1)), augment_key)
        turns = np.asarray(jax.random.randint(turn_key, (20,), 0, 4))
        kept = [j for j in range(20) if j % 4 != 3]
        rows = jnp.asarray(np.stack([np.rot90(np.asarray(views[j]), turns[j]) for j in kept]))
        gradient = jax.grad(lambda p: mean_cross_entropy(rotation_logits(p, rows), turns[kept]))(params)  # noqa: B023
        params = jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient)
    close(after.params, params, 1e-4, 1e-6)
    close(outputs[:3], HEADED.apply(params, state.model_state, X)[0][:3], 1e-4, 1e-5)
    assert int(after.parts["ttt"].calls) == 2
    same_bytes(after.params["params"]["output"], state.params["params"]["output"])  # the main branch
    for moved in (("params", "hidden_0"), ("params", "hidden_1"), ("rotation_head", "hidden_0")):
        assert (
            np.abs(after.params[moved[0]][moved[1]]["kernel"] - once.params[moved[0]][moved[1]]["kernel"]).max() > 1e-4
        )


def test_learning_rate_zero_answers_as_the_net() -> None:
    for component in (ttt(learning_rate=0.0, steps=2, views=3), ttt(steps=0)):
        learner, state = start(HEADED, component)
        after, outputs = jax.jit(learner.adapt)(state, BATCH)
        same_bytes(after.params, state.params)
        close(outputs[:3], jax.jit(learner.predict)(state, X)[:3])


def test_images_that_look_upright_are_left_alone() -> None:
    """Beyond the threshold an image takes no part; where all are beyond it, nothing moves."""
    confidence = jax.nn.softmax(rotation_logits(start(HEADED)[1].params, X))[:3, 0]
    low, high = float(confidence.min()), float(confidence.max())
    between = (low + high) / 2
    results = {}
    for threshold in (low / 2, between, 1.0):
        learner, state = start(HEADED, ttt(0.3, steps=1, views=4, threshold=threshold))
        results[threshold] = jax.jit(learner.adapt)(state, BATCH)[0].params
    same_bytes(results[low / 2], state.params)
    learner, state = start(HEADED, ttt(0.3, steps=1, views=4))
    kept = BATCH._replace(weight=jnp.append(jnp.where(confidence < between, 1.0, 0.0), 0.0))
    close(results[1.0], jax.jit(learner.adapt)(state, BATCH)[0].params)
    assert (
        np.abs(results[between]["params"]["hidden_0"]["kernel"] - results[1.0]["params"]["hidden_0"]["kernel"]).max()
        > 1e-5
    )
    assert int(kept.weight.sum()) in (1, 2)


NORMED = mlp((4, 4), 3, hidden=(6, 5), norm="batch")


def test_tent_at_rate_zero_answers_by_the_statistics_of_the_batch() -> None:
    learner, state = start(NORMED, tent(0.0))
    after, outputs = jax.jit(learner.adapt)(state, BATCH)
    same_bytes((after.params, after.model_state), (state.params, state.model_state))
    h = X[:3].reshape((3, 16)).astype(jnp.float32) / 255
    for i in range(2):
        z = h @ state.params[f"hidden_{i}"]["kernel"]
        z = (z - z.mean(0)) / jnp.sqrt(z.var(0) + 1e-5)
        h = jnp.maximum(z * state.params[f"norm_{i}"]["scale"] + state.params[f"norm_{i}"]["bias"], 0)
    wanted = h @ state.params["output"]["kernel"] + state.params["output"]["bias"]
    np.testing.assert_allclose(outputs[:3], wanted, rtol=1e-3, atol=1e-4)
    assert np.abs(outputs - learner.predict(state, X)).max() > 1e-2


def test_tent_moves_scales_and_biases_down_the_entropy_and_answers_from_before() -> None:
    learner, state = start(NORMED, tent(optimiser=optax.sgd(0.05)))
    adapt = jax.jit(learner.adapt)

    def entropy(params: Any, x: Any = X[:3]) -> Any:
        logits = NORMED.apply(params, state.model_state, x, train=True)[0]
        return -jnp.mean(jnp.sum(jax.nn.softmax(logits) * jax.nn.log_softmax(logits), -1))

    after, outputs = adapt(state, BATCH)
    gradient = jax.grad(entropy)(state.params)
    for name, layer in state.params.items():
        for leaf, value in layer.items():
            step = -0.05 * gradient[name][leaf] if name.startswith("norm") else 0
            np.testing.assert_allclose(after.params[name][leaf], value + step, rtol=1e-4, atol=1e-5)
    close(outputs[:3], NORMED.apply(state.params, state.model_state, X[:3], train=True)[0], 1e-3, 1e-4)
    found = [float(entropy(state.params))]
    for _ in range(5):
        state, _ = adapt(state, BATCH)
        found.append(float(entropy(state.params)))
    assert all(b < a for a, b in zip(found, found[1:], strict=False)), found


def test_tent_with_two_steps_is_two_calls_and_carries_adam() -> None:
    once, state = start(NORMED, tent(0.01))
    twice, two = start(NORMED, tent(0.01, steps=2))
    one, _ = once.adapt(state, BATCH)
    wanted, wanted_outputs = once.adapt(one, BATCH)
    found, outputs = twice.adapt(two, BATCH)
    close((found.params, outputs), (wanted.params, wanted_outputs), 1e-4, 1e-5)
    close(found.parts["tent"].opt_state, wanted.parts["tent"].opt_state, 1e-4, 1e-5)


def test_tent_counts_only_outputs_that_compete_and_moves_only_what_it_is_told(tiny_images: Any) -> None:
    stream = split_mnist(3, "class", images=tiny_images, batch_size=4, steps=1)
    learner = compose(mlp((4, 4), 6, hidden=(5, 4), norm="batch"), optax.sgd(0.1), supervised(),
                      tent(0.1, only=("norm_1/scale",)), tasks=stream.tasks)  # fmt: skip
    state = learner.init(KEY, BATCH)
    after, outputs = learner.adapt(state, BATCH)
    assert (outputs[:, 2:] < -1e30).all() and (np.abs(outputs[:, :2]) < 1e3).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after.params))
    before, moved = (jax.tree_util.tree_leaves_with_path(params) for params in (state.params, after.params))
    pairs = zip(before, moved, strict=True)
    changed = [jax.tree_util.keystr(p, simple=True, separator="/") for (p, a), (_, b) in pairs if (a != b).any()]
    assert changed == ["norm_1/scale"]


def test_nets_that_cannot_are_refused() -> None:
    with pytest.raises(ValueError, match="tent: none of the model's layers normalises"):
        start(mlp((4, 4), 3), tent())
    with pytest.raises(ValueError, match="only names 'norm_7'"):
        start(NORMED, tent(only=("norm_7",)))
    learner, state = start(mlp((4, 4), 3, hidden=(5,)), ttt())
    for function in (learner.update, learner.adapt):
        with pytest.raises(ValueError, match="ttt: the model has no rotation head"):
            function(state, BATCH)
    for make, words in (
        (lambda: ttt(-1.0), "learning_rate"), (lambda: ttt(views=0), "views"), (lambda: ttt(steps=-1), "steps"),
        (lambda: ttt(threshold=2.0), "threshold"), (lambda: tent(steps=0), "steps"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            make()
