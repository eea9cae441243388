"""What `compose` returns: a continual learner, the one interface of runners, measures and experiments."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.interpreters import partial_eval

from cl_zoo._batches import blanked, check_batch, check_state, copied
from cl_zoo._model import of_arrays
from cl_zoo.checks import check_key
from cl_zoo.compilation import DoesNotFitError
from cl_zoo.losses import mask_outputs, scored
from cl_zoo.models.rewriting import has_plain_convolutions
from cl_zoo.types import Agent, Array, Batch, Component, Context, Key, Model, PyTree, Record, TaskInfo, TrainState

__all__ = ["Learner"]

Metrics = dict[str, Array]


@of_arrays("model", "tasks")
class Learner:
    """A continual learner: pure functions over a `TrainState`; all transitions keep its tree, shapes and dtypes.

    It is an argument of programs: weights bound to its model and `tasks` are data, all else is static.

    Attributes:
      model, optimiser, components, tasks: as composed.
    """

    model: Model
    optimiser: optax.GradientTransformation
    components: tuple[Component, ...]
    tasks: TaskInfo | None

    @property
    def needs(self) -> frozenset[tuple[str, str]]:
        """Pairs of a component's name and one of `NEEDS`."""
        needs = {(component.name, need) for component in self.components for need in component.needs}
        return frozenset(needs | ({("compose(tasks=None)", "open_outputs")} if self.tasks is None else set()))

    def bind(self, weights: PyTree) -> Learner:
        """The same learner with weights bound to its model, see `Model.bind`."""
        return dataclasses.replace(self, model=self.model.bind(weights))

    def drawn(self, key: Key, batch: Batch) -> Learner:
        """The learner that `init` with this key begins: what is frozen and not bound yet is drawn and bound."""
        draw = self.model.draw_function
        if draw is None or self.model.weights is not None:
            return self
        return self.bind(draw(_key(key, 0, "init", "model"), batch.x))

    def init(self, key: Key, batch: Batch) -> TrainState:
        """The first state, for batches like this one."""
        check_key("init", "key", key)
        check_batch("init", batch)
        learner = self.drawn(key, batch)
        params, model_state = learner.model.init(_key(key, 0, "init", "model"), batch.x)
        zero, context = jnp.zeros((), jnp.int32), learner._context()
        _check_outputs(context, params, model_state, batch)
        opt_state = self.optimiser.init(params)
        if any(type(node).__name__ == "ScheduleFreeState" for node in _nodes(opt_state)):
            raise ValueError(
                "compose: the optimiser is schedule-free, which answers from another iterate than it trains; take one"
                " whose parameters are those that predict, and ema() for an average"
            )
        state = TrainState(zero, jnp.copy(zero), copied(key), params, model_state, opt_state, {})
        return state._replace(parts={c.name: _part(c, context, state, batch, key) for c in self.components if c.init})

    def begin_task(self, state: TrainState, task: TaskInfo, sample: Batch | None = None) -> TrainState:
        """Before the first update of a task."""
        check_state("begin_task", state)
        if not isinstance(task, TaskInfo):
            raise ValueError(
                f"begin_task: task is {type(task).__name__}, but it must be a TaskInfo, as one of stream.tasks"
            )
        state = state._replace(task=jnp.array(task.index, jnp.int32))  # its memory may be donated
        return self._each("begin_task", state, task, self._blank_all(sample))

    def end_task(self, state: TrainState, sample: Batch | None = None) -> TrainState:
        """After the last update of a task."""
        return self._each("end_task", state, self._blank_all(sample))

    def update(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One step, and its metrics, `f32[]` each."""
        check_batch("update", batch, state)
        context, begun = self._context(), state
        prepared = batch = blanked(batch)
        for c, key in self._with("prepare", state):
            prepared, part = c.prepare(context, state, state.parts.get(c.name), prepared, key)
            state = _with_part(state, c, part)
        # Without it, compilers fetch examples again wherever x is read: forward, and for the kernel's gradient.
        prepared = prepared._replace(x=jax.lax.optimization_barrier(prepared.x))

        old = state.params
        (loss, (terms, aux, outputs, model_state, taps)), gradient = jax.value_and_grad(
            lambda params: self._losses(context, state, params, prepared, state.key, state.step), has_aux=True
        )(old)
        metrics = {"loss": loss}
        if len(terms) > 1:
            metrics |= {f"{name}/loss": term for name, term in terms.items()}
        for name, values in aux.items():
            metrics |= {f"{name}/{field}": value for field, value in values.items() if jnp.ndim(value) == 0}

        def penalties(params: PyTree) -> tuple[Array, Metrics]:
            terms = {
                c.name: c.penalty(context, state, state.parts.get(c.name), params) for c in self.components if c.penalty
            }
            return jnp.asarray(sum(terms.values())), terms

        penalty_gradient = None
        if any(c.penalty for c in self.components):
            (_, penalty_terms), penalty_gradient = jax.value_and_grad(penalties, has_aux=True)(old)
            metrics |= {f"{name}/penalty": term for name, term in penalty_terms.items()}

        record = Record(
            batch, prepared, outputs, taps, aux, gradient, penalty_gradient, old, state.opt_state, new_params=None
        )
        for c, key in self._with("transform", state):
            gradient, part = c.transform(context, state, state.parts.get(c.name), record, gradient, key)
            state = _with_part(state, c, part)
        if penalty_gradient is not None:
            gradient = jax.tree.map(jnp.add, gradient, penalty_gradient)

        def step() -> tuple[PyTree, PyTree, PyTree, dict[str, PyTree]]:
            # Some optimisers also read the loss (reduce_on_plateau).
            optimiser = optax.with_extra_args_support(self.optimiser)
            try:
                updates, opt_state = optimiser.update(gradient, state.opt_state, old, value=loss, grad=gradient)
            except (TypeError, AttributeError, ValueError) as error:
                said = str(error).splitlines()[0]
                raise ValueError(f"compose: the optimiser needs more than gradients and the loss: {said}") from None
            params, after = optax.apply_updates(old, updates), state
            for c, key in self._with("constrain", state):
                params, opt_state, part = c.constrain(
                    context, after, after.parts.get(c.name), record, params, opt_state, key
                )
                after = _with_part(after, c, part)
            return params, opt_state, model_state, changed(after)

        def changed(after: TrainState) -> dict[str, PyTree]:
            """Parts that `prepare`, `transform` or `constrain` may have changed; others need not pass a branch."""
            return {
                c.name: after.parts[c.name]
                for c in self.components
                if c.constrain or after.parts.get(c.name) is not begun.parts.get(c.name)
                if c.init
            }

        # A batch of padding alone leaves everything but `step` as it was: Adam moves even if the gradient is zero.
        kept = (old, begun.opt_state, begun.model_state, {name: begun.parts[name] for name in changed(state)})
        new, opt_state, model_state, parts = jax.lax.cond(jnp.any(batch.weight > 0), step, lambda: kept)
        after = state._replace(params=new, opt_state=opt_state, model_state=model_state, parts={**begun.parts, **parts})
        after = self._each("observe", after, record._replace(new_params=new))
        return after._replace(step=state.step + 1), metrics

    def adapt(self, state: TrainState, batch: Batch) -> tuple[TrainState, PyTree]:
        """Learns from a test batch and predicts it."""
        check_batch("adapt", batch, state)
        batch, outputs = blanked(batch), None
        for c, key in self._with("adapt", state):
            state, part, predicted = c.adapt(self._context(), state, state.parts.get(c.name), batch, key)
            outputs = outputs if predicted is None else predicted
            state = _with_part(state, c, part)
        return state, self.predict(state, batch.x, batch.task) if outputs is None else outputs

    def predict(self, state: TrainState, x: PyTree, task: Array | None = None) -> PyTree:
        """Outputs for x, inactive ones masked; nan where `task` is none of the stream's (ValueError outside of
        programs)."""
        check_state("predict", state)
        if jax.tree.leaves(x) and jax.tree.leaves(x)[0].shape[:1] == (0,):
            raise ValueError("predict: x has no examples, but there must be at least one")
        context = self._context()
        known = self._known(task)
        for c in self.components:
            if c.predict:
                outputs = c.predict(context, state, state.parts.get(c.name), x, task)
                break
        else:
            outputs, _, _ = self.model.apply(state.params, state.model_state, x, task=task)
            outputs = mask_outputs(outputs, context.active(state.task, task))
        if known is None:
            return outputs
        return jnp.where(known.reshape(known.shape + (1,) * (outputs.ndim - known.ndim)), outputs, jnp.nan)

    def act(self, state: TrainState, x: PyTree, key: Key, *, greedy: bool = False) -> tuple[PyTree, PyTree]:
        """`(action, info)`: of the component with the hook `act`; else a draw from the softmax of `predict`, or with
        `greedy` its most probable action, `i32[B]`, and info `{"log_probability": f32[B]}`."""
        for c in self.components:
            if c.act:
                key = _key(key, state.step, "act", c.name)
                return c.act(self._context(), state, state.parts.get(c.name), x, key)
        log_p = jax.nn.log_softmax(self.predict(state, x))
        action = jnp.argmax(log_p, axis=-1) if greedy else jax.random.categorical(key, log_p)
        return action, {"log_probability": jnp.take_along_axis(log_p, action[..., None], axis=-1)[..., 0]}

    def agent(self, state: TrainState) -> Agent:
        """The learner at a state, as streams and evaluations see it."""
        return Agent(lambda x, task=None: self.predict(state, x, task), lambda x, key: self.act(state, x, key))

    def _context(self) -> Context:
        # A component that re-initialises parameters draws them, also where the model began from bound weights.
        model = self.model if self.model.frozen else self.model.bind(None)

        def objective(state: TrainState, params: PyTree, batch: Batch, key: Key, *, train: bool = True) -> Array:
            return self._losses(context, state, params, batch, key, 0, train)[0]

        context = Context(model, self.optimiser, self.tasks, objective)
        return context

    def _known(self, task: Array | None) -> Array | None:
        """Which examples are of a task that exists; None where none is told."""
        if task is None or self.tasks is None:
            return None
        n = self.tasks.index.shape[0]
        known = (jnp.asarray(task) >= 0) & (jnp.asarray(task) < n)
        if not isinstance(known, jax.core.Tracer) and not known.all():
            wrong = np.ravel(task)[~np.ravel(known)][0]
            raise ValueError(f"predict: task is {wrong}, but the tasks are 0 to {n - 1}")
        return known

    def _scored(self, batch: Batch) -> Batch:
        """Examples without a target have weight 0 in losses and estimates, if the losses read targets so. Elsewhere
        they are examples like others: weights that depend on labels would make every update a branch."""
        if not all(c.reads_ignored for c in self.components):
            return batch
        return batch._replace(weight=scored(batch.y, batch.weight))

    def _blank_all(self, sample: Batch | None) -> Batch | None:
        return None if sample is None else jax.vmap(lambda batch: blanked(self._scored(batch)))(sample)

    def _with(self, hook: str, state: TrainState) -> Iterator[tuple[Any, Key]]:
        """The components that have a hook, and its key at this step."""
        for c in self.components:
            if getattr(c, hook):
                yield c, _key(state.key, state.step, hook, c.name)

    def _each(self, hook: str, state: TrainState, *arguments: Any) -> TrainState:
        """Runs `hook` of every component that has it, each on the state that the one before left."""
        context = self._context()
        earlier: list[tuple[str, Any]] = []
        for c, key in self._with(hook, state):
            before, run = state, getattr(c, hook)
            state, part = run(context, state, state.parts.get(c.name), *arguments, key)
            if any(new is not old for new, old in zip(*_leaves(state.params, before.params), strict=True)):
                for name, depends in earlier if hook == "end_task" else ():
                    if depends():
                        raise ValueError(
                            f"compose: {c.name} changes the parameters at a task's end, but {name} before it keeps what"
                            f" they were; put {c.name} before {name}"
                        )
            else:
                earlier.append((c.name, partial(_reads_params, run, context, before, c.name, arguments, key)))
            state = _with_part(state, c, part)
        return state

    def _losses(
        self,
        context: Context,
        state: TrainState,
        params: PyTree,
        batch: Batch,
        key: Key,
        step: Array | int,
        train: bool = True,
    ) -> tuple[Array, tuple[Any, ...]]:
        """The sum of all losses; each of them, its aux, and what the shared pass returned."""
        shared: list[tuple[PyTree, PyTree, Any]] = []  # made on first use
        batch = self._scored(batch)

        def forward() -> PyTree:
            if not shared:
                options = {"key": _key(key, step, "forward", "model"), "train": True} if train else {}
                shared.append(
                    context.model.apply(
                        params, state.model_state, batch.x, task=batch.task, weight=batch.weight, **options
                    )
                )
            return shared[0][0]

        terms, aux = {}, {}
        for c in self.components:
            if c.loss:
                part, own = state.parts.get(c.name), _key(key, step, "loss", c.name)
                terms[c.name], aux[c.name] = c.loss(context, state, part, params, forward, batch, own)
        total, known = jnp.asarray(sum(terms.values())), self._known(batch.task)
        if known is not None:  # another task's outputs would be trained
            total = jnp.where(jnp.all(known | (batch.weight == 0)), total, jnp.nan)
        return total, (terms, aux, *(shared[0] if shared else (None, state.model_state, {})))


def _part(component: Component, context: Context, state: TrainState, batch: Batch, key: Key) -> PyTree:
    try:
        return component.init(context, state, batch, _key(key, 0, "init", component.name))  # type: ignore[misc]
    except DoesNotFitError as error:
        raise DoesNotFitError(f"{component.name}: {error}") from None


def _leaves(*trees: PyTree) -> list[list[Any]]:
    return [jax.tree.leaves(tree) for tree in trees]


def _reads_params(run: Any, context: Context, state: TrainState, name: str, arguments: Any, key: Key) -> bool:
    """Whether what a hook puts into its part depends on the parameters."""
    jaxpr = jax.make_jaxpr(
        lambda params: run(context, state._replace(params=params), state.parts.get(name), *arguments, key)[1]
    )(state.params).jaxpr
    return any(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[1])


def _nodes(tree: PyTree) -> Iterator[Any]:
    """All tuples, named or not, in a tree."""
    if isinstance(tree, tuple):
        yield tree
    if isinstance(tree, (tuple, list, dict)):
        for child in tree.values() if isinstance(tree, dict) else tree:
            yield from _nodes(child)


def _key(state_key: Key, step: Array | int, hook: str, name: str) -> Key:
    """Every hook of every component draws from its own key at every step, whatever else is composed."""
    return jax.random.fold_in(jax.random.fold_in(state_key, step), crc32(f"{name}/{hook}".encode()))


def _with_part(state: TrainState, component: Component, part: PyTree) -> TrainState:
    return state._replace(parts={**state.parts, component.name: part}) if component.init else state


def _check_outputs(context: Context, params: PyTree, model_state: PyTree, batch: Batch) -> None:
    """One abstract forward pass: the model must take the batch, and have an output for every class."""
    shapes = jax.tree.map(lambda leaf: leaf.shape, batch.x)
    try:
        jaxpr, (outputs, _, _) = jax.make_jaxpr(
            lambda p, s, b: context.model.apply(p, s, b.x, task=b.task, weight=b.weight), return_shape=True
        )(params, model_state, batch)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"compose: the model cannot take the stream's batches, x of shape {shapes}: {error}"
        ) from error
    if context.tasks is not None and not hasattr(outputs, "shape"):
        raise ValueError(
            f"compose: the model's outputs are a {type(outputs).__name__}, but with tasks they must be one array,"
            " [B, C]; give it a head that returns one, or tasks=None"
        )
    if context.tasks is not None and outputs.shape[-1] != context.tasks.active.shape[-1]:
        raise ValueError(
            f"compose: the model has {outputs.shape[-1]} outputs, but the stream's tasks have"
            f" {context.tasks.active.shape[-1]} classes; the two must be equal"
        )
    if jax.default_backend() == "cpu" and has_plain_convolutions(jaxpr.jaxpr):
        warnings.warn(
            "compose: the model convolves by lax, whose gradients take 10 to 30 times as long in compiled loops on a"
            " CPU; give compose a Model of cl_zoo.models.fast_convolutions(apply)",
            stacklevel=2,
        )
