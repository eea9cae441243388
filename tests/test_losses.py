"""Losses of next tokens on numbers worked out by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_zoo import Batch, Model, compose, supervised
from cl_zoo.losses import next_token_loss, token_accuracy, token_losses

# Probabilities 1/4, 3/4 and 1/2, 1/2 and 1/8, 7/8 of two tokens.
OUTPUTS = jnp.log(jnp.array([[[1.0, 3.0], [2.0, 2.0], [1.0, 7.0]], [[1.0, 3.0], [5.0, 5.0], [1.0, 7.0]]]))
Y = jnp.array([[1, -1, 0], [-1, -1, -1]])


def test_losses_are_those_of_the_right_tokens() -> None:
    want = [[np.log(4 / 3), 0, np.log(8)], [0, 0, 0]]
    np.testing.assert_allclose(token_losses(OUTPUTS, Y), want, rtol=1e-6)
    np.testing.assert_allclose(next_token_loss(OUTPUTS, Y), [(np.log(4 / 3) + np.log(8)) / 2, 0], rtol=1e-6)
    np.testing.assert_allclose(token_losses(OUTPUTS + 1000.0, Y), want, rtol=1e-3)


def test_accuracy_is_over_the_scored_positions() -> None:
    np.testing.assert_array_equal(token_accuracy(OUTPUTS, Y), [0.5, 0])
    np.testing.assert_array_equal(token_accuracy(OUTPUTS, jnp.array([[1, -1, -1], [0, -1, 1]])), [1, 0.5])


def test_the_softmax_is_taken_in_float32() -> None:
    # 512 equal logits: a sum in bfloat16 would stop at 256.
    losses = token_losses(jnp.zeros((1, 1, 512), jnp.bfloat16), jnp.zeros((1, 1), jnp.int32))
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, np.log(512), rtol=1e-6)


def test_what_is_not_scored_gets_no_gradient() -> None:
    y = jnp.array([[1, -1, 0]])
    gradient = jax.grad(lambda o: next_token_loss(o, y)[0])(OUTPUTS[:1])
    np.testing.assert_allclose(gradient[0], [[1 / 8, -1 / 8], [0, 0], [-7 / 16, 7 / 16]], atol=1e-6)
    spoilt = OUTPUTS[:1].at[0, 1].set(jnp.nan)
    assert np.isfinite(token_losses(spoilt, y)).all() and np.isfinite(next_token_loss(spoilt, y)).all()


@pytest.mark.parametrize("function", [token_losses, next_token_loss, token_accuracy])
def test_shapes_that_do_not_fit_are_refused(function) -> None:
    with pytest.raises(ValueError, match=r"outputs are \(2, 3, 2\) and y is \(2, 2\)"):
        function(OUTPUTS, Y[:, :2])


def test_it_is_a_loss_for_supervised() -> None:
    # One table of logits by token. Its loss falls to the entropy of what follows: 0 after token 0, log 2 after 1.
    def init(key, x):
        return jnp.zeros((2, 2)), ()

    def apply(params, model_state, x, **_):
        return params[x], model_state, {}

    learner = compose(Model(init, apply), optax.sgd(1.0), supervised(next_token_loss))
    batch = Batch(jnp.array([[0, 1, 1, 0]] * 2), jnp.array([[1, 0, 1, -1], [1, 1, 0, -1]]), None, jnp.ones(2))
    state = learner.init(jax.random.key(0), batch)
    update = jax.jit(learner.update)
    for _ in range(300):
        state, metrics = update(state, batch)
    np.testing.assert_allclose(metrics["loss"], 2 / 3 * np.log(2), atol=0.01)
