from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cl_zoo import Batch, Stream
from cl_zoo.datasets import LabelledImages
from cl_zoo.streams import permuted_mnist, rotated_mnist, split_mnist
from cl_zoo.streams.arrays import locate, scenario_tasks
from cl_zoo.streams.images import rotate
from tests.tiny import same_bytes

K = 6  # classes of tiny_images
KEY = jax.random.key(7)
SCENARIOS = ("task", "domain", "class")
MAKERS = {"split": split_mnist, "permuted": permuted_mnist, "rotated": rotated_mnist}


@pytest.fixture(scope="session")
def unequal_images():
    """Four classes of different sizes."""
    random = np.random.default_rng(1)

    def draw(counts):
        labels = random.permutation(np.repeat(np.arange(4), counts))
        return random.integers(0, 256, (len(labels), 4, 4)).astype(np.uint8), labels.astype(np.uint8)

    return LabelledImages(*draw([20, 9, 15, 12]), *draw([5, 9, 2, 7]))


def whereabouts(images):
    """bytes of an image -> (split, row)."""
    found = {image.tobytes(): ("train", i) for i, image in enumerate(images.train_images)}
    found |= {image.tobytes(): ("test", i) for i, image in enumerate(images.test_images)}
    assert len(found) == len(images.train_images) + len(images.test_images), "images must differ"
    return found


def rows_of(images, x):
    """The split and the row in it of each image of a batch, or of stacked batches."""
    found = whereabouts(images)
    return [found[image.tobytes()] for image in np.asarray(x).reshape((-1, *x.shape[-2:]))]


def train_rows(images, x):
    found = rows_of(images, x)
    assert all(split == "train" for split, _ in found)
    return np.array([row for _, row in found])


def undone(stream, task, x):
    """The images as they were before the stream permuted or turned them (by multiples of 90 degrees)."""
    x = np.asarray(x)
    if stream.data.permutations is not None:
        flat = np.empty((*x.shape[:-2], 16), np.uint8)
        flat[..., np.asarray(stream.data.permutations[task])] = x.reshape(flat.shape)
        return flat.reshape(x.shape)
    if stream.data.angles is not None:
        return np.rot90(x, -round(float(stream.data.angles[task]) / 90), axes=(-2, -1))
    return x


@partial(jax.jit, static_argnums=1)
def batches_of(stream, n, cursor):
    return jax.lax.scan(lambda c, _: stream.next(c)[::-1], cursor, length=n)[1]


def run(stream, n, key=KEY):
    """The first n batches, stacked."""
    return batches_of(stream, n, stream.init(key))


@cache
def compiled(function, *static):
    return jax.jit(function, static_argnums=static)


def held_out(stream, task, split="test"):
    return compiled(Stream.evaluation, 2)(stream, task, split)


def sampled(stream, task, key=KEY):
    return compiled(Stream.sample)(stream, task, key)


def make(kind, scenario, images, n_tasks=3, **options):
    if kind == "rotated":
        options = {"angles": [90.0 * t for t in range(n_tasks)], **options}
    return MAKERS[kind](n_tasks, scenario, images=images, **{"batch_size": 20, **options})


def assert_task_told(scenario, task, batch):
    """Rows tell their task in the task scenario, and only there."""
    if scenario == "task":
        assert batch.task.shape == batch.y.shape and batch.task.dtype == jnp.int32
        assert np.all(batch.task == task)
    else:
        assert batch.task is None


def largest_constant(jaxpr):
    """Bytes of the largest array that a traced program holds, in its inner programs too."""
    sizes = [np.asarray(constant).nbytes for constant in getattr(jaxpr, "consts", ())] + [0]
    for equation in jaxpr.eqns:
        sizes += [np.asarray(variable.val).nbytes for variable in equation.invars if hasattr(variable, "val")]
        inner = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda value: hasattr(value, "eqns"))
        sizes += [largest_constant(value) for value in inner if hasattr(value, "eqns")]
    return max(sizes)


# What the tasks are


