"""What is measured in a run, and when: against a loop by hand, in one program and from a host loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_zoo import Learner, Stream, accuracy, at, ewc, fit, replay, run_stream, supervised, sweep
from cl_zoo.evaluation import Measure
from cl_zoo.evaluation.measures import settled
from cl_zoo.losses import weighted_mean
from cl_zoo.streams import (
    associative_recall,
    blurry,
    drifting,
    few_shot,
    permuted_mnist,
    rotated_mnist,
    sinusoids,
    slowly_changing_regression,
    split_mnist,
    text_domains,
)
from cl_zoo.training import clear_programs
from cl_zoo.training._run_stream import _program
from cl_zoo.training.checkpoint import Checkpoints
from tests.tiny import BATCH, STEPS, close, same_bytes, tiny_learner, tiny_stream

KEY = jax.random.key(2)
LENGTHS = [4, 6, 3]


@pytest.fixture(scope="module")
def stream(tiny_images: Any) -> Stream:
    return tiny_stream(tiny_images, "class")


@pytest.fixture(scope="module")
def uneven(tiny_images: Any) -> Stream:
    """Tasks of different lengths."""
    return tiny_stream(tiny_images, "class", steps=LENGTHS)


@pytest.fixture(scope="module")
def learner(stream: Stream) -> Learner:
    return tiny_learner(stream, supervised(), replay(20, batch_size=4), optimiser=optax.sgd(0.1))


def size(learner: Learner, state: Any, stream: Stream, key: Any) -> dict[str, Any]:
    """A measure of one's own: a pytree, of floats and of whole numbers."""
    kernel = state.params["output"]["kernel"]
    return {"norms": jnp.linalg.norm(kernel, axis=0), "place": (state.step, state.task)}


def drawn(learner: Learner, state: Any, stream: Stream, key: Any) -> Any:
    return jax.random.uniform(key)


def spread(found: Any) -> Any:
    """A report: what no program could do."""
    assert all(isinstance(leaf, (np.ndarray, np.generic)) for leaf in jax.tree.leaves(found))
    return {"mean": float(found["norms"].mean()), "step": int(found["place"][0])}


MEASURES = {
    "accuracy": accuracy(),
    "curve": at(4, accuracy(batches=1)),  # in tasks of 6 updates, once
    "size": at(2, size),
    "drawn": at(3, drawn),
    "last": at("end", accuracy("test", within_task=True)),
    "report": at(3, Measure(size, report=spread)),
}


def run(learner: Learner, stream: Stream, directory: Path, **options: Any) -> Any:
    settings = {"checkpoint_every": 3, "checkpoint_seconds": 0, "measure": MEASURES, "progress": False, **options}
    return fit(learner, stream, KEY, directory, **settings)


def by_hand(learner: Learner, stream: Stream, lengths: list[int]) -> tuple[list[Any], list[list[Any]], list[list[Any]]]:
    """The states at the borders, those after each update of each task, and the losses."""
    learner_key, stream_key = jax.random.split(KEY)
    cursor = stream.init(stream_key)
    zeros = jax.tree.map(jnp.zeros_like, stream.next(cursor)[0])
    update, fetch = jax.jit(Learner.update), jax.jit(Stream.next)
    state = learner.init(learner_key, zeros)
    borders, within, losses = [state], [], []
    for t, length in enumerate(lengths):
        sample = stream.sample(t, stream_key)
        state = learner.begin_task(state, jax.tree.map(lambda leaf, t=t: leaf[t], stream.tasks), sample)
        within.append([])
        losses.append([])
        for _ in range(length):
            batch, cursor = fetch(stream, cursor)
            state, metrics = update(learner, state, batch)
            within[t].append(state)
            losses[t].append(float(metrics["loss"]))
        state = learner.end_task(state, sample)
        borders.append(state)
    return borders, within, losses


@pytest.fixture(scope="module")
def hand(learner: Learner, stream: Stream) -> Any:
    return by_hand(learner, stream, [STEPS] * 3)


@pytest.fixture(scope="module")
def whole(learner: Learner, stream: Stream) -> Any:
    return run_stream(learner, stream, KEY, measure=MEASURES)


def some_of(scores: Any, stream: Stream, learner: Learner, state: Any, batches: int) -> np.ndarray:
    """The score on the first batches of each task."""
    found = []
    for task in range(stream.n_tasks):
        rows = jax.tree.map(lambda leaf: leaf[:batches].reshape((-1, *leaf.shape[2:])), stream.evaluation(task, scores))
        found.append(weighted_mean(stream.score(learner.predict(state, rows.x, rows.task), rows), rows.weight))
    return np.array(found)


