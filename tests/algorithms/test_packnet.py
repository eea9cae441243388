"""PackNet's own claims: exact shares, weights frozen to the bit, answers that never change."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_zoo import compose, packnet, run_stream, supervised
from cl_zoo.models import from_nnx, mlp
from cl_zoo.training import loop
from tests.tiny import tiny_learner, tiny_stream

KEY = jax.random.key(4)
FREE = 32767
HIDDEN = 20  # so many that of the weights left for the third task some feed units that fire
MODEL = mlp((4, 4), 6, hidden=(HIDDEN,))
RESTLESS = optax.adamw(1e-2, weight_decay=0.3)  # moves a weight without gradient


@pytest.fixture(scope="module")
def ran(tiny_images: Any) -> SimpleNamespace:
    """Three tasks under an optimiser that leaves no weight alone; the state around each task's end."""
    stream = tiny_stream(tiny_images)
    learner = compose(MODEL, RESTLESS, supervised(), packnet(0.4, 5), tasks=stream.tasks)
    begin, finish = jax.jit(loop.begin), jax.jit(loop.finish)
    train = jax.jit(lambda learner, stream, carry: loop.train_steps(learner, stream, carry, 0, stream.steps, {}, {})[0])
    _, (state, cursor) = jax.jit(loop.start)(learner, stream, KEY)
    begun, trained, ended = [], [], []
    for t in range(3):
        state = begin(learner, stream, KEY, state, jnp.int32(t))
        begun.append(state)
        state, cursor = train(learner, stream, (state, cursor))
        trained.append(state)
        state = finish(learner, stream, KEY, state, jnp.int32(t))
        ended.append(state)
    return SimpleNamespace(stream=stream, learner=learner, begun=begun, trained=trained, ended=ended)


def kernels(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(layer["kernel"]) for name, layer in tree.items()}


def test_number_of_owned_weights_is_exact(ran: SimpleNamespace) -> None:
    free, wanted = 16 * HIDDEN, []
    for state in ran.ended:
        pruned = round(0.4 * free)
        wanted.append(free - pruned)
        free = pruned
        owner = np.asarray(state.parts["packnet"].owner["hidden_0"]["kernel"])
        assert [int((owner == t).sum()) for t in range(len(wanted))] == wanted
        assert int((owner == FREE).sum()) == free
        np.testing.assert_array_equal(state.parts["packnet"].owner["hidden_0"]["bias"], 0)
    assert wanted == [192, 77, 31]


def test_smallest_are_handed_back(ran: SimpleNamespace) -> None:
    for before, after in zip(ran.trained, ran.ended, strict=True):
        weight = np.abs(kernels(before.params)["hidden_0"])
        was, now = (kernels(state.parts["packnet"].owner)["hidden_0"] for state in (before, after))
        given_back, kept = weight[(was == FREE) & (now == FREE)], weight[(was == FREE) & (now != FREE)]
        assert given_back.max() <= kept.min()


def test_each_task_owns_its_outputs_whole(ran: SimpleNamespace) -> None:
    for t, state in enumerate(ran.ended):
        owner = state.parts["packnet"].owner["output"]
        wanted = [0, 0, 1, 1, 2, 2]
        wanted = [task if task <= t else FREE for task in wanted]
        np.testing.assert_array_equal(owner["bias"], wanted)
        np.testing.assert_array_equal(owner["kernel"], np.broadcast_to(wanted, (HIDDEN, 6)))


def test_weights_of_earlier_tasks_are_frozen_to_the_bit(ran: SimpleNamespace) -> None:
    for t in (1, 2):
        owner = ran.begun[t].parts["packnet"].owner
        for later in (ran.trained[t], ran.ended[t]):
            for path, mine in jax.tree_util.tree_leaves_with_path(owner):
                old, new = (_at(state.params, path) for state in (ran.begun[t], later))
                assert old[np.asarray(mine) < t].tobytes() == new[np.asarray(mine) < t].tobytes()
        moved = kernels(ran.begun[t].params)["hidden_0"] != kernels(ran.trained[t].params)["hidden_0"]
        assert moved[kernels(owner)["hidden_0"] == FREE].any()


def _at(tree: Any, path: Any) -> np.ndarray:
    for entry in path:
        tree = tree[entry.key]
    return np.asarray(tree)


def test_free_weights_are_zero_when_a_task_begins(ran: SimpleNamespace) -> None:
    for t in (1, 2):
        free = kernels(ran.begun[t].parts["packnet"].owner)["hidden_0"] == FREE
        assert free.any()
        assert not kernels(ran.begun[t].params)["hidden_0"][free].any()


