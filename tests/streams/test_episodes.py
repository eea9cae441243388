"""Streams whose rows are learning problems."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_zoo import Batch, Model, Stream, compose, run_stream, supervised
from cl_zoo.datasets import FewShotImages, LabelledImages
from cl_zoo.models import mlp
from cl_zoo.streams import few_shot, sinusoids, trajectories
from tests.streams.test_images import largest_constant
from tests.tiny import close, raw, same_bytes

KEY = jax.random.key(7)
PER_CLASS = 12  # images of each class of `marked`


@cache
def compiled(function: Any, *static: int) -> Any:
    return jax.jit(function, static_argnums=static)


def first(stream: Stream, key: Any = KEY, step: int = 0) -> Batch:
    """The batch at a step."""
    cursor = stream.init(key)._replace(step=jnp.int32(step))
    return compiled(Stream.next)(stream, cursor)[0]


def held_out(stream: Stream, task: int = 0, split: str = "test") -> Batch:
    return compiled(Stream.evaluation, 2)(stream, jnp.int32(task), split)


def sampled(stream: Stream, task: int = 0, key: Any = KEY) -> Batch:
    return compiled(Stream.sample)(stream, jnp.int32(task), key)


def fitted(batch: Batch, row: int) -> tuple[float, float, float]:
    """Amplitude and phase of a sinusoid by least squares on its support, and the largest error of that on the query."""
    x, y = np.asarray(batch.x.support_x[row, :, 0], np.float64), np.asarray(batch.x.support_y[row], np.float64)
    (a, b), *_ = np.linalg.lstsq(np.stack([np.sin(x), np.cos(x)], 1), y, rcond=None)
    q = np.asarray(batch.x.query_x[row, :, 0], np.float64)
    worst = np.abs(a * np.sin(q) + b * np.cos(q) - np.asarray(batch.y[row])).max()
    return float(np.hypot(a, b)), float(np.arctan2(-b, a)), float(worst)


def uniform(values: Any, low: float, high: float) -> bool:
    """Whether the empirical distribution function is as near U(low, high) as in all but one of 10^5 samples."""
    values = np.sort((np.ravel(values) - low) / (high - low))
    assert values[0] >= -1e-3 and values[-1] <= 1.001
    n = len(values)
    return float(np.abs(values - (np.arange(n) + 0.5) / n).max()) < np.sqrt(np.log(2e5) / 2 / n) + 1e-3


def marked(n_classes: int, per_class: int = PER_CLASS, side: int = 2) -> LabelledImages:
    """Each image says its class, its row in it, and, in its other corners, how it is turned."""
    labels = np.tile(np.arange(n_classes), per_class)
    images = np.zeros((len(labels), side, side), np.uint8)
    images[:, 0, 0], images[:, 0, 1] = labels + 1, np.arange(len(labels)) // n_classes + 101
    half = len(labels) // 2
    return LabelledImages(images[:half], labels[:half], images[half:], labels[half:])


def read(images: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Class, row and quarter turns of marked images `[..., 2, 2]`."""
    images = np.asarray(images)
    quarters = np.zeros(images.shape[:-2], int)
    upright = images.copy()
    for k in range(1, 4):
        turned = np.rot90(images, -k, axes=(-2, -1))
        mine = (turned[..., 0, 0] > 0) & (turned[..., 0, 1] > 100)
        upright[mine], quarters[mine] = turned[mine], k
    assert (upright[..., 0, 1] > 100).all()
    return upright[..., 0, 0].astype(int) - 1, upright[..., 0, 1].astype(int) - 101, quarters


# Sinusoids


