"""Replay, iCaRL and GDumb: what their memories hold, and what is learnt from it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_zoo import Batch, gdumb, icarl, replay, supervised
from cl_zoo._learner import _key
from cl_zoo.losses import cross_entropy
from cl_zoo.models import mlp
from cl_zoo.training._fit import _programs
from tests.tiny import same_bytes, tiny_learner, tiny_stream

KEY = jax.random.key(4)


def run(images: Any, *components: Any, optimiser: Any = None, **options: Any) -> tuple[Any, Any, list[Any]]:
    """Stream, learner, and the state before the first task and after each."""
    stream = tiny_stream(images, "class", **options)
    learner = tiny_learner(stream, *components, optimiser=optimiser)
    programs = _programs(jax.tree.structure((learner, stream)))
    carry = programs["start"](learner, stream, KEY)
    states = [carry[0]]
    for t in range(stream.n_tasks):
        carry = jax.tree.map(jnp.copy, carry)
        carry = programs["begin"](learner, stream, KEY, carry, jnp.int32(t))
        carry, _ = programs["train"](learner, stream, carry, jnp.int32(stream.steps), stream.steps, None)
        carry = programs["finish"](learner, stream, KEY, carry, jnp.int32(t))
        states.append(jax.tree.map(jnp.copy, carry[0]))
    return stream, learner, states


def test_replay_from_a_ring_and_from_a_balanced_memory(tiny_images: Any) -> None:
    for memory, held in (("ring", [2] * 6), ("class_balanced", [2, 2, 2, 2, 2, 3])):
        component = replay(13, batch_size=4, memory=memory, n_classes=6)
        stream, learner, states = run(tiny_images, supervised(), component)
        part = states[-1].parts["replay"]
        labels = np.asarray(part.rows[1])
        assert sorted(np.bincount(labels, minlength=6).tolist()) == held
        assert part.rows[0].dtype == jnp.uint8
        batch, _ = stream.next(stream.init(KEY))
        absent = batch._replace(weight=jnp.zeros_like(batch.weight))
        after, _ = jax.jit(learner.update)(states[-1], absent)
        same_bytes(after._replace(step=states[-1].step), states[-1])
        joined, _ = component.prepare(None, states[1], states[1].parts["replay"], batch, KEY)
        assert joined.weight.tolist() == [1.0] * 12 and set(joined.y[8:].tolist()) <= {0, 1}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"memory": "stack"}, "memory is 'stack'"),
        ({"memory": "ring"}, "n_classes is None"),
        ({"memory": "class_balanced", "n_classes": 30}, "n_classes is 30"),
    ],
)
def test_replay_says_what_is_wrong(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replay(20, batch_size=4, **arguments)


@pytest.fixture(scope="module")
def icarl_run(tiny_images: Any) -> tuple[Any, Any, list[Any]]:
    return run(tiny_images, icarl(20, 6, batch_size=20), sample_size=None)


def exemplars(part: Any, label: int) -> np.ndarray:
    """Of one class, in the order in which they were picked."""
    mine = np.flatnonzero((np.asarray(part.labels) == label) & (np.arange(20) < int(part.held.sum())))
    order = mine[np.argsort(np.asarray(part.ranks)[mine])]
    assert np.asarray(part.ranks)[order].tolist() == list(range(len(order)))
    return np.asarray(part.rows[0])[order]


def test_icarl_shares_its_memory_out_and_cuts_old_lists(icarl_run: Any) -> None:
    _, _, states = icarl_run
    parts = [state.parts["icarl"] for state in states]
    assert [part.held.tolist() for part in parts] == [[0] * 6, [10, 10, 0, 0, 0, 0], [5, 5, 5, 5, 0, 0], [3] * 6]
    for before, after in zip(parts[1:], parts[2:], strict=False):
        for label in np.flatnonzero(before.seen):
            kept = exemplars(after, label)
            np.testing.assert_array_equal(kept, exemplars(before, label)[: len(kept)])
    last = parts[-1]
    assert last.rows[0].shape == (20, 4, 4) and last.rows[0].dtype == jnp.uint8
    assert not np.asarray(last.rows[0])[18:].any(), "slots that are not used hold rows"
    np.testing.assert_array_equal(last.rows[1][:18], last.labels[:18])


def test_icarl_exemplars_are_herded(icarl_run: Any, tiny_images: Any) -> None:
    _, _, states = icarl_run
    state, x, y = states[1], tiny_images.train_images, tiny_images.train_labels
    params = jax.tree.map(np.asarray, state.params)
    features = np.maximum(x.reshape(-1, 16) / 255 @ params["hidden_0"]["kernel"] + params["hidden_0"]["bias"], 0)
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-30)
    for label in (0, 1):
        own = unit[y == label]
        mean = own.mean(0) / np.linalg.norm(own.mean(0))
        picked = exemplars(state.parts["icarl"], label)
        found = [int(np.flatnonzero((x[y == label] == image).all((1, 2)))[0]) for image in picked]
        assert len(set(found)) == 10
        total = np.zeros(5)
        for k, row in enumerate(found, 1):
            distance = np.linalg.norm(mean - (total + own) / k, axis=1)
            distance[found[: k - 1]] = np.inf
            assert distance[row] < distance.min() + 1e-6
            total += own[row]
        mean_of_picks = own[found].mean(0) / np.linalg.norm(own[found].mean(0))
        np.testing.assert_allclose(state.parts["icarl"].means[label], mean_of_picks, rtol=1e-4, atol=1e-5)


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


def forward(params: Any, x: np.ndarray) -> np.ndarray:
    hidden = np.maximum(x.reshape(len(x), -1) / 255 @ params["hidden_0"]["kernel"] + params["hidden_0"]["bias"], 0)
    return hidden @ params["output"]["kernel"] + params["output"]["bias"]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_icarl_loss_is_that_of_the_union(icarl_run: Any, temperature: float) -> None:
    """A batch that is the whole task, joined by all exemplars: the weights make it the mean over both."""
    stream, _, states = icarl_run
    learner = tiny_learner(stream, icarl(20, 6, batch_size=20, temperature=temperature))
    sample = stream.sample(2, KEY)
    task = jax.tree.map(lambda leaf: leaf[2], stream.tasks)
    state = learner.begin_task(states[2], task, sample)
    params = jax.tree.map(lambda leaf: leaf + 0.1, state.params)
    rows = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), sample)
    assert int(rows.weight.sum()) == 120 and int(state.parts["icarl"].held.sum()) == 20
    _, metrics = jax.jit(learner.update)(state._replace(params=params), rows)

    part = jax.tree.map(np.asarray, state.parts["icarl"])
    x = np.concatenate([rows.x, part.rows[0]]).astype(np.float64)
    y = np.concatenate([rows.y, part.labels])
    targets = np.where(np.arange(6) < 4, sigmoid(forward(part.params, x) / temperature), np.eye(6)[y])
    chance = sigmoid(forward(jax.tree.map(np.asarray, params), x))
    terms = -targets * np.log(chance) - (1 - targets) * np.log(1 - chance)
    np.testing.assert_allclose(metrics["loss"], terms.sum(1).mean(), rtol=1e-4)


def test_icarl_weighs_few_exemplars_like_all(icarl_run: Any) -> None:
    stream, _, states = icarl_run
    batch, _ = stream.next(stream.init(KEY))
    part = states[2].parts["icarl"]
    for rows, size in ((4, None), (20, None), (4, 50.0)):
        component = icarl(20, 6, batch_size=rows, task_size=size)
        joined, _ = component.prepare(None, states[2], part._replace(task_size=jnp.float32(size or 120)), batch, KEY)
        np.testing.assert_allclose(joined.weight[8:].sum(), 8 * 20 / (size or 120), rtol=1e-5)
        assert len(np.unique(joined.weight[8:])) == 1
        assert ("begin_sample" in component.needs) == (size is None)
    component = icarl(20, 6, batch_size=10, draw="examples")
    joined = jax.vmap(lambda key: component.prepare(None, states[2], part, batch, key)[0].weight[8:])(
        jax.random.split(KEY, 1000)
    )
    assert set(np.unique(joined)) == {0, 1}
    np.testing.assert_allclose(joined.sum(1).mean(), 8 * 20 / 120, rtol=0.1)  # four standard errors
    empty, _ = icarl(20, 6, batch_size=4).prepare(None, states[0], states[0].parts["icarl"], batch, KEY)
    assert empty.weight[8:].tolist() == [0] * 4


def test_icarl_answers_with_the_nearest_mean(icarl_run: Any, tiny_images: Any) -> None:
    _, learner, states = icarl_run
    x = jnp.asarray(tiny_images.test_images)
    before = learner.predict(states[0], x)
    assert np.isfinite(before).all()
    answers = np.asarray(learner.predict(states[2], x))
    part, params = states[2].parts["icarl"], jax.tree.map(np.asarray, states[2].params)
    features = np.maximum(x.reshape(-1, 16) / 255 @ params["hidden_0"]["kernel"] + params["hidden_0"]["bias"], 0)
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-30)
    distance = ((unit[:, None] - np.asarray(part.means)) ** 2).sum(-1)
    np.testing.assert_allclose(answers[:, :4], -distance[:, :4], rtol=1e-3, atol=1e-5)
    assert set(np.argmax(answers, 1).tolist()) <= {0, 1, 2, 3}
    assert np.isfinite(answers).all()


def test_icarl_with_a_fixed_number_a_class(tiny_images: Any) -> None:
    _, _, states = run(tiny_images, icarl(20, 6, batch_size=4, per_class=2))
    assert [state.parts["icarl"].held.tolist() for state in states[1:]] == [
        [2, 2, 0, 0, 0, 0],
        [2, 2, 2, 2, 0, 0],
        [2] * 6,
    ]


def test_icarl_says_what_is_wrong(tiny_images: Any) -> None:
    with pytest.raises(ValueError, match="capacity is 5, but it must be at least 6"):
        icarl(5, 6)
    with pytest.raises(ValueError, match=r"per_class is 4, but it must be in \[1, 3\]"):
        icarl(20, 6, batch_size=4, per_class=4)
    stream = tiny_stream(tiny_images, "class")
    learner = tiny_learner(stream, icarl(20, 7, batch_size=4))
    batch, _ = stream.next(stream.init(KEY))
    state = learner.init(KEY, batch)
    with pytest.raises(ValueError, match="n_classes is 7, but the model has 6 outputs"):
        jax.eval_shape(learner.update, state, batch)
    with pytest.raises(ValueError, match="begin_task was given no sample"):
        learner.begin_task(state, jax.tree.map(lambda leaf: leaf[0], stream.tasks))


def test_gdumb_memory_is_balanced_and_nothing_is_learnt_between(tiny_images: Any) -> None:
    decaying = optax.adamw(1e-2, weight_decay=0.1)  # it moves parameters at gradient 0 too
    stream, learner, states = run(tiny_images, gdumb(13, 6, epochs=1, batch_size=5), optimiser=decaying)
    shares = [sorted(state.parts["gdumb"].held.tolist()) for state in states]
    assert shares[1:] == [[0, 0, 0, 0, 6, 7], [0, 0, 3, 3, 3, 4], [2, 2, 2, 2, 2, 3]]
    batch, _ = stream.next(stream.init(KEY))
    after, metrics = jax.jit(learner.update)(states[1], batch)
    same_bytes(after.params, states[1].params)
    assert float(metrics["loss"]) == 0


@pytest.mark.parametrize(("epochs", "batch_size", "held"), [(1, 10, 7), (3, 4, 10)])
def test_gdumb_trains_from_scratch_on_the_memory_alone(
    tiny_images: Any, epochs: int, batch_size: int, held: int
) -> None:
    stream = tiny_stream(tiny_images, "class")
    component = gdumb(10, 6, epochs=epochs, batch_size=batch_size, optimiser=optax.sgd(0.5))
    learner = tiny_learner(stream, component)
    x, y = jnp.asarray(tiny_images.train_images[:held]), jnp.asarray(tiny_images.train_labels[:held], jnp.int32)
    state = learner.init(KEY, Batch(x, y, None, jnp.ones(held)))
    task = jax.tree.map(lambda leaf: leaf[2], stream.tasks)
    state, _ = learner.update(learner.begin_task(state, task), Batch(x, y, None, jnp.ones(held)))
    assert int(state.parts["gdumb"].held.sum()) == held
    end = jax.jit(learner.end_task)
    after = end(state)
    same_bytes(end(state._replace(params=jax.tree.map(jnp.ones_like, state.params))).params, after.params)

    key = jax.random.split(_key(state.key, state.step, "end_task", "gdumb"), 3)[0]
    model = mlp((4, 4), 6, hidden=(5,))
    params, model_state = model.init(key, x[:1])
    loss = lambda params, x, y: jnp.mean(cross_entropy(model.apply(params, model_state, x)[0], y))  # noqa: E731
    if epochs == 1:  # one step on all rows: the rows beyond those held have no say
        wanted = jax.tree.map(lambda p, g: p - 0.5 * g, params, jax.grad(loss)(params, x, y))
        for path in ("hidden_0", "output"):
            np.testing.assert_allclose(after.params[path]["kernel"], wanted[path]["kernel"], rtol=1e-4, atol=1e-6)
    assert float(loss(after.params, x, y)) < float(loss(params, x, y))


def test_gdumb_visits_every_row_once_a_pass(tiny_images: Any) -> None:
    """With a loss whose gradient does not depend on the parameters, training adds up a number of each row."""
    stream = tiny_stream(tiny_images, "class")

    def linear(outputs: Any, y: Any) -> Any:
        return outputs[jnp.arange(len(y)), 0] * 2.0**y

    component = gdumb(10, 6, epochs=3, batch_size=5, optimiser=optax.sgd(1.0), loss=linear)
    learner = tiny_learner(stream, component)
    x, y = jnp.asarray(tiny_images.train_images[:10]), jnp.array([0, 1, 2, 3, 4, 5, 0, 1, 2, 3])
    batch = Batch(x, y, None, jnp.ones(10))
    state, _ = learner.update(learner.init(KEY, batch), batch)
    key = jax.random.split(_key(state.key, state.step, "end_task", "gdumb"), 3)[0]
    before = mlp((4, 4), 6, hidden=(5,)).init(key, x[:1])[0]["output"]["bias"][0]
    after = learner.end_task(state).params["output"]["bias"][0]
    np.testing.assert_allclose(before - after, 3 * (2.0 ** np.asarray(y)).sum() / 5, rtol=1e-5)
