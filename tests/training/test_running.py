"""run_stream, sweep and fit beyond what the laws say: stops, damage, bad numbers, memory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_zoo import NonFiniteError, accuracy, at, compose, ewc, fit, replay, run_stream, supervised, sweep
from cl_zoo.evaluation.cost import state_bytes, timed, update_flops
from cl_zoo.files import InUseError, locked
from cl_zoo.models import mlp
from cl_zoo.streams import permuted_mnist
from cl_zoo.training import Stopped, _sweep, loop, stream_program
from cl_zoo.training.checkpoint import CheckpointError, Checkpoints
from cl_zoo.training.run_directory import ConfigError, read_metrics
from tests.tiny import STEPS, same_bytes, tiny_learner, tiny_stream

KEY = jax.random.key(2)


@pytest.fixture(scope="module")
def stream(tiny_images: Any) -> Any:
    return tiny_stream(tiny_images)


@pytest.fixture(scope="module")
def learner(stream: Any) -> Any:
    return tiny_learner(stream, supervised())


def run(learner: Any, stream: Any, directory: Path, **options: Any) -> Any:
    return fit(
        learner,
        stream,
        KEY,
        directory,
        **{"checkpoint_every": 3, "checkpoint_seconds": 0, "progress": False, **options},
    )


def test_second_run_compiles_nothing(learner: Any, stream: Any) -> None:
    program = stream_program(learner, stream)
    run_stream(learner, stream, jax.random.key(0))
    run_stream(learner, stream, jax.random.key(1))
    run_stream(learner, stream.reorder(KEY), jax.random.key(1))
    assert stream_program(learner, stream) is program
    assert program._cache_size() == 1


def test_sweep_over_orders(stream: Any, tiny_images: Any) -> None:
    make = lambda rate: tiny_learner(stream, supervised(), optimiser=optax.adam(rate))  # noqa: E731
    keys, rates = jax.random.split(KEY, 2), jnp.array([1e-2, 3e-2])
    full = sweep(make, rates, stream, keys, orders=jax.random.split(jax.random.key(9), 3), batch_size=4)
    assert full.accuracy.shape == (2, 2, 3, 4, 3)
    paired = sweep(make, rates, stream, keys, orders="per_seed")
    assert paired.accuracy.shape == (2, 2, 4, 3)
    one = jax.random.fold_in(keys[1], 3)
    alone = run_stream(make(1e-2), stream.reorder(one), keys[1])
    np.testing.assert_allclose(paired.metrics["loss"][0, 1], alone.metrics["loss"], rtol=1e-3, atol=1e-5)
    assert len({float(full.metrics["loss"][0, 0, order].sum()) for order in range(3)}) == 3


def test_sweep_of_seeds_alone(stream: Any, capfd: Any) -> None:
    """A learner and no settings; three runs, two at once; a bar that counts them."""
    learner = tiny_learner(stream, supervised())
    keys = jax.random.split(KEY, 3)
    result = sweep(learner, None, stream, keys, batch_size=2, keep_states=True)
    assert result.accuracy.shape == (3, 4, 3) and result.state.step.tolist() == [18] * 3
    alone = run_stream(learner, stream, keys[2])
    np.testing.assert_allclose(result.metrics["loss"][2], alone.metrics["loss"], rtol=1e-3, atol=1e-5)
    assert "3/3" in capfd.readouterr().err
    programs = _sweep._sweep_program.cache_info().misses
    sweep(learner, None, stream, jax.random.split(jax.random.key(1), 3), batch_size=2, keep_states=True, progress=False)
    assert _sweep._sweep_program.cache_info().misses == programs
    assert "3/3" not in capfd.readouterr().err
    with pytest.raises(ValueError, match="make is function, but without settings it must be the learner"):
        sweep(lambda s: learner, None, stream, keys)
    with pytest.raises(ValueError, match="make is Learner, but it must be a function of a setting"):
        sweep(learner, jnp.zeros(2), stream, keys)


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"a": jnp.zeros(2), "b": jnp.zeros(3)}, {}, "one common leading axis"),
        ({"a": jnp.zeros(())}, {}, "one common leading axis"),
        ({"a": jnp.zeros(2)}, {"orders": "random"}, "orders is 'random'"),
        ({"a": jnp.zeros(2)}, {"batch_size": 0}, "batch_size is 0"),
        ({"a": jnp.zeros(2)}, {"measure": {"a": at(7, accuracy())}}, "'a' is at 7 updates, but a task has only 6"),
        ({"a": jnp.zeros(2)}, {"metrics": ["los"]}, "metrics has 'los', but the learner gives loss"),
    ],
)
def test_impossible_sweeps_are_refused(stream: Any, settings: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sweep(lambda s: tiny_learner(stream, supervised()), settings, stream, jax.random.split(KEY, 2), **options)


def test_loss_that_is_not_finite_stops_the_run(stream: Any, tmp_path: Path) -> None:
    stiff = tiny_learner(stream, supervised(), ewc(1e12), optimiser=optax.sgd(0.1))
    with pytest.raises(NonFiniteError, match=r"at task 1, step \d+; likely cause: a penalty grew"):
        run_stream(stiff, stream, KEY)
    with pytest.raises(NonFiniteError, match=r"a penalty grew.*checkpoint before it is that of step [69]"):
        run(stiff, stream, tmp_path)
    whole, tree = _saved(tmp_path, stiff, stream)
    assert whole in (6, 9)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree["state"].params))
    wild = tiny_learner(stream, supervised(), optimiser=optax.sgd(float("inf")))
    with pytest.raises(NonFiniteError, match="at task 0, step 1; likely cause: too high a learning rate"):
        run_stream(wild, stream, KEY)


def _saved(directory: Path, learner: Any, stream: Any) -> Any:
    state, cursor = jax.eval_shape(loop.start, learner, stream, KEY)[1]
    template = {
        "state": state,
        "cursor": cursor,
        "measures": {"accuracy": jax.ShapeDtypeStruct((4, 3), jnp.float32)},
        "step": jax.ShapeDtypeStruct((), jnp.int32),
        "log": jax.ShapeDtypeStruct((), jnp.int32),
        "updates": jax.ShapeDtypeStruct((3,), jnp.int32),
        "log_crc32": jax.ShapeDtypeStruct((), jnp.uint32),
    }
    return Checkpoints(directory / "checkpoints").restore_newest(template)


def test_parameters_spoilt_by_the_last_update_are_noticed(stream: Any) -> None:
    late = optax.chain(optax.sgd(0.1), optax.scale_by_schedule(lambda count: jnp.where(count == 17, jnp.nan, 1.0)))
    with pytest.raises(NonFiniteError, match=r"state.params is not finite at task 2, step 5;"):
        run_stream(tiny_learner(stream, supervised(), optimiser=late), stream, KEY)


def test_what_was_not_kept_of_each_update_is_not_blamed_on_one(stream: Any, tmp_path: Path) -> None:
    wild = tiny_learner(stream, supervised(), optimiser=optax.sgd(float("inf")))
    with pytest.raises(NonFiniteError, match="state.params is not finite at task 0, step 5 or before"):
        run_stream(wild, stream, KEY, metrics=())
    with pytest.raises(NonFiniteError, match="loss is nan at task 0, step 1 or before"):
        run_stream(wild, stream, KEY, metrics={"loss": 2})
    with pytest.raises(NonFiniteError, match=r"state.params is not finite at task 0, step \d or before"):
        fit(wild, stream, KEY, tmp_path, metrics=(), checkpoint_every=3, checkpoint_seconds=0, progress=False)


def test_shortened_log_is_refused(learner: Any, stream: Any, tmp_path: Path) -> None:
    run(learner, stream, tmp_path)
    (tmp_path / "metrics.csv").write_text("step\n")
    with pytest.raises(ConfigError, match="shorter than when the checkpoint was written"):
        run(learner, stream, tmp_path)


def test_config_that_json_cannot_hold_is_refused(learner: Any, stream: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds what JSON cannot"):
        run(learner, stream, tmp_path, config={"activation": len})


def test_run_directory(learner: Any, stream: Any, tmp_path: Path) -> None:
    result = run(learner, stream, tmp_path, config={"rate": 0.01})
    assert json.loads((tmp_path / "config.json").read_text())["config"] == {"rate": 0.01}
    assert "jax" in json.loads((tmp_path / "environment.json").read_text())["versions"]
    np.testing.assert_array_equal(np.load(tmp_path / "accuracy.npy", allow_pickle=False), result.accuracy)
    steps, losses = read_metrics(tmp_path)["loss"]
    assert steps.tolist() == list(range(3 * STEPS))
    np.testing.assert_array_equal(losses, np.ravel(result.metrics["loss"]))
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines[0] == "step,phase,task,metric,value"
    assert len(lines) == 1 + 3 * STEPS + 4 * 3
    scores = [line.split(",") for line in lines if ",measure," in line]
    assert [row[:4] for row in scores] == [
        [str(done), "measure", str(task), "accuracy"] for done in range(0, 19, STEPS) for task in range(3)
    ]
    np.testing.assert_array_equal(np.float32([row[4] for row in scores]), np.ravel(result.accuracy))
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"15", "18"}
    same_bytes(run(learner, stream, tmp_path, config={"rate": 0.01}), result)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {"rate": 0.02}}, r"config.rate was 0.01, now it is 0.02"),
        ({"config": {"rate": 0.01, "new": 1}}, r"config.new was 'absent', now it is 1"),
        ({"config": {"rate": 0.01}, "checkpoint_every": 2}, r"run.checkpoint_every was 3, now it is 2"),
        (
            {"config": {"rate": 0.01}, "measure": {"accuracy": at("end", accuracy())}},
            r"run.measures.accuracy was 'task', now it is 'end'",
        ),
        ({"config": {"rate": 0.01}, "metrics": ["loss"]}, r"run.metrics was None, now it is 'absent'"),
    ],
)
def test_resume_with_another_config_is_refused(
    learner: Any, stream: Any, tmp_path: Path, changes: Any, message: str
) -> None:
    run(learner, stream, tmp_path, config={"rate": 0.01})
    with pytest.raises(ConfigError, match=message):
        run(learner, stream, tmp_path, **changes)


def test_resume_with_another_model_is_refused(learner: Any, stream: Any, tmp_path: Path) -> None:
    run(learner, stream, tmp_path)
    with pytest.raises(ConfigError, match="the learner or the stream is another"):
        run(tiny_learner(stream, supervised(), replay(20, batch_size=8)), stream, tmp_path)


def test_a_changed_rate_is_refused_and_other_versions_are_a_warning(stream: Any, tmp_path: Path) -> None:
    """A rate is in no configuration, but in the program; another version of JAX traces another program."""
    make = lambda rate: tiny_learner(stream, supervised(), optimiser=optax.adam(rate))  # noqa: E731
    run(make(1e-2), stream, tmp_path)
    run(make(1e-2), stream, tmp_path)
    with pytest.raises(ConfigError, match="the learner or the stream is another: a number"):
        run(make(2e-2), stream, tmp_path)
    path = tmp_path / "environment.json"
    path.write_text(path.read_text().replace(jax.__version__, "0.0.1"))
    with pytest.warns(UserWarning, match=f"began with jax 0.0.1, and continues with {jax.__version__}"):
        run(make(2e-2), stream, tmp_path)


def test_two_processes_in_one_directory(learner: Any, stream: Any, tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(InUseError, match=f"process {os.getpid()} works there"):
        run(learner, stream, tmp_path)
    run(learner, stream, tmp_path)


DAMAGES = {
    "config.json": (lambda path: path.unlink(), ConfigError, "missing, but there are checkpoints"),
    "config.json, cut": (lambda path: path.write_text("{"), ConfigError, "not readable as JSON"),
    "config.json, nested": (lambda path: path.write_text("[" * 200_000), ConfigError, "not readable as JSON"),
    "config.json, edited": (
        lambda path: path.write_text(path.read_text().replace('"steps": 6', '"steps": 7')),
        ConfigError,
        "run.steps was 7, now it is 6",
    ),
    "metrics.csv": (lambda path: path.unlink(), ConfigError, "shorter than when"),
    "metrics.csv, edited": (
        lambda path: path.write_text(path.read_text().replace(",loss,", ",lost,", 1)),
        ConfigError,
        "its first .* bytes are not those that were written",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_directory_that_was_changed_is_refused(learner: Any, stream: Any, tmp_path: Path, name: str) -> None:
    hurt, error, said = DAMAGES[name]
    run(learner, stream, tmp_path)
    hurt(tmp_path / name.split(",")[0])
    with pytest.raises(error, match=said):
        run(learner, stream, tmp_path)


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"no array")])
def test_what_follows_from_a_checkpoint_is_written_again(
    learner: Any, stream: Any, tmp_path: Path, damage: Any
) -> None:
    once = run(learner, stream, tmp_path)
    before = (tmp_path / "accuracy.npy").read_bytes()
    damage(tmp_path / "accuracy.npy")
    same_bytes(run(learner, stream, tmp_path), once)
    assert (tmp_path / "accuracy.npy").read_bytes() == before


def test_a_checkpoint_under_another_name_is_refused(learner: Any, stream: Any, tmp_path: Path) -> None:
    run(learner, stream, tmp_path)
    (tmp_path / "checkpoints" / "18").rename(tmp_path / "checkpoints" / "17")
    with pytest.raises(CheckpointError, match="the checkpoint of step 17 is of step 18"):
        run(learner, stream, tmp_path)


def _largest_file(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied", "manifest"])
def test_damaged_newest_checkpoint_is_passed_over(learner: Any, stream: Any, tmp_path: Path, damage: str) -> None:
    once = run(learner, stream, tmp_path / "once")
    shutil.copytree(tmp_path / "once", tmp_path / "hurt")
    newest = tmp_path / "hurt" / "checkpoints" / "18"
    if damage == "manifest":
        (newest / "manifest" / "metadata").write_text("{")
    else:
        path = _largest_file(newest / "tree")
        content = bytearray(path.read_bytes())
        if damage == "flipped":
            for i in range(len(content) // 4, 3 * len(content) // 4, 7):
                content[i] ^= 0x10
        path.write_bytes({"truncated": content[: len(content) // 2], "emptied": b"", "flipped": content}[damage])
    with pytest.warns(UserWarning, match="damaged checkpoint skipped, step 18: .*; continuing from step 15"):
        again = run(learner, stream, tmp_path / "hurt")
    same_bytes(again, once)
    assert (tmp_path / "hurt" / "metrics.csv").read_bytes() == (tmp_path / "once" / "metrics.csv").read_bytes()


def test_all_checkpoints_damaged_is_an_error(learner: Any, stream: Any, tmp_path: Path) -> None:
    run(learner, stream, tmp_path)
    for step in ("15", "18"):
        for path in (tmp_path / "checkpoints" / step / "tree").rglob("*"):
            if path.is_file():
                path.write_bytes(b"\x80\x04cos\nsystem\n")  # a pickle, which nothing here would ever load
    with pytest.raises(CheckpointError, match="no usable checkpoint; step 18: .*; step 15: "):
        run(learner, stream, tmp_path)


def _steps(directory: Path) -> list[int]:
    return sorted(int(path.name) for path in (directory / "checkpoints").iterdir())


def test_checkpoints_by_time_and_where_a_run_is_stopped(learner: Any, stream: Any, tmp_path: Path) -> None:
    """A short run writes its beginning and its end. A request to stop is heard at the next multiple of 3."""
    asked = iter([False, True])

    def ask(scores: Any) -> Any:
        if next(asked, False):
            signal.raise_signal(signal.SIGINT)
        return scores

    def slowly(directory: Path) -> Any:
        measure = {"accuracy": accuracy(), "asking": at(2, accuracy())._replace(report=ask)}
        return run(learner, stream, directory, checkpoint_seconds=1000, measure=measure)

    with pytest.raises(Stopped, match="stopped after step 6 of 18"):
        slowly(tmp_path / "stopped")
    assert _steps(tmp_path / "stopped") == [0, 6]
    resumed, once = slowly(tmp_path / "stopped"), slowly(tmp_path / "once")
    assert _steps(tmp_path / "once") == [0, 18]
    same_bytes(resumed.state, once.state)


def test_what_writing_raises_is_raised(learner: Any, stream: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Also what the last checkpoint raised, of which nothing comes after."""
    real = Checkpoints.save

    def last(self: Any, step: int, tree: Any) -> None:
        if step == 18:
            raise OSError("no room")
        real(self, step, tree)

    monkeypatch.setattr(Checkpoints, "save", last)
    with pytest.raises(OSError, match="no room"):
        run(learner, stream, tmp_path / "last", checkpoint_seconds=0)


