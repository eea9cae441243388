"""The contract: what a batch, a task, a state, a model, a stream, a component and a learner are.

Legend for shapes: `B` rows of a batch, `T` tasks, `C` outputs, `M` or `E` stacked batches.

`Batch`, `TaskInfo`, `TrainState` and `Record` are NamedTuples of arrays, so `jit`, `vmap`, `scan`, sharding and
checkpoints handle them as they are. `Model`, `Stream`, `Component` and `Learner` are NamedTuples of pure functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from cl_zoo.losses import mask_outputs

Array = jax.Array
Key = jax.Array
PyTree = Any

NEEDS = {
    "boundaries": "task boundaries (calls of begin_task and end_task)",
    "task_ids": "the task of every row, also when it is tested",
    "begin_sample": "a sample of the new task when it begins",
    "end_sample": "a sample of the finished task when it ends",
    "open_outputs": "every output open to every row (or `compose(..., tasks=stream.tasks)`)",
}
"""What a component may ask of a stream, and what each word means."""


class Batch(NamedTuple):
    """Rows to learn from or to answer.

    Attributes:
      x: inputs, a pytree of `[B, ...]` arrays.
      y: targets, a pytree of `[B, ...]` arrays; None where there are no labels.
      task: `i32[B]`, the task of each row; None where the stream does not tell it.
      weight: `f32[B]`; 0 marks padding or a rejected row, so that shapes never change.
    """

    x: PyTree
    y: PyTree
    task: Array | None
    weight: Array


class Episode(NamedTuple):
    """`Batch.x` where each row is a small learning problem of its own: learn from the support, answer the query.
    `Batch.y` then holds the query's targets, a pytree of `[B, Q, ...]` arrays.

    Attributes:
      support_x, support_y: what to learn from, pytrees of `[B, K, ...]` arrays.
      query_x: what to answer, a pytree of `[B, Q, ...]` arrays.
    """

    support_x: PyTree
    support_y: PyTree
    query_x: PyTree


class TaskInfo(NamedTuple):
    """What is known about a task. With a leading axis `T` it describes a whole stream.

    Attributes:
      index: `i32[]`, its place in the stream.
      active: `bool[C]`, the outputs that compete while this is the task at hand.
    """

    index: Array  # type: ignore[assignment]
    active: Array


class TrainState(NamedTuple):
    """All that a learner is at one moment. `update` keeps its tree, shapes and dtypes.

    Attributes:
      step: `i32[]`, updates so far.
      task: `i32[]`, index of the task at hand (0 before any).
      key: the run's key; it never changes, draws fold `step` into it.
      params: what the optimiser trains, a pytree.
      model_state: what else the model carries (normalisation statistics, frozen weights).
      opt_state: the optimiser's state.
      parts: each component's own state under its name.
    """

    step: Array
    task: Array
    key: Key
    params: PyTree
    model_state: PyTree
    opt_state: PyTree
    parts: dict[str, PyTree]


class Model(NamedTuple):
    """A network as two pure functions.

    Attributes:
      init: `(key, x) -> (params, model_state)`. A model that can begin from published weights takes them as a third
        argument, a pytree of arrays; then they are arguments of every program, and never constants in it.
      apply: `(params, model_state, x, *, task=None, weight=None, key=None, train=False, perturb=None)
        -> (outputs, model_state, taps)`. `taps[name]` is `(input, pre-activation)` of a dense or convolution
        layer whose parameters lie under the path `name` ("/" between levels) as `kernel` and `bias`;
        `perturb[name]` is added to that pre-activation, so the gradient to it is the layer's cotangent. A layer with
        taps is used once in a pass; one that is shared or tied has none. A block of layers may have a tap of its own,
        `(input, output)`, and no kernel.
      units: the wiring of hidden units, one tuple of `(path, axis, role)` per group of units, `path` a tuple of
        keys into `params`, `role` "out" where the axis makes the units and "in" where it reads them. An axis that
        is k times as long as its group is k blocks of it (a flattened feature map, channels last).
      parameters: of a model made from another: `(params, model_state) -> params` of that other model; None is `params`.

    What lies in `model_state` under the key "frozen" never changes: no component sees or copies it, no checkpoint holds
    it, and all seeds of a sweep share it. A model that was given weights to begin from has there these, as they were
    given, or nothing.
    """

    init: Callable[..., tuple[PyTree, PyTree]]
    apply: Callable[..., tuple[PyTree, PyTree, dict[str, tuple[Array, Array]]]]
    units: tuple[tuple[tuple[tuple[str, ...], int, str], ...], ...] = ()
    parameters: Callable[[PyTree, PyTree], PyTree] | None = None


class Stream(NamedTuple):
    """A sequence of tasks. `data` is always an argument of a compiled program, never a constant in it.

    Attributes:
      n_tasks: `T`.
      steps: batches per task.
      tasks: `TaskInfo` with a leading axis `T`.
      data: what the functions below read, a pytree of arrays.
      provides: which of `NEEDS` it fulfils.
      init: `(key) -> cursor`, the place in the stream; it goes into checkpoints.
      next: `(data, cursor, answer) -> (Batch, cursor)`; `answer(x)` is the learner's prediction now.
      sample: `(data, task, key) -> Batch[M, B, ...]`, a bounded sample of a task, for consolidation.
      evaluation: `(data, task, split) -> Batch[E, B, ...]`, split "validation" or "test".
      score: `(outputs, batch) -> f32[B]`.
      reorder: `(data, key) -> data` with the tasks drawn anew (class order, permutations, angles); it shares the
        images, so a `vmap` over keys holds one copy of them.
    """

    n_tasks: int
    steps: int
    tasks: TaskInfo
    data: PyTree
    provides: frozenset[str]
    init: Callable[[Key], PyTree]
    next: Callable[[PyTree, PyTree, Callable[[PyTree], PyTree]], tuple[Batch, PyTree]]
    sample: Callable[[PyTree, Array, Key], Batch]
    evaluation: Callable[[PyTree, Array, str], Batch]
    score: Callable[[PyTree, Batch], Array]
    reorder: Callable[[PyTree, Key], PyTree]


class Context(NamedTuple):
    """What never changes in a run: given to every hook of a component.

    Attributes:
      model, optimiser: as given to `compose`.
      tasks: `TaskInfo` with a leading axis `T`, or None where every output is open to every row.
      objective: `(state, params, batch, key) -> f32[]`, the sum of all `loss` hooks on a batch: what is learnt from
        it, without the penalties.
    """

    model: Model
    optimiser: Any
    tasks: TaskInfo | None
    objective: Callable[[TrainState, PyTree, Batch, Key], Array]

    def active(self, current: Array, task: Array | None = None) -> Array | None:
        """The outputs that compete: those of each row's own task where that is told (`bool[B, C]`, a multi-head
        net), else those of the task at hand (`bool[C]`); None where all do."""
        if self.tasks is None:
            return None
        return self.tasks.active[current if task is None else task]

    def logits(
        self, state: TrainState, params: PyTree, batch: Batch, perturb: dict[str, Array] | None = None
    ) -> tuple[Array, dict[str, tuple[Array, Array]]]:
        """Masked outputs `[B, C]` and taps of the network at `params`, as it answers (not as it trains)."""
        outputs, _, taps = self.model.apply(
            params, state.model_state, batch.x, task=batch.task, weight=batch.weight, perturb=perturb
        )
        return mask_outputs(outputs, self.active(state.task, batch.task)), taps

    def features(self, state: TrainState, x: PyTree, task: Array | None = None) -> Array:
        """What the network's last layer reads, `[B, F]`.

        Raises:
          ValueError: a model without taps.
        """
        _, _, taps = self.model.apply(state.params, state.model_state, x, task=task)
        if not taps:
            raise ValueError("the model records no taps, but its features are the input of its last tapped layer")
        return list(taps.values())[-1][0]


class Record(NamedTuple):
    """What happened in one update: given to `transform` (before the step) and `observe` (after it).

    Attributes:
      batch: as received, rows of weight 0 blanked.
      prepared: after every `prepare` hook; the first rows are those of `batch`.
      outputs, taps: of the shared forward pass on `prepared`, before masking; None and {} where no loss asked for it.
      aux: each loss's second result under its component's name.
      task_gradient, penalty_gradient: of the sum of losses, and of the sum of penalties (None without any).
      old_params, new_params: around the step; `new_params` is None in `transform`.
    """

    batch: Batch
    prepared: Batch
    outputs: PyTree
    taps: dict[str, tuple[Array, Array]]
    aux: dict[str, dict[str, PyTree]]
    task_gradient: PyTree
    penalty_gradient: PyTree
    old_params: PyTree
    new_params: PyTree


class Component(NamedTuple):
    """One thing that a continual learner does differently: pure functions over its own `part` of the state.

    Every hook is optional. `key` is this hook's own at this step: another component never changes its draws.

    Attributes:
      name: the key of its part in `TrainState.parts`.
      needs: which of `NEEDS` it cannot do without.
      init: `(context, state, batch, key) -> part`.
      begin_task: `(context, state, part, task, sample, key) -> (state, part)`.
      prepare: `(context, state, part, batch, key) -> batch`; incoming rows stay first.
      loss: `(context, state, part, params, forward, batch, key) -> (scalar, aux)`, a term in function space;
        `forward()` gives the outputs of the one shared pass over `batch`. Scalars in `aux` become metrics.
      penalty: `(context, state, part, params) -> scalar`, a term in parameter space, differentiated apart.
      transform: `(context, state, part, record, grads, key) -> grads`, acts on the task gradient.
      observe: `(context, state, part, record, key) -> (state, part)`, after the step. It must treat rows of
        weight 0 as absent.
      end_task: `(context, state, part, sample, key) -> (state, part)`.
      adapt: `(context, state, part, batch, key) -> (state, part, outputs | None)`, learns from a test batch; where it
        gives no outputs, they are those of `predict` afterwards.
      predict: `(context, state, part, x, task) -> outputs`; at most one component has it.
    """

    name: str
    needs: frozenset[str] = frozenset()
    init: Callable[..., PyTree] | None = None
    begin_task: Callable[..., tuple[TrainState, PyTree]] | None = None
    prepare: Callable[..., Batch] | None = None
    loss: Callable[..., tuple[Array, dict[str, PyTree]]] | None = None
    penalty: Callable[..., Array] | None = None
    transform: Callable[..., PyTree] | None = None
    observe: Callable[..., tuple[TrainState, PyTree]] | None = None
    end_task: Callable[..., tuple[TrainState, PyTree]] | None = None
    adapt: Callable[..., tuple[TrainState, PyTree, PyTree]] | None = None
    predict: Callable[..., PyTree] | None = None


class Learner(NamedTuple):
    """A continual learner: all that runners, metrics and experiments know.

    Attributes:
      init: `(key, batch, weights=None) -> TrainState`; the weights, if any, are those that the model begins from.
      begin_task: `(state, task, sample) -> TrainState`.
      update: `(state, batch) -> (TrainState, metrics: dict[str, f32[]])`.
      end_task: `(state, sample) -> TrainState`.
      adapt: `(state, batch) -> (TrainState, outputs)`: learn from a test batch and answer it.
      predict: `(state, x, task=None) -> outputs`.
      needs: pairs of a component's name and one of `NEEDS`.
    """

    init: Callable[..., TrainState]
    begin_task: Callable[[TrainState, TaskInfo, Batch | None], TrainState]
    update: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]
    end_task: Callable[[TrainState, Batch | None], TrainState]
    adapt: Callable[[TrainState, Batch], tuple[TrainState, PyTree]]
    predict: Callable[..., PyTree]
    needs: frozenset[tuple[str, str]] = frozenset()
