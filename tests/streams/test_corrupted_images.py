from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_zoo import compose, run_stream, supervised
from cl_zoo.datasets import CORRUPTIONS, NOISES, LabelledImages, corrupt
from cl_zoo.models import mlp
from cl_zoo.streams import _corrupted_images as module
from cl_zoo.streams import conditions, corrupted_images
from tests.tiny import same_bytes

KEY = jax.random.key(7)
SOME = {"corruptions": ["contrast", "gaussian_noise"], "severities": [1, 3], "examples": 24, "batch_size": 8}


@pytest.fixture(scope="module")
def images():
    """Ninety different images of five classes, sorted by class."""
    random = np.random.default_rng(0)
    return LabelledImages(
        random.integers(0, 256, (20, 6, 6)).astype(np.uint8),
        np.repeat(np.arange(5), 4),
        random.integers(0, 256, (90, 6, 6)).astype(np.uint8),
        np.repeat(np.arange(5), 18),
    )


@jax.jit
def run(stream, key=KEY):
    n = stream.n_tasks * stream.steps
    return jax.lax.scan(lambda cursor, _: stream.next(cursor)[::-1], stream.init(key), length=n)[1]


def held_out(stream, task, split="test"):
    """Images and labels of the rows that count."""
    batch = stream.evaluation(jnp.asarray(task), split)
    real = np.asarray(batch.weight).ravel() > 0
    return np.asarray(batch.x).reshape(-1, *batch.x.shape[2:])[real], np.asarray(batch.y).ravel()[real]


def pairs(x, y):
    return sorted((image.tobytes(), int(label)) for image, label in zip(np.asarray(x), np.asarray(y), strict=True))


def test_conditions():
    assert conditions()[:6] == (*(("gaussian_noise", s) for s in range(1, 6)), ("shot_noise", 1))
    assert len(conditions()) == 75 and len(conditions(schedule="gradual")) == 135
    assert [s for _, s in conditions(["fog"], schedule="gradual")] == [1, 2, 3, 4, 5, 4, 3, 2, 1]
    assert conditions(["fog", "snow"], [5, 2], "gradual", clean_first=True) == (
        ("clean", 0),
        *(("fog", 2), ("fog", 5), ("fog", 2)),
        *(("snow", 2), ("snow", 5), ("snow", 2)),
    )
    assert conditions(["fog"], [4], "gradual") == (("fog", 4),)
    assert conditions(["fog"], [5, 2]) == (("fog", 5), ("fog", 2)), "a grid keeps the order it is given"


@pytest.mark.parametrize("schedule", ["grid", "gradual"])
def test_rows_of_every_condition(schedule, images):
    stream = corrupted_images(images, schedule=schedule, clean_first=True, key=KEY, **SOME)
    order = conditions(SOME["corruptions"], SOME["severities"], schedule, clean_first=True)
    assert stream.n_tasks == len(order) == {"grid": 5, "gradual": 7}[schedule] and stream.steps == 3
    assert stream.data.images.shape == (5, 24, 6, 6) and stream.data.images.dtype == jnp.uint8
    assert stream.tasks.active.shape == (stream.n_tasks, 5) and np.all(stream.tasks.active)
    clean = {image.tobytes(): label for image, label in zip(images.test_images, images.test_labels, strict=True)}
    x, y = held_out(stream, 0)
    assert len(x) == 24 and all(clean[image.tobytes()] == label for image, label in zip(x, y, strict=True))
    assert len({image.tobytes() for image in x}) == 24 and set(y) == set(range(5)), "rows twice, or not all classes"
    batches = run(stream)
    assert batches.task is None and np.all(batches.weight == 1)
    for task, (name, severity) in enumerate(order):
        mine = slice(3 * task, 3 * task + 3)
        handed = pairs(batches.x[mine].reshape(24, 6, 6), batches.y[mine].ravel())
        assert handed == pairs(*held_out(stream, task)), "each row once an epoch, and the test set is the stream"
        if name == "contrast":
            expected = corrupt(jnp.asarray(x), name, severity, KEY).astype(float)
            np.testing.assert_allclose(held_out(stream, task)[0], expected, atol=1)  # halves round by the program
        if name == "gaussian_noise":
            change = np.abs(held_out(stream, task)[0].astype(float) - x)
            assert 0.5 < change.mean() / (255 * {1: 0.04, 3: 0.08}[severity] * np.sqrt(2 / np.pi)) < 1.1
    for task, other in ((0, 1), (3, 4)):
        assert pairs(*held_out(stream, task)) != pairs(*held_out(stream, other))