def test_measures_are_those_of_a_loop_by_hand(whole: Any, hand: Any, learner: Learner, stream: Stream) -> None:
    borders, within, losses = hand
    found = whole.measures
    assert list(found) == list(MEASURES)
    assert found["accuracy"].shape == (4, 3) and whole.accuracy is found["accuracy"]
    for row, state in zip(found["accuracy"], borders, strict=True):
        np.testing.assert_allclose(row, some_of("test", stream, learner, state, 2), atol=1e-6)
    assert found["curve"].shape == (3, 1, 3), "4 and 8 of 6: only the first"
    for t in range(3):
        np.testing.assert_allclose(found["curve"][t, 0], some_of("test", stream, learner, within[t][3], 1), atol=1e-6)
    norms, (steps, tasks) = found["size"]["norms"], found["size"]["place"]
    assert norms.shape == (3, 3, 6) and steps.dtype == tasks.dtype == jnp.int32
    assert steps.tolist() == [[2, 4, 6], [8, 10, 12], [14, 16, 18]]
    assert tasks.tolist() == [[0] * 3, [1] * 3, [2] * 3]
    wanted = [[np.linalg.norm(within[t][i].params["output"]["kernel"], axis=0) for i in (1, 3, 5)] for t in range(3)]
    np.testing.assert_allclose(norms, wanted, rtol=1e-4)
    assert found["last"].shape == (3,)
    assert (found["last"] >= found["accuracy"][-1] - 1e-6).all()
    assert set(found["report"]) == {"mean", "step"}
    assert found["report"]["step"].tolist() == [[3, 6], [9, 12], [15, 18]]
    np.testing.assert_allclose(found["report"]["mean"][1, 1], np.mean(wanted[1][2]), rtol=1e-4)
    np.testing.assert_allclose(whole.metrics["loss"], losses, rtol=1e-3)
    assert whole.updated.dtype == bool and whole.updated.shape == (3, STEPS) and whole.updated.all()
    close(whole.state, borders[-1], rtol=1e-3, atol=1e-4)


def test_each_measure_draws_from_a_key_of_its_own(whole: Any, learner: Learner, stream: Stream) -> None:
    key = jax.random.fold_in(KEY, crc32(b"measure/drawn"))
    wanted = [[jax.random.uniform(jax.random.fold_in(key, 2 * t + i)) for i in range(2)] for t in range(3)]
    np.testing.assert_array_equal(whole.measures["drawn"], wanted)
    assert len(np.unique(wanted)) == 6
    # Neither other measures nor the learner see any of it.
    alone = run_stream(learner, stream, KEY, measure={"drawn": at(3, drawn), "other": at("task", drawn)})
    np.testing.assert_array_equal(alone.measures["drawn"], wanted)
    assert len(np.unique(np.append(alone.measures["other"], wanted))) == 10
    close(alone.metrics, whole.metrics)
    with pytest.raises(KeyError, match="accuracy"):
        _ = alone.accuracy


def test_a_function_is_measured_by_task_and_nothing_may_be_measured(learner: Learner, stream: Stream) -> None:
    found = run_stream(learner, stream, KEY, measure={"size": size, "end": at("end", size)}).measures
    assert found["size"]["norms"].shape == (4, 6) and found["size"]["place"][0].tolist() == [0, 6, 12, 18]
    assert found["end"]["norms"].shape == (6,) and int(found["end"]["place"][0]) == 18
    np.testing.assert_allclose(found["end"]["norms"], found["size"]["norms"][-1], rtol=1e-5)
    assert run_stream(learner, stream, KEY, measure={}).measures == {}


@pytest.mark.parametrize("batches", [1, 2, 5])
def test_some_batches_of_an_evaluation(learner: Learner, stream: Stream, hand: Any, batches: int) -> None:
    state = hand[0][-1]
    found = accuracy(batches=batches)(learner, state, stream)
    np.testing.assert_allclose(found, some_of("test", stream, learner, state, batches), atol=1e-6)
    if batches > 1:  # all that there are
        np.testing.assert_allclose(found, accuracy()(learner, state, stream), atol=1e-6)


