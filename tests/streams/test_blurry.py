"""Streams without borders: which rows come when, what is refused, and that runs on them work."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cl_zoo import Component, Stream, accuracy, at, ewc, fit, lwf, replay, run_stream, supervised
from cl_zoo.datasets import LabelledImages
from cl_zoo.streams import blurry, drifting, permuted_mnist, split_mnist
from cl_zoo.streams._blurry import log_weights
from cl_zoo.training.checkpoint import Checkpoints
from cl_zoo.training.run_directory import ConfigError
from tests.tiny import close, same_bytes, tiny_learner

KEY = jax.random.key(6)
BATCH, EVALUATION = 6, 30
SMALL: dict[str, Any] = {"batch_size": BATCH, "sample_size": 40, "sample_batch": 20, "evaluation_batch": EVALUATION}


def stream_of(images: LabelledImages, mixing: Any, n_tasks: int = 3, **options: Any) -> Any:
    return split_mnist(n_tasks, "class", images=images, outputs="all", mixing=mixing, **{**SMALL, **options})


@pytest.fixture(scope="module")
def unequal_images() -> LabelledImages:
    """Four classes of different sizes, all images different."""
    random = np.random.default_rng(1)

    def draw(counts: list[int]) -> tuple[np.ndarray, np.ndarray]:
        labels = random.permutation(np.repeat(np.arange(4), counts))
        return random.integers(0, 256, (len(labels), 4, 4)).astype(np.uint8), labels.astype(np.uint8)

    return LabelledImages(*draw([40, 31, 52, 37]), *draw([5, 9, 2, 7]))


def shown(stream: Any, steps: int | None = None, key: Any = KEY) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a whole run, `[T, rows of a period, ...]`."""
    n = stream.n_tasks * stream.steps if steps is None else steps

    @jax.jit
    def draw(stream: Stream) -> Any:
        return jax.lax.scan(lambda cursor, _: stream.next(cursor)[::-1], stream.init(key), length=n)[1]

    batches = draw(stream)
    assert batches.task is None and (batches.weight == 1).all()
    groups = stream.n_tasks if steps is None else 1
    return tuple(np.asarray(a).reshape((groups, -1, *a.shape[2:])) for a in (batches.x, batches.y))  # type: ignore[return-value]


def rows(images: LabelledImages, x: np.ndarray) -> np.ndarray:
    """Which training image each is."""
    place = {image.tobytes(): i for i, image in enumerate(images.train_images)}
    assert len(place) == len(images.train_images)
    return np.array([place[image.tobytes()] for image in x.reshape((-1, *x.shape[-2:]))])


@pytest.mark.parametrize("mixing", [blurry(0.4), drifting(), drifting("linear", width=1.0)])
def test_every_batch_of_a_mixed_stream_comes_several_times(tiny_images: LabelledImages, mixing: Any) -> None:
    steps = 5 if mixing.most_steps is None else None
    once = stream_of(tiny_images, mixing, steps=steps)
    stream = stream_of(tiny_images, mixing, updates_per_batch=3, steps=steps and 3 * steps)
    assert stream.steps == 3 * once.steps
    for several, single in zip(shown(stream), shown(once), strict=True):
        several = several.reshape((-1, 3, BATCH, *several.shape[2:]))
        for time in range(3):
            np.testing.assert_array_equal(several[:, time], single.reshape(several[:, 0].shape))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4])
def test_shares_of_a_blurry_stream_are_exact(tiny_images: LabelledImages, share: float) -> None:
    """Six classes of 60 rows, three periods: all rows come, and so many of each class in each period."""
    stream = stream_of(tiny_images, blurry(share))
    x, y = shown(stream)
    assert stream.steps == 20
    away = int(60 * share) // 2
    for period in range(3):
        counts = np.bincount(y[period], minlength=6)
        own = np.arange(6) // 2 == period
        np.testing.assert_array_equal(counts, np.where(own, 60 - 2 * away, away))
        assert counts[~own].sum() == pytest.approx(share * counts.sum())
    index = rows(tiny_images, x)
    assert len(np.unique(index)) == len(index) == 360
    np.testing.assert_array_equal(tiny_images.train_labels[index], np.ravel(y))


def test_disjoint_classes_stay_in_their_period(tiny_images: LabelledImages) -> None:
    _, y = shown(stream_of(tiny_images, blurry(0.3, disjoint=0.5)))
    counts = np.stack([np.bincount(period, minlength=6) for period in y])
    np.testing.assert_array_equal(counts[:, ::2], 60 * np.eye(3))
    np.testing.assert_array_equal(counts[:, 1::2], 9 + 33 * np.eye(3))