def test_sinusoids_are_those_of_the_protocol() -> None:
    stream = sinusoids(batch_size=2000, shots=5, queries=3)
    batch = first(stream)
    assert [leaf.shape for leaf in batch.x] == [(2000, 5, 1), (2000, 5), (2000, 3, 1)] and batch.y.shape == (2000, 3)
    assert {leaf.dtype for leaf in jax.tree.leaves(batch)} == {jnp.dtype("float32")}
    assert batch.task is None and (batch.weight == 1).all()
    assert stream.tasks.active.tolist() == [[True]]
    assert stream.provides == {"boundaries", "begin_sample", "end_sample", "open_outputs"}
    amplitude, phase, worst = np.array([fitted(batch, row) for row in range(2000)]).T
    well = worst < 1e-3  # five points near each other fix no sinusoid
    assert well.mean() > 0.99
    assert uniform(amplitude[well], 0.1, 5.0) and uniform(phase[well], 0.0, np.pi)
    assert uniform(batch.x.support_x, -5, 5) and uniform(batch.x.query_x, -5, 5)
    assert abs(np.corrcoef(amplitude[well], phase[well])[0, 1]) < 0.1
    assert not uniform(amplitude[well], 0.1, 5.5), "the test sees a range that is 10 % off"


def test_each_task_is_a_family_of_its_own() -> None:
    stream = sinusoids(3, steps=2, batch_size=200, amplitude=[(0.1, 1), (2, 3), (4, 5)], x_range=(0, 6), task_ids=True)
    assert "task_ids" in stream.provides
    for step, task in ((0, 0), (1, 0), (2, 1), (5, 2), (99, 2)):
        batch = first(stream, step=step)
        amplitude, phase, worst = np.array([fitted(batch, row) for row in range(200)]).T
        well = worst < 1e-3
        low, high = [(0.1, 1), (2, 3), (4, 5)][task]
        assert uniform(amplitude[well], low, high)
        assert uniform(phase[well], task * np.pi / 3, (task + 1) * np.pi / 3)  # [0, pi] in three parts
        assert (batch.task == task).all() and batch.task.dtype == jnp.int32
        assert uniform(batch.x.query_x, 0, 6)
    for rows in (held_out(stream, 1), sampled(stream, 1)):
        found = [fitted(jax.tree.map(lambda leaf: leaf[0], rows), row)[0] for row in range(50)]
        assert 2 <= np.median(found) <= 3 and (rows.task == 1).all()


def test_another_order_of_families() -> None:
    stream = sinusoids(6, steps=1, amplitude=[(i, i + 1) for i in range(6)])
    orders = {tuple(np.asarray(stream.reorder(jax.random.key(i)).data.amplitude[:, 0])) for i in range(4)}
    assert len(orders) > 1 and all(sorted(order) == [0, 1, 2, 3, 4, 5] for order in orders)
    other = stream.reorder(KEY)
    data = other.data
    np.testing.assert_array_equal(np.floor(data.phase[:, 0] / (np.pi / 6) + 0.01), data.amplitude[:, 0])
    amplitude = fitted(first(other, step=2), 0)[0]
    assert data.amplitude[2, 0] - 1e-3 <= amplitude <= data.amplitude[2, 1] + 1e-3


def test_score_of_a_sinusoid_is_minus_its_mean_squared_error() -> None:
    stream = sinusoids()
    batch = Batch(None, jnp.array([[0.0, 1.0], [2.0, 2.0]]), None, jnp.ones(2))
    np.testing.assert_allclose(stream.score(jnp.array([[[1.0], [4.0]], [[2.0], [2.0]]]), batch), [-5.0, 0.0])


# Few-shot classes


