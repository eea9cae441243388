"""Streams from arrays of one's own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_zoo import compose, run_stream, supervised
from cl_zoo.losses import squared_error
from cl_zoo.models import mlp
from cl_zoo.streams import task_stream

KEY = jax.random.key(1)
RANDOM = np.random.default_rng(3)
SIZES = (21, 5, 12)
LABELS = ([0, 3], [1, 2, 5], [4])


def task(n: int, labels: Any, features: int = 4) -> tuple[np.ndarray, np.ndarray]:
    y = np.resize(labels, n)
    return RANDOM.normal(size=(n, features)) + y[:, None], y


TASKS = [task(n, labels) for n, labels in zip(SIZES, LABELS, strict=True)]
TESTS = [task(n, labels) for n, labels in zip((3, 7, 0), LABELS, strict=True)]


def batches(stream: Any) -> list[list[Any]]:
    """Those of each task, as a run gets them."""
    cursor, found = stream.init(KEY), []
    lengths = [stream.steps] * stream.n_tasks if stream.task_steps is None else stream.task_steps.tolist()
    for length in lengths:
        found.append([])
        for _ in range(length):
            batch, cursor = jax.jit(stream.next)(cursor)
            found[-1].append(batch)
    return found


def test_every_example_comes_once_an_epoch_and_batches_are_filled_up() -> None:
    stream = task_stream(TASKS, tests=TESTS, batch_size=8, epochs=[1, 3, 2])
    assert stream.task_steps.tolist() == [3, 3, 4]
    for (x, y), given, epochs in zip(TASKS, batches(stream), (1, 3, 2), strict=True):
        rows = np.concatenate([np.asarray(b.x)[np.asarray(b.weight) > 0] for b in given])
        labels = np.concatenate([np.asarray(b.y)[np.asarray(b.weight) > 0] for b in given])
        assert len(rows) == epochs * len(x) and all(b.x.shape == (8, 4) for b in given)
        per_epoch = rows.reshape(epochs, *x.shape)
        order = [np.argsort(one[:, 0]) for one in per_epoch]
        for one, place, label in zip(per_epoch, order, labels.reshape(epochs, -1), strict=True):
            np.testing.assert_allclose(one[place], x[np.argsort(x[:, 0])], rtol=1e-6)
            np.testing.assert_array_equal(label[place], y[np.argsort(x[:, 0])])
        assert epochs == 1 or any((order[0] != other).any() for other in order[1:])


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, ["100100", "111101", "111111"]),
        ({"classes": 8}, ["10010000", "11110100", "11111100"]),
        ({"classes": 8, "outputs": "all"}, ["11111111"] * 3),
        ({"scenario": "task"}, ["100100", "011001", "000010"]),
        ({"scenario": "domain"}, ["111111"] * 3),
        ({"scenario": "task", "classes": [[0, 3, 6], [1, 2, 5], [4]]}, ["1001001", "0110010", "0000100"]),
    ],
)
def test_active_outputs(options: Any, wanted: list[str]) -> None:
    stream = task_stream(TASKS, tests=TESTS, batch_size=4, **options)
    assert ["".join(map(str, row)) for row in stream.tasks.active.astype(int).tolist()] == wanted
    batch, _ = stream.next(stream.init(KEY))
    assert (batch.task is None) == (options.get("scenario") != "task")


def test_balanced_batches() -> None:
    """18 of class 0, 3 of class 3: as often; of each class its examples in turn, all before one comes again."""
    y = np.array([0] * 18 + [3] * 3 + [-1] * 2)
    tasks = [(np.arange(23.0)[:, None], y), task(12, [1, 2, 5], 1)]
    stream = task_stream(tasks, tests=0, balanced=True, batch_size=6, steps=[6, 3], scenario="task")
    one, two = batches(stream)
    for batch in one:
        assert sorted(batch.y.tolist()) == [0] * 3 + [3] * 3 and batch.weight.min() == 1
    rare = np.concatenate([np.asarray(b.x)[np.asarray(b.y) == 3, 0] for b in one]).reshape(6, 3)
    assert all(sorted(turn) == [18, 19, 20] for turn in rare.tolist()) and len({tuple(turn) for turn in rare}) > 1
    common = np.concatenate([np.asarray(b.x)[np.asarray(b.y) == 0, 0] for b in one])
    assert sorted(common) == list(range(18))
    for batch in two:
        assert sorted(batch.y.tolist()) == [1, 1, 2, 2, 5, 5]
    assert jax.tree.structure(stream.first(1)) == jax.tree.structure(
        task_stream(tasks[:1], tests=0, balanced=True, batch_size=6, steps=[6], scenario="task", classes=6)
    )


def test_evaluation_has_all_test_examples() -> None:
    stream = task_stream(TASKS, tests=TESTS, validation=0.2, batch_size=4, evaluation_batch=3)
    for t, (x, y) in enumerate(TESTS):
        found = stream.evaluation(t, "test")
        kept = np.asarray(found.weight).ravel() > 0
        np.testing.assert_array_equal(np.sort(np.asarray(found.y).ravel()[kept]), np.sort(y))
        assert kept.sum() == len(x)
    kept = [int(stream.evaluation(t, "validation").weight.sum()) for t in range(3)]
    assert kept == [4, 1, 2] and stream.data.count[0].tolist() == [17, 4, 10]


def test_held_out_examples_are_no_training_examples_and_stay_so_when_tasks_are_added() -> None:
    fewer, more = task_stream(TASKS[:2], classes=6, tests=0.3), task_stream(TASKS, classes=6, tests=0.3)
    for place, split in ((0, "train"), (2, "test")):
        end = int(fewer.data.count[place].sum())
        np.testing.assert_array_equal(fewer.data.x[split], more.data.x[split][:end])
    train, test = (np.asarray(more.data.x[split])[:, 0] for split in ("train", "test"))
    assert not set(train) & set(test) and len(train) + len(test) == sum(SIZES)


def test_the_first_tasks_are_a_stream_of_their_own() -> None:
    whole, few = task_stream(TASKS, classes=6, tests=TESTS), task_stream(TASKS[:2], classes=6, tests=TESTS[:2])
    cut = whole.first(2)
    assert jax.tree.structure(cut) == jax.tree.structure(few)  # one program serves both
    jax.tree.map(np.testing.assert_array_equal, cut, few)
    with pytest.raises(ValueError, match=r"n_tasks is 4, but it must be in \[1, 3\]"):
        whole.first(4)


def test_targets_that_are_not_labels() -> None:
    """Learned, scored by minus the squared error; several arrays in x."""
    x = RANDOM.normal(size=(200, 3))
    tasks = [({"a": x[:, :2], "b": x[:, 2:]}, (x @ w)[:, None]) for w in RANDOM.normal(size=(2, 3))]
    stream = task_stream(tasks, scenario="domain", batch_size=20, epochs=30)
    net = mlp((3,), 1, hidden=())
    joined = lambda x: jnp.concatenate([x["a"], x["b"]], axis=-1)  # noqa: E731
    model = net.__class__(lambda key, x: net.init(key, joined(x)), lambda p, s, x, **o: net.apply(p, s, joined(x), **o))
    result = run_stream(compose(model, optax.adam(0.05), supervised(squared_error)), stream, KEY)
    assert result.accuracy[1, 0] > -0.01 > result.accuracy[0, 0]


class Frame:
    """What a DataFrame is to NumPy."""

    def __init__(self, values: Any):
        self.values = np.asarray(values)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.values if dtype is None else self.values.astype(dtype)


def test_frames_lists_and_examples_without_a_label() -> None:
    x, y = TASKS[0]
    given = [(Frame(x), Frame(y)), (x.tolist(), y.tolist()), (x, np.where(np.arange(len(y)) < 5, -1, y))]
    stream = task_stream(given, tests=0, batch_size=7)
    assert stream.tasks.active.tolist() == [[True, False, False, True]] * 3
    np.testing.assert_array_equal(stream.data.x["train"][:21], stream.data.x["train"][21:42])


def test_one_epoch_of_small_tasks_learns(capfd: Any) -> None:
    """A task of five examples, fewer than a batch, is learned."""
    stream = task_stream(TASKS, tests=TASKS, batch_size=16, epochs=40, scenario="task")
    result = run_stream(compose(mlp((4,), 6), optax.adam(0.01), supervised(), tasks=stream.tasks), stream, KEY)
    assert result.accuracy[2, 1] > 0.9 and np.isfinite(result.metrics["loss"][1, :40]).all()


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        ([], {}, "tasks is empty"),
        ([TASKS[0][0]], {}, r"tasks\[0\] is ndarray, but it must be a pair"),
        ([(TASKS[0][0], TASKS[1][1])], {}, "arrays of 21 and 5 examples|arrays of 5 and 21 examples"),
        ([TASKS[0], (TASKS[1][0][:, :2], TASKS[1][1])], {}, r"tasks\[1\] has examples .* but those of tasks\[0\]"),
        ([TASKS[0], (TASKS[1][0].astype(np.uint8), TASKS[1][1])], {}, "uint8.*float32"),
        ([(TASKS[0][0], TASKS[0][1].astype(str))], {}, "y of tasks.* is <U.*np.unique"),
        ([(np.where(TASKS[0][0] > 3, np.nan, TASKS[0][0]), TASKS[0][1])], {}, "x of tasks.*has nan"),
        ([(TASKS[0][0], TASKS[0][1] - 5)], {}, "task 0 has the label -5"),
        ([(TASKS[0][0], np.full(21, -1))], {}, "task 0 has no label"),
        ([(TASKS[0][0], TASKS[0][1] * 1.5)], {}, 'give scenario="domain" and no classes'),
        (TASKS, {"classes": 4}, "classes is 4, but y has the label 5; it must be at least 6"),
        (TASKS, {"classes": [[0, 3], [1, 2]]}, "classes has 2 lists, but there are 3 tasks"),
        (TASKS, {"classes": [[0, 3], [1, 2], [4]]}, r"task 1 has the label 5, but classes\[1\] has not"),
        (TASKS, {"tests": TESTS[:2]}, "tests has 2 pairs, but there are 3 tasks"),
        (TASKS, {"tests": 1.5}, r"tests is 1.5, but it must be in \[0, 0.999\]"),
        (TASKS, {"steps": [1, 2]}, "steps has 2 numbers, but there are 3 tasks"),
        (TASKS, {"steps": 0}, "steps is 0"),
        (TASKS, {"epochs": 0}, "epochs is 0"),
        (TASKS, {"batch_size": 0}, "batch_size is 0"),
        (TASKS, {"scenario": "tasks"}, "scenario is 'tasks'"),
        ([(TASKS[0][0][:0], TASKS[0][1][:0])], {}, "task 0 has no training examples"),
        (TASKS, {"sample_sizes": 3}, "sample_sizes"),
        (TASKS, {"balanced": True, "joint": "seen"}, "joint is 'seen', but balanced"),
    ],
)
def test_careless_input(tasks: Any, options: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        task_stream(tasks, **options)