def test_retraining_moves_what_the_task_kept_and_nothing_else(ran: SimpleNamespace) -> None:
    for t, (before, after) in enumerate(zip(ran.trained, ran.ended, strict=True)):
        owner = kernels(after.parts["packnet"].owner)["hidden_0"]
        old, new = kernels(before.params)["hidden_0"], kernels(after.params)["hidden_0"]
        assert (old != new)[owner == t].any()
        assert not new[owner == FREE].any()


def test_answers_to_finished_tasks_never_change(ran: SimpleNamespace) -> None:
    predict = jax.jit(ran.learner.predict)
    for t in range(3):
        rows = ran.stream.evaluation(t, "test")
        x, task, active = rows.x[0], rows.task[0], ran.stream.tasks.active[t]
        wanted = np.asarray(predict(ran.ended[t], x, task))[:, active]
        for state in ran.trained[t + 1 :] + ran.ended[t + 1 :]:
            assert np.asarray(predict(state, x, task))[:, active].tobytes() == wanted.tobytes()
    last = ran.ended[2]
    plain, _, _ = MODEL.apply(last.params, last.model_state, x)
    first = ran.stream.tasks.active[0]
    assert np.abs(plain - predict(last, x, jnp.zeros_like(task)))[:, first].max() > 1e-3, "later weights take no part"


def test_batch_of_several_tasks(ran: SimpleNamespace) -> None:
    state, predict = ran.ended[2], jax.jit(ran.learner.predict)
    x = jnp.stack([ran.stream.evaluation(t, "test").x[0, :2] for t in range(3)])
    tasks = jnp.arange(3)
    mixed = predict(state, x.reshape(6, 4, 4), jnp.repeat(tasks, 2))
    for t in range(3):
        np.testing.assert_allclose(mixed[2 * t : 2 * t + 2], predict(state, x[t], jnp.full(2, t)), rtol=1e-6)


def test_whole_stream_keeps_every_score(ran: SimpleNamespace) -> None:
    result = run_stream(ran.learner, ran.stream, KEY)
    for t in range(3):
        assert np.unique(np.asarray(result.accuracy[t + 1 :, t])).size == 1
    assert np.asarray(result.accuracy[-1]).mean() > 0.6


def test_nothing_is_left_for_later_tasks(tiny_images: Any) -> None:
    """With prune 0 the first task takes all but the others' outputs."""
    stream = tiny_stream(tiny_images)
    for packed in (False, True):
        learner = tiny_learner(stream, supervised(), packnet(0.0, 1, pack_outputs=packed), optimiser=RESTLESS)
        state = run_stream(learner, stream, KEY).state
        owner = state.parts["packnet"].owner
        assert not np.asarray(owner["hidden_0"]["kernel"]).any()
        assert sorted(set(np.ravel(owner["output"]["kernel"]).tolist())) == ([0] if packed else [0, 1, 2])


def test_last_layer_can_be_packed(tiny_images: Any) -> None:
    stream = tiny_stream(tiny_images)
    state = run_stream(tiny_learner(stream, supervised(), packnet(0.5, 1, pack_outputs=True)), stream, KEY).state
    owner = np.asarray(state.parts["packnet"].owner["output"]["kernel"])
    assert [int((owner == t).sum()) for t in (0, 1, 2, FREE)] == [15, 7, 4, 4]
    np.testing.assert_array_equal(state.parts["packnet"].owner["output"]["bias"], 0)


def test_what_it_cannot_do_without(tiny_images: Any) -> None:
    stream = tiny_stream(tiny_images, "domain")
    with pytest.raises(ValueError, match="packnet needs 'task_ids'"):
        run_stream(tiny_learner(stream, supervised(), packnet()), stream, KEY)
    from flax import nnx

    stream = tiny_stream(tiny_images)
    flat = from_nnx(lambda rngs: nnx.Linear(16, 6, rngs=rngs), preprocess=lambda x: x.reshape((-1, 16)) / 255)
    learner = compose(flat, optax.sgd(0.1), supervised(), packnet(), tasks=stream.tasks)
    with pytest.raises(ValueError, match="packnet: the model records no taps, so its last layer is unknown"):
        run_stream(learner, stream, KEY)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: packnet(1.5), r"packnet: prune is 1.5, but it must be in \[0, 1\]"),
        (lambda: packnet(0.5, 2.5), "packnet: retrain_steps is 2.5, but it must be a whole number"),
    ],
)
def test_impossible_numbers_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