@pytest.mark.parametrize("rotations", [False, True])
def test_episodes_of_classes(rotations: bool) -> None:
    n_way, shots, queries = 3, 2, 4
    stream = few_shot(
        marked(9),
        n_way=n_way,
        shots=shots,
        queries=queries,
        batch_size=600,
        test_classes=[1, 4, 8],
        rotations=rotations,
    )
    batch = first(stream)
    assert batch.x.support_x.shape == (600, 6, 2, 2) and batch.x.support_x.dtype == jnp.uint8
    assert batch.x.query_x.shape == (600, 12, 2, 2) and batch.x.query_x.dtype == jnp.uint8
    assert batch.x.support_y.shape == (600, 6) and batch.y.shape == (600, 12) and batch.y.dtype == jnp.int32
    assert stream.tasks.active.tolist() == [[True] * 3] and batch.task is None
    pixels = np.concatenate([batch.x.support_x, batch.x.query_x], axis=1)
    y = np.concatenate([batch.x.support_y, batch.y], axis=1)
    label, row, quarter = read(pixels)
    kind = label * 4 + quarter  # a turned class is another class
    assert set(label.ravel()) == {0, 2, 3, 5, 6, 7}
    assert set(quarter.ravel()) == (set(range(4)) if rotations else {0})
    assert set(row.ravel()) == set(range(PER_CLASS)), "training and test images of a class are pooled"
    for b in range(600):
        classes = [set(kind[b, y[b] == way].tolist()) for way in range(n_way)]
        assert all(len(mine) == 1 for mine in classes) and len(set.union(*classes)) == n_way
        assert np.bincount(y[b, :6]).tolist() == [shots] * 3 and np.bincount(y[b, 6:]).tolist() == [queries] * 3
        assert len(set(zip(kind[b].tolist(), row[b].tolist(), strict=True))) == 18, "an image came twice"
    # Every class has every label, every row of a class comes, and every place has every label, equally often.
    kinds = np.unique(kind)
    assert len(kinds) == (24 if rotations else 6)
    chances = []
    for mine in kinds:
        came = np.array([(y[b, np.argmax(kind[b] == mine)]) for b in range(600) if (kind[b] == mine).any()])
        chances.append(np.bincount(came, minlength=3))
    chances = np.array(chances)
    assert_even(chances.sum(1))
    assert_even(chances.ravel())
    assert_even(np.bincount(row.ravel()))
    for place in range(18):
        assert_even(np.bincount(y[:, place]))


def assert_even(counts: np.ndarray) -> None:
    """Within five standard deviations of draws of equal chance."""
    mean = counts.mean()
    assert (np.abs(counts - mean) < 5 * np.sqrt(mean)).all(), counts


def test_labels_of_an_episode_are_a_uniform_permutation() -> None:
    stream = few_shot(
        marked(6), n_way=3, shots=1, queries=1, batch_size=6000, train_classes=[0, 1, 5], test_classes=[2, 3, 4]
    )
    batch = first(stream)
    label = read(batch.x.query_x)[0]
    order = np.take_along_axis(label, np.argsort(np.asarray(batch.y), axis=1), axis=1)
    permutations, counts = np.unique(order, axis=0, return_counts=True)
    assert len(permutations) == 6
    assert_even(counts)


def classes_of(batch: Batch) -> set[int]:
    return set(read(np.concatenate([batch.x.support_x, batch.x.query_x], axis=-3))[0].ravel().tolist())


def test_splits_and_tasks_share_no_classes() -> None:
    stream = few_shot(
        marked(20),
        n_tasks=3,
        steps=2,
        n_way=2,
        queries=2,
        batch_size=60,
        validation_classes=0.3,
        test_classes=[0, 2, 4, 6, 8, 10, 12],
        evaluation_size=90,
    )
    train = [classes_of(first(stream, step=step)) for step in (0, 2, 4)]
    assert train == [classes_of(sampled(stream, task)) for task in range(3)]
    assert classes_of(first(stream, step=1)) == train[0] and classes_of(first(stream, step=50)) == train[2]
    validation = [classes_of(held_out(stream, task, "validation")) for task in range(3)]
    test = [classes_of(held_out(stream, task)) for task in range(3)]
    assert train == [{1, 3}, {5, 7}, {9, 11}]  # one is left over
    assert validation == [{14, 15}, {16, 17}, {18, 19}]
    assert test == [{0, 2}, {4, 6}, {8, 10}]