def test_full_disk_leaves_the_checkpoint_before(learner: Any, stream: Any, tmp_path: Path, monkeypatch: Any) -> None:
    once = run(learner, stream, tmp_path / "once")
    save = Checkpoints.save
    with monkeypatch.context() as patch:

        def full(self: Any, step: int, tree: Any) -> None:
            if step == 9:
                raise OSError(28, "No space left on device")
            save(self, step, tree)

        patch.setattr(Checkpoints, "save", full)
        with pytest.raises(OSError, match="No space left"):
            run(learner, stream, tmp_path / "full")
    same_bytes(run(learner, stream, tmp_path / "full"), once)


SCRIPT = """
import sys, jax
sys.path.insert(0, {root!r})
import tests.conftest
from cl_zoo import ewc, fit, replay, supervised
from cl_zoo.streams import split_mnist
from tests.tiny import tiny_learner
stream = split_mnist(3, "class", images=tests.conftest.tiny_images.__wrapped__(), batch_size=8, steps=60)
learner = tiny_learner(stream, supervised(), replay(50, batch_size=8), ewc(100.0))
print("ready", flush=True)
fit(learner, stream, jax.random.key(0), sys.argv[1], checkpoint_every=10, checkpoint_seconds=0, progress=False)
print("done", flush=True)
"""