@pytest.mark.parametrize(
    "kind,scenario",
    [("split", "task"), ("split", "domain"), ("split", "class"), ("permuted", "domain"), ("rotated", "task")],
)
def test_labels_images_and_task_ids(kind, scenario, tiny_images):
    stream = make(kind, scenario, tiny_images, steps=4)
    batches = run(stream, 12)
    assert batches.x.dtype == jnp.uint8 and batches.x.shape == (12, 20, 4, 4)
    assert np.all(batches.weight == 1)
    per_task = 2 if kind == "split" else K
    for t in range(3):
        mine = slice(4 * t, 4 * t + 4)
        of = tiny_images.train_labels[train_rows(tiny_images, undone(stream, t, batches.x[mine]))].astype(int)
        place = of - 2 * t if kind == "split" else of
        assert set(place) == set(range(per_task)), "images of other classes than the task's, or not all of them"
        expected = place if scenario == "domain" else t * per_task + place
        np.testing.assert_array_equal(np.ravel(batches.y[mine]), expected)
        assert_task_told(scenario, t, jax.tree.map(lambda leaf, mine=mine: leaf[mine], batches))


@pytest.mark.parametrize(
    "scenario,outputs", [("task", "seen"), ("domain", "seen"), ("class", "seen"), ("class", "all")]
)
def test_active_outputs(scenario, outputs):
    tasks = scenario_tasks(scenario, 3, 2, outputs)
    assert tasks.index.tolist() == [0, 1, 2] and tasks.active.dtype == bool
    assert (
        tasks.active.astype(int).tolist()
        == {
            ("task", "seen"): [[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]],
            ("domain", "seen"): [[1, 1]] * 3,
            ("class", "seen"): [[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]],
            ("class", "all"): [[1, 1, 1, 1, 1, 1]] * 3,
        }[scenario, outputs]
    )


def test_what_a_stream_provides(tiny_images):
    always = {"boundaries", "begin_sample", "end_sample"}
    assert make("split", "task", tiny_images).provides == always | {"task_ids"}
    assert make("split", "domain", tiny_images).provides == always | {"open_outputs"}
    assert make("split", "class", tiny_images).provides == always
    assert make("split", "class", tiny_images, outputs="all").provides == always | {"open_outputs"}


def test_classes_that_do_not_divide_are_left_out(tiny_images):
    stream = split_mnist(4, "class", images=tiny_images, batch_size=20)
    assert stream.tasks.active.shape == (4, 4)
    assert stream.data.classes.tolist() == [[0], [1], [2], [3]]


def test_class_order_from_a_key(tiny_images):
    stream = split_mnist(3, "class", images=tiny_images, key=jax.random.key(3), batch_size=20, steps=3)
    order = np.asarray(stream.data.classes)
    assert sorted(order.ravel().tolist()) == list(range(K)) and order.ravel().tolist() != list(range(K))
    batches = run(stream, 9)
    for t in range(3):
        mine = slice(3 * t, 3 * t + 3)
        of = tiny_images.train_labels[train_rows(tiny_images, batches.x[mine])]
        label = np.ravel(batches.y[mine])
        np.testing.assert_array_equal(of, order.ravel()[label])
        assert set(of.tolist()) == set(order[t].tolist())


def test_permuted_images_equal_numpy():
    shape = (3, 5, 2)
    random = np.random.default_rng(0)
    arrays = [random.integers(0, 256, (4, *shape)).astype(np.uint8), np.arange(4) % 2]
    stream = permuted_mnist(2, images=LabelledImages(*arrays, *arrays), batch_size=4)
    permutations = np.asarray(stream.data.permutations)
    for t in range(2):
        assert sorted(permutations[t].tolist()) == list(range(shape[0] * shape[1]))
        assert permutations[t].tolist() != sorted(permutations[t].tolist()), "the first task is permuted too"
        test = held_out(stream, t)
        flat = arrays[0].reshape((4, shape[0] * shape[1], *shape[2:]))
        expected = flat[:, permutations[t]].reshape((4, *shape))[[0, 2, 1, 3]]
        np.testing.assert_array_equal(np.asarray(test.x).reshape((4, *shape)), expected)
    assert permutations[0].tolist() != permutations[1].tolist()


@pytest.mark.parametrize("shape", [(5, 5), (28, 28)])
@pytest.mark.parametrize("quarters", [0, 1, 2, 3, 4])
def test_quarter_turns_equal_rot90(quarters, shape):
    image = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    turned = compiled(rotate)(jnp.asarray(image), 90.0 * quarters)
    assert turned.dtype == jnp.uint8
    np.testing.assert_array_equal(turned, np.rot90(image, quarters))