def test_tasks_are_dealt_other_classes_of_the_same_split() -> None:
    options: dict[str, Any] = {"n_tasks": 3, "n_way": 2, "queries": 2, "validation_classes": [5, 6, 7, 8, 9, 17]}
    stream = few_shot(marked(18), **options, test_classes=[0, 1, 2, 3, 4, 10])
    keys = jax.random.split(jax.random.key(0), 4)
    one_copy = stream.data._replace(images=None, start=None, count=None, train=0, validation=0, test=0)
    drawn = jax.jit(jax.vmap(lambda s, k: s.reorder(k).data, in_axes=(None, 0), out_axes=one_copy))(stream, keys)
    for split in ("train", "validation", "test"):
        before, after = np.asarray(getattr(stream.data, split)), np.asarray(getattr(drawn, split))
        assert len({order.tobytes() for order in after}) > 1
        for order in after:
            assert sorted(order.ravel()) == sorted(before.ravel()) and order.dtype == np.int32
    same_bytes(drawn.images, stream.data.images)
    again = few_shot(marked(18), **options, test_classes=[0, 1, 2, 3, 4, 10], key=keys[1])
    np.testing.assert_array_equal(again.data.test, drawn.test[1])
    other = stream.reorder(keys[1])
    assert classes_of(first(other, step=0)) <= set(other.data.train[0].tolist())
    assert classes_of(held_out(other, 2, "validation")) <= set(other.data.validation[2].tolist())


def test_all_turns_of_a_class_are_in_one_task() -> None:
    stream = few_shot(marked(8), n_tasks=2, steps=1, n_way=5, queries=1, batch_size=100, rotations=True)
    for task, mine in ((0, {0, 1}), (1, {2, 3})):
        label, _, quarter = read(first(stream, step=task).x.query_x)
        assert set(label.ravel()) == mine and len(set(zip(label.ravel(), quarter.ravel(), strict=True))) == 8


def test_turned_images_with_channels_equal_rot90() -> None:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (8, 4, 4, 3)).astype(np.uint8)
    few = FewShotImages(images, np.repeat(np.arange(2), 4), np.array([0]), np.array([]), np.array([1]))
    batch = first(few_shot(few, n_way=4, queries=1, rotations=True, batch_size=50))
    turned = {np.rot90(image, k).tobytes(): (i, k) for i, image in enumerate(images[:4]) for k in range(4)}
    found = [[turned[np.asarray(image).tobytes()] for image in row] for row in np.asarray(batch.x.query_x)]
    assert {place for row in found for place in row} == set(turned.values())
    assert all(sorted(k for _, k in row) == [0, 1, 2, 3] for row in found)


def test_an_image_set_brings_its_own_split() -> None:
    pooled = marked(9)
    images = np.concatenate([pooled.train_images, pooled.test_images])
    labels = np.concatenate([pooled.train_labels, pooled.test_labels])
    few = FewShotImages(images, labels, np.array([8, 1, 3, 5]), np.array([0, 2]), np.array([4, 6]))
    stream = few_shot(few, n_way=2, queries=2)
    assert [set(getattr(stream.data, s).ravel().tolist()) for s in ("train", "validation", "test")] == [
        {1, 3, 5, 8},
        {0, 2},
        {4, 6},
    ]
    changed = few_shot(few, n_way=2, queries=2, test_classes=[1, 4])  # 1 leaves the training classes
    assert changed.data.train.tolist() == [[3, 5, 8]] and changed.data.validation.tolist() == [[0, 2]]


def test_digits_are_the_default() -> None:
    stream = few_shot(shots=5)
    assert stream.data.images.shape == (12000, 28, 28) and stream.data.count.tolist() == [1200] * 10
    assert stream.data.train.tolist() == [[0, 1, 2, 3, 4]] and stream.data.test.tolist() == [[5, 6, 7, 8, 9]]
    assert first(stream).x.support_x.shape == (4, 25, 28, 28)


def test_score_of_an_episode_is_its_accuracy() -> None:
    stream = few_shot(marked(4), n_way=2, queries=2)
    batch = Batch(None, jnp.array([[0, 1], [1, 1]]), None, jnp.ones(2))
    outputs = jnp.array([[[2.0, 1.0], [3.0, 0.0]], [[-2.0, 1.0], [0.0, 1.0]]])
    assert stream.score(outputs, batch).tolist() == [0.5, 1.0]