def start_process(directory: Path, errors: int | None = None) -> subprocess.Popen[str]:
    root = str(Path(__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(root=root), str(directory)],
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        cwd=root,
        env={**os.environ, "CL_ZOO_TEST_CACHE": str(directory.parent / "cache")},
    )


def files(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in ("metrics.csv", "accuracy.npy")}


def final_bytes(directory: Path) -> Any:
    manifest = json.loads((directory / "checkpoints" / "180" / "manifest" / "metadata").read_text())
    return files(directory), manifest["leaves"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: Any) -> Path:
    directory = tmp_path_factory.mktemp("run") / "once"
    assert start_process(directory).wait(timeout=240) == 0
    return directory


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, *(pytest.param(n, marks=pytest.mark.long) for n in (signal.SIGTERM, signal.SIGINT))]
)
def test_killed_process_resumes_to_the_same_bytes(uninterrupted: Path, number: signal.Signals) -> None:
    killed = uninterrupted.parent / f"killed-{number.name}"
    process = start_process(killed)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    while process.poll() is None and not (killed / "checkpoints" / "30").exists():
        time.sleep(0.005)
    process.send_signal(number)
    assert process.wait(timeout=60) != 0
    assert not (killed / "checkpoints" / "180").exists()
    assert start_process(killed).wait(timeout=240) == 0
    assert final_bytes(killed) == final_bytes(uninterrupted)