@pytest.mark.parametrize(("share", "n_tasks"), [(0.1, 2), (0.35, 4), (1.0, 2), (0.2, 1)])
def test_every_row_comes_once_at_most(unequal_images: LabelledImages, share: float, n_tasks: int) -> None:
    stream = stream_of(unequal_images, blurry(share), n_tasks, batch_size=5)
    everything = 160 // n_tasks // 5
    assert 0.5 * everything < stream.steps <= everything
    for order in (stream, stream.reorder(jax.random.key(1))):
        index = rows(unequal_images, shown(order)[0])
        assert len(np.unique(index)) == len(index)


def test_rows_are_mixed_within_a_period_and_between_keys(tiny_images: LabelledImages) -> None:
    stream = stream_of(tiny_images, blurry(0.1))
    x, y = shown(stream)
    again, other = shown(stream)[0], shown(stream, key=jax.random.key(7))[0]
    np.testing.assert_array_equal(x, again)
    assert (x != other).any(axis=(2, 3)).mean() > 0.9
    for period in range(3):
        own = y[period] // 2 == period
        halves = own[:60].sum(), own[60:].sum()
        assert min(halves) > 40, "the rows of other tasks come all along"


def test_blurry_stream_of_more_steps_than_rows_is_refused(tiny_images: LabelledImages) -> None:
    for options in ({"steps": 21}, {"epochs": 2}):
        with pytest.raises(ValueError, match="blurry stream comes at most once: .* steps at most 20"):
            stream_of(tiny_images, blurry(0.1), **options)
    assert stream_of(tiny_images, blurry(0.1), steps=7).steps == 7


@pytest.mark.parametrize("schedule", ["gaussian", "linear"])
@pytest.mark.parametrize("over", ["class", "task"])
def test_weights_of_a_drifting_stream(tiny_images: LabelledImages, schedule: str, over: str) -> None:
    """The frequencies of many draws at one place, beside the formula in words of one class at a time."""
    stream = stream_of(tiny_images, drifting(schedule, width=0.8, over=over), steps=50, batch_size=8)
    units = 6 if over == "class" else 3
    for step in (0, 74, 149):
        cursors = jax.vmap(lambda k, s=step: stream.init(k)._replace(step=jnp.int32(s)))(jax.random.split(KEY, 500))
        y = np.ravel(jax.jit(jax.vmap(lambda c: stream.next(c)[0].y))(cursors))
        place = units * (step + 0.5) / 150
        weight = []
        for label in range(6):
            distance = abs(place - (label * units // 6) - 0.5)
            weight.append(np.exp(-(distance**2) / 2 / 0.8**2) if schedule == "gaussian" else max(0, 1 - distance / 0.8))
        wanted = np.array(weight) / sum(weight)
        np.testing.assert_allclose(np.bincount(y, minlength=6) / len(y), wanted, atol=4 * np.sqrt(0.25 / len(y)))
        numbers = np.exp(log_weights(stream.data.mixing, (step + 0.5) / 150))
        np.testing.assert_allclose(numbers / numbers.sum(), wanted, atol=1e-5)


def test_linear_drift_passes_from_one_class_into_the_next(tiny_images: LabelledImages) -> None:
    numbers = drifting("linear", width=1.0).numbers(3, 2)
    weights = lambda past: np.exp(log_weights(numbers, past)).round(4)  # noqa: E731
    np.testing.assert_allclose(weights(0.5 / 6), [1, 0, 0, 0, 0, 0])
    np.testing.assert_allclose(weights(0.75 / 6), [0.75, 0.25, 0, 0, 0, 0])
    np.testing.assert_allclose(weights(3 / 6), [0, 0, 0.5, 0.5, 0, 0])


def test_a_class_starts_again_when_all_its_rows_have_come(unequal_images: LabelledImages) -> None:
    stream = stream_of(unequal_images, drifting(width=0.7), 2, steps=40)
    x, _ = shown(stream, 80)
    index = rows(unequal_images, x)
    labels = unequal_images.train_labels[index]
    passes = []
    for label in range(4):
        mine, n = index[labels == label], int((unequal_images.train_labels == label).sum())
        for begin in range(0, len(mine), n):
            batch = mine[begin : begin + n]
            assert len(np.unique(batch)) == len(batch)
        if len(mine) >= 2 * n:
            assert (mine[:n] != mine[n : 2 * n]).any(), "in a new order"
        passes.append(len(mine) / n)
    assert max(passes) > 2


def test_permuted_tasks_can_drift_too(tiny_images: LabelledImages) -> None:
    stream = permuted_mnist(2, images=tiny_images, mixing=drifting(over="task", width=0.3), steps=30, **SMALL)
    x, y = shown(stream, 60)
    flat = x[0].reshape((-1, 16))
    place = {
        image.reshape(16)[np.asarray(order)].tobytes(): task
        for task, order in enumerate(stream.data.permutations)
        for image in tiny_images.train_images
    }
    task = np.array([place[row.tobytes()] for row in flat])
    assert task[:60].mean() < 0.1 and task[-60:].mean() > 0.9
    assert 0.2 < task[120:240].mean() < 0.8
    assert np.bincount(y[0], minlength=6).min() > 30, "all classes all along"


MIXINGS = {"blurry": blurry(0.1, disjoint=0.5), "drifting": drifting()}


@pytest.mark.parametrize("mixing", list(MIXINGS))
@pytest.mark.parametrize(
    ("component", "message"),
    [
        (ewc(1.0), "ewc needs 'boundaries', task boundaries .* provide; it provides open_outputs"),
        (lwf(), "lwf needs 'boundaries'"),
        (replay(20, batch_size=4, weighting="tasks"), "replay needs 'boundaries'"),
        (Component("seer", frozenset({"end_sample"})), "seer needs 'end_sample'"),
        (Component("teller", frozenset({"task_ids"})), "teller needs 'task_ids'"),
    ],
)
def test_what_needs_borders_is_refused_by_name(tiny_images: Any, mixing: str, component: Any, message: str) -> None:
    stream = stream_of(tiny_images, MIXINGS[mixing], steps=6)
    with pytest.raises(ValueError, match=message):
        run_stream(tiny_learner(stream, supervised(), component), stream, KEY)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda images: split_mnist(3, "task", images=images, mixing=blurry(), **SMALL),
            "mixing removes task boundaries",
        ),
        (
            lambda images: split_mnist(3, "class", images=images, mixing=blurry(), **SMALL),
            "mixing removes task boundaries",
        ),
        (lambda images: stream_of(images, blurry(), joint="all"), "mixing removes task boundaries"),
        (lambda images: stream_of(images, blurry(disjoint=0.3)), "disjoint is 0.3, but times the 2 classes of a task"),
        (lambda images: blurry(0.0125), "fraction is 0.0125, but it must be a multiple of 0.001"),
        (lambda images: blurry(1.5), r"fraction is 1.5, but it must be in \[0, 1\]"),
        (lambda images: drifting("sudden"), "schedule is 'sudden', but it must be one of 'gaussian', 'linear'"),
        (lambda images: drifting(over="row"), "over is 'row'"),
        (lambda images: drifting(width=0.0), "width is 0"),
        (lambda images: drifting("linear", width=0.4), "width is 0.4"),
    ],
)
def test_impossible_mixings_are_refused(tiny_images: Any, make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tiny_images)


