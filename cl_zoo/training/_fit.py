"""A run from a host loop: checkpoints, resume, a progress bar, a log."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from cl_zoo._batches import copied
from cl_zoo._learner import Learner
from cl_zoo.checks import check_range, check_whole
from cl_zoo.compilation import jit
from cl_zoo.evaluation.measures import Measure, Measures, settled
from cl_zoo.files import locked, write_arrays
from cl_zoo.training._continue import check_begun, first_tasks, placed, rows_of
from cl_zoo.training._description import checksum, described_run, fingerprint
from cl_zoo.training.callbacks import Event
from cl_zoo.training.checkpoint import Checkpoints, Saver
from cl_zoo.training.event_log import EventLog
from cl_zoo.training.loop import (
    Carry,
    Metrics,
    Result,
    begin,
    check_finite,
    check_run,
    chosen_metrics,
    finish,
    histories,
    is_finite,
    measured,
    reported,
    room,
    slots,
    start,
    task_lengths,
    train_steps,
    updates,
)
from cl_zoo.training.run_directory import MetricsLog, read_histories, settle_run
from cl_zoo.training.stops import Stopped, stop_requests
from cl_zoo.types import Array, Key, PyTree, Stream, TrainState

__all__ = ["Stopped", "fit"]


def fit(
    learner: Learner,
    stream: Stream,
    key: Key,
    directory: str | os.PathLike[str],
    *,
    config: Any = None,
    checkpoint_every: int = 500,
    checkpoint_seconds: float = 10.0,
    keep: int = 2,
    measure: Measures | None = None,
    metrics: Metrics | None = None,
    state: TrainState | None = None,
    after: Result | None = None,
    callback: Callable[[Event], Any] | None = None,
    stop: Mapping[str, Callable[[np.ndarray], bool]] | None = None,
    progress: bool = True,
    tensorboard: bool = False,
) -> Result:
    """`run_stream` from a host loop, in a directory. Run it again after a stop of any kind, and it continues.

    The updates of a task are cut into chunks at multiples of `checkpoint_every` and of the intervals of measures. At
    multiples of `checkpoint_every`, and after the end of each task, the whole run goes into a checkpoint if the last
    one is `checkpoint_seconds` old; a thread writes it while the run goes on. As the grid does not depend on where a
    run was stopped, a resumed run executes the same programs on the same arrays, and ends in the same bytes (same
    machine and versions; tested on CPUs). Ctrl-C and SIGTERM stop at the next multiple, in a checkpoint; a second one,
    or SIGKILL, at once, and the updates since the last checkpoint are lost.

    A run goes on with tasks that did not exist when it began: given a stream that begins with the tasks of the run in
    the directory (`task_stream`), it learns the others, and ends in the bytes of a run that had them all from the
    start. What was not there to be measured on is nan. The outputs must be as many as then.

    Args:
      learner, stream, key: as for `run_stream`. Frozen weights are in no checkpoint: those that were bound must be
        bound again on resume, and are compared; others are drawn again.
      directory: of this run: config.json, environment.json, metrics.csv (step, phase, task, metric, value), NAME.npy of
        each measure, accuracy.npy say, checkpoints/.
      config: a dataclass or mapping that describes learner and stream; kept, and compared on resume. Numbers of the
        learner (rates, strengths) are compared by a checksum of its program.
      checkpoint_every: updates between the places where a checkpoint may be written.
      checkpoint_seconds: time between checkpoints, at least; with 0 there is one at every such place.
      keep: checkpoints kept.
      measure, metrics, state, after: see `run_stream`. Reports are made at once.
      callback: called with an `Event` after each chunk of updates and at the end of each task: to log elsewhere, say.
        A run that was killed tells it again what came after its last checkpoint.
      stop: by the name of a measure at n updates, a function of its results in the task so far, `[k, ...]`: where it is
        true, the task ends there. See `patience`.
      progress: show a bar.
      tensorboard: also write event files for TensorBoard, into tensorboard/: metrics as `train/METRIC`, scores as
        `MEASURE/task_I`, with the steps and numbers of metrics.csv. Turned on for a run that has begun, they begin at
        its checkpoint.

    Returns:
      A `Result`, whole also after a resume.

    Raises:
      ValueError: as `run_stream`; an impossible number; a config of another kind.
      ImportError: tensorboard without the package tensorboardX.
      ConfigError: the directory holds a run of another configuration, names the field; or of another learner or stream
        (a changed rate, other outputs), where the versions of its packages are these; metrics.csv or config.json were
        changed.
      InUseError: another process runs in the directory.
      CheckpointError: there are checkpoints, but none is whole.
      NonFiniteError: names what is not finite, task, step and likely cause; the last good checkpoint stays.
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
    check_run("fit", learner, stream, key)
    check_whole("fit", "checkpoint_every", checkpoint_every, 1)
    check_range("fit", "checkpoint_seconds", checkpoint_seconds, 0)
    check_whole("fit", "keep", keep, 1)
    if not isinstance(directory, (str, os.PathLike)) or not str(directory):
        raise ValueError(f"fit: directory is {directory!r}, but it must be a path")
    if Path(directory).exists() and not Path(directory).is_dir():
        raise ValueError(f"fit: directory is {str(directory)!r}, but there is a file of that name")
    described = isinstance(config, Mapping) or (dataclasses.is_dataclass(config) and not isinstance(config, type))
    if config is not None and not described:
        raise ValueError(f"fit: config is {type(config).__name__}, but it must be a dataclass or a mapping")
    config = dict(config) if isinstance(config, Mapping) else config and dataclasses.asdict(config)
    measures, chosen = settled(measure, stream), chosen_metrics(metrics)
    begun = check_begun("fit", learner, stream, key, state, after)
    if callback is not None and not callable(callback):
        raise ValueError(f"fit: callback is {type(callback).__name__}, but it must be a function of an Event")
    stop = dict(stop or {})
    within = [name for name, one in measures if isinstance(one.when, int)]
    for name, function in stop.items():
        if name not in within or not callable(function):
            raise ValueError(
                f"fit: stop has {name!r}: {type(function).__name__}, but it must be functions by the name of a measure"
                f" at n updates, one of {', '.join(within) or 'none here'}"
            )
    if chosen:  # unknown names are refused before anything is written
        jax.eval_shape(lambda: _kept(learner, stream, key, chosen))
    folder = Path(directory).resolve()
    with locked(folder):
        return _fit(
            learner, stream, key, folder, config, checkpoint_every, checkpoint_seconds, keep, measures, chosen, begun,
            after, callback or (lambda event: None), stop, progress, tensorboard,
        )  # fmt: skip


