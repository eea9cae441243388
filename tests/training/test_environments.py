"""Streams that answer what the learner does: bandits, and learners of their rewards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_zoo import Batch, Component, Learner, Stream, TaskInfo, accuracy, at, compose, ewc, fit, replay, run_stream
from cl_zoo.evaluation import adapted_accuracy
from cl_zoo.losses import weighted_mean
from cl_zoo.models import mlp
from cl_zoo.streams import Cursor
from tests.tiny import close

KEY = jax.random.key(3)
STEPS, ROWS = 80, 16


def bandit(pay: Any = ((0.9, 0.1, 0.2), (0.1, 0.2, 0.9))) -> Stream:
    """Two tasks of three arms, or of a number to find; rows are plays."""
    pay = jnp.asarray(pay)

    def rewards(pay: Any, task: Any, action: Any) -> Any:
        return pay[task][action] if pay.ndim == 2 else -jnp.square(action - pay[task])

    def next_batch(pay: Any, cursor: Cursor, agent: Any) -> tuple[Batch, Cursor]:
        act_key, noise_key = jax.random.split(jax.random.fold_in(cursor.key, cursor.step))
        x = jnp.ones((ROWS, 1))
        action, info = agent.act(x, act_key)
        reward = rewards(pay, jnp.minimum(cursor.step // STEPS, 1), action) + 0.1 * jax.random.normal(
            noise_key, (ROWS,)
        )
        y = {"action": action, "reward": reward, "info": info}
        return Batch(x, y, None, jnp.ones(ROWS)), cursor._replace(step=cursor.step + 1)

    def evaluate(pay: Any, agent: Any, task: Any, split: str, key: Any) -> Any:
        return jnp.mean(rewards(pay, task, agent.act(jnp.ones((300, 1)), key)[0]))

    arms = pay.shape[1] if pay.ndim == 2 else 1
    return Stream(
        2, STEPS, frozenset({"boundaries", "open_outputs"}),
        init_function=lambda key: Cursor(key, jnp.zeros((), jnp.int32)), next_function=next_batch,
        sample_function=lambda pay, task, key: Batch(jnp.ones((1, ROWS, 1)), None, None, jnp.zeros((1, ROWS))),
        reorder_function=lambda pay, key: pay[jax.random.permutation(key, 2)], evaluate_function=evaluate,
        tasks=TaskInfo(jnp.arange(2), jnp.ones((2, arms), bool)), data=pay,
    )  # fmt: skip


def reinforce() -> Component:
    """- (reward - mean) log p(action), and a little entropy, so that it goes on to try all."""

    def loss(context: Any, state: Any, part: Any, params: Any, forward: Any, batch: Batch, key: Any) -> Any:
        log_ps = jax.nn.log_softmax(forward())
        log_p = jnp.take_along_axis(log_ps, batch.y["action"][:, None], axis=1)[:, 0]
        reward = weighted_mean(batch.y["reward"], batch.weight)
        # The learner that acts is the one that learns: so it knows the probability of what it did.
        off = jnp.max(jnp.abs(log_p - batch.y["info"]["log_probability"]))
        gain = (batch.y["reward"] - reward) * log_p - 0.15 * jnp.sum(jnp.exp(log_ps) * log_ps, axis=1)
        return -weighted_mean(gain, batch.weight), {"reward": reward, "off": off}

    return Component("reinforce", loss=loss)


def gaussian(scale: float = 0.3) -> Component:
    """The same for a number: the net's output is the mean of the action."""

    def mean(context: Any, state: Any, params: Any, x: Any) -> Any:
        return context.model.apply(params, state.model_state, x)[0][:, 0]

    def act(context: Any, state: Any, part: Any, x: Any, key: Any) -> Any:
        middle = mean(context, state, state.params, x)
        return middle + scale * jax.random.normal(key, middle.shape), {"mean": middle}

    def loss(context: Any, state: Any, part: Any, params: Any, forward: Any, batch: Batch, key: Any) -> Any:
        log_p = -jnp.square(batch.y["action"] - forward()[:, 0]) / 2 / scale**2
        advantage = batch.y["reward"] - jnp.mean(batch.y["reward"])
        return -weighted_mean(advantage * log_p, batch.weight), {"mean": jnp.mean(batch.y["info"]["mean"])}

    return Component("gaussian", act=act, loss=loss)