def test_epochs(images):
    stream = corrupted_images(images, epochs=2, key=KEY, **SOME)
    batches = run(stream)
    first, second = (pairs(batches.x[i : i + 3].reshape(24, 6, 6), batches.y[i : i + 3].ravel()) for i in (0, 3))
    assert stream.steps == 6 and first == second
    assert np.any(batches.x[:3] != batches.x[3:6]), "in another order"


def test_draws_of_the_key(images):
    made = partial(corrupted_images, images, **SOME)
    same_bytes(made(key=KEY).data, made(key=KEY).data)
    same_bytes(made().data, made(key=jax.random.key(0)).data)
    other = made(key=jax.random.key(8)).data
    assert np.any(other.labels != made(key=KEY).data.labels)
    # A condition's noise is the same whatever other conditions there are, and each image has its own.
    alone = corrupted_images(images, key=KEY, **{**SOME, "corruptions": ["gaussian_noise"], "severities": [3]})
    np.testing.assert_array_equal(alone.data.images[0], made(key=KEY).data.images[3])
    flat = images._replace(test_images=np.full_like(images.test_images, 128))
    noisy = np.asarray(corrupted_images(flat, key=KEY, **SOME).data.images)
    assert len({image.tobytes() for image in noisy[2:].reshape(48, 36)}) == 48


def test_images_in_parts_are_those_at_once(images, monkeypatch):
    whole = corrupted_images(images, key=KEY, **SOME).data
    monkeypatch.setattr(module, "_AT_ONCE", 7)
    module._corrupted.clear_cache()
    same_bytes(corrupted_images(images, key=KEY, **SOME).data, whole)
    module._corrupted.clear_cache()


def test_validation_rows_are_apart(images):
    stream = corrupted_images(images, key=KEY, validation=1 / 3, **{**SOME, "examples": 36})
    test, validation = (pairs(*held_out(stream, 2, split)) for split in ("test", "validation"))
    assert len(test) == 24 and len(validation) == 12 and not set(test) & set(validation)
    with pytest.raises(ValueError, match="no validation examples"):
        held_out(corrupted_images(images, key=KEY, **SOME), 0, "validation")


def test_reorder_keeps_each_corruptions_schedule(images):
    options = {**SOME, "corruptions": ["contrast", "brightness", "pixelate"], "schedule": "gradual"}
    stream = corrupted_images(images, clean_first=True, key=KEY, **options)
    found = set()
    for seed in range(20):
        condition = np.asarray(stream.reorder(jax.random.key(seed)).data.condition)
        assert condition[0] == 0
        blocks = [tuple(block) for block in condition[1:].reshape(3, 3).tolist()]
        assert sorted(blocks) == [(1, 2, 1), (3, 4, 3), (5, 6, 5)]
        found.add(tuple(blocks))
    assert len(found) > 3


def test_colour_and_digits_by_default(images):
    coloured = images._replace(test_images=np.stack([images.test_images] * 3, axis=-1))
    assert corrupted_images(coloured, **SOME).data.images.shape == (4, 24, 6, 6, 3)
    assert corrupted_images(**SOME).data.images.shape == (4, 24, 28, 28)


def test_learning_from_a_stream(images):
    """Labels belong to their images: a few epochs fit them."""
    patterns = np.random.default_rng(1).integers(0, 256, (5, 6, 6))
    easy = images._replace(test_images=patterns[images.test_labels].astype(np.uint8))
    stream = corrupted_images(easy, epochs=40, key=KEY, **{**SOME, "severities": [3]})
    learner = compose(mlp((6, 6), 5, hidden=(8,)), optax.adam(1e-2), supervised(), tasks=stream.tasks)
    assert np.all(run_stream(learner, stream, KEY).accuracy[-1] > 0.9)


