"""Components -> Learner."""

from __future__ import annotations

import inspect
from typing import Any

import optax

from cl_zoo import types
from cl_zoo._learner import Learner
from cl_zoo.types import Component, Model, TaskInfo

__all__ = ["compose"]


def compose(
    model: Model, optimiser: optax.GradientTransformation, *components: Component, tasks: TaskInfo | None = None
) -> Learner:
    """A learner from a model, an optimiser and components.

    One update is

        g = grad_p [sum of losses](p);   g <- transform(g);   g <- g + grad_p [sum of penalties](p)
        p <- p + optimiser(g);           p <- constrain(p);   observe

    Hooks run left to right. Losses and penalties are differentiated separately, since synaptic intelligence and
    A-GEM need the gradient of the task alone.

    Args:
      model: the network; weights that are bound to it are bound to the learner.
      optimiser: any optax optimiser; its learning rates may be tracers of a sweep.
      *components: at least one with a loss, and no two with the same name.
      tasks: `stream.tasks`, the active outputs of each task; None: all outputs are active for every example.

    Returns:
      A `Learner`.

    Raises:
      ValueError: two components with the same name, none with a loss, more than one with `predict` or `act`, a hook
        whose arguments are not those of its Protocol; at `init`, a model with too few outputs for `tasks`, or one that
        cannot take the batch.

    Example:
      >>> import jax, optax
      >>> from cl_zoo import compose, ewc, run_stream, supervised
      >>> from cl_zoo.models import mlp
      >>> from cl_zoo.streams import split_mnist
      >>> stream = split_mnist(steps=20)
      >>> model = mlp((28, 28), stream.tasks.active.shape[-1], hidden=(32,))
      >>> learner = compose(model, optax.adam(1e-3), supervised(), ewc(strength=1e4), tasks=stream.tasks)
      >>> run_stream(learner, stream, jax.random.key(0)).accuracy.shape
      (6, 5)
    """
    if not isinstance(model, Model):
        hint = "; call it" if callable(model) and hasattr(model, "__name__") else ", as mlp(...) or from_nnx(...) gives"
        raise ValueError(f"compose: model is {_called(model)}, but it must be a Model{hint}")
    if not (callable(getattr(optimiser, "init", None)) and callable(getattr(optimiser, "update", None))):
        raise ValueError(
            f"compose: optimiser is {_called(optimiser)}, but it must be an optax one, as optax.adam(1e-3)"
        )
    for component in components:
        if not isinstance(component, Component):
            hint = f"; call it: {component.__name__}()" if hasattr(component, "__name__") else ", as supervised() is"
            hint = "; give them one by one: *components" if isinstance(component, (list, tuple)) else hint
            raise ValueError(f"compose: a component is {_called(component)}, but it must be a Component{hint}")
    if tasks is not None and not isinstance(tasks, TaskInfo):
        raise ValueError(f"compose: tasks is {_called(tasks)}, but it must be a TaskInfo, as stream.tasks is")
    names = [component.name for component in components]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"compose: {names.count(name)} components are named {name!r}; give each its own name=")
    for component in components:
        _check_hooks(component)
    if not any(component.loss for component in components):
        raise ValueError(
            f"compose: none of the components ({', '.join(names) or 'there are none'}) has a loss; add supervised()"
        )
    for hook in ("predict", "act"):
        those = [component.name for component in components if getattr(component, hook)]
        if len(those) > 1:
            raise ValueError(f"compose: only one component may have the hook {hook}, but these do: {', '.join(those)}")
    return Learner(model, optimiser, components, tasks)


def _called(value: Any) -> str:
    """What the value is, for an error."""
    return f"the function {value.__name__}" if hasattr(value, "__name__") else type(value).__name__


def _check_hooks(component: Component) -> None:
    """Refuses hooks whose arguments are not those of their Protocols: too many, too few, or in another order."""
    for hook, given in component._asdict().items():
        if hook in ("name", "needs", "reads_ignored") or given is None:
            continue
        protocol = getattr(types, "".join(word.title() for word in hook.split("_")) + "Hook")
        wanted = list(inspect.signature(protocol.__call__).parameters)[1:]
        try:
            signature = inspect.signature(given)
            names = list(signature.parameters)[: len(wanted)]
            signature.bind(*wanted)
            fits = all(name == want or name not in wanted for name, want in zip(names, wanted, strict=False))
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise ValueError(
                f"compose: the hook {hook} of {component.name!r} takes other arguments than ({', '.join(wanted)})"
            )