def silent() -> Component:
    """Fails where a border is told."""

    def told(*_: Any) -> Any:
        raise AssertionError("a border was told")

    return Component("silent", begin_task=told, end_task=told)


@pytest.mark.parametrize("mixing", list(MIXINGS))
def test_replay_runs_and_resumes_to_the_same_bytes(
    tiny_images: Any, mixing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = stream_of(tiny_images, MIXINGS[mixing], steps=6)
    learner = tiny_learner(stream, supervised(), replay(30, batch_size=6), silent())
    measure = {"accuracy": accuracy(), "curve": at(3, accuracy(batches=2))}
    result = run_stream(learner, stream, KEY, measure=measure)
    curve = result.measures["curve"]
    assert curve.shape == (3, 2, 3)
    np.testing.assert_allclose(curve[:, -1], result.accuracy[1:], atol=1e-6)
    assert int(result.state.parts["replay"].seen) == 18 * BATCH
    assert np.asarray(result.accuracy[-1]).mean() > np.asarray(result.accuracy[0]).mean()

    run = partial(fit, learner, stream, KEY, checkpoint_every=4, checkpoint_seconds=0, progress=False)
    once = run(tmp_path / "once")
    close((result.state, result.accuracy), (once.state, once.accuracy), rtol=1e-4, atol=1e-5)
    save = Checkpoints.save
    with monkeypatch.context() as patch:

        def die(self: Any, step: int, tree: Any) -> None:
            if step == 10:
                raise SystemExit("killed")
            save(self, step, tree)

        patch.setattr(Checkpoints, "save", die)
        with pytest.raises(SystemExit):
            run(tmp_path / "stopped")
    same_bytes(run(tmp_path / "stopped"), once)
    for file in ("metrics.csv", "accuracy.npy"):
        assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "once" / file).read_bytes()
    other = stream_of(tiny_images, blurry(0.2) if mixing == "blurry" else drifting("linear", width=0.9), steps=6)
    with pytest.raises(ConfigError, match="run.data_crc32 was"):
        fit(learner, other, KEY, tmp_path / "once", checkpoint_every=4, checkpoint_seconds=0, progress=False)