# CIFAR-10-C's own files


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """Files in which an image tells its corruption, severity and row."""
    folder = tmp_path_factory.mktemp("cifar")
    labels = np.random.default_rng(2).integers(0, 10, 10_000).astype(np.uint8)
    np.save(folder / "labels.npy", np.tile(labels, 5))
    for number, name in enumerate(("fog", "spatter")):
        file = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.uint8, (50_000, 32, 32, 3))
        row = np.arange(50_000)
        file[:, 0, 0] = np.stack([10 * number + row // 10_000 + 1, row % 10_000 // 100, row % 100], axis=1)
        file.flush()
    return folder, labels


def test_official_files(official):
    folder, labels = official
    options = {"data_dir": folder, "severities": [2, 5], "examples": 30, "batch_size": 10, "key": KEY}
    stream = corrupted_images(corruptions=["fog", "spatter"], **options)
    assert stream.n_tasks == 4 and stream.tasks.active.shape == (4, 10)
    rows = []
    for task, code in enumerate((2, 5, 12, 15)):
        x, y = held_out(stream, task)
        told = x[:, 0, 0].astype(int)
        assert x.shape == (30, 32, 32, 3) and np.all(told[:, 0] == code)
        rows.append(100 * told[:, 1] + told[:, 2])
        np.testing.assert_array_equal(y, labels[rows[-1]])
    assert np.all(rows[0] == rows) and len(set(rows[0])) == 30 and np.ptp(rows[0]) > 3_000


def test_official_files_after_clean_images(official):
    folder, labels = official
    plain = np.zeros((10_000, 32, 32, 3), np.uint8)
    plain[:, 0, 0, 1], plain[:, 0, 0, 2] = np.arange(10_000) // 100, np.arange(10_000) % 100
    images = LabelledImages(plain[:1], labels[:1], plain, labels)
    options = {"data_dir": folder, "corruptions": ["fog"], "severities": [1], "examples": 20, "batch_size": 10}
    stream = corrupted_images(images, clean_first=True, **options)
    (clean, _), (foggy, _) = held_out(stream, 0), held_out(stream, 1)
    np.testing.assert_array_equal(clean[:, 0, 0, 1:], foggy[:, 0, 0, 1:])
    assert np.all(clean[:, 0, 0, 0] == 0) and np.all(foggy[:, 0, 0, 0] == 1)
    with pytest.raises(ValueError, match="clean_first with a data_dir needs images"):
        corrupted_images(clean_first=True, **options)
    with pytest.raises(ValueError, match="other test labels.*not CIFAR-10's"):
        corrupted_images(images._replace(test_labels=labels[::-1]), **options)
    with pytest.raises(FileNotFoundError, match=r"snow\.npy"):
        corrupted_images(**{**options, "corruptions": ["snow"]})


@pytest.mark.parametrize(
    "options,message",
    [
        ({"schedule": "random"}, "schedule is 'random'.*'grid', 'gradual'"),
        ({"corruptions": ["rain"]}, "corruptions is 'rain'"),
        ({"corruptions": "fog"}, "corruptions is 'fog'.*sequence"),
        ({"corruptions": []}, r"corruptions is \[\]"),
        ({"corruptions": ["fog", "fog"]}, "different values"),
        ({"severities": [0]}, "severities is 0"),
        ({"severities": ()}, r"severities is \(\)"),
        ({"examples": 91}, r"examples is 91.*\[1, 90\]"),
        ({"batch_size": 7}, "batch_size is 7, but a task has 24 examples.*divide 24"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"validation": 1.0}, "validation is 1"),
    ],
)
def test_refusals(options, message, images):
    with pytest.raises(ValueError, match=message):
        corrupted_images(images, **{**SOME, **options})


def test_all_noises_make_a_stream(images):
    stream = corrupted_images(images, corruptions=NOISES, severities=[5], examples=24, batch_size=24)
    assert stream.n_tasks == 5 and set(NOISES) - set(CORRUPTIONS) == {"speckle_noise", "uniform_noise"}
