"""A stream of tasks from arrays of one's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cl_zoo.checks import Count, check_range, check_whole, checked
from cl_zoo.datasets.images import LARGEST_LABEL
from cl_zoo.losses import IGNORED, squared_error
from cl_zoo.shuffle import shuffled_index
from cl_zoo.streams.arrays import Outputs, Scenario, array_stream, score_labels
from cl_zoo.types import Array, Batch, Key, PyTree, Stream, TaskInfo

__all__ = ["TaskData", "task_stream"]

_SPLITS = ("train", "validation", "test")


class TaskData(NamedTuple):
    """Examples of all tasks, task after task in each split.

    Attributes:
      x, y: by split, pytrees of `[N, ...]` arrays.
      start, count: `i32[3, T]`, where each task begins in each split, and how many examples it has.
      runs: where batches are balanced, examples of each class of each task; else None.
    """

    x: dict[str, PyTree]
    y: dict[str, PyTree]
    start: Array
    count: Array  # type: ignore[assignment]
    runs: Any


class Runs(NamedTuple):
    """Attributes:
    order: `i32[N]`, places within their task of the training examples, by task and label.
    start, count: `i32[T, C]`, where each class of each task begins in it, and how many there are.
    classes: `i32[T]`, how many classes a task has; those come first.
    """

    order: Array
    start: Array
    count: Array  # type: ignore[assignment]
    classes: Array


@checked
def task_stream(
    tasks: Sequence[Any],
    *,
    tests: Sequence[Any] | float = 0.2,
    validation: Sequence[Any] | float = 0.0,
    classes: int | Sequence[Any] | None = None,
    scenario: Scenario = "class",
    outputs: Outputs = "seen",
    batch_size: Count = 128,
    steps: int | Sequence[int] | None = None,
    epochs: int | Sequence[int] = 1,
    balanced: bool = False,
    score: Callable[[PyTree, Batch], Array] | None = None,
    **options: Any,
) -> Stream:
    """A stream of your own tasks, each a pair of arrays `(x, y)`: other sizes, other classes, other numbers of epochs.

    An epoch is a new random order of a task's examples; its last batch is filled up with examples of weight 0, so that
    every example comes once. Labels are outputs of the network: task t has those in its y, whichever they are.

    Args:
      tasks: `(x, y)` of each task's training examples: x a pytree of `[N, ...]` arrays, y labels `[N]` (-1: an example
        without one) or, for scenario "domain" alone, any targets. Anything that `np.asarray` takes will do, a DataFrame
        say; float64 becomes float32.
      tests: `(x, y)` of each task's test examples; or a fraction of each task's examples that is held out, drawn at
        random, the same in each call.
      validation: the same for the split "validation", of what tests leave.
      classes: the outputs. None: as many as the largest label says, and for each task those in its y. A number: so many
        in all, which leaves room for tasks that come later. A list of labels for each task: those.
      scenario: "task", "domain" or "class", see `scenario_tasks`.
      outputs: "seen" or "all", see `scenario_tasks`.
      batch_size: examples per training batch; a task may have fewer.
      steps: batches of each task, one number or one for each task; None: as many as `epochs` have.
      epochs: passes over each task, one number or one for each.
      balanced: draw every batch from the classes of the task in turn, so that rare ones come as often as others; an
        epoch then has as many batches as before, in which frequent ones do not all come.
      score: `(outputs, batch) -> f32[B]`; None is `label_accuracy` for labels, else minus `squared_error`.
      **options: `updates_per_batch`, `joint`, `sample_size`, `sample_batch` and `evaluation_batch` of `array_stream`.

    Returns:
      A `Stream`. `stream.first(n)` is the stream of its first n tasks, from which a run goes on to this one.

    Raises:
      ValueError: no tasks, arrays of other shapes or types than those of the first task, labels beyond `classes`, a
        task without examples or labels, other targets than labels where outputs are classes.

    Example:
      >>> import numpy as np
      >>> random = np.random.default_rng(0)
      >>> tasks = [(random.normal(size=(n, 5)), random.choice(labels, n)) for n, labels in ((90, [0, 1, 2]), (40, [3, 4]))]
      >>> stream = task_stream(tasks, classes=8, batch_size=16, epochs=2)
      >>> stream.task_steps.tolist(), stream.tasks.active.sum(axis=1).tolist()
      ([10, 4], [3, 5])
    """  # noqa: E501
    found = {"train": _pairs("tasks", tasks)}
    n_tasks = len(found["train"])
    if not n_tasks:
        raise ValueError("task_stream: tasks is empty, but there must be at least one (x, y)")
    for field, given, split, salt in (("tests", tests, "test", 0), ("validation", validation, "validation", 1)):
        if isinstance(given, (int, float)):
            check_range("task_stream", field, given, 0, 0.999)
            parted = [_held_out(pair, given, (salt, t)) for t, pair in enumerate(found["train"])]
            found["train"], found[split] = [kept for kept, _ in parted], [out for _, out in parted]
        elif len(given) != n_tasks:
            raise ValueError(
                f"task_stream: {field} has {len(given)} pairs, but there are {n_tasks} tasks; give one for each"
            )
        else:
            found[split] = _pairs(field, given)
    _check_alike(found)
    count = np.array([[len(jax.tree.leaves(y)[0]) for _, y in found[split]] for split in _SPLITS], np.int32)
    if not count[0].all():
        raise ValueError(f"task_stream: task {int(np.argmin(count[0]))} has no training examples")
    active = _active(found, classes, scenario, outputs)
    lengths = _each("steps", steps, n_tasks)
    if lengths is None:
        repeats = options.get("updates_per_batch", 1)
        check_whole("task_stream", "updates_per_batch", repeats, 1)
        passes = _each("epochs", epochs, n_tasks) or ()
        lengths = [n * -(-int(size) // batch_size) * repeats for n, size in zip(passes, count[0], strict=True)]
    if score is None:
        score = score_labels if classes_are_told(found) else minus_squared_error

    def joined(place: int) -> dict[str, PyTree]:
        return {
            split: jax.tree.map(lambda *leaves: jnp.asarray(np.concatenate(leaves)), *(pair[place] for pair in pairs))
            for split, pairs in found.items()
        }

    runs = None
    if balanced:
        if not classes_are_told(found):
            raise ValueError("task_stream: balanced is True, but y is not labels, [N] whole numbers")
        runs = _by_class([y for _, y in found["train"]], active.shape[1])
    start = np.cumsum(count, axis=1, dtype=np.int32) - count
    data = TaskData(joined(0), joined(1), jnp.asarray(start), jnp.asarray(count), runs)
    return _stream(data, active, tuple(lengths), batch_size, scenario, score, tuple(options.items()))


def _stream(
    data: TaskData,
    active: np.ndarray,
    lengths: tuple[int, ...],
    batch_size: int,
    scenario: str,
    score: Callable[[PyTree, Batch], Array],
    options: tuple[tuple[str, Any], ...],
) -> Stream:
    """The stream of what was checked; that of its first tasks is made by the same function."""
    count = np.asarray(data.count)

    def size(data: TaskData, split: str) -> Array:
        return data.count[_SPLITS.index(split)]

    def fetch(data: TaskData, split: str, task: Array, index: Array) -> tuple[PyTree, PyTree]:
        place = data.start[_SPLITS.index(split)][task] + index
        return jax.tree.map(lambda leaf: leaf[place], (data.x[split], data.y[split]))

    def first(data: TaskData, n: int) -> Stream:
        ends = {split: int(count[i, :n].sum()) for i, split in enumerate(_SPLITS)}
        x, y = ({split: jax.tree.map(lambda leaf, end=end: leaf[:end], parts[split]) for split, end in ends.items()}
                for parts in (data.x, data.y))  # fmt: skip
        runs = data.runs and Runs(data.runs.order[: ends["train"]], *(leaf[:n] for leaf in data.runs[1:]))
        fewer = TaskData(x, y, data.start[:, :n], data.count[:, :n], runs)
        return _stream(fewer, active[:n], lengths[:n], batch_size, scenario, score, options)

    return dataclasses.replace(
        array_stream(
            data,
            TaskInfo(jnp.arange(len(lengths), dtype=jnp.int32), jnp.asarray(active)),
            size=size,
            fetch=fetch,
            largest={split: int(count[i].max()) for i, split in enumerate(_SPLITS)},
            smallest=int(count[0].min()),
            steps=lengths,
            batch_size=batch_size,
            keep_last=data.runs is None,
            pick=None if data.runs is None else _pick,
            task_ids=scenario == "task",
            reorder=None,
            score=score,
            **dict(options),
        ),
        first_function=first,
    )


def _by_class(labels: list[np.ndarray], n_outputs: int) -> Runs:
    orders, counts = [], np.zeros((len(labels), n_outputs), np.int32)
    for t, y in enumerate(labels):
        orders.append(np.argsort(np.where(y == IGNORED, np.iinfo(np.int32).max, y), kind="stable"))
        found = np.unique(y[y != IGNORED], return_counts=True)[1]
        counts[t, : len(found)] = found
    first = np.cumsum([0, *map(len, labels)])[:-1, None]
    starts = first + np.cumsum(counts, axis=1) - counts
    classes = (counts > 0).sum(axis=1)
    return Runs(*(jnp.asarray(a, jnp.int32) for a in (np.concatenate(orders), starts, counts, classes)))


def _pick(data: TaskData, key: Key, task: Array, position: Array) -> Array:
    """The example at each place of a balanced stream: classes in turn, of each its examples in random orders."""
    runs = data.runs
    label, turn = position % runs.classes[task], position // runs.classes[task]
    n = runs.count[task][label]
    epoch, place = turn // n, turn % n
    index = jax.vmap(lambda p, n, label, e: shuffled_index(key, p, n, task, label, e))(place, n, label, epoch)
    return runs.order[runs.start[task][label] + index]


def minus_squared_error(outputs: PyTree, batch: Batch) -> Array:
    """Higher is better, as for all scores: `f32[B]`."""
    return -squared_error(outputs, batch.y)


def classes_are_told(found: dict[str, list[Any]]) -> bool:
    """Whether y is labels, whole numbers `[N]`."""
    leaves = jax.tree.leaves(found["train"][0][1])
    return len(leaves) == 1 and leaves[0].ndim == 1 and np.issubdtype(leaves[0].dtype, np.integer)


def _pairs(field: str, given: Sequence[Any]) -> list[tuple[PyTree, PyTree]]:
    """Of NumPy arrays, each with as many examples in x as in y."""
    pairs = []
    for t, pair in enumerate(given):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ValueError(f"task_stream: {field}[{t}] is {type(pair).__name__}, but it must be a pair (x, y)")
        x, y = (_arrays(f"{name} of {field}[{t}]", tree) for name, tree in zip("xy", pair, strict=True))
        lengths = {leaf.shape[0] for leaf in jax.tree.leaves((x, y))}
        if len(lengths) != 1:
            raise ValueError(
                f"task_stream: {field}[{t}] has arrays of {' and '.join(map(str, sorted(lengths)))} examples, but x"
                " and y must have as many"
            )
        pairs.append((x, y))
    return pairs


def _arrays(name: str, tree: PyTree) -> PyTree:
    """As NumPy arrays with a leading axis, of numbers; floating point finite, and float32."""

    def array(leaf: Any) -> np.ndarray:
        found = np.asarray(leaf)
        if not (np.issubdtype(found.dtype, np.number) or found.dtype == bool):
            raise ValueError(
                f"task_stream: {name} is {found.dtype}, but it must be numbers; of words, np.unique(words,"
                " return_inverse=True)[1] gives labels"
            )
        if found.ndim == 0:
            raise ValueError(f"task_stream: {name} is one number, but it must be an array, [N, ...]")
        if np.issubdtype(found.dtype, np.floating):
            if not np.isfinite(found).all():
                raise ValueError(f"task_stream: {name} has {found[~np.isfinite(found)][0]}, but it must be finite")
            return found.astype(np.float32) if found.dtype == np.float64 else found
        return found.astype(np.int32) if found.dtype in (np.int64, np.uint64, np.uint32) else found

    is_array = lambda node: hasattr(node, "__array__")  # a DataFrame is one too  # noqa: E731
    if isinstance(tree, list):
        return array(tree)
    return jax.tree.map(array, tree, is_leaf=is_array)


def _check_alike(found: dict[str, list[Any]]) -> None:
    """All tasks, and all splits, have examples of one kind."""
    first = None
    for split, pairs in found.items():
        field = "tasks" if split == "train" else "tests" if split == "test" else split
        for t, pair in enumerate(pairs):
            kinds = jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape[1:])}", pair)
            first = first or kinds
            if kinds != first:
                raise ValueError(
                    f"task_stream: {field}[{t}] has examples (x, y) of {kinds}, but those of tasks[0] are {first};"
                    " they must be alike"
                )


def _held_out(pair: tuple[PyTree, PyTree], fraction: float, seed: tuple[int, int]) -> tuple[Any, Any]:
    """The pair without a fraction of its examples, and those: both in the order in which they were."""
    n = len(jax.tree.leaves(pair[1])[0])
    out = np.zeros(n, bool)
    out[np.random.default_rng(seed).permutation(n)[: round(fraction * n)]] = True
    return tuple(jax.tree.map(lambda leaf, rows=rows: leaf[rows], pair) for rows in (~out, out))


def _each(field: str, given: int | Sequence[int] | None, n_tasks: int) -> list[int] | None:
    """One number for each task."""
    if given is None:
        return None
    numbers: list[Any] = list(given) if isinstance(given, Sequence) else [given] * n_tasks
    if len(numbers) != n_tasks:
        raise ValueError(
            f"task_stream: {field} has {len(numbers)} numbers, but there are {n_tasks} tasks; give one for each"
        )
    for number in numbers:
        check_whole("task_stream", field, number, 1)
    return [int(number) for number in numbers]


def _active(found: dict[str, list[Any]], classes: Any, scenario: str, outputs: str) -> np.ndarray:
    """The active outputs of each task, `bool[T, C]`; one for all where y is no labels."""
    n_tasks = len(found["train"])
    if not classes_are_told(found):
        if scenario != "domain" or classes is not None:
            raise ValueError(
                "task_stream: y is not labels, [N] whole numbers, but classes and the scenarios task and class need"
                ' them; give scenario="domain" and no classes'
            )
        return np.ones((n_tasks, 1), bool)
    told = [np.unique(np.concatenate([found[split][t][1] for split in _SPLITS])) for t in range(n_tasks)]
    told = [labels[labels != IGNORED] for labels in told]
    for t, labels in enumerate(told):
        if not len(labels) or labels[0] < 0:
            has = f"the label {labels[0]}" if len(labels) else "no label"
            raise ValueError(f"task_stream: task {t} has {has}, but labels must be whole numbers from 0")
    own = told
    if isinstance(classes, (list, tuple)):
        if len(classes) != n_tasks:
            raise ValueError(f"task_stream: classes has {len(classes)} lists, but there are {n_tasks} tasks")
        own = [np.unique(np.asarray(labels, np.int64)) for labels in classes]
        for t, labels in enumerate(own):
            if not len(labels) or labels[0] < 0 or labels[-1] > LARGEST_LABEL:
                raise ValueError(f"task_stream: classes[{t}] is {classes[t]!r:.60}, but it must be labels from 0")
            if beyond := sorted(set(told[t].tolist()) - set(labels.tolist())):
                raise ValueError(f"task_stream: task {t} has the label {beyond[0]}, but classes[{t}] has not")
    largest = max(int(labels[-1]) for labels in own)
    if largest > LARGEST_LABEL:
        raise ValueError(f"task_stream: y has the label {largest}, but it must be at most {LARGEST_LABEL}")
    n_outputs = largest + 1 if classes is None or isinstance(classes, (list, tuple)) else classes
    if largest >= n_outputs:
        raise ValueError(
            f"task_stream: classes is {n_outputs}, but y has the label {largest}; it must be at least {largest + 1}"
        )
    if scenario == "domain" or (scenario == "class" and outputs == "all"):
        return np.ones((n_tasks, n_outputs), bool)
    active = np.zeros((n_tasks, n_outputs), bool)
    for t, labels in enumerate(own):
        active[t, labels] = True
    return np.logical_or.accumulate(active, axis=0) if scenario == "class" else active
