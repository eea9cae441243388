"""The contract: what a batch, a task, a state, a model, a stream and a component are. `compose` makes learners of them.

Legend for shapes: `B` examples of a batch, `T` tasks, `C` outputs, `M` or `E` stacked batches.

`Batch`, `TaskInfo`, `TrainState` and `Record` are NamedTuples of arrays, so `jit`, `vmap`, `scan`, sharding and
checkpoints handle them as they are. `Model` and `Stream` are dataclasses of pure functions (static) and arrays, so they
are arguments of programs too. `Component` is a NamedTuple of pure functions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from cl_zoo._model import Array, Key, Model, PyTree, Taps, of_arrays
from cl_zoo.checks import check_choice, check_whole
from cl_zoo.identity import alike
from cl_zoo.losses import mask_outputs, mean_score, scored

NEEDS = {
    "boundaries": "task boundaries (calls of begin_task and end_task)",
    "task_ids": "the task of every example, also when it is tested",
    "begin_sample": "a sample of the new task when it begins",
    "end_sample": "a sample of the finished task when it ends",
    "open_outputs": "all outputs active for every example (or `compose(..., tasks=stream.tasks)`)",
}
"""What a component may ask of a stream, and what each word means."""


class Batch(NamedTuple):
    """Examples to learn from or to predict.

    Attributes:
      x: inputs, a pytree of `[B, ...]` arrays.
      y: targets, a pytree of `[B, ...]` arrays; None where there are no labels.
      task: `i32[B]`, the task of each example; None where the stream does not give it.
      weight: `f32[B]`; 0 marks padding or a rejected example, so that shapes never change.
      replayed: `bool[B]`, which examples a `prepare` hook took from a memory; None where none did.
    """

    x: PyTree
    y: PyTree
    task: Array | None
    weight: Array
    replayed: Array | None = None


class Episode(NamedTuple):
    """`Batch.x` where each example is a small learning problem: learn from the support, predict the query.
    `Batch.y` then holds the query's targets, a pytree of `[B, Q, ...]` arrays.

    Attributes:
      support_x, support_y: what to learn from, pytrees of `[B, K, ...]` arrays.
      query_x: what to predict, a pytree of `[B, Q, ...]` arrays.
    """

    support_x: PyTree
    support_y: PyTree
    query_x: PyTree


class TaskInfo(NamedTuple):
    """What is known about a task. With a leading axis `T` it describes a whole stream.

    Attributes:
      index: `i32[]`, its place in the stream.
      active: `bool[C]`, the outputs that are active while this is the current task.
    """

    index: Array  # type: ignore[assignment]
    active: Array


class TrainState(NamedTuple):
    """All that changes as a learner learns. `update` keeps its tree, shapes and dtypes.

    Attributes:
      step: `i32[]`, updates so far; runners refuse runs of more than 2^31 - 1.
      task: `i32[]`, index of the current task (0 before any).
      key: the run's key; it never changes: draws fold `step` into it.
      params: what the optimiser trains, a pytree.
      model_state: what else the model changes as it trains (normalisation statistics).
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


class Agent(NamedTuple):
    """A learner as a stream sees it.

    Attributes:
      predict: `(x, task=None) -> outputs`.
      act: `(x, key) -> (action, info)`.
    """

    predict: Callable[..., PyTree]
    act: Callable[[PyTree, Key], tuple[PyTree, PyTree]]