# What both have in common


@pytest.fixture(scope="module", params=["sinusoids", "few_shot"])
def stream(request: pytest.FixtureRequest) -> Stream:
    sizes: dict[str, Any] = {"n_tasks": 2, "steps": 3, "batch_size": 4, "queries": 2}
    sizes |= {"sample_size": 5, "evaluation_size": 10, "evaluation_batch": 4}
    if request.param == "sinusoids":
        return sinusoids(**sizes)
    return few_shot(marked(12), n_way=2, validation_classes=[0, 1, 2, 3], test_classes=[8, 9, 10, 11], **sizes)


def same(a: Batch, b: Batch) -> bool:
    """Whether two batches have an episode in common."""
    rows = [
        [b"".join(raw(leaf[i]).tobytes() for leaf in jax.tree.leaves((batch.x, batch.y))) for i in range(len(batch.y))]
        for batch in (a, b)
    ]
    return bool(set(rows[0]) & set(rows[1]))


def flat(batch: Batch) -> Batch:
    return jax.tree.map(lambda leaf: leaf.reshape((-1, *leaf.shape[2:])), batch)


def test_episodes_follow_from_key_and_step(stream: Stream) -> None:
    same_bytes(first(stream, step=1), first(stream, step=1))
    step = lambda cursor, _: stream.next(cursor)[::-1]  # noqa: E731
    cursor, batches = jax.jit(lambda: jax.lax.scan(step, stream.init(KEY), length=7))()
    assert int(cursor.step) == 7
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], batches) for i in range(7)]
    for i in range(7):
        same_bytes(each[i], first(stream, step=i))
        assert not any(same(each[i], each[j]) for j in range(i))
        assert not same(each[i], first(stream, key=jax.random.key(8), step=i))
        assert len({raw(row).tobytes() for row in jax.tree.leaves(each[i].x)[-1]}) == 4, "rows of a batch differ"


def test_many_keys_are_the_single_ones(stream: Stream) -> None:
    keys = jax.random.split(KEY, 3)
    many = jax.jit(jax.vmap(lambda stream, key: stream.next(stream.init(key))[0], (None, 0)))(stream, keys)
    for i, key in enumerate(keys):
        one = first(stream, key=key)
        for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6)


def test_evaluation_is_fixed_and_differs_by_split_and_task(stream: Stream) -> None:
    sets = {(task, split): held_out(stream, task, split) for task in (0, 1) for split in ("validation", "test")}
    for (task, split), rows in sets.items():
        close(rows, stream.evaluation(task, split), rtol=1e-5, atol=1e-5)  # another program
        assert rows.y.shape[:2] == (3, 4) == rows.weight.shape
        assert np.ravel(rows.weight).tolist() == [1.0] * 10 + [0.0] * 2
    each = [*map(flat, sets.values()), *(first(stream, step=i) for i in range(6))]
    each += [first(stream, key=jax.random.key(0), step=i) for i in range(2)]
    for i in range(len(each)):
        assert not any(same(each[i], each[j]) for j in range(i))


def test_samples_are_of_their_key(stream: Stream) -> None:
    rows = sampled(stream, 1)
    assert rows.y.shape[:2] == (2, 4) and np.ravel(rows.weight).tolist() == [1.0] * 5 + [0.0] * 3
    same_bytes(rows, sampled(stream, 1))
    assert not same(flat(rows), flat(sampled(stream, 1, jax.random.key(8))))
    assert not same(flat(rows), flat(sampled(stream, 0)))