def test_the_validation_split(tiny_images: Any) -> None:
    held = tiny_stream(tiny_images, "class", validation=0.25)
    learner = tiny_learner(held, supervised(), optimiser=optax.sgd(0.1))
    measure = {"accuracy": accuracy("validation"), "test": at("end", accuracy())}
    result = run_stream(learner, held, KEY, measure=measure)
    wanted = some_of("validation", held, learner, result.state, 9)
    np.testing.assert_allclose(result.accuracy[-1], wanted, atol=1e-6)
    np.testing.assert_allclose(result.measures["test"], accuracy()(learner, result.state, held), atol=1e-6)


def test_fit_gives_the_same(whole: Any, learner: Learner, stream: Stream, tmp_path: Path) -> None:
    found = run(learner, stream, tmp_path)
    assert list(found.measures) == list(whole.measures)
    close((found.state, found.metrics, found.measures), (whole.state, whole.metrics, whole.measures), 1e-3, 1e-4)
    np.testing.assert_array_equal(found.measures["drawn"], whole.measures["drawn"])
    np.testing.assert_array_equal(found.updated, whole.updated)
    for name in ("accuracy", "curve", "last", "drawn"):
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}.npy", allow_pickle=False), found.measures[name])
    rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines() if ",measure," in line]
    counts = {name: [int(row[0]) for row in rows if row[3] == name] for name in MEASURES}
    assert counts["accuracy"] == [step for step in (0, 6, 12, 18) for _ in range(3)]
    assert counts["curve"] == [step for step in (4, 10, 16) for _ in range(3)]
    assert counts["drawn"] == [3, 6, 9, 12, 15, 18] and counts["last"] == [18] * 3


@pytest.mark.parametrize("lost", [3, 4, 9, 10, 18])
def test_a_resumed_run_measures_the_same_bytes(
    learner: Learner, stream: Stream, uneven: Stream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    """Stopped before the checkpoint of some step, so that what came after the one before is measured again."""
    source = uneven if lost in (4, 10) else stream
    once = run(learner, source, tmp_path / "once")
    save = Checkpoints.save

    def die(self: Any, step: int, tree: Any) -> None:
        if step == lost:
            raise SystemExit("killed")
        save(self, step, tree)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", die)
        with pytest.raises(SystemExit):
            run(learner, source, tmp_path / "stopped")
    same_bytes(run(learner, source, tmp_path / "stopped"), once)
    files = sorted(path.name for path in (tmp_path / "once").iterdir() if path.suffix in (".csv", ".npy", ".npz"))
    assert {"metrics.csv", "accuracy.npy", "curve.npy"} <= set(files)
    for file in files:
        assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "once" / file).read_bytes(), file
    same_bytes(run(learner, source, tmp_path / "stopped"), once)


def test_fit_reports_each_result_once(learner: Learner, stream: Stream, tmp_path: Path) -> None:
    told: list[int] = []

    def report(found: Any) -> Any:
        told.append(int(found["place"][0]))
        return spread(found)

    found = run(learner, stream, tmp_path, measure={"report": at(2, Measure(size, report=report))})
    assert told == list(range(2, 19, 2))
    assert found.measures["report"]["step"].tolist() == [[2, 4, 6], [8, 10, 12], [14, 16, 18]]


# Tasks of different lengths


def test_tasks_of_different_lengths(learner: Learner, uneven: Stream) -> None:
    assert uneven.steps == 6 and uneven.task_steps.tolist() == LENGTHS
    borders, within, losses = by_hand(learner, uneven, LENGTHS)
    measure = {**MEASURES, "odd": at(5, size)}
    found = run_stream(learner, uneven, KEY, measure=measure)
    mask = np.arange(6) < np.array(LENGTHS)[:, None]
    np.testing.assert_array_equal(found.updated, mask)
    for name, values in found.metrics.items():
        np.testing.assert_array_equal(np.isfinite(values), mask, err_msg=name)
    for t, wanted in enumerate(losses):
        np.testing.assert_allclose(found.metrics["loss"][t, : LENGTHS[t]], wanted, rtol=1e-3)
    assert int(found.state.step) == sum(LENGTHS)
    assert int(found.state.parts["replay"].seen) == sum(LENGTHS) * BATCH
    close(found.state, borders[-1], rtol=1e-3, atol=1e-4)
    for row, state in zip(found.accuracy, borders, strict=True):
        np.testing.assert_allclose(row, some_of("test", uneven, learner, state, 2), atol=1e-6)
    curve = np.asarray(found.measures["curve"])
    assert curve.shape == (3, 1, 3) and np.isnan(curve[2]).all(), "the last task ends before"
    for t in (0, 1):
        np.testing.assert_allclose(curve[t, 0], some_of("test", uneven, learner, within[t][3], 1), atol=1e-6)
    norms, (steps, _) = found.measures["size"]["norms"], found.measures["size"]["place"]
    assert steps.tolist() == [[2, 4, 0], [6, 8, 10], [12, 0, 0]]
    np.testing.assert_array_equal(np.isfinite(norms[..., 0]), [[1, 1, 0], [1, 1, 1], [1, 0, 0]])
    assert found.measures["odd"]["place"][0].tolist() == [[0], [9], [0]]
    assert np.isfinite(found.measures["last"]).all()