def _fit(
    learner: Learner,
    stream: Stream,
    key: Key,
    directory: Path,
    config: Any,
    checkpoint_every: int,
    checkpoint_seconds: float,
    keep: int,
    measures: tuple[tuple[str, Measure], ...],
    chosen: tuple[tuple[str, int], ...] | None,
    begun: tuple[int, tuple[TrainState, PyTree] | None],
    after: Result | None,
    callback: Callable[[Event], Any],
    stop: dict[str, Callable[[np.ndarray], bool]],
    progress: bool,
    tensorboard: bool,
) -> Result:
    events, weights = EventLog(directory) if tensorboard else None, learner.model.weights
    learner, stream = jax.tree.map(jnp.asarray, (learner, stream))  # not to be sent to the device at every call
    if learner.model.frozen and learner.model.weights is None:
        learner = learner.bind(_programs(jax.tree.structure((learner, stream)))["draw"](learner, stream, key))
    programs = _programs(jax.tree.structure((learner, stream)))
    lengths = np.asarray(task_lengths(stream))
    starts, total = np.cumsum(lengths) - lengths, int(lengths.sum())
    grid = [checkpoint_every, *(one.when for _, one in measures if isinstance(one.when, int))]
    size = min(*grid, int(lengths.max()))

    fresh = jax.eval_shape(programs["start"], learner, stream, key)

    def described(learner: Learner, stream: Stream) -> dict[str, Any]:
        run = described_run(learner, stream, key, weights, checkpoint_every, measures, chosen)
        size = min(*grid, int(np.max(task_lengths(stream))))
        programs = _programs(jax.tree.structure((learner, stream)))
        run["program_crc32"] = fingerprint(programs, learner, stream, key, fresh, size, chosen)
        run |= {"stop": sorted(stop)} if stop else {}
        return run if begun[1] is None else run | {"begun_crc32": checksum(begun[1][0])}

    def rooms(stream: Stream) -> dict[str, PyTree]:
        return {
            name: room(name, one, learner, stream, key, fresh[0], slots(one, stream), np.full) for name, one in measures
        }

    sizes = settle_run(
        directory, config, stream, lambda n: described(*first_tasks(learner, stream, n)), described(learner, stream)
    )
    log, checkpoints, taken = MetricsLog(directory), Checkpoints(directory / "checkpoints", keep), rooms(stream)
    made = np.zeros(stream.n_tasks, np.int32)  # updates of each task
    place = jax.ShapeDtypeStruct((), jnp.int32)
    crc = jax.ShapeDtypeStruct((), jnp.uint32)
    counts = {"step": place, "log": place, "log_crc32": crc}
    templates = [
        {"state": fresh[0], "cursor": fresh[1], "measures": found, "updates": made[:n], **counts}
        for n, found in ((stream.n_tasks, taken), *((n, rooms(stream.first(n))) for n in sizes))
    ]
    restored, saver = checkpoints.restore_newest(*templates), Saver(checkpoints, checkpoint_seconds)
    if restored is None:
        carry, done = programs["start"](learner, stream, key), int(np.append(starts, total)[begun[0]])
        if begun[1] is not None:
            carry = jax.tree.map(copied, (begun[1][0], carry[1] if begun[1][1] is None else begun[1][1]))
        if after is not None:
            known = {name: after.measures.get(name, taken[name]) for name, one in measures if one.report is None}
            taken |= {name: placed(taken[name], found) for name, found in known.items()}
            made[: begun[0]] = np.asarray(after.updated).sum(axis=1)
        log.rewind(0)
    else:
        done, saved = restored
        saver.step = done
        carry, taken = (saved["state"], saved["cursor"]), placed(taken, jax.tree.map(np.asarray, saved["measures"]))
        made = placed(made, np.asarray(saved["updates"]))
        checkpoints.check_place(done, int(saved["step"]), carry[0].key, key)
        log.rewind(int(saved["log"]), int(saved["log_crc32"]))
        for name, found in taken.items():
            write_arrays(directory, name, found)
        del saved
    if events:
        events.rewind(None if restored is None else done)
    new, restored = restored is None, None  # only the carry may hold its memory
    reports: dict[str, dict[int, PyTree]] = {name: {} for name, _ in measures}
    if after is not None:
        reports = {name: rows_of(after, name) if one.report else {} for name, one in measures}

    def save() -> None:
        arrays = {"step": np.int32(done), "log": np.int32(log.length()), "log_crc32": np.uint32(log.crc)}
        for name, found in taken.items():
            write_arrays(directory, name, found)
        saver.save(done, {"state": carry[0], "cursor": carry[1], "measures": taken, "updates": made, **arrays})

    def take(name: str, one: Measure, where: tuple[int, ...]) -> Any:
        """Measures, reports, logs."""
        number = int(np.ravel_multi_index(where, slots(one, stream))) if where else 0
        found = programs["measure"](learner, stream, key, carry[0], jnp.int32(number), name, one)
        found = jax.tree.map(np.asarray, found)
        jax.tree.map(lambda all_, now: all_.__setitem__(where, now), taken[name], found)
        if one.report is not None:
            found = reports[name][number] = one.report(found)
        if isinstance(found, (np.ndarray, np.generic, float)) and np.ndim(found) < 2:
            log.scores(done, name, np.atleast_1d(found))
            if events:
                events.scores(done, name, np.atleast_1d(found))
        return found

    bar = tqdm(total=total, initial=done, disable=not progress, unit="step", smoothing=0.1)
    with bar, saver, stop_requests() as asked, closing(events) if events else nullcontext():
        if new:
            for name, one in measures:
                if one.when == "task":
                    take(name, one, (begun[0],))
            save()
        while done < total:
            task = int(np.searchsorted(starts, done, side="right")) - 1
            step, end = int(done - starts[task]), int(lengths[task])
            bar.set_description(f"task {task + 1}/{stream.n_tasks}")
            if step == 0:
                carry = programs["begin"](learner, stream, key, carry, jnp.int32(task))
            n = min(*(every - step % every for every in grid), end - step)
            carry, history = programs["train"](learner, stream, carry, jnp.int32(n), size, chosen)
            history = {name: values[:n] for name, values in jax.device_get(history).items()}
            newest = f"; the last checkpoint before it is that of step {saver.step}, in {checkpoints.directory}"
            ran = task * stream.steps + step + np.arange(n)
            seen = {name: (ran, values) for name, values in history.items()}
            check_finite(ran, seen, carry[0], {int(ran[-1]): programs["finite"](carry[0])}, stream.steps, newest)
            strides = dict.fromkeys(history, 1) if chosen is None else dict(chosen)
            numbers = {
                name: {i: values[i].item() for i in range(n) if (step + i + 1) % strides[name] == 0}
                for name, values in history.items()
            }
            log.updates(done, task, numbers)
            if events:
                events.updates(done, numbers)
            done, step, made[task], scores = done + n, step + n, step + n, {}
            for name, one in measures:
                if isinstance(one.when, int) and step % one.when == 0:
                    scores[name] = take(name, one, (task, step // one.when - 1))
                    so_far = taken[name][task, : step // one.when] if name in stop else None
                    if so_far is not None and step < end and stop[name](so_far):  # it ends here, others need not agree
                        carry = programs["skip"](learner, stream, carry, jnp.int32(end - step))
                        n, done, step = n + end - step, done + end - step, end
            if step == end:
                carry = programs["finish"](learner, stream, key, carry, jnp.int32(task))
                check_finite(ran, {}, carry[0], {int(ran[-1]): programs["finite"](carry[0])}, stream.steps, newest)
                for name, one in measures:
                    if one.when == "task":
                        scores[name] = take(name, one, (task + 1,))
                    elif one.when == "end" and done == total:
                        scores[name] = take(name, one, ())
            last = {name: float(values[-1]) for name, values in history.items()}
            callback(Event(done, task, step == end, last, scores, carry[0]))
            bar.update(n)
            if "loss" in history:
                bar.set_postfix(loss=f"{float(history['loss'][-1]):.3f}")
            if step == end or step % checkpoint_every == 0:
                stopped = asked() and done < total
                if stopped or done == total or saver.due():
                    save()
                if stopped:
                    saver.wait()
                    raise Stopped(f"stopped after step {done} of {total}; run the same command again to continue")
        saver.wait()

    measures_found = {
        name: reported(one, taken[name], len(slots(one, stream)), reports[name]) for name, one in measures
    }
    kept = read_histories(directory, chosen, starts, stream.steps)
    if after is not None:
        kept = {name: jnp.asarray(placed(np.asarray(kept[name]), after.metrics.get(name, kept[name]))) for name in kept}
    updated = updates(stream) & (jnp.arange(stream.steps) < jnp.asarray(made)[:, None])
    return Result(carry[0], kept, measures_found, updated, jnp.ones(stream.n_tasks, bool), carry[1])


def _kept(learner: Learner, stream: Stream, key: Key, chosen: tuple[tuple[str, int], ...]) -> dict[str, Array]:
    """Room for one value of each metric that is kept."""
    learner, carry = start(learner, stream, key)
    return histories(learner, stream, carry, 1, chosen)[1]


@functools.lru_cache(maxsize=16)
def _programs(structure: Any) -> dict[str, Callable[..., Any]]:
    """Every state transition jitted, the old state's memory donated to the new one."""

    def start_all(learner: Learner, stream: Stream, key: Key) -> Carry:
        # Its memory is donated to the next program: none of it may be the caller's.
        return jax.tree.map(copied, start(learner, stream, key)[1])

    def draw(learner: Learner, stream: Stream, key: Key) -> PyTree:
        return start(learner, stream, key)[0].model.weights

    def begin_task(learner: Learner, stream: Stream, key: Key, carry: Carry, t: Array) -> Carry:
        return begin(learner, stream, key, carry[0], t), carry[1]

    def train(
        learner: Learner, stream: Stream, carry: Carry, count: Array, size: int, chosen: Any
    ) -> tuple[Carry, dict[str, Array]]:
        names = chosen and tuple((name, 1) for name, _ in chosen)
        strides, kept = histories(learner, stream, carry, size, names)
        return train_steps(learner, stream, carry, 0, count, strides, kept)

    def skip(learner: Learner, stream: Stream, carry: Carry, count: Array) -> Carry:
        agent = learner.agent(carry[0])
        return carry[0], jax.lax.fori_loop(0, count, lambda _, cursor: stream.next(cursor, agent)[1], carry[1])

    def end_task(learner: Learner, stream: Stream, key: Key, carry: Carry, t: Array) -> Carry:
        return finish(learner, stream, key, carry[0], t), carry[1]

    def measure(
        learner: Learner, stream: Stream, key: Key, state: TrainState, slot: Array, name: str, one: Measure
    ) -> PyTree:
        return measured(name, one, learner, stream, key, state, slot)

    return {
        "draw": jit(draw),
        "start": jit(start_all),
        "begin": jit(begin_task, donate_argnums=3),
        "train": jit(train, static_argnums=(4, 5), donate_argnums=2),
        "skip": jit(skip, donate_argnums=2),
        "finish": jit(end_task, donate_argnums=3),
        "finite": jit(is_finite),
        "measure": jit(measure, static_argnums=(5, 6)),
    }