def test_a_run_learns_what_all_episodes_share() -> None:
    """One network for all sinusoids of two narrow families: it answers without a look at the support."""
    stream = sinusoids(2, steps=300, amplitude=(1.0, 1.2), phase=[(0.0, 0.1), (3.0, 3.1)], evaluation_size=40)
    net = mlp((1,), 1, hidden=(20,))

    def apply(params: Any, model_state: Any, x: Any, **options: Any) -> Any:
        outputs, model_state, _ = net.apply(params, model_state, x.query_x.reshape(-1, 1), train=options.get("train"))
        return outputs.reshape(*x.query_x.shape[:2], 1), model_state, {}

    def error(outputs: Any, y: Any) -> Any:
        return jnp.mean(jnp.square(outputs[..., 0] - y), axis=1)

    model = Model(lambda key, x: net.init(key, x.query_x.reshape(-1, 1)), apply)
    learner = compose(model, optax.adam(1e-2), supervised(error), tasks=stream.tasks)
    scores = np.asarray(run_stream(learner, stream, KEY).accuracy)
    assert scores.shape == (3, 2) and (scores <= 0).all()
    assert scores[1, 0] > -0.1 > scores[0, 0] and scores[2, 1] > -0.1
    assert scores[1, 1] < -1 and scores[2, 0] < -1, "the second family is the first, upside down"


def test_no_program_holds_the_images(digits: LabelledImages) -> None:
    stream = few_shot(digits, steps=10, evaluation_size=20, sample_size=20)
    for program in (
        lambda stream, key: stream.next(stream.init(key)),
        lambda stream, key: stream.sample(0, key),
        lambda stream, key: stream.evaluation(0, "test"),
        Stream.reorder,
    ):
        assert largest_constant(jax.make_jaxpr(program)(stream, KEY)) < 2**20


# Bad values


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n_tasks": 0}, "n_tasks is 0"),
        ({"shots": 0}, "shots is 0"),
        ({"queries": 1.5}, "queries is 1.5, but it must be a whole number"),
        ({"batch_size": 0}, "sinusoids: batch_size is 0, but it must be at least 1"),
        ({"steps": 0}, "steps is 0"),
        ({"evaluation_size": 0}, "evaluation_size is 0"),
        ({"evaluation_batch": 0}, "evaluation_batch is 0"),
        ({"sample_size": 0}, "sample_size is 0"),
        ({"amplitude": (-1, 2)}, "amplitude is -1, but it must be at least 0"),
        ({"amplitude": (2, 1)}, r"amplitude is \(2, 1\), but it must be \(low, high\), low at most high"),
        ({"phase": (0, float("nan"))}, r"phase is \(0, nan\)"),
        ({"x_range": (0, float("inf"))}, r"x_range is \(0, inf\)"),
        ({"amplitude": 5}, "amplitude is 5, but it must be 2 values, each a finite number"),
        ({"n_tasks": 3, "phase": [(0, 1), (1, 2)]}, r"phase is \[.*a pair \(low, high\), or 3 such pairs"),
        ({"phase": [(0, 1), (1,)]}, "phase is .*, but it must be 2 values"),
    ],
)
def test_impossible_sinusoids_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        sinusoids(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n_way": 1}, "n_way is 1, but it must be at least 2"),
        ({"n_way": 4}, "n_way is 4, but each of 1 tasks has 3 train classes, of 3 in all"),
        ({"n_tasks": 2, "n_way": 2}, "n_way is 2, but each of 2 tasks has 1 train classes, of 3 in all"),
        ({"n_tasks": 0}, "n_tasks is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"shots": 0}, "shots is 0"),
        ({"queries": 0}, "queries is 0"),
        ({"shots": 8, "queries": 5}, "shots is 8 and queries is 5, but class 0 has only 12 images"),
        ({"rotations": 2}, "rotations is 2"),
        ({"test_classes": 1.5}, r"test_classes is 1.5, but it must be in \[0, 1\]"),
        ({"validation_classes": float("nan")}, "validation_classes is nan"),
        ({"n_way": 2, "test_classes": 0.2}, "n_way is 2, but each of 1 tasks has 1 test classes"),
        ({"n_way": 2, "validation_classes": 0.2}, "n_way is 2, but each of 1 tasks has 1 validation classes"),
        ({"train_classes": 0.5}, "train_classes is 0.5, but it must be a sequence"),
        ({"test_classes": [3, 4, 6]}, "test_classes has 6, but there are images of 6 classes, from 0 to 5"),
        (
            {"test_classes": [3, 4, 1.5]},
            r"test_classes is \[3, 4, 1.5\], but it must be a sequence, each a whole number",
        ),
        ({"test_classes": [3, 4, 4]}, "test_classes has 4, but a class must be in one split only, and once"),
        ({"train_classes": [0, 1, 4]}, "train_classes has 4, but a class must be in one split only"),
    ],
)
def test_impossible_classes_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        few_shot(marked(6), **{"n_way": 3, "queries": 2, **options})
    assert "\n" not in str(error.value)