def test_other_turns_are_bilinear():
    image = np.random.default_rng(0).integers(0, 256, (5, 5)).astype(np.uint8)
    turned = np.asarray(jax.jit(rotate)(jnp.asarray(image), 30.0))
    sin, cos = np.sin(np.pi / 6), np.cos(np.pi / 6)
    padded = np.pad(image.astype(float), 3)
    for row in range(5):
        for column in range(5):
            up, right = 2 - row, column - 2  # where this pixel was before it was turned anticlockwise
            from_row, from_column = 2 - (cos * up - sin * right) + 3, 2 + (cos * right + sin * up) + 3
            r, c = int(np.floor(from_row)), int(np.floor(from_column))
            f, g = from_row - r, from_column - c
            patch = padded[r : r + 2, c : c + 2]
            value = np.array([1 - f, f]) @ patch @ np.array([1 - g, g])
            assert abs(turned[row, column] - value) < 0.51


def test_drawn_angles(tiny_images):
    stream = rotated_mnist(50, images=tiny_images, largest_angle=30.0, batch_size=20)
    angles = np.asarray(stream.data.angles)
    assert angles.min() >= 0 and 25 < angles.max() <= 30 and len(set(angles.tolist())) == 50


def test_locate_in_runs_of_unequal_length():
    counts = [2, 0, 3, 1]
    run, offset = jax.vmap(partial(locate, jnp.array(counts)))(jnp.arange(6))
    assert run.tolist() == [0, 0, 2, 2, 2, 3]
    assert offset.tolist() == [0, 1, 0, 1, 2, 0]


# Order of the rows