def learner_of(stream: Stream, *components: Component, rate: float = 0.1) -> Learner:
    model = mlp((1,), stream.tasks.active.shape[-1], hidden=())
    return compose(model, optax.adam(rate), *components, tasks=stream.tasks)


def test_a_bandit_is_learnt_and_forgotten(tmp_path: Path) -> None:
    stream = bandit()
    learner = learner_of(stream, reinforce())
    measure = {"accuracy": accuracy(), "curve": at(25, accuracy())}
    result = run_stream(learner, stream, KEY, measure=measure)
    scores, rewards = np.asarray(result.accuracy), np.asarray(result.metrics["reinforce/reward"])
    assert (scores[0] < 0.6).all()
    assert scores[1, 0] > 0.8 > 0.3 > scores[1, 1] and scores[2, 1] > 0.8 > 0.3 > scores[2, 0]
    assert (rewards[:, -10:].mean(1) > 0.8).all() and rewards[0, :3].mean() < 0.6 and rewards[1, :3].mean() < 0.3
    assert (np.asarray(result.metrics["reinforce/off"]) < 1e-5).all()
    assert result.measures["curve"].shape == (2, 3, 2)

    other = fit(
        learner, stream, KEY, tmp_path, measure=measure, checkpoint_every=20, checkpoint_seconds=0, progress=False
    )
    close((other.state, other.metrics, other.measures), (result.state, result.metrics, result.measures), 1e-3, 1e-4)
    again = run_stream(learner, bandit(), KEY)
    np.testing.assert_allclose(again.accuracy, result.accuracy, atol=1e-5)


def test_seeds_play_apart() -> None:
    stream = bandit()
    learner = learner_of(stream, reinforce())
    found = jax.vmap(lambda key: run_stream(learner, stream, key))(jax.random.split(KEY, 3))
    assert found.accuracy.shape == (3, 3, 2) and (found.accuracy[:, 1, 0] > 0.8).all()
    assert len(np.unique(found.metrics["reinforce/reward"][:, 0, 0])) == 3


def test_a_component_may_act() -> None:
    """Actions that are numbers, which the rows of a memory keep as they are."""
    stream = bandit(pay=(1.0, -1.0))
    learner = learner_of(stream, gaussian(), replay(40, batch_size=0), rate=0.05)
    result = run_stream(learner, stream, KEY)
    means = np.asarray(result.metrics["gaussian/mean"])
    assert abs(means[0, -1] - 1) < 0.3 and abs(means[1, -1] + 1) < 0.3
    assert result.accuracy[1, 0] > -0.3 and result.accuracy[1, 1] < -2
    kept = result.state.parts["replay"].rows[1]
    assert kept["action"].dtype == jnp.float32 and kept["info"]["mean"].shape == (40,)
    assert len(np.unique(kept["action"])) == 40


@pytest.mark.parametrize("measure", [accuracy(batches=1), accuracy(within_task=True), adapted_accuracy()])
def test_there_are_no_examples_to_measure_on(measure: Any) -> None:
    stream = bandit()
    with pytest.raises(ValueError, match="'some' needs examples, but this stream is evaluated without any"):
        run_stream(learner_of(stream, reinforce()), stream, KEY, measure={"some": measure})
    with pytest.raises(ValueError, match="evaluated without examples"):
        stream.evaluation(0, "test")


def test_a_component_that_needs_a_sample_is_refused() -> None:
    stream = bandit()
    with pytest.raises(ValueError, match="ewc needs 'end_sample'"):
        run_stream(learner_of(stream, reinforce(), ewc(1.0)), stream, KEY)