def test_images_that_cannot_be_used_are_refused() -> None:
    images = marked(6)
    with pytest.raises(ValueError, match=r"images of \(2, 1\) pixels are not square"):
        few_shot(LabelledImages(*[a[:, :, :1] if a.ndim == 3 else a for a in images]), rotations=True)
    with pytest.raises(ValueError, match=r"labels has the shape \(71,\), but it must be \(72,\)"):
        few_shot(images._replace(test_labels=images.test_labels[1:]), queries=2)


def test_splits_that_are_not_there_are_refused() -> None:
    stream = few_shot(marked(6), n_way=3, queries=2)
    with pytest.raises(ValueError, match="there are no validation classes; hold some out with validation_classes"):
        stream.evaluation(0, "validation")
    with pytest.raises(ValueError, match="split is 'train', but it must be one of 'validation', 'test'"):
        stream.evaluation(0, "train")


def test_trajectories_walk_class_by_class_and_ask_for_all(tiny_images: Any) -> None:
    stream = trajectories(
        tiny_images, steps=5, n_way=2, shots=3, remembered=40, queries=4, batch_size=6, test_classes=(1, 4),
        evaluation_size=8, evaluation_batch=4,
    )  # fmt: skip
    assert stream.tasks.active.shape == (1, 4)
    pooled = np.concatenate([tiny_images.train_images, tiny_images.test_images])
    label_of = np.concatenate([tiny_images.train_labels, tiny_images.test_labels])

    def classes_of(x: Any) -> np.ndarray:
        flat = np.asarray(x).reshape((-1, 1, 16)) == pooled.reshape((1, -1, 16))
        return label_of[flat.all(-1).argmax(1)].reshape(x.shape[:-2])

    batch, _ = stream.next(stream.init(jax.random.key(0)))
    train = np.array([0, 2, 3, 5])
    for x, y in ((batch.x.support_x, batch.x.support_y), (batch.x.query_x, batch.y)):
        np.testing.assert_array_equal(classes_of(x), train[np.asarray(y)])
    walked = np.asarray(batch.x.support_y).reshape((6, 2, 3))
    assert (walked == walked[:, :, :1]).all() and (walked[:, 0, 0] != walked[:, 1, 0]).all()
    np.testing.assert_array_equal(batch.x.query_x[:, :6], batch.x.support_x)
    assert set(np.ravel(batch.y[:, 6:])) == {0, 1, 2, 3}
    tests = stream.evaluation(0, "test")
    np.testing.assert_array_equal(classes_of(tests.x.support_x), np.array([1, 4])[np.asarray(tests.x.support_y)])
    np.testing.assert_array_equal(classes_of(tests.x.query_x), np.array([1, 4])[np.asarray(tests.y)])
    shown = np.asarray(tests.x.support_x).reshape((8, 6, 16))
    for asked, seen in zip(np.asarray(tests.x.query_x).reshape((8, 8, 16)), shown, strict=True):
        assert not (asked[:, None] == seen[None]).all(-1).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_way": 6}, "n_way is 6, but it must be in"),
        ({"test_way": 6}, "test_way is 6, but it must be in"),
        ({"shots": 0}, "shots is 0"),
        ({"shots": 100}, "a trajectory needs 100 images of a train class"),
    ],
)
def test_impossible_trajectories_are_refused(tiny_images: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trajectories(tiny_images, **options)
