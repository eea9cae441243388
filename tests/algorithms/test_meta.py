"""MAML and its kin, Reptile, OML and La-MAML against NumPy oracles, and their own claims."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_zoo import Batch, Component, Episode, compose, ewc, la_maml, maml, oml, replay, reptile
from cl_zoo.algorithms.la_maml import look_ahead_sgd
from cl_zoo.buffers import reservoir_sample
from cl_zoo.estimators.inner_loop import inner_loop
from cl_zoo.losses import squared_error
from cl_zoo.models import mlp
from cl_zoo.types import Context
from cl_zoo.wrappers import episodic, with_learning_rates
from tests.algorithms.test_oracles import _hook_key
from tests.oracles import la_maml as la_maml_oracle
from tests.oracles import maml as oracle
from tests.oracles import reptile as reptile_oracle

SUPPORT, QUERY, EPISODES, RATE = 4, 3, 3, 0.05
MODEL = mlp((2,), 1, hidden=(4,))
RATES_LOW, RATES_HIGH = 0.02, 0.1


def episodes(seed: int, outputs: int = 1) -> tuple[Batch, list[Any]]:
    """A batch of regression or classification episodes in float64, and the same as the oracles take them."""
    random = np.random.default_rng(seed)
    x, q = random.normal(size=(EPISODES, SUPPORT, 2)), random.normal(size=(EPISODES, QUERY, 2))
    if outputs == 1:
        slope = random.normal(size=(EPISODES, 2, 1))
        y, z = ((np.sin(a @ slope))[..., 0] for a in (x, q))
    else:
        y, z = (random.integers(0, outputs, a.shape[:2]) for a in (x, q))
    batch = Batch(Episode(x, y, q), z, None, np.ones(EPISODES))
    return batch, [((x[e], y[e]), (q[e], z[e])) for e in range(EPISODES)]


def started(model: Any, component: Component, optimiser: Any, batch: Batch) -> tuple[Any, Any]:
    """A learner and its first state, in float64."""
    learner = compose(model, optimiser, component)
    state = learner.init(jax.random.key(0), batch)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), state.params)
    return learner, state._replace(params=params, opt_state=optimiser.init(params))


def close(ours: Any, theirs: Any, tolerance: float = 1e-7) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=jax.tree_util.keystr(path))


WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # our arguments, the oracle's
    "maml": ({"inner_steps": 2}, {"steps": 2}),
    "fomaml": ({"inner_steps": 2, "order": 1}, {"steps": 2, "exact": False}),
    "anil": ({"inner_steps": 2, "only": ("output",)}, {"steps": 2, "only": ["output"]}),
    "multi-step": ({"inner_steps": 3, "step_weights": (0.2, 0.3, 0.5)}, {"steps": 3, "weights": [0.2, 0.3, 0.5]}),
    "rematerialised": ({"inner_steps": 2, "rematerialise": True}, {"steps": 2}),
    "online": ({"inner_steps": None, "inner_batch_size": 1}, {"steps": SUPPORT, "rows": 1}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("outputs", [1, 3])
def test_runs_equal_the_oracle(way: str, outputs: int) -> None:
    """Exact gradients are finite differences in float64."""
    mine, theirs = WAYS[way]
    with jax.enable_x64(True):
        batches, lists = zip(*(episodes(seed, outputs) for seed in range(2)), strict=True)
        losses = {1: (squared_error, "mse"), 3: (None, "cross_entropy")}[outputs]
        chosen = {} if losses[0] is None else {"loss": losses[0]}
        component = maml(**chosen, inner=optax.sgd(RATE), **mine)
        model = episodic(mlp((2,), outputs, hidden=(4,)))
        learner, state = started(model, component, optax.sgd(0.1), batches[0])
        first, update, history = jax.tree.map(np.asarray, state.params), jax.jit(learner.update), []
        for batch in batches:
            state, metrics = update(state, batch)
            history.append(float(metrics["loss"]))
        wanted, params, _ = oracle.sgd_run(first, lists, RATE, lr=0.1, loss=losses[1], **theirs)
        np.testing.assert_allclose(history, wanted, rtol=1e-6)
        close(state.params, params, 1e-6)


@pytest.mark.parametrize("order", [1, 2])
def test_meta_sgd_learns_rates(order: int) -> None:
    with jax.enable_x64(True):
        batches, lists = zip(*(episodes(seed) for seed in range(2)), strict=True)
        model = with_learning_rates(episodic(MODEL), RATES_LOW, RATES_HIGH)
        component = maml(squared_error, inner="learned", inner_steps=2, order=order)
        learner, state = started(model, component, optax.sgd(0.1), batches[0])
        first, update = jax.tree.map(np.asarray, state.params), jax.jit(learner.update)
        rates = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(first["learning_rates"])])
        assert rates.min() >= RATES_LOW and rates.max() <= RATES_HIGH and rates.std() > 0.01
        for batch in batches:
            state, _ = update(state, batch)
        _, params, rate = oracle.sgd_run(
            first["params"], lists, first["learning_rates"], 2, lr=0.1, exact=order == 2, learn_rate=True
        )
        close(state.params, {"params": params, "learning_rates": rate}, 1e-6)


def test_first_order_is_exact_where_the_inner_loss_is_linear_and_nowhere_else() -> None:
    linear = mlp((2,), 1, hidden=())

    def along(outputs: Any, y: Any) -> Any:
        return outputs[:, 0] * y

    def gradients(model: Any, loss: Any) -> list[Any]:
        batch, _ = episodes(0)
        batch = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), batch)
        found = []
        for order in (1, 2):
            learner = compose(episodic(model), optax.sgd(1.0), maml(loss, inner=optax.sgd(0.1), order=order))
            state = learner.init(jax.random.key(0), batch)
            found.append(jax.tree.leaves(learner.update(state, batch)[0].params))
        return found

    for first, second in zip(*gradients(linear, along), strict=True):
        np.testing.assert_array_equal(first, second)
    parts = [np.abs(first - second).max() for first, second in zip(*gradients(MODEL, squared_error), strict=True)]
    assert max(parts) > 1e-3


@pytest.mark.parametrize("inner", ["sgd", "adam"])
def test_reptile_equals_the_oracle(inner: str) -> None:
    with jax.enable_x64(True):
        batches, lists = zip(*(episodes(seed) for seed in range(2)), strict=True)
        optimiser = {"sgd": optax.sgd(RATE), "adam": optax.adam(RATE)}[inner]
        component = reptile(squared_error, inner=optimiser, inner_steps=3, inner_batch_size=3)
        learner, state = started(episodic(MODEL), component, optax.sgd(0.5), batches[0])
        first = jax.tree.map(np.asarray, state.params)
        for batch in batches:
            state, _ = jax.jit(learner.update)(state, batch)

        def minibatches(episode: Any) -> list[Any]:
            x, y = (np.concatenate([episode[0][i], episode[1][i]]) for i in range(2))
            index = [(3 * i + np.arange(3)) % len(x) for i in range(3)]  # the third goes on from the start
            return [(x[rows], y[rows]) for rows in index]

        batches_of = [[minibatches(episode) for episode in listed] for listed in lists]
        close(state.params, reptile_oracle.run(first, batches_of, 0.5, lr=RATE, inner=inner), 1e-6)


def test_rows_of_weight_zero_are_no_episodes() -> None:
    batch, _ = episodes(0)
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), batch)
    fewer = jax.tree.map(lambda leaf: leaf[:2], batch)
    for component in (maml(squared_error, inner=optax.sgd(RATE)), reptile(squared_error, inner=optax.sgd(RATE))):
        learner = compose(episodic(MODEL), optax.sgd(0.1), component)
        state = learner.init(jax.random.key(0), batch)
        padded = batch._replace(weight=jnp.array([1.0, 1.0, 0.0]), y=batch.y.at[2].set(jnp.nan))
        close(learner.update(state, padded)[0].params, learner.update(state, fewer)[0].params, 1e-5)


def test_answers_come_after_learning_and_adapt_keeps_what_was_learnt() -> None:
    batch, _ = episodes(3)
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), batch)
    learner = compose(
        episodic(MODEL), optax.sgd(0.1), maml(squared_error, inner=optax.sgd(RATE), inner_steps=1, test_steps=4)
    )
    state = learner.init(jax.random.key(0), batch)
    answers = learner.predict(state, batch.x)
    support = Batch(batch.x.support_x[1], batch.x.support_y[1], None, jnp.ones(SUPPORT))
    after, outputs = learner.adapt(state, support)
    np.testing.assert_allclose(answers[1], learner.predict(after, batch.x.query_x[1]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(outputs, learner.predict(after, support.x), rtol=1e-5, atol=1e-6)
    before = float(jnp.mean(squared_error(learner.predict(state, support.x), support.y)))
    assert float(jnp.mean(squared_error(outputs, support.y))) < before
    padded = support._replace(weight=jnp.array([1.0, 1.0, 0.0, 0.0]), x=support.x.at[2:].set(jnp.nan))
    two = jax.tree.map(lambda leaf: leaf[:2], support)
    close(learner.adapt(state, padded)[0].params, learner.adapt(state, two)[0].params, 1e-5)
    unchanged, episode_answers = learner.adapt(state, batch)
    close(unchanged.params, state.params, 0)
    np.testing.assert_array_equal(episode_answers, answers)


def test_oml_moves_only_the_prediction_part_along_a_trajectory() -> None:
    batch, lists = episodes(4)
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), batch)
    learner = compose(episodic(MODEL), optax.sgd(0.1), oml(RATE, squared_error))
    state = learner.init(jax.random.key(0), batch)
    support = Batch(batch.x.support_x[0], batch.x.support_y[0], None, jnp.ones(SUPPORT))
    after, _ = learner.adapt(state, support)
    wanted = oracle.adapted(
        jax.tree.map(np.asarray, state.params), *lists[0][0], RATE, SUPPORT, only=["output"], rows=1
    )
    close(after.params, wanted, 1e-5)
    close(after.params["hidden_0"], state.params["hidden_0"], 0)
    moved, _ = learner.update(state, batch)
    assert np.abs(moved.params["hidden_0"]["kernel"] - state.params["hidden_0"]["kernel"]).max() > 1e-4


def classes(seed: int) -> Batch:
    random = np.random.default_rng(seed)
    return Batch(random.normal(size=(5, 2)), random.integers(0, 3, 5), None, np.ones(5))


@pytest.mark.parametrize(
    ("variant", "order"), [("la_maml", 1), ("la_maml", 2), ("sync", 1), ("c_maml", 1), ("c_maml", 2)]
)
def test_la_maml_equals_the_oracle(variant: str, order: int) -> None:
    """Three batches of two updates_per_batch each; the rows that were drawn from memory are read off our draws."""
    eta, beta, updates_per_batch = 0.3, 0.05, 2
    with jax.enable_x64(True):
        network = mlp((2,), 3, hidden=(4,))
        fixed = variant == "c_maml"
        model = network if fixed else with_learning_rates(network, 0.1, 0.2)
        optimiser = (
            optax.chain(optax.clip_by_global_norm(2.0), optax.sgd(beta))
            if fixed
            else look_ahead_sgd(eta, beta if variant == "sync" else None)
        )
        component = la_maml(
            8, batch_size=4, rate=0.1 if fixed else None, order=order, updates_per_batch=updates_per_batch
        )
        learner, state = started(model, component, optimiser, classes(0))
        params = jax.tree.map(np.asarray, state.params)
        theta, alpha = (params, 0.1) if fixed else (params["params"], params["learning_rates"])
        update, batches = jax.jit(learner.update), []
        for step in range(3 * updates_per_batch):
            batch = classes(step // updates_per_batch)
            order_key, draw_key = jax.random.split(_hook_key(state, "loss", "la_maml"))
            (x, y, _), weight = reservoir_sample(state.parts["la_maml"].memory, 4, draw_key)
            held = np.asarray(weight) > 0
            rows = np.asarray(jax.random.permutation(order_key, 5))
            meta = (np.concatenate([batch.x, np.asarray(x)[held]]), np.concatenate([batch.y, np.asarray(y)[held]]))
            batches.append(((batch.x[rows], batch.y[rows]), meta))
            state, _ = update(state, batch)
        assert int(state.parts["la_maml"].memory.seen) == 15  # each row once
        options = {"variant": variant, "exact": order == 2, "beta": beta}
        _, theta, alpha = la_maml_oracle.run(theta, alpha, batches, eta, **options)
        close(state.params, theta if fixed else {"params": theta, "learning_rates": alpha}, 1e-6)


def test_rate_falls_where_learning_would_disturb_what_is_remembered() -> None:
    """Gradient of the rate = minus the inner product of the inner gradient and that of the meta-loss."""
    model = with_learning_rates(mlp((2,), 1, hidden=()), 0.1)

    def rate_step(memory_y: float) -> float:
        component = la_maml(4, batch_size=4, loss=squared_error)
        learner = compose(model, look_ahead_sgd(0.01, 0.0), component)
        batch = Batch(jnp.array([[1.0, 0.0]]), jnp.array([1.0]), None, jnp.ones(1))
        state = learner.init(jax.random.key(0), batch)
        state = state._replace(
            params={
                "params": jax.tree.map(jnp.zeros_like, state.params["params"]),
                "learning_rates": state.params["learning_rates"],
            }
        )
        part = state.parts["la_maml"]
        rows = (jnp.full((4, 2), jnp.array([1.0, 0.0])), jnp.full(4, memory_y), None)
        full = part._replace(memory=part.memory._replace(rows=rows, seen=jnp.array(4)))
        after, _ = learner.update(state._replace(parts={"la_maml": full}), batch)
        return float(after.params["learning_rates"]["output"]["kernel"][0, 0] - 0.1)

    assert rate_step(1.0) > 1e-4  # memory wants the same
    assert rate_step(-1.0) < -1e-4  # memory wants the opposite


def test_memory_does_not_grow_with_inner_steps_where_rematerialised() -> None:
    def temporary(steps: int, rematerialise: bool) -> int:
        component = maml(squared_error, inner=optax.sgd(0.01), inner_steps=steps, rematerialise=rematerialise)
        learner = compose(episodic(mlp((1,), 1, hidden=(8,))), optax.sgd(0.1), component)
        x = Episode(jnp.ones((2, 500, 1)), jnp.ones((2, 500)), jnp.ones((2, 500, 1)))
        batch = Batch(x, jnp.ones((2, 500)), None, jnp.ones(2))
        state = jax.eval_shape(lambda: learner.init(jax.random.key(0), batch))
        memory = jax.jit(learner.update).lower(state, batch).compile().memory_analysis()
        return memory.temp_size_in_bytes

    activations = 2 * 500 * 8 * 4
    assert temporary(9, True) - temporary(2, True) < 7 * activations / 2
    assert temporary(9, False) - temporary(2, False) > 7 * activations


def test_ewc_of_a_meta_loss_is_the_mean_of_squared_gradients_of_episodes() -> None:
    batch, lists = episodes(5)
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), batch)
    learner = compose(
        episodic(MODEL),
        optax.sgd(0.1),
        maml(squared_error, inner=optax.sgd(RATE)),
        replay(4, batch_size=2),
        ewc(10.0, labels="loss"),
    )
    state = learner.init(jax.random.key(0), batch)
    state, _ = learner.update(state, batch)
    assert int(state.parts["replay"].seen) == EPISODES
    after = learner.end_task(state, jax.tree.map(lambda leaf: leaf[None], batch))
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state.params)
    each = [oracle.meta_gradient(params, [one], RATE, 1, of_rate=False)[0] for one in lists]
    wanted = jax.tree.map(lambda *g: np.mean(np.square(g), axis=0), *each)
    close(after.parts["ewc"].precision, wanted, 1e-4)
    _, metrics = learner.update(after._replace(params=jax.tree.map(lambda p: p + 0.1, after.params)), batch)
    assert float(metrics["ewc/penalty"]) > 0


def test_only_names_parameters() -> None:
    with pytest.raises(ValueError, match="only names 'head', but the parameters are hidden_0/bias, hidden_0/kernel"):
        inner_loop(
            lambda p, i: 0.0, MODEL.init(jax.random.key(0), jnp.ones((1, 2)))[0], optax.sgd(1.0), 1, only=["head"]
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: maml(inner=optax.sgd(0.1), order=3), "order is 3, but it must be one of 1, 2"),
        (lambda: maml(inner="adam"), "inner is 'adam'"),
        (lambda: maml(inner=optax.sgd(0.1), inner_steps=-1), "inner_steps is -1"),
        (lambda: maml(inner=optax.sgd(0.1), inner_batch_size=0), "inner_batch_size is 0"),
        (lambda: maml(inner=optax.sgd(0.1), step_weights=(1.0, 2.0)), "step_weights has 2 numbers"),
        (lambda: reptile(inner=optax.sgd(0.1), inner_steps=-1), "inner_steps is -1"),
        (lambda: la_maml(5, batch_size=6), "batch_size is 6"),
        (lambda: la_maml(5, batch_size=5, updates_per_batch=0), "updates_per_batch is 0"),
        (lambda: look_ahead_sgd(-0.1), "rate_learning_rate is -0.1"),
        (lambda: with_learning_rates(MODEL, 0.2, 0.1), "high is 0.1"),
    ],
)
def test_impossible_arguments_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_batches_of_another_kind_are_refused() -> None:
    rows = Batch(jnp.ones((2, 2)), jnp.ones(2), None, jnp.ones(2))
    for component in (maml(squared_error, inner=optax.sgd(0.1)), reptile(squared_error, inner=optax.sgd(0.1))):
        learner = compose(episodic(MODEL), optax.sgd(0.1), component)
        with pytest.raises(ValueError, match="the examples of the batch are not episodes"):
            learner.update(learner.init(jax.random.key(0), rows), rows)
    with pytest.raises(ValueError, match="the model has no learning rates"):
        compose(MODEL, optax.sgd(0.1), la_maml(5, batch_size=5)).init(jax.random.key(0), rows)
    with pytest.raises(ValueError, match="the parameters have no learning rates"):
        look_ahead_sgd(0.1).update({"w": jnp.ones(1)}, optax.EmptyState(), {"w": jnp.ones(1)})


def test_context_of_learned_rates_shows_taps_under_their_paths() -> None:
    model = with_learning_rates(MODEL, 0.1)
    params, model_state = model.init(jax.random.key(0), jnp.ones((1, 2)))
    outputs, _, taps = model.apply(params, model_state, jnp.ones((3, 2)))
    assert list(taps) == ["params/hidden_0", "params/output"]
    shifted, _, _ = model.apply(params, model_state, jnp.ones((3, 2)), perturb={"params/output": jnp.ones((3, 1))})
    np.testing.assert_allclose(shifted, outputs + 1, rtol=1e-6)
    context = Context(model, optax.sgd(0.1), None, lambda *_: jnp.zeros(()))
    assert context.model.units[0][0][0] == ("params", "hidden_0", "kernel")