@of_arrays("tasks", "data", "task_steps")
class Stream:
    """A sequence of tasks. Its functions are pure and read only `data`, which is an argument of a compiled program.
    Functions of the same code and closures are equal (`alike`), so equal calls of a factory share their programs.

    Attributes:
      n_tasks: `T`.
      steps: batches per task; where tasks differ, those of the longest.
      provides: which of `NEEDS` it fulfils.
      init_function: `(key) -> cursor`, the place in the stream; it goes into checkpoints.
      next_function: `(data, cursor, agent) -> (Batch, cursor)`; the agent is the current learner.
      sample_function: `(data, task, key) -> Batch[M, B, ...]`, a bounded sample of a task, for consolidation; or None.
      reorder_function: `(data, key) -> data` with the tasks drawn again (class order, permutations, angles); it shares
        the images, so a `vmap` over keys holds one copy of them. None: they have one order.
      evaluation_function: `(data, task, split) -> Batch[E, B, ...]`, split "validation" or "test"; None: no examples.
      score_function: `(outputs, batch) -> f32[B]`; None without examples.
      evaluate_function: `(data, agent, task, split, key) -> f32[]`, the score on a task; None: the mean of `score`.
      first_function: `(data, n) -> Stream`, that of the first n tasks alone; None: it cannot be cut.
      tasks: `TaskInfo` with a leading axis `T`.
      data: what the functions read, a pytree of arrays.
      task_steps: `i32[T]`, batches of each task, at most `steps`; None where all have `steps`.
    """

    n_tasks: int
    steps: int
    provides: frozenset[str]
    init_function: Callable[[Key], PyTree]
    next_function: Callable[[PyTree, PyTree, Agent], tuple[Batch, PyTree]]
    sample_function: Callable[[PyTree, Array, Key], Batch] | None = None
    reorder_function: Callable[[PyTree, Key], PyTree] | None = None
    evaluation_function: Callable[[PyTree, Array, str], Batch] | None = None
    score_function: Callable[[PyTree, Batch], Array] | None = None
    evaluate_function: Callable[[PyTree, Agent, Array, str, Key], Array] | None = None
    first_function: Callable[[PyTree, int], Stream] | None = None
    tasks: TaskInfo = None  # type: ignore[assignment]
    data: PyTree = None
    task_steps: Array | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name.endswith("_function"):
                object.__setattr__(self, field.name, alike(getattr(self, field.name)))

    def init(self, key: Key) -> PyTree:
        """The cursor at the beginning."""
        return self.init_function(key)

    def next(self, cursor: PyTree, agent: Agent | None = None) -> tuple[Batch, PyTree]:
        """The batch at a cursor, and the cursor after it. An environment also needs the agent."""
        return self.next_function(self.data, cursor, agent)  # type: ignore[arg-type]

    def sample(self, task: Array | int, key: Key) -> Batch:
        """A bounded sample of a task, `Batch[M, B, ...]`. ValueError where there is none."""
        if self.sample_function is None:
            raise ValueError("the stream gives no samples of its tasks: it was made without a sample_function")
        return self.sample_function(self.data, jnp.asarray(task), key)

    def evaluation(self, task: Array | int, split: str) -> Batch:
        """The examples that a task is evaluated on, `Batch[E, B, ...]`. ValueError where there are none."""
        if self.evaluation_function is None:
            raise ValueError("the stream is evaluated without examples, so there are none to measure on")
        check_choice("stream", "split", split, ("validation", "test"))
        if not isinstance(task, jax.core.Tracer) and not 0 <= int(task) < self.n_tasks:
            raise ValueError(f"stream: task is {task}, but the tasks are 0 to {self.n_tasks - 1}")
        return self.evaluation_function(self.data, jnp.asarray(task), split)

    def score(self, outputs: PyTree, batch: Batch) -> Array:
        """The score of each example, `f32[B]`."""
        return self.score_function(outputs, batch)  # type: ignore[misc]

    def evaluate(self, agent: Agent, task: Array | int, split: str, key: Key) -> Array:
        """The score on a task, `f32[]`."""
        if self.evaluate_function is not None:
            return self.evaluate_function(self.data, agent, jnp.asarray(task), split, key)
        return self.mean_score(agent, self.evaluation(task, split))

    def mean_score(self, agent: Agent, examples: Batch) -> Array:
        """The mean of `score` over examples, `Batch[E, B, ...]`; nan where there are none."""

        def one(batch: Batch) -> tuple[Array, Array]:
            weight = scored(batch.y, batch.weight, self.score_function)
            return self.score(agent.predict(batch.x, batch.task), batch), weight

        return mean_score(*jax.lax.map(one, examples))

    def first(self, n_tasks: int) -> Stream:
        """The stream of the first tasks alone. ValueError where there are not so many, or it cannot be cut."""
        check_whole("stream", "n_tasks", n_tasks, 1, self.n_tasks)
        if self.first_function is None:
            raise ValueError("the stream cannot be cut: it was made without a first_function, as task_stream gives one")
        return self.first_function(self.data, n_tasks)

    def reorder(self, key: Key) -> Stream:
        """The same stream with its tasks drawn again. ValueError where they have one order."""
        if self.reorder_function is None:
            raise ValueError("the stream's tasks have one order: it was made without a reorder_function")
        return dataclasses.replace(self, data=self.reorder_function(self.data, key))