@pytest.mark.parametrize("batch_size,per_epoch", [(20, 6), (16, 7)])
def test_every_epoch_visits_each_example_once(batch_size, per_epoch, tiny_images):
    stream = make("split", "class", tiny_images, batch_size=batch_size, epochs=2)
    assert stream.steps == 2 * per_epoch
    x = run(stream, 3 * stream.steps).x
    for t in range(3):
        epochs = x[stream.steps * t : stream.steps * (t + 1)].reshape((2, per_epoch, batch_size, 4, 4))
        orders = [train_rows(tiny_images, epoch).tolist() for epoch in epochs]
        mine = set(np.flatnonzero(tiny_images.train_labels // 2 == t).tolist())
        for order in orders:
            assert len(set(order)) == len(order) == per_epoch * batch_size
            assert set(order) <= mine
            assert order != sorted(order)
        assert orders[0] != orders[1]
        if batch_size == 20:
            assert set(orders[0]) == set(orders[1]) == mine
        else:
            assert set(orders[0]) != set(orders[1]), "the left-out rows change"


def test_epochs_of_unequal_tasks(unequal_images):
    stream = split_mnist(2, "domain", images=unequal_images, batch_size=3, steps=18)
    rows = train_rows(unequal_images, run(stream, 36).x).reshape((2, 54))
    for t, n in ((0, 29), (1, 27)):  # 9 batches an epoch in both
        for epoch in rows[t].reshape((2, 27)):
            assert len(set(epoch.tolist())) == 27
            assert set(epoch.tolist()) <= set(np.flatnonzero(unequal_images.train_labels // 2 == t).tolist())
        assert np.sum(unequal_images.train_labels // 2 == t) == n


def test_the_cursor_is_the_place_in_the_stream(tiny_images):
    stream = make("split", "task", tiny_images, steps=3)
    whole, cursor = run(stream, 9), stream.init(KEY)
    for i in range(9):
        batch, cursor = compiled(Stream.next)(stream, cursor)
        same_bytes(batch, jax.tree.map(lambda leaf, i=i: leaf[i], whole))
    assert run(stream, 9, key=jax.random.key(8)).x.tolist() != whole.x.tolist(), "another key, another order"


def test_joint_seen_draws_each_example_of_the_tasks_so_far(tiny_images):
    stream = make("split", "task", tiny_images, joint="seen", steps=18)
    batches = run(stream, 54)
    for t in range(3):
        epoch = slice(18 * t, 18 * t + 6 * (t + 1))  # 120 examples of each task, 20 rows a batch
        rows = train_rows(tiny_images, batches.x[epoch])
        labels = tiny_images.train_labels[rows]
        assert sorted(rows.tolist()) == np.flatnonzero(tiny_images.train_labels // 2 <= t).tolist()
        np.testing.assert_array_equal(np.ravel(batches.y[epoch]), labels)
        np.testing.assert_array_equal(np.ravel(batches.task[epoch]), labels // 2)


def test_joint_all_draws_each_example_of_every_task_from_the_start(unequal_images):
    stream = split_mnist(2, "task", images=unequal_images, joint="all", batch_size=8, steps=7)
    batches = run(stream, 14)
    for epoch in (slice(0, 7), slice(7, 14)):
        rows = train_rows(unequal_images, batches.x[epoch])
        assert sorted(rows.tolist()) == list(range(56))
        np.testing.assert_array_equal(np.ravel(batches.task[epoch]), unequal_images.train_labels[rows] // 2)


@pytest.mark.parametrize("joint", [None, "seen"])
def test_every_batch_comes_several_times(joint, tiny_images):
    once = make("split", "task", tiny_images, joint=joint, epochs=2)
    stream = make("split", "task", tiny_images, joint=joint, epochs=2, updates_per_batch=3)
    assert once.steps == 12 and stream.steps == 36
    batches, different = run(stream, 3 * 36 + 6), run(once, 3 * 12 + 2)
    for time in range(3):
        same_bytes(jax.tree.map(lambda leaf, i=time: leaf[i::3], batches), different)
    if joint is None:
        first_pass = train_rows(tiny_images, batches.x[:18:3])
        assert len(set(first_pass.tolist())) == 6 * 20


def test_one_update_per_batch_is_the_stream_as_it_was(tiny_images):
    same_bytes(
        run(make("split", "class", tiny_images, updates_per_batch=1), 9), run(make("split", "class", tiny_images), 9)
    )


# Samples and evaluation sets


@pytest.mark.parametrize(
    "kind,scenario,evaluation_batch",
    [(kind, scenario, 7) for kind in MAKERS for scenario in SCENARIOS] + [("split", "class", 1000)],
)
def test_evaluation_covers_each_test_example_once(kind, scenario, evaluation_batch, unequal_images):
    stream = make(kind, scenario, unequal_images, 2, batch_size=4, evaluation_batch=evaluation_batch)
    per_task = 2 if kind == "split" else 4
    expected = scenario_tasks(scenario, 2, per_task)
    np.testing.assert_array_equal(stream.tasks.active, expected.active)
    for t in range(2):
        test = held_out(stream, t)
        assert test.x.dtype == jnp.uint8
        assert set(np.ravel(test.weight).tolist()) <= {0.0, 1.0}
        assert_task_told(scenario, t, test)
        counts = np.asarray(test.weight) > 0
        found = rows_of(unequal_images, undone(stream, t, test.x)[counts])
        mine = np.flatnonzero((unequal_images.test_labels // 2 == t) | (kind != "split"))
        assert sorted(found) == [("test", row) for row in mine]
        of = unequal_images.test_labels[[row for _, row in found]].astype(int)
        place = of - 2 * t if kind == "split" else of
        np.testing.assert_array_equal(test.y[counts], place + (0 if scenario == "domain" else t * per_task))


def test_each_evaluation_batch_is_a_fair_part(tiny_images):
    stream = make("split", "domain", tiny_images, evaluation_batch=20)
    test = held_out(stream, 1)
    assert test.x.shape == (3, 20, 4, 4)
    assert np.sum(np.asarray(test.y) == 0, axis=1).tolist() == [10, 10, 10]


def test_validation_is_held_out_of_every_class(tiny_images):
    stream = make("split", "class", tiny_images, validation=0.25, batch_size=10)
    assert stream.steps == 9
    trained = run(stream, 27).x
    for t in range(3):
        batch = held_out(stream, t, "validation")
        rows = train_rows(tiny_images, np.asarray(batch.x)[np.asarray(batch.weight) > 0]).tolist()
        used = train_rows(tiny_images, trained[9 * t : 9 * t + 9]).tolist()
        assert np.bincount(tiny_images.train_labels[rows], minlength=K).tolist() == [
            15 * (c // 2 == t) for c in range(K)
        ]
        assert sorted(rows + used) == np.flatnonzero(tiny_images.train_labels // 2 == t).tolist()


@pytest.mark.parametrize(
    "scenario,sample_size,sample_batch",
    [("task", None, 50), ("domain", 30, 20), ("class", 1000, 500)],
)
def test_sample_has_distinct_rows_of_its_task(scenario, sample_size, sample_batch, tiny_images):
    stream = make("split", scenario, tiny_images, sample_size=sample_size, sample_batch=sample_batch)
    sample = sampled(stream, 1)
    n = min(sample_size or 120, 120)
    assert sample.y.shape == (-(-n // min(sample_batch, n)), min(sample_batch, n))
    counts = np.asarray(sample.weight) > 0
    rows = train_rows(tiny_images, np.asarray(sample.x)[counts])
    assert len(set(rows.tolist())) == len(rows) == n
    assert np.all(tiny_images.train_labels[rows] // 2 == 1)
    np.testing.assert_array_equal(sample.y[counts], tiny_images.train_labels[rows] - 2 * (scenario == "domain"))
    assert_task_told(scenario, 1, sample)


def test_sample_of_unequal_tasks(unequal_images):
    stream = split_mnist(2, "class", images=unequal_images, batch_size=4, sample_size=28, sample_batch=10)
    for t, n in ((0, 28), (1, 27)):
        sample = sampled(stream, t)
        counts = np.asarray(sample.weight) > 0
        rows = train_rows(unequal_images, np.asarray(sample.x)[counts])
        assert len(set(rows.tolist())) == n and np.all(unequal_images.train_labels[rows] // 2 == t)


def test_samples_differ_by_key(tiny_images):
    stream = make("split", "class", tiny_images, sample_size=20)
    samples = [sampled(stream, 0, jax.random.key(i)).x.tolist() for i in (0, 0, 1)]
    assert samples[0] == samples[1] != samples[2]


def test_score_is_one_where_the_largest_output_is_the_label(tiny_images):
    stream = make("split", "domain", tiny_images)
    batch = Batch(None, jnp.array([0, 1, 1]), None, jnp.ones(3))
    assert stream.score(jnp.array([[2.0, 1.0], [2.0, 1.0], [-3.0, -1.0]]), batch).tolist() == [1.0, 0.0, 1.0]


# Drawing the tasks anew


@pytest.mark.parametrize("kind,field", [("split", "classes"), ("permuted", "permutations"), ("rotated", "angles")])
def test_reorder_draws_per_key_and_shares_the_images(kind, field, tiny_images):
    stream = make(kind, "class", tiny_images, n_tasks=6)
    keys = jax.random.split(jax.random.key(0), 4)
    one_copy = stream.data._replace(**dict.fromkeys(stream.data._fields))._replace(**{field: 0})
    drawn = jax.jit(jax.vmap(lambda s, k: s.reorder(k).data, in_axes=(None, 0), out_axes=one_copy))(stream, keys)
    same_bytes(drawn.images, stream.data.images)
    orders = np.asarray(getattr(drawn, field))
    first = np.asarray(getattr(stream.data, field))
    assert len({order.tobytes() for order in (*orders, first)}) == 5, "two keys gave one order"
    again = stream.reorder(keys[2]).data
    np.testing.assert_array_equal(getattr(again, field), orders[2])
    assert again.images is stream.data.images
    for order in orders:
        np.testing.assert_array_equal(np.sort(order, axis=None), np.sort(first, axis=None))


def test_reordered_labels_follow_the_new_order(tiny_images):
    stream = make("split", "domain", tiny_images, steps=3)
    stream = stream.reorder(jax.random.key(5))
    batches, classes = run(stream, 9), np.asarray(stream.data.classes)
    of = tiny_images.train_labels[train_rows(tiny_images, batches.x)]
    np.testing.assert_array_equal(of, classes[np.repeat([0, 1, 2], 60), np.ravel(batches.y)])
    test = held_out(stream, 2)
    assert {tiny_images.test_labels[row] for _, row in rows_of(tiny_images, test.x)} == set(classes[2].tolist())


# Data is an argument


@pytest.mark.parametrize("kind", MAKERS)
def test_no_program_holds_the_images(kind, digits):
    stream = MAKERS[kind](2, "domain", images=digits, sample_size=100)
    assert stream.data.images.nbytes > 2**20
    programs = (
        lambda stream, key: stream.next(stream.init(key)),
        lambda stream, key: stream.sample(0, key),
        lambda stream, key: stream.evaluation(1, "test"),
        Stream.reorder,
    )
    for program in programs:
        assert largest_constant(jax.make_jaxpr(program)(stream, KEY)) < 2**20
        assert len(jax.jit(program).lower(stream, KEY).as_text()) < 2**20


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.vmap])
def test_a_held_array_would_be_found(wrap):
    held = jnp.ones(2**19)
    assert largest_constant(jax.make_jaxpr(wrap(lambda x: x + held[0]))(jnp.ones(3))) == 2**21


# Bad values

BAD = [
    ("split", {"n_tasks": 0}, ["n_tasks", "0"]),
    ("split", {"n_tasks": 11}, ["n_tasks", "11"]),
    ("permuted", {"n_tasks": 0}, ["n_tasks", "0"]),
    ("rotated", {"n_tasks": -1}, ["n_tasks", "-1"]),
    ("split", {"scenario": "tasks"}, ["scenario", "'tasks'", "'task'", "'domain'", "'class'"]),
    ("rotated", {"scenario": None}, ["scenario", "None"]),
    ("split", {"outputs": "some"}, ["outputs", "'some'"]),
    ("split", {"batch_size": 0}, ["batch_size", "0"]),
    ("split", {"batch_size": 500, "steps": 5}, ["batch_size", "500", "120"]),
    ("split", {"batch_size": 500}, ["batch_size", "500", "120"]),
    ("split", {"validation": 1.5}, ["validation", "1.5"]),
    ("split", {"validation": -0.1}, ["validation", "-0.1"]),
    ("split", {"validation": float("nan")}, ["validation", "nan"]),
    ("split", {"validation": 0.9}, ["batch_size", "20", "12"]),
    ("split", {"steps": 0}, ["steps", "0"]),
    ("split", {"epochs": 0}, ["epochs", "0"]),
    ("split", {"updates_per_batch": 0}, ["updates_per_batch", "0"]),
    ("split", {"updates_per_batch": 2.0}, ["updates_per_batch", "2.0", "whole number"]),
    ("split", {"updates_per_batch": 3, "steps": 7}, ["steps is 7", "updates_per_batch is 3", "multiple of 3"]),
    ("split", {"sample_size": -1}, ["sample_size", "-1"]),
    ("split", {"sample_size": 0}, ["sample_size", "0"]),
    ("split", {"sample_batch": 0}, ["sample_batch", "0"]),
    ("split", {"evaluation_batch": 0}, ["evaluation_batch", "0"]),
    ("split", {"joint": "every"}, ["joint", "'every'"]),
    ("split", {"joint": "all", "scenario": "class"}, ["joint", "all", "outputs"]),
    ("rotated", {"angles": [0.0, 45.0]}, ["angles", "2", "3"]),
]


@pytest.mark.parametrize("kind,bad,words", BAD, ids=lambda value: str(value).replace(" ", "")[:40])
def test_bad_values_are_refused_by_name(kind, bad, words, tiny_images):
    arguments = {"n_tasks": 3, "scenario": "task", "batch_size": 20, **bad}
    with pytest.raises(ValueError) as error:
        MAKERS[kind](images=tiny_images, **arguments)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def test_largest_batch_is_accepted(tiny_images):
    assert make("split", "task", tiny_images, batch_size=120).steps == 1


def test_empty_validation_split_is_refused(tiny_images):
    stream = make("split", "task", tiny_images)
    with pytest.raises(ValueError, match="no validation examples.*validation=0.1"):
        stream.evaluation(0, "validation")


def test_unknown_split_is_refused(tiny_images):
    stream = make("split", "task", tiny_images)
    with pytest.raises(ValueError, match="split is 'train'.*'validation', 'test'"):
        stream.evaluation(0, "train")


def test_joint_all_is_accepted_where_all_outputs_are_open(tiny_images):
    assert np.all(make("split", "class", tiny_images, joint="all", outputs="all").tasks.active)


def test_embedded_digits_are_the_default():
    assert split_mnist(scenario="class").data.images.shape == (12000, 28, 28)
