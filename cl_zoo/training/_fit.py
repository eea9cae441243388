"""A run from a host loop: checkpoints, resume, a progress bar, a log."""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from cl_zoo.checks import check_whole
from cl_zoo.compilation import jit
from cl_zoo.evaluation.measures import evaluate
from cl_zoo.frozen import join_state, learner_with, split_state, with_weights, without_weights
from cl_zoo.training.checkpoint import Checkpoints
from cl_zoo.training.event_log import EventLog
from cl_zoo.training.loop import (
    Result,
    begin,
    check_arrays,
    check_finite,
    check_needs,
    finish,
    start,
    stream_functions,
    train_steps,
)
from cl_zoo.training.run_directory import MetricsLog, read_metrics, settle_config, write_array
from cl_zoo.types import Array, Key, Learner, PyTree, Stream, TaskInfo, TrainState

__all__ = ["Stopped", "fit"]


class Stopped(KeyboardInterrupt):
    """The run was asked to stop, and saved itself first."""


def fit(
    learner: Learner,
    stream: Stream,
    key: Key,
    directory: str | os.PathLike[str],
    *,
    config: Any = None,
    checkpoint_every: int = 500,
    keep: int = 2,
    split: str = "test",
    progress: bool = True,
    tensorboard: bool = False,
    weights: PyTree = None,
) -> Result:
    """`run_stream` from a host loop, in a directory. Run it again after a stop of any kind and it goes on.

    The updates of a task are cut into chunks at multiples of `checkpoint_every`; at each chunk's edge, and after each
    task's end and evaluation, all there is goes into a checkpoint. As the grid does not depend on where a run was
    stopped, a resumed run executes the same programs on the same arrays, and ends in the same bytes (same machine and
    versions; tested on CPUs). Ctrl-C and SIGTERM stop at the next edge; a second one, or SIGKILL, at once, and what is
    lost are the updates since the last edge.

    Args:
      learner, stream, key: as for `run_stream`.
      directory: of this run: config.json, environment.json, metrics.csv (step, phase, task, metric, value),
        accuracy.npy, checkpoints/.
      config: a dataclass or mapping that describes learner and stream; kept, and compared on resume. Numbers of the
        learner (rates, strengths) are compared only through it.
      checkpoint_every: updates per chunk.
      keep: checkpoints kept.
      split: what R is measured on.
      progress: show a bar.
      tensorboard: also write event files for TensorBoard, into tensorboard/: metrics as `train/METRIC`, scores as
        `score/task_I`, with the steps and numbers of metrics.csv. Turned on for a run that has begun, they begin at its
        checkpoint.
      weights: see `run_stream`. Frozen ones are in no checkpoint: the same must be given again on resume, and are
        compared.

    Returns:
      A `Result`; its metrics are `f32[T, steps]`, also after a resume.

    Raises:
      ValueError: the learner needs what the stream lacks; an impossible number; a config or weights of another kind.
      ImportError: tensorboard without the package tensorboardX.
      ConfigError: the directory holds a run of another configuration; names the field.
      CheckpointError: there are checkpoints, but none is whole.
      NonFiniteError: names task, step and likely cause; the last good checkpoint stays.
      Stopped: on Ctrl-C or SIGTERM, after saving.

    Example:
      >>> import jax, optax, tempfile
      >>> from cl_zoo import compose, fit, supervised
      >>> from cl_zoo.models import mlp
      >>> from cl_zoo.streams import split_mnist
      >>> stream = split_mnist(n_tasks=2, scenario="domain", steps=20)
      >>> learner = compose(mlp((28, 28), 5), optax.adam(1e-3), supervised())
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     fit(learner, stream, jax.random.key(0), directory, progress=False).accuracy.shape
      (3, 2)
    """
    check_needs(learner, stream)
    check_arrays(weights)
    check_whole("fit", "checkpoint_every", checkpoint_every, 1)
    check_whole("fit", "keep", keep, 1)
    described = isinstance(config, Mapping) or (dataclasses.is_dataclass(config) and not isinstance(config, type))
    if config is not None and not described:
        raise ValueError(f"fit: config is {type(config).__name__}, but it must be a dataclass or a mapping")
    directory = Path(directory).resolve()
    events = EventLog(directory) if tensorboard else None
    n_tasks, steps = stream.n_tasks, stream.steps
    settle_config(
        directory,
        {
            "config": dict(config) if isinstance(config, Mapping) else config and dataclasses.asdict(config),
            "run": {
                "n_tasks": n_tasks,
                "steps": steps,
                "checkpoint_every": checkpoint_every,
                "split": split,
                "key": np.asarray(jax.random.key_data(key)).tolist(),
                "data_crc32": _checksum((stream.data, stream.tasks)),
                "batch": _kinds(stream, key),
                **({} if weights is None else {"weights_crc32": _checksum(weights)}),
            },
        },
    )
    log = MetricsLog(directory)
    checkpoints = Checkpoints(directory / "checkpoints", keep)
    programs = _programs(learner, stream_functions(stream), split)
    data, tasks = stream.data, stream.tasks

    if weights is not None:
        weights = jax.tree.map(jnp.asarray, weights)
    fresh = jax.eval_shape(programs["start"], data, key, weights)
    fresh = split_state(fresh[0])[0], fresh[1]
    matrix = jax.ShapeDtypeStruct((n_tasks + 1, n_tasks), jnp.float32)
    place = jax.ShapeDtypeStruct((), jnp.int32)
    template = {"carry": fresh, "accuracy": matrix, "step": place, "log": place}
    restored = checkpoints.restore_newest(template)
    first, cursor = programs["start"](data, key, weights)
    first, frozen = split_state(with_weights(first, weights))
    if restored is None:
        carry = first, cursor
        accuracy = np.full(matrix.shape, np.nan, np.float32)
        done = 0
        log.rewind(0)
    else:
        done, saved = restored
        carry, accuracy = saved["carry"], np.array(saved["accuracy"])
        log.rewind(int(saved["log"]))
    del first, cursor  # nothing but the carry may hold their memory
    if events:
        events.rewind(None if restored is None else done)

    def save() -> None:
        checkpoints.save(
            done,
            {
                "carry": carry,
                "accuracy": jnp.asarray(accuracy),
                "step": jnp.asarray(done, jnp.int32),
                "log": jnp.asarray(log.length(), jnp.int32),
            },
        )

    def score(state: TrainState, row: int) -> None:
        accuracy[row] = programs["evaluate"](data, state, frozen)
        log.scores(done, accuracy[row])
        if events:
            events.scores(done, accuracy[row])
        write_array(directory / "accuracy.npy", accuracy)

    if restored is None:
        score(carry[0], 0)
        save()

    bar = tqdm(total=n_tasks * steps, initial=done, disable=not progress, unit="step", smoothing=0.1)
    with bar, _stop_requests() as stop, closing(events) if events else nullcontext():
        while done < n_tasks * steps:
            task, step = divmod(done, steps)
            bar.set_description(f"task {task + 1}/{n_tasks}")
            if step == 0:
                carry = programs["begin"](tasks, data, key, carry, jnp.int32(task), frozen)
            n = min(checkpoint_every - step % checkpoint_every, steps - step)
            carry, metrics = programs["train"](data, carry, n, frozen)
            metrics = jax.device_get(metrics)
            newest = f"; the last checkpoint before it is that of step {done}, in {checkpoints.directory}"
            check_finite(metrics, carry[0].params, steps, done, kept=newest)
            log.updates(done, task, metrics)
            if events:
                events.updates(done, metrics)
            done += n
            if step + n == steps:
                carry = programs["finish"](data, key, carry, jnp.int32(task), frozen)
                score(carry[0], task + 1)
            save()
            bar.update(n)
            bar.set_postfix(loss=f"{float(metrics['loss'][-1]):.3f}")
            if stop() and done < n_tasks * steps:
                raise Stopped(f"stopped after step {done} of {n_tasks * steps}; run the same command again to go on")

    history = {name: jnp.asarray(values.reshape(n_tasks, steps)) for name, values in read_metrics(directory).items()}
    return Result(join_state(carry[0], frozen), history, jnp.asarray(accuracy))