def test_fit_with_tasks_of_different_lengths(learner: Learner, uneven: Stream, tmp_path: Path) -> None:
    metrics = {"loss": 3, "supervised/loss": 1} if len(learner.components) > 2 else {"loss": 3}
    whole = run_stream(learner, uneven, KEY, measure=MEASURES, metrics=metrics)
    assert whole.metrics["loss"].shape == (3, 2)
    np.testing.assert_array_equal(np.isfinite(whole.metrics["loss"]), [[1, 0], [1, 1], [1, 0]])
    found = run(learner, uneven, tmp_path, metrics=metrics)
    close((found.state, found.metrics, found.measures), (whole.state, whole.metrics, whole.measures), 1e-3, 1e-4)
    np.testing.assert_array_equal(found.updated, whole.updated)
    full = run(learner, uneven, tmp_path / "full")
    close(full.metrics, run_stream(learner, uneven, KEY).metrics, 1e-3, 1e-4)


def test_rows_of_a_task_come_in_its_updates_alone(tiny_images: Any) -> None:
    for lengths, updates_per_batch in ((LENGTHS, 1), ([4, 6, 2], 2)):
        uneven = tiny_stream(tiny_images, "task", steps=lengths, updates_per_batch=updates_per_batch)
        step = lambda cursor, _: uneven.next(cursor)[::-1]  # noqa: B023, E731
        batches = jax.jit(lambda: jax.lax.scan(step, uneven.init(KEY), length=sum(lengths) + 2))()[1]  # noqa: B023
        wanted = np.append(np.repeat([0, 1, 2], lengths), [2, 2])
        np.testing.assert_array_equal(batches.task[:, 0], wanted)
        np.testing.assert_array_equal(np.asarray(batches.y) // 2, batches.task)
    even = tiny_stream(tiny_images, "task", steps=[6, 6, 6])
    assert even.task_steps is None and even.steps == 6
    with pytest.raises(ValueError, match="steps has 2 numbers, but there are 3 tasks"):
        tiny_stream(tiny_images, "task", steps=[6, 6])
    with pytest.raises(ValueError, match="steps is 0, but it must be at least 1"):
        tiny_stream(tiny_images, "task", steps=[6, 0, 6])
    with pytest.raises(ValueError, match="steps is 5 and updates_per_batch is 2, .* multiple of 2"):
        tiny_stream(tiny_images, "task", steps=[6, 5, 6], updates_per_batch=2)


def test_a_sweep_measures_each_run(uneven: Stream) -> None:
    make = lambda rate: tiny_learner(uneven, supervised(), optimiser=optax.sgd(rate))  # noqa: E731
    keys = jax.random.split(KEY, 2)
    measure = {"accuracy": accuracy(), "size": at(2, size), "report": at("end", Measure(size, report=spread))}
    found = sweep(make, jnp.array([0.1, 0.3]), uneven, keys, measure=measure, metrics={"loss": 2})
    assert found.accuracy.shape == (2, 2, 4, 3) and found.metrics["loss"].shape == (2, 2, 3, 3)
    assert found.measures["report"]["step"].tolist() == [[13, 13], [13, 13]]
    alone = run_stream(make(0.3), uneven, keys[1], measure=measure, metrics={"loss": 2})
    one = jax.tree.map(lambda leaf: leaf[1, 1], found.measures)
    close(one, alone.measures, 1e-3, 1e-4)
    np.testing.assert_allclose(found.metrics["loss"][1, 1], alone.metrics["loss"], rtol=1e-3)


# Which metrics are kept


def test_metrics_of_a_stride(learner: Learner, stream: Stream, whole: Any, tmp_path: Path) -> None:
    for metrics, strides in (({"loss": 3}, {"loss": 3}), ({"loss": 4}, {"loss": 4}), (["loss"], {"loss": 1})):
        found = run_stream(learner, stream, KEY, metrics=metrics)
        assert set(found.metrics) == set(strides)
        for name, n in strides.items():
            np.testing.assert_allclose(found.metrics[name], whole.metrics[name][:, n - 1 :: n], rtol=1e-4)
        host = run(learner, stream, tmp_path / str(metrics), metrics=metrics)
        close(host.metrics, found.metrics, 1e-3, 1e-4)
        steps = [int(line.split(",")[0]) for line in (tmp_path / str(metrics) / "metrics.csv").read_text().splitlines()
                 if ",train," in line]  # fmt: skip
        n = strides["loss"]
        assert steps == [6 * t + i for t in range(3) for i in range(n - 1, 6, n)]
    assert run_stream(learner, stream, KEY, metrics=()).metrics == {}
    assert run(learner, stream, tmp_path / "none", metrics=()).metrics == {}


def test_penalties_are_metrics_too(stream: Stream) -> None:
    learner = tiny_learner(stream, supervised(), ewc(10.0), optimiser=optax.sgd(0.1))
    full = run_stream(learner, stream, KEY).metrics
    found = run_stream(learner, stream, KEY, metrics={"ewc/penalty": 2, "loss": 6}).metrics
    assert found["ewc/penalty"].shape == (3, 3) and found["loss"].shape == (3, 1)
    np.testing.assert_allclose(found["ewc/penalty"], full["ewc/penalty"][:, 1::2], rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(found["loss"], full["loss"][:, 5::6], rtol=1e-3)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measure": {"curve": at(7, accuracy())}}, "'curve' is at 7 updates, but a task has only 6"),
        ({"measure": {"a b": accuracy()}}, "the name 'a b' must be of letters, digits"),
        ({"measure": {"../a": accuracy()}}, "the name '../a' must be of letters"),
        ({"measure": {"a": "test"}}, "'a' is 'test', but it must be a function or a Measure"),
        ({"measure": {"a": Measure(size, when="never")}}, "when is 'never', but it must be one of 'task', 'end'"),
        ({"measure": {"a": Measure(size, when=0)}}, "when is 0, but it must be at least 1"),
        ({"metrics": "loss"}, "metrics is 'loss', but it must be a sequence of names"),
        ({"metrics": {"loss": 0}}, "metrics: loss is 0, but it must be at least 1"),
        ({"metrics": ["los"]}, "metrics has 'los', but the learner gives loss"),
    ],
)
def test_impossible_measures_are_refused(
    learner: Learner, stream: Stream, tmp_path: Path, options: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run_stream(learner, stream, KEY, **options)
    with pytest.raises(ValueError, match=message):
        fit(learner, stream, KEY, tmp_path, progress=False, **options)
    assert not list(tmp_path.iterdir()), "refused before anything is written"
    with pytest.raises(ValueError, match=message):
        sweep(lambda s: learner, jnp.zeros(1), stream, jax.random.split(KEY, 1), **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: at("never", accuracy()), "at: when is 'never', but it must be one of 'task', 'end'"),
        (lambda: at(0, accuracy()), "at: when is 0, but it must be at least 1"),
        (lambda: at(2.5, accuracy()), "at: when is 2.5, but it must be a word or a whole number"),
        (lambda: accuracy("train"), "accuracy: split is 'train', but it must be one of 'validation', 'test'"),
        (lambda: accuracy(batches=0), "accuracy: batches is 0"),
    ],
)
def test_impossible_times_and_splits_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# Programs


