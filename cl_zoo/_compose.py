"""Components -> Learner."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any
from zlib import crc32

import jax
import jax.numpy as jnp
import optax

from cl_zoo.frozen import join_state, model_with, split_state
from cl_zoo.losses import mask_outputs
from cl_zoo.models.rewriting import has_plain_convolutions
from cl_zoo.types import Batch, Component, Context, Key, Learner, Model, PyTree, Record, TaskInfo, TrainState

__all__ = ["compose"]


def _key(state_key: Key, step: jax.Array | int, hook: str, name: str) -> Key:
    """Every hook of every component draws from its own key at every step, whatever else is composed."""
    return jax.random.fold_in(jax.random.fold_in(state_key, step), crc32(f"{name}/{hook}".encode()))


def _blank(batch: Batch) -> Batch:
    """Rows of weight 0 become zeros before any arithmetic: 0 * NaN would be NaN."""

    def blank(leaf: jax.Array) -> jax.Array:
        present = (batch.weight > 0).reshape((-1,) + (1,) * (leaf.ndim - 1))
        return jnp.where(present, leaf, jnp.zeros_like(leaf))

    return batch._replace(
        x=jax.tree.map(blank, batch.x), y=jax.tree.map(blank, batch.y), task=jax.tree.map(blank, batch.task)
    )


def _blank_all(sample: Batch | None) -> Batch | None:
    return None if sample is None else jax.vmap(_blank)(sample)


def compose(
    model: Model, optimiser: optax.GradientTransformation, *components: Component, tasks: TaskInfo | None = None
) -> Learner:
    """A learner from a model, an optimiser and components.

    One update is

        g = grad_p [sum of losses](p);   g <- transform(g);   g <- g + grad_p [sum of penalties](p)
        p <- p + optimiser(g);           observe

    Hooks run left to right. Losses and penalties are differentiated apart, since synaptic intelligence and A-GEM need
    the gradient of the task alone.

    Args:
      model: the network.
      optimiser: any optax optimiser; its rates may be tracers of a sweep.
      *components: at least one with a loss, and no two of one name.
      tasks: `stream.tasks`, which says the outputs that compete in each task; None opens all outputs to all rows.

    Returns:
      A `Learner` of pure functions. `begin_task`, `update` and `end_task` keep the state's tree, shapes and dtypes.

    Raises:
      ValueError: two components of one name, none with a loss, more than one with `predict`; at `init`, a model with
        too few outputs for `tasks`, or one that cannot take the batch.

    Example:
      >>> import jax, optax
      >>> from cl_zoo import compose, ewc, supervised, run_stream
      >>> from cl_zoo.models import mlp
      >>> from cl_zoo.streams import split_mnist
      >>> stream = split_mnist(steps=20)
      >>> model = mlp((28, 28), stream.tasks.active.shape[-1], hidden=(32,))
      >>> learner = compose(model, optax.adam(1e-3), supervised(), ewc(strength=1e4), tasks=stream.tasks)
      >>> run_stream(learner, stream, jax.random.key(0)).accuracy.shape
      (6, 5)
    """
    plain = _compose(model, optimiser, components, tasks)

    def held(state: TrainState) -> tuple[Learner, TrainState, Callable[[TrainState], TrainState]]:
        """The learner and the state as components see them, without frozen weights; and the way back."""
        rest, frozen = split_state(state)
        if frozen is None:
            return plain, state, lambda after: after
        learner = _compose(model_with(model, frozen), optimiser, components, tasks)
        return learner, rest, lambda after: join_state(after, frozen)

    def init(key: Key, batch: Batch, weights: PyTree = None) -> TrainState:
        arguments = () if weights is None else (weights,)
        params, model_state = model.init(_key(key, 0, "init", "model"), batch.x, *arguments)
        zero = jnp.zeros((), jnp.int32)
        learner, state, back = held(TrainState(zero, zero, key, params, model_state, None, {}))
        return back(learner.init(state, batch))

    def begin_task(state: TrainState, task: TaskInfo, sample: Batch | None = None) -> TrainState:
        learner, state, back = held(state)
        return back(learner.begin_task(state, task, sample))

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        learner, state, back = held(state)
        state, metrics = learner.update(state, batch)
        return back(state), metrics

    def end_task(state: TrainState, sample: Batch | None = None) -> TrainState:
        learner, state, back = held(state)
        return back(learner.end_task(state, sample))

    def adapt(state: TrainState, batch: Batch) -> tuple[TrainState, PyTree]:
        learner, state, back = held(state)
        state, outputs = learner.adapt(state, batch)
        return back(state), outputs

    def predict(state: TrainState, x: PyTree, task: jax.Array | None = None) -> PyTree:
        learner, state, _ = held(state)
        return learner.predict(state, x, task)

    return Learner(init, begin_task, update, end_task, adapt, predict, plain.needs)


def _compose(
    model: Model, optimiser: optax.GradientTransformation, components: tuple[Component, ...], tasks: TaskInfo | None
) -> Learner:
    """`compose` for models without frozen weights; `init` takes a state that lacks the optimiser's and the parts."""
    names = [component.name for component in components]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"compose: {names.count(name)} components are named {name!r}; give each its own name=")
    if not any(component.loss for component in components):
        raise ValueError(
            f"compose: none of the components ({', '.join(names) or 'there are none'}) has a loss; add supervised()"
        )
    answering = [(component, component.predict) for component in components if component.predict]
    if len(answering) > 1:
        both = ", ".join(component.name for component, _ in answering)
        raise ValueError(f"compose: only one component may answer (predict), but these do: {both}")

    def losses(
        state: TrainState, params: PyTree, batch: Batch, key: Callable[[str, str], Key]
    ) -> tuple[jax.Array, tuple[Any, ...]]:
        """The sum of all losses; each of them, its aux, and what the shared pass gave."""
        shared: list[tuple[PyTree, PyTree, Any]] = []  # made on first use

        def forward() -> PyTree:
            if not shared:
                shared.append(
                    model.apply(
                        params,
                        state.model_state,
                        batch.x,
                        task=batch.task,
                        weight=batch.weight,
                        key=key("forward", "model"),
                        train=True,
                    )
                )
            return shared[0][0]

        terms, aux = {}, {}
        for c in components:
            if c.loss:
                part = state.parts.get(c.name)
                terms[c.name], aux[c.name] = c.loss(context, state, part, params, forward, batch, key("loss", c.name))
        return jnp.asarray(sum(terms.values())), (terms, aux, *(shared[0] if shared else (None, state.model_state, {})))

    def objective(state: TrainState, params: PyTree, batch: Batch, key: Key) -> jax.Array:
        return losses(state, params, batch, lambda hook, name: _key(key, 0, hook, name))[0]

    context = Context(model, optimiser, tasks, objective)

    def init(state: TrainState, batch: Batch) -> TrainState:
        _check_outputs(context, state.params, state.model_state, batch)
        state = state._replace(opt_state=optimiser.init(state.params))
        parts = {
            c.name: c.init(context, state, batch, _key(state.key, 0, "init", c.name)) for c in components if c.init
        }
        return state._replace(parts=parts)

    def each(hook: str, state: TrainState, *arguments: Any) -> TrainState:
        """Runs `hook` of every component that has it, each on the state that the one before left."""
        for component in components:
            function = getattr(component, hook)
            if function is None:
                continue
            key = _key(state.key, state.step, hook, component.name)
            state, part = function(context, state, state.parts.get(component.name), *arguments, key)
            if component.init:
                state = state._replace(parts={**state.parts, component.name: part})
        return state

    def begin_task(state: TrainState, task: TaskInfo, sample: Batch | None = None) -> TrainState:
        return each("begin_task", state._replace(task=jnp.asarray(task.index, jnp.int32)), task, _blank_all(sample))

    def end_task(state: TrainState, sample: Batch | None = None) -> TrainState:
        return each("end_task", state, _blank_all(sample))

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        def key(phase: str, name: str) -> Key:
            return _key(state.key, state.step, phase, name)

        def part(component: Component) -> PyTree:
            return state.parts.get(component.name)

        prepared = batch = _blank(batch)
        for c in components:
            if c.prepare:
                prepared = c.prepare(context, state, part(c), prepared, key("prepare", c.name))
        # Without it, compilers fetch rows anew wherever x is read: forward, and transposed for the kernel's gradient.
        prepared = prepared._replace(x=jax.lax.optimization_barrier(prepared.x))

        def penalties(params: PyTree) -> tuple[jax.Array, dict[str, jax.Array]]:
            terms = {c.name: c.penalty(context, state, part(c), params) for c in components if c.penalty}
            return jnp.asarray(sum(terms.values())), terms

        old = state.params
        (loss, (terms, aux, outputs, model_state, taps)), gradient = jax.value_and_grad(
            lambda params: losses(state, params, prepared, key), has_aux=True
        )(old)
        metrics = {"loss": loss}
        if len(terms) > 1:
            metrics |= {f"{name}/loss": term for name, term in terms.items()}
        for name, values in aux.items():
            metrics |= {f"{name}/{field}": value for field, value in values.items() if jnp.ndim(value) == 0}

        penalty_gradient = None
        if any(c.penalty for c in components):
            (_, penalty_terms), penalty_gradient = jax.value_and_grad(penalties, has_aux=True)(old)
            metrics |= {f"{name}/penalty": term for name, term in penalty_terms.items()}

        record = Record(batch, prepared, outputs, taps, aux, gradient, penalty_gradient, old, None)
        for c in components:
            if c.transform:
                gradient = c.transform(context, state, part(c), record, gradient, key("transform", c.name))
        if penalty_gradient is not None:
            gradient = jax.tree.map(jnp.add, gradient, penalty_gradient)

        def step() -> tuple[PyTree, PyTree, PyTree]:
            updates, opt_state = optimiser.update(gradient, state.opt_state, old)
            return optax.apply_updates(old, updates), opt_state, model_state

        # A batch of padding alone leaves everything but `step` as it was: Adam moves on a gradient of zero.
        kept = (old, state.opt_state, state.model_state)
        new, opt_state, model_state = jax.lax.cond(jnp.any(batch.weight > 0), step, lambda: kept)

        after = state._replace(params=new, opt_state=opt_state, model_state=model_state)
        after = each("observe", after, record._replace(new_params=new))
        return after._replace(step=state.step + 1), metrics

    def predict(state: TrainState, x: PyTree, task: jax.Array | None = None) -> PyTree:
        for c, answer in answering:
            return answer(context, state, state.parts.get(c.name), x, task)
        outputs, _, _ = model.apply(state.params, state.model_state, x, task=task)
        active = context.active(state.task, task)
        return outputs if active is None else mask_outputs(outputs, active)

    def adapt(state: TrainState, batch: Batch) -> tuple[TrainState, PyTree]:
        batch, outputs = _blank(batch), None
        for c in components:
            if c.adapt:
                key = _key(state.key, state.step, "adapt", c.name)
                state, part, answered = c.adapt(context, state, state.parts.get(c.name), batch, key)
                outputs = outputs if answered is None else answered
                if c.init:
                    state = state._replace(parts={**state.parts, c.name: part})
        return state, predict(state, batch.x, batch.task) if outputs is None else outputs

    needs = {(c.name, need) for c in components for need in c.needs}
    if tasks is None:
        needs.add(("compose(tasks=None)", "open_outputs"))
    return Learner(init, begin_task, update, end_task, adapt, predict, frozenset(needs))


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
    if context.tasks is not None and outputs.shape[-1] != context.tasks.active.shape[-1]:
        raise ValueError(
            f"compose: the model has {outputs.shape[-1]} outputs, but the stream's tasks have"
            f" {context.tasks.active.shape[-1]} classes; the two must be equal"
        )
    if jax.default_backend() == "cpu" and has_plain_convolutions(jaxpr.jaxpr):
        warnings.warn(
            "compose: the model convolves by lax, whose gradients take 10 to 30 times as long in compiled loops on a"
            " CPU; give compose model._replace(apply=fast_convolutions(model.apply)), of cl_zoo.models.rewriting",
            stacklevel=2,
        )