def test_cost_is_told(learner: Any, stream: Any) -> None:
    timing = timed(stream_program(learner, stream), learner, stream, KEY, repeats=2)
    assert timing.compile_seconds > 0 and len(timing.run_seconds) == 2
    state = timing.result.state
    counted = state_bytes(state)
    n = 16 * 5 + 5 + 5 * 6 + 6
    assert counted["params"] == 4 * n
    assert counted["opt_state"] == 2 * 4 * n + 4
    batch, _ = stream.next(stream.init(KEY))
    floor = 8 * 2 * (2 * 16 * 5 + 3 * 5 * 6)
    assert floor <= update_flops(learner, state, batch) < 20 * floor


def test_no_program_holds_a_large_constant(digits: Any) -> None:
    stream = permuted_mnist(2, images=digits, batch_size=64, steps=2, sample_size=64)
    learner = compose(mlp((28, 28), 10, hidden=(8,)), optax.sgd(0.1), supervised(), ewc(1.0), tasks=stream.tasks)
    text = stream_program(learner, stream).lower(learner, stream, KEY).as_text()
    assert max(map(len, text.splitlines())) < 1 << 20


def test_peak_memory_of_ten_permuted_tasks(digits: Any) -> None:
    """One copy of the data, ten times the state, the activations of one batch."""
    hidden, rows = (256, 256), 500
    stream = permuted_mnist(10, images=digits, batch_size=128, sample_batch=rows, evaluation_batch=rows)
    learner = compose(mlp((28, 28), 10, hidden=hidden), optax.adam(1e-3), supervised(), ewc(1.0), tasks=stream.tasks)
    compiled = stream_program(learner, stream).lower(learner, stream, KEY).compile()
    memory = compiled.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    _, (state, _) = jax.eval_shape(loop.start, learner, stream, KEY)
    n_bytes = sum(leaf.size * 4 for leaf in jax.tree.leaves(state))
    activations = rows * 4 * (784 + 2 * sum(hidden) + 10)
    assert peak <= stream.data.images.nbytes + 10 * n_bytes + activations