@functools.lru_cache(maxsize=16)
def _programs(learner: Learner, stream: Stream, split: str) -> dict[str, Callable[..., Any]]:
    """Every state transition jitted, the old state's memory given to the new one."""
    Carry = tuple[TrainState, PyTree]

    def start_all(data: PyTree, key: Key, weights: PyTree = None) -> Carry:
        state, cursor = start(learner, stream, data, key, weights)
        state, frozen = split_state(state)
        # Its memory is given away by the next program: none of it may be the caller's.
        return without_weights(jax.tree.map(_copy, state), frozen, weights), cursor

    def begin_task(tasks: TaskInfo, data: PyTree, key: Key, carry: Carry, t: Array, frozen: PyTree = None) -> Carry:
        return begin(learner_with(learner, frozen), stream, tasks, data, key, carry[0], t), carry[1]

    def train(data: PyTree, carry: Carry, n: int, frozen: PyTree = None) -> tuple[Carry, dict[str, Array]]:
        return train_steps(learner_with(learner, frozen), stream, data, carry, n)

    def end_task(data: PyTree, key: Key, carry: Carry, t: Array, frozen: PyTree = None) -> Carry:
        return finish(learner_with(learner, frozen), stream, data, key, carry[0], t), carry[1]

    def score(data: PyTree, state: TrainState, frozen: PyTree = None) -> Array:
        return evaluate(learner_with(learner, frozen), stream, data, state, split)

    return {
        "start": jit(start_all),
        "begin": jit(begin_task, donate_argnums=3),
        "train": jit(train, static_argnums=2, donate_argnums=1),
        "finish": jit(end_task, donate_argnums=2),
        "evaluate": jit(score),
    }


def _copy(leaf: Array) -> Array:
    return leaf if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jnp.copy(leaf)


def _kinds(stream: Stream, key: Key) -> list[str]:
    """Dtype and shape of every array of a batch."""
    batch = jax.eval_shape(lambda: stream.next(stream.data, stream.init(key), lambda x: None)[0])
    return [f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(batch)]


def _checksum(data: PyTree) -> int:
    crc = 0
    for leaf in jax.tree.leaves(data):
        crc = zlib.crc32(np.ascontiguousarray(np.asarray(leaf)).reshape(-1).view(np.uint8).data, crc)
    return crc


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Turns the first SIGINT or SIGTERM into a request; the second acts as it would have."""
    asked: list[int] = []
    before: dict[int, Any] = {}

    def ask(number: int, frame: Any) -> None:
        asked.append(number)
        for signal_number, handler in before.items():
            signal.signal(signal_number, handler)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, ask)
    try:
        yield lambda: bool(asked)
    finally:
        for signal_number, handler in before.items():
            signal.signal(signal_number, handler)