class Objective(Protocol):
    def __call__(self, state: TrainState, params: PyTree, batch: Batch, key: Key, *, train: bool = True) -> Array: ...


class Context(NamedTuple):
    """What never changes in a run: given to every hook of a component.

    Attributes:
      model, optimiser: as composed.
      tasks: `TaskInfo` with a leading axis `T`, or None where all outputs are active for every example.
      objective: `(state, params, batch, key, train=True) -> f32[]`, the sum of all `loss` hooks on a batch, without
        the penalties; with `train=False` the shared pass is that of the network as it predicts.
    """

    model: Model
    optimiser: Any
    tasks: TaskInfo | None
    objective: Objective

    def n_outputs(self, state: TrainState, batch: Batch) -> int:
        """C, of the model's outputs for batches like this one."""
        one = self.model.apply
        return jax.eval_shape(lambda s, b: one(s.params, s.model_state, b.x, task=b.task)[0], state, batch).shape[-1]

    def active(self, current: Array, task: Array | None = None) -> Array | None:
        """The active outputs: those of each example's own task where that is given (`bool[B, C]`, a multi-head
        network), else those of the current task (`bool[C]`); None where all are active."""
        if self.tasks is None:
            return None
        return self.tasks.active[current if task is None else task]

    def logits(
        self, state: TrainState, params: PyTree, batch: Batch, perturb: dict[str, Array] | None = None
    ) -> tuple[Array, Taps]:
        """Masked outputs `[B, C]` and taps of the network at `params`, as it predicts (not as it trains)."""
        outputs, _, taps = self.model.apply(
            params, state.model_state, batch.x, task=batch.task, weight=batch.weight, perturb=perturb
        )
        return mask_outputs(outputs, self.active(state.task, batch.task)), taps

    def features(self, state: TrainState, x: PyTree, task: Array | None = None) -> Array:
        """The input of the network's last layer, `[B, F]`.

        Raises:
          ValueError: a model without taps.
        """
        _, _, taps = self.model.apply(state.params, state.model_state, x, task=task)
        if not taps:
            raise ValueError("the model records no taps, but its features are the input of its last tapped layer")
        return list(taps.values())[-1][0]


class Record(NamedTuple):
    """What happened in one update: given to `transform`, `constrain` and `observe`.

    Attributes:
      batch: as received, examples of weight 0 set to zeros.
      prepared: after every `prepare` hook; the first examples are those of `batch`.
      outputs, taps: of the shared forward pass on `prepared`, before masking; None and {} where no loss asked for it.
      aux: each loss's second result under its component's name.
      task_gradient, penalty_gradient: of the sum of losses, and of the sum of penalties (None without any).
      old_params, old_opt_state: before the step.
      new_params: after it and after every `constrain`; None before.
    """

    batch: Batch
    prepared: Batch
    outputs: PyTree
    taps: Taps
    aux: dict[str, dict[str, PyTree]]
    task_gradient: PyTree
    penalty_gradient: PyTree
    old_params: PyTree
    old_opt_state: PyTree
    new_params: PyTree


Aux = dict[str, PyTree]
Forward = Callable[[], PyTree]
Changed = tuple[TrainState, Any]


