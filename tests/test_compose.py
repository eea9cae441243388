"""Composition: order, isolation, and clear refusals before anything compiles."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_zoo import Component, Learner, Stream, accuracy, compose, ewc, lwf, replay, run_stream, supervised
from cl_zoo.models import mlp
from cl_zoo.streams import split_mnist
from cl_zoo.training.loop import check_run
from tests.tiny import same_bytes, tiny_learner, tiny_stream

MODEL = mlp((4, 4), 6, hidden=(5,))


def ones(context: Any, state: Any, part: Any, x: Any, task: Any) -> Any:
    return jnp.ones((x.shape[0], 6))


@pytest.mark.parametrize(
    ("components", "message"),
    [
        ((supervised(), ewc(1.0), ewc(2.0)), "2 components are named 'ewc'"),
        ((ewc(1.0),), r"none of the components \(ewc\) has a loss"),
        ((), "there are none"),
        (
            (supervised(), Component("a", predict=ones), Component("b", predict=ones)),
            "predict, but these do: a, b",
        ),
        (
            (supervised(), Component("a", predict=len)),
            r"predict of 'a' takes other arguments than \(context, state, part, x, task\)",
        ),
    ],
)
def test_impossible_compositions_are_refused(components: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose(MODEL, optax.sgd(0.1), *components)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ewc(-1.0), "ewc: strength is -1, but it must be at least 0"),
        (lambda: ewc(jnp.array([1.0, -2.0])), "strength is .* it must be a finite number"),
        (lambda: ewc(1.0, decay=1.5), r"decay is 1.5, but it must be in \[0, 1\]"),
        (lambda: ewc(1.0, labels="true"), "labels is 'true', but it must be one of 'expected', 'sampled', 'observed'"),
        (lambda: lwf(temperature=0.0), "lwf: temperature is 0"),
        (lambda: lwf(weighting="x"), "lwf: weighting is 'x'"),
        (lambda: replay(0), "replay: capacity is 0"),
        (lambda: replay(10, batch_size=11), r"replay: batch_size is 11, but it must be in \[0, 10\]"),
        (lambda: ewc(float("nan")), "strength is nan"),
        (lambda: ewc(1.0, batch_square=True), 'batch_square needs labels "sampled" or "observed"'),
        (lambda: replay(10.5), "capacity is 10.5, but it must be a whole number"),
    ],
)
def test_impossible_numbers_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_too_few_outputs_are_refused(tiny_images: Any) -> None:
    stream = tiny_stream(tiny_images)
    learner = compose(mlp((4, 4), 4), optax.sgd(0.1), supervised(), tasks=stream.tasks)
    with pytest.raises(ValueError, match="the model has 4 outputs, but the stream's tasks have 6 classes"):
        run_stream(learner, stream, jax.random.key(0))


def test_model_of_another_shape_is_refused(tiny_images: Any) -> None:
    stream = tiny_stream(tiny_images)
    learner = compose(mlp((28, 28), 6), optax.sgd(0.1), supervised(), tasks=stream.tasks)
    with pytest.raises(
        ValueError, match=r"takes inputs of shape \(28, 28\), but an example of the batch has shape \(4, 4\)"
    ):
        run_stream(learner, stream, jax.random.key(0))


def test_component_that_needs_boundaries_is_refused_by_name(tiny_images: Any) -> None:
    stream = dataclasses.replace(tiny_stream(tiny_images), provides=frozenset({"open_outputs"}))
    with pytest.raises(ValueError, match="ewc needs 'boundaries', task boundaries"):
        check_run("run_stream", tiny_learner(stream, supervised(), ewc(1.0)), stream, jax.random.key(0))


def test_forgotten_tasks_are_noticed(tiny_images: Any) -> None:
    learner = compose(MODEL, optax.sgd(0.1), supervised())
    with pytest.raises(ValueError, match=r"compose\(tasks=None\) needs 'open_outputs'.*tasks=stream.tasks"):
        run_stream(learner, tiny_stream(tiny_images), jax.random.key(0))


def test_unlabelled_batches_are_refused(tiny_images: Any) -> None:
    stream = tiny_stream(tiny_images)
    learner = tiny_learner(stream, supervised())
    batch, _ = stream.next(stream.init(jax.random.key(0)))
    state = learner.init(jax.random.key(0), batch)
    with pytest.raises(ValueError, match="has no labels"):
        learner.update(state, batch._replace(y=None))


def test_adding_a_component_does_not_change_the_draws_of_another(tiny_images: Any) -> None:
    stream = tiny_stream(tiny_images)
    results = [
        run_stream(tiny_learner(stream, *components), stream, jax.random.key(1))
        for components in ((supervised(), replay(20, batch_size=8)), (supervised(), ewc(0.0), replay(20, batch_size=8)))
    ]
    np.testing.assert_allclose(results[0].metrics["loss"], results[1].metrics["loss"], rtol=1e-4)
    np.testing.assert_array_equal(*(result.state.parts["replay"].rows[0] for result in results))


def test_hooks_run_left_to_right_and_transform_sees_the_task_gradient_alone(tiny_images: Any) -> None:
    calls = []

    def spy(name: str) -> Component:
        def transform(context: Any, state: Any, part: Any, record: Any, grads: Any, key: Any) -> Any:
            calls.append(f"{name} transform")
            return jax.tree.map(lambda task, g: 2 * g + 0 * task, record.task_gradient, grads), part

        def observe(context: Any, state: Any, part: Any, record: Any, key: Any) -> Any:
            calls.append(f"{name} observe")
            return state, part + 1

        def pull(context: Any, state: Any, part: Any, params: Any) -> Any:
            return 3.0 * jnp.sum(params["output"]["bias"])

        return Component(name, init=lambda *_: jnp.zeros(()), transform=transform, observe=observe, penalty=pull)

    stream = tiny_stream(tiny_images)
    batch, _ = stream.next(stream.init(jax.random.key(0)))
    learner = tiny_learner(stream, supervised(), spy("a"), spy("b"), optimiser=optax.sgd(1.0))
    plain = tiny_learner(stream, supervised(), optimiser=optax.sgd(1.0))
    state = learner.init(jax.random.key(0), batch)
    after, metrics = learner.update(state, batch)
    one, _ = plain.update(plain.init(jax.random.key(0), batch), batch)
    assert calls == ["a transform", "b transform", "a observe", "b observe"]
    gradient = state.params["output"]["bias"] - one.params["output"]["bias"]
    np.testing.assert_allclose(
        after.params["output"]["bias"], state.params["output"]["bias"] - 4 * gradient - 6, rtol=1e-5
    )
    assert after.parts == {"a": 1.0, "b": 1.0}
    assert set(metrics) == {"loss", "a/penalty", "b/penalty"}


def test_constrain_comes_after_the_optimiser_and_parts_are_kept_with_the_step(tiny_images: Any) -> None:
    """`prepare`, `transform` and `constrain` may change their part; a batch of padding alone changes none."""

    def counter(name: str, scale: float) -> Component:
        def prepare(context: Any, state: Any, part: Any, batch: Any, key: Any) -> Any:
            return batch, part + 1

        def transform(context: Any, state: Any, part: Any, record: Any, grads: Any, key: Any) -> Any:
            return grads, part + 10

        def constrain(
            context: Any, state: Any, part: Any, record: Any, params: Any, opt_state: Any, key: Any
        ) -> tuple[Any, Any, Any]:
            assert record.new_params is None
            params = {**params, "hidden_0": record.old_params["hidden_0"]}
            return jax.tree.map(lambda leaf: scale * leaf + 1, params), record.old_opt_state, part + 100

        def observe(context: Any, state: Any, part: Any, record: Any, key: Any) -> Any:
            same_bytes(record.new_params, state.params)
            return state, part

        hooks = {"prepare": prepare, "transform": transform, "constrain": constrain, "observe": observe}
        return Component(name, init=lambda context, state, batch, key: jnp.zeros(()), **hooks)

    stream = tiny_stream(tiny_images)
    batch, _ = stream.next(stream.init(jax.random.key(0)))
    learner = tiny_learner(stream, supervised(), counter("a", 2.0), counter("b", 3.0))
    plain = tiny_learner(stream, supervised())
    state = learner.init(jax.random.key(0), batch)
    after, _ = learner.update(state, batch)
    one, _ = plain.update(plain.init(jax.random.key(0), batch), batch)
    for layer, before in (("output", one.params), ("hidden_0", state.params)):
        for name, leaf in before[layer].items():
            wanted = 3 * (2 * leaf + 1) + 1 if layer == "output" else 3 * leaf + 1
            np.testing.assert_allclose(after.params[layer][name], wanted, rtol=1e-5)
    same_bytes(after.opt_state, state.opt_state)
    assert after.parts == {"a": 111.0, "b": 111.0}
    absent, _ = learner.update(after, batch._replace(weight=jnp.zeros_like(batch.weight)))
    same_bytes(absent._replace(step=after.step), after)
    assert absent.step == 2


def test_a_learner_is_an_argument_of_programs(tiny_images: Any) -> None:
    stream = tiny_stream(tiny_images)
    learner = tiny_learner(stream, supervised(), ewc(1.0))
    leaves = jax.tree.leaves(learner)
    assert {leaf.shape for leaf in leaves} == {(3,), (3, 6)}, "the tasks, and no weights"
    batch, _ = jax.jit(Stream.next)(stream, stream.init(jax.random.key(0)))
    state = jax.jit(Learner.init)(learner, jax.random.key(0), batch)
    update = jax.jit(Learner.update)
    for _ in range(2):
        state, _ = update(learner, state, batch)
    assert update._cache_size() == 1
    weights = {**state.params, "output": jax.tree.map(jnp.ones_like, state.params["output"])}
    begun = jax.jit(Learner.init)(learner.bind(weights), jax.random.key(0), batch)
    same_bytes(begun.params, weights)
    same_bytes(begun.opt_state, learner.init(jax.random.key(0), batch).opt_state)
    assert learner.bind(weights).bind(None).model.weights is None
    other = dataclasses.replace(learner, tasks=stream.tasks._replace(active=jnp.roll(stream.tasks.active, 1, axis=0)))
    outputs = [jax.jit(Learner.predict)(one, state, batch.x, jnp.zeros(8, jnp.int32)) for one in (learner, other)]
    assert [set(np.argmax(each, axis=1).tolist()) <= {0, 1} for each in outputs] == [True, False]


def test_a_component_may_answer(tiny_images: Any) -> None:
    constant = Component("constant", predict=ones)
    stream = tiny_stream(tiny_images, "class")
    result = run_stream(tiny_learner(stream, supervised(), constant), stream, jax.random.key(0))
    np.testing.assert_allclose(result.accuracy[-1], [0.5, 0.0, 0.0])


def test_classes_not_open_are_never_answered(tiny_images: Any) -> None:
    stream = tiny_stream(tiny_images, "class")
    matrix = run_stream(tiny_learner(stream, supervised()), stream, jax.random.key(0)).accuracy
    assert matrix[1, 1] == matrix[1, 2] == matrix[2, 2] == 0


def test_task_incremental_score_of_a_class_incremental_run(tiny_images: Any) -> None:
    stream = split_mnist(3, "class", images=tiny_images, batch_size=8, steps=30)
    measure = {"accuracy": accuracy(), "within": accuracy(within_task=True)}
    result = run_stream(tiny_learner(stream, supervised()), stream, jax.random.key(0), measure=measure)
    within = result.measures["within"]
    assert (within[1:] >= result.accuracy[1:]).all()
    assert within[-1].mean() > result.accuracy[-1].mean() + 0.2


def test_a_loop_of_ones_own_may_donate_the_state(tiny_images: Any) -> None:
    """Made without a program, it shares no memory with the key, the task or itself."""
    stream = tiny_stream(tiny_images)
    learner, key = tiny_learner(stream, supervised(), replay(8, batch_size=2)), jax.random.key(3)
    batch, _ = stream.next(stream.init(key))
    update = jax.jit(learner.update, donate_argnums=0)
    task = jax.tree.map(lambda leaf: leaf[0], stream.tasks)
    state, _ = update(learner.begin_task(learner.init(key, batch), task), batch)
    state, _ = update(learner.end_task(state, stream.sample(0, key)), batch)
    assert jax.random.key_data(key).shape == (2,) and int(task.index) == 0 and int(state.step) == 2