FACTORIES = {
    "split": lambda images, n: split_mnist(3, "class", images=images, batch_size=n, steps=2),
    "lengths": lambda images, n: split_mnist(3, "class", images=images, batch_size=n, steps=LENGTHS),
    "permuted": lambda images, n: permuted_mnist(3, images=images, batch_size=n, steps=2),
    "rotated": lambda images, n: rotated_mnist(3, images=images, batch_size=n, steps=2),
    "angles": lambda images, n: rotated_mnist(3, images=images, batch_size=n, steps=2, angles=[0.0, 30.0, 60.0]),
    "blurry": lambda images, n: split_mnist(
        3, "class", images=images, outputs="all", mixing=blurry(0.1), batch_size=n, steps=2
    ),
    "drifting": lambda images, n: split_mnist(
        3, "class", images=images, outputs="all", mixing=drifting(), batch_size=n, steps=2
    ),
    "few_shot": lambda images, n: few_shot(images, n_way=2, queries=2, batch_size=n, steps=2),
    "sinusoids": lambda images, n: sinusoids(2, batch_size=n, steps=2),
    "recall": lambda images, n: associative_recall(length=8, pairs=2, vocabulary=8, batch_size=n, steps=2),
    "regression": lambda images, n: slowly_changing_regression(3, steps=2, batch_size=n),
    "text": lambda images, n: text_domains({"a": bytes(300), "b": bytes(300)}, length=8, steps=2, batch_size=n),
    "skills": lambda images, n: tiny_stream(images, "skills") if n == 4 else tiny_stream(images, "episodes"),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_two_equal_calls_of_a_factory_are_one_structure(tiny_images: Any, name: str) -> None:
    make = FACTORIES[name]
    one, same, other = (jax.tree.structure(make(tiny_images, n)) for n in (4, 4, 5))
    assert one == same and hash(one) == hash(same)
    assert one != other


def test_two_equal_calls_of_a_factory_share_a_program(tiny_images: Any, learner: Learner) -> None:
    clear_programs()
    for seed in range(2):
        source = tiny_stream(tiny_images, "class")
        made = lambda learner, state, stream, key: state.step  # noqa: E731
        measure = {"accuracy": accuracy(batches=1), "own": at(2, made), "end": at("end", accuracy())}
        run_stream(learner, source, jax.random.key(seed), measure=measure)
    info = _program.cache_info()
    assert (info.misses, info.hits) == (1, 1)
    run_stream(learner, tiny_stream(tiny_images, "class"), KEY, measure={"accuracy": accuracy(batches=2)})
    run_stream(learner, tiny_stream(tiny_images, "class", batch_size=4), KEY, measure={"accuracy": accuracy(batches=2)})
    assert _program.cache_info().misses == 3
    clear_programs()
    assert _program.cache_info().currsize == 0


def test_jit_and_vmap_around_a_run(learner: Learner, stream: Stream, uneven: Stream, whole: Any) -> None:
    found = jax.jit(lambda learner, stream, key: run_stream(learner, stream, key, measure=MEASURES))(
        learner, stream, KEY
    )
    assert set(found.measures["report"]) == {"norms", "place"}, "reports are left out"
    plain = {name: value for name, value in whole.measures.items() if name != "report"}
    inside = {name: value for name, value in found.measures.items() if name != "report"}
    close((found.state, found.metrics, inside), (whole.state, whole.metrics, plain), 1e-3, 1e-4)
    constant = jax.jit(lambda: run_stream(learner, stream, KEY).accuracy)()  # no tracer comes in
    np.testing.assert_allclose(constant, whole.accuracy, atol=1e-6)

    keys = jnp.stack([KEY, jax.random.key(5)])
    many = jax.vmap(lambda key: run_stream(learner, uneven, key, metrics={"loss": 2}))(keys)
    assert many.accuracy.shape == (2, 4, 3) and many.metrics["loss"].shape == (2, 3, 3)
    for i in range(2):
        one = run_stream(learner, uneven, keys[i], metrics={"loss": 2})
        close(jax.tree.map(lambda leaf, i=i: leaf[i], many), one, 1e-3, 1e-4)


def test_chosen_tasks_are_columns_of_R(stream: Stream, tmp_path: Path) -> None:
    learner = tiny_learner(stream, supervised(), replay(5, batch_size=2))
    whole = run_stream(learner, stream, KEY, measure={"accuracy": accuracy()}).measures["accuracy"]
    some = {"accuracy": accuracy(tasks=[2, 0])}
    np.testing.assert_array_equal(run_stream(learner, stream, KEY, measure=some).measures["accuracy"], whole[:, [2, 0]])
    kept = fit(learner, stream, KEY, tmp_path / "run", measure=some, progress=False).measures["accuracy"]
    np.testing.assert_allclose(kept, whole[:, [2, 0]], atol=1e-6)
    for tasks, told in (([stream.n_tasks], "last task"), ([-1], "sequence of tasks"), ([], "sequence of tasks")):
        with pytest.raises(ValueError, match=f"accuracy: tasks .*{told}"):
            run_stream(learner, stream, KEY, measure={"accuracy": accuracy(tasks=tasks)})


def test_a_run_of_many_tasks_says_what_R_costs(tiny_images: Any) -> None:
    many = permuted_mnist(101, images=tiny_images, steps=1, batch_size=2)
    with pytest.warns(UserWarning, match="101 tasks are scored after each, 10201 times"):
        settled(None, many)