class InitHook(Protocol):
    def __call__(self, context: Context, state: TrainState, batch: Batch, key: Key) -> PyTree: ...


class BeginTaskHook(Protocol):
    def __call__(
        self, context: Context, state: TrainState, part: Any, task: TaskInfo, sample: Batch, key: Key
    ) -> Changed: ...


class PrepareHook(Protocol):
    def __call__(self, context: Context, state: TrainState, part: Any, batch: Batch, key: Key) -> tuple[Batch, Any]: ...


class LossHook(Protocol):
    def __call__(
        self, context: Context, state: TrainState, part: Any, params: PyTree, forward: Forward, batch: Batch, key: Key
    ) -> tuple[Array, Aux]: ...


class PenaltyHook(Protocol):
    def __call__(self, context: Context, state: TrainState, part: Any, params: PyTree) -> Array: ...


class TransformHook(Protocol):
    def __call__(
        self, context: Context, state: TrainState, part: Any, record: Record, grads: PyTree, key: Key
    ) -> tuple[PyTree, Any]: ...


class ConstrainHook(Protocol):
    def __call__(
        self,
        context: Context,
        state: TrainState,
        part: Any,
        record: Record,
        params: PyTree,
        opt_state: PyTree,
        key: Key,
    ) -> tuple[PyTree, PyTree, Any]: ...


class ObserveHook(Protocol):
    def __call__(self, context: Context, state: TrainState, part: Any, record: Record, key: Key) -> Changed: ...


class EndTaskHook(Protocol):
    def __call__(self, context: Context, state: TrainState, part: Any, sample: Batch, key: Key) -> Changed: ...


class AdaptHook(Protocol):
    def __call__(
        self, context: Context, state: TrainState, part: Any, batch: Batch, key: Key
    ) -> tuple[TrainState, Any, PyTree | None]: ...


class PredictHook(Protocol):
    def __call__(self, context: Context, state: TrainState, part: Any, x: PyTree, task: Array | None) -> PyTree: ...


class ActHook(Protocol):
    def __call__(
        self, context: Context, state: TrainState, part: Any, x: PyTree, key: Key
    ) -> tuple[PyTree, PyTree]: ...


class Component(NamedTuple):
    """One thing that a continual learner does differently: pure functions over its own `part` of the state.

    Every hook is optional. `key` is this hook's own at this step: another component never changes its draws. What
    `prepare`, `transform` and `constrain` change in a part is kept only if some example of the batch has weight > 0.

    Attributes:
      name: the key of its part in `TrainState.parts`.
      needs: which of `NEEDS` it requires.
      init: the component's part at the beginning.
      begin_task: before the first update of a task; `sample` is from that task.
      prepare: returns the batch to learn from in its place; incoming examples stay first.
      loss: a term in function space; scalars of its aux become metrics. `forward()` gives outputs of the one
        shared pass.
      penalty: a term in parameter space, differentiated apart.
      transform: acts on the task gradient.
      constrain: acts on the optimiser's result: what must not move is set back to `record.old_params` and
        `old_opt_state`.
      observe: after the step. It must treat examples of weight 0 as absent.
      end_task: after the last update of a task; `sample` is from that task.
      adapt: learns from a test batch; where it returns no outputs, `predict` gives them afterwards.
      predict: predicts in the network's place; at most one component has it.
      act: chooses `(action, info)` and changes no state; at most one component has it.
      reads_ignored: whether a target of `losses.IGNORED` is none, as for losses of labels.
    """

    name: str
    needs: frozenset[str] = frozenset()
    init: InitHook | None = None
    begin_task: BeginTaskHook | None = None
    prepare: PrepareHook | None = None
    loss: LossHook | None = None
    penalty: PenaltyHook | None = None
    transform: TransformHook | None = None
    constrain: ConstrainHook | None = None
    observe: ObserveHook | None = None
    end_task: EndTaskHook | None = None
    adapt: AdaptHook | None = None
    predict: PredictHook | None = None
    act: ActHook | None = None
    reads_ignored: bool = True
