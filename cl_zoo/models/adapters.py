"""Flax modules -> `Model`. All that depends on Flax's own interfaces is here."""

from __future__ import annotations

import inspect
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from cl_zoo.checks import checked
from cl_zoo.models.rewriting import fast_convolutions
from cl_zoo.types import Array, Key, Model, PyTree

__all__ = ["from_linen", "from_nnx"]

_ON, _OFF = ("train", "training", "is_training"), ("deterministic", "use_running_average")
"""What Flax modules call the switch between training and evaluation: on in the one, or in the other."""

Units = tuple[tuple[tuple[tuple[str, ...], int, str], ...], ...]


class _Tap:
    """Calls layers for a module: `tap(name, layer, x)` is `layer(x)`, recorded and perturbed."""

    def __init__(self, perturb: dict[str, Array] | None):
        self.perturb = perturb or {}
        # Plain dicts lose their order in transformations; the last layer is the last here.
        self.taps: dict[str, tuple[Array, Array]] = OrderedDict()

    def __call__(self, name: str, layer: Callable[[Array], Array], x: Array) -> Array:
        if name in self.taps:
            raise ValueError(f"the layer {name!r} is called twice through tap; call a shared layer without it")
        z = layer(x)
        if name in self.perturb:
            z = z + self.perturb[name]
        self.taps[name] = (x, z)
        return z


def _check_shape(x: PyTree, input_shape: tuple[int, ...] | None) -> None:
    if input_shape is not None and jax.tree.leaves(x)[0].shape[1:] != tuple(input_shape):
        raise ValueError(
            f"the model takes inputs of shape {tuple(input_shape)}, but an example of the batch has shape"
            f" {jax.tree.leaves(x)[0].shape[1:]}"
        )


def as_it_is(x: PyTree) -> PyTree:
    """No preprocessing."""
    return x


def _warn_of_pixels(owner: str, preprocess: Callable[[PyTree], PyTree], x: PyTree) -> None:
    if preprocess is as_it_is and getattr(x, "dtype", None) == jnp.uint8 and x.ndim > 2:
        warnings.warn(
            f"{owner}: x is uint8, from 0 to 255, and nothing scales it; give preprocess=cl_zoo.models.scale_images",
            stacklevel=2,
        )


@checked
def from_nnx(
    make: Callable[[nnx.Rngs], nnx.Module],
    *,
    preprocess: Callable[[PyTree], PyTree] = as_it_is,
    input_shape: tuple[int, ...] | None = None,
    units: Units = (),
) -> Model:
    """A `Model` from a Flax NNX module: split once, merged at each trace.

    `nnx.Param` variables become `params`, all others but keys (normalisation statistics, ...) `model_state`; both are
    nested dicts. A module whose `__call__` takes `tap` calls its dense and convolution layers as `tap("path/to/layer",
    self.layer, x)`, and so gives taps; any other module simply has none. One that takes `task` or `weight` is given
    them. Its switches are set, as arguments of `__call__` or as attributes: `train`, `training`, `is_training`,
    `deterministic`, `use_running_average`. Dropout draws from the key of the call. Inside a program on a CPU,
    convolutions are made fast (`fast_convolutions`): what `__call__` stores outside variables and outputs is lost
    there.

    Args:
      make: `(rngs) -> module`.
      preprocess: of x, inside the program, so that streams and buffers keep uint8.
      input_shape: of one example, for a clear error; None skips the check.
      units: see `Model`.

    Returns:
      A `Model`.

    Raises:
      ValueError: a module where a function that makes one is meant; an input of another shape; at `init`, batch
        normalisation that no switch turns.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> model = from_nnx(lambda rngs: nnx.Linear(3, 2, rngs=rngs))
      >>> params, model_state = model.init(jax.random.key(0), jnp.ones((1, 3)))
      >>> model.apply(params, model_state, jnp.ones((5, 3)))[0].shape
      (5, 2)
    """
    if isinstance(make, (nnx.Module, linen.Module)):
        raise ValueError(
            f"from_nnx: make is a {type(make).__name__}, but it must be a function that makes one, as"
            f" lambda rngs: {type(make).__name__}(..., rngs=rngs)"
        )
    abstract = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    if not isinstance(abstract, nnx.Module):
        raise ValueError(f"from_nnx: make gives a {type(abstract).__name__}, but it must give an NNX module")
    graph, abstract_params, abstract_keys, abstract_rest = _split(abstract)
    extra = _accepted(type(abstract).__call__)
    modules = [module for _, module in nnx.iter_modules(abstract)]
    statistics = any(isinstance(module, nnx.BatchNorm) for module in modules)
    dropout = any(isinstance(module, nnx.Dropout) and module.rate > 0 for module in modules)

    def init(key: Key, x: PyTree) -> tuple[PyTree, PyTree]:
        _check_shape(x, input_shape)
        _warn_of_pixels("from_nnx", preprocess, x)
        _, params, _, rest = _split(make(nnx.Rngs(key)))
        made = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)
        _check_switch("from_nnx", apply, made, x, key, statistics, dropout)
        return made

    def apply(
        params: PyTree,
        model_state: PyTree,
        x: PyTree,
        *,
        task: Array | None = None,
        weight: Array | None = None,
        key: Key | None = None,
        train: bool = False,
        perturb: dict[str, Array] | None = None,
    ) -> tuple[PyTree, PyTree, dict[str, tuple[Array, Array]]]:
        _check_shape(x, input_shape)
        states = []
        for skeleton, values in ((abstract_params, params), (abstract_rest, model_state)):
            state = jax.tree.map(lambda leaf: leaf, skeleton)
            nnx.replace_by_pure_dict(state, values)
            states.append(state)
        keys = jax.tree.map(
            lambda leaf: (
                jnp.broadcast_to(jax.random.key(0), leaf.shape)
                if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
                else jnp.zeros(leaf.shape, leaf.dtype)
            ),
            abstract_keys,
        )
        module: Any = nnx.merge(graph, states[0], keys, states[1])
        if train and key is not None:
            streams = [variable.tag for _, variable in nnx.iter_graph(module) if isinstance(variable, nnx.RngKey)]
            seeds = {name: jax.random.fold_in(key, i) for i, name in enumerate(sorted({*streams} - {"default"}))}
            nnx.reseed(module, default=key, **seeds)  # type: ignore[arg-type]
        module.set_attributes(**dict.fromkeys(_OFF, not train), raise_if_not_found=False)
        for _, each in nnx.iter_modules(module):
            for name in _ON:
                if isinstance(vars(each).get(name), bool):  # every module has a method `train`
                    setattr(each, name, train)
        tap = _Tap(perturb)
        given: dict[str, Any] = {"tap": tap, "task": task, "weight": weight, **_switches(train)}
        outputs = module(preprocess(x), **{name: given[name] for name in extra})
        _, _, _, rest = _split(module)
        return outputs, nnx.to_pure_dict(rest), tap.taps

    return Model(init, fast_convolutions(apply), units)


@checked
def from_linen(
    module: Any,
    *,
    preprocess: Callable[[PyTree], PyTree] = as_it_is,
    input_shape: tuple[int, ...] | None = None,
    units: Units = (),
) -> Model:
    """A `Model` from a Flax Linen module, by the conventions of `from_nnx`.

    The collection "params" becomes `params`, all others `model_state`. Dropout draws from the key of the call.

    Args:
      module: a `flax.linen.Module`.
      preprocess, input_shape, units: see `from_nnx`.

    Returns:
      A `Model`.

    Raises:
      ValueError: what is no Linen module; an input of another shape; at `init`, statistics that no switch turns.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen
      >>> model = from_linen(linen.Dense(2))
      >>> params, model_state = model.init(jax.random.key(0), jnp.ones((1, 3)))
      >>> model.apply(params, model_state, jnp.ones((5, 3)))[0].shape
      (5, 2)
    """
    if not isinstance(module, linen.Module):
        name = getattr(module, "__name__", type(module).__name__)
        raise ValueError(f"from_linen: module is {name}, but it must be an instance of a Linen module, as {name}(...)")
    extra = _accepted(type(module).__call__)
    switches = [name for name in _switches(True) if name in module.__dataclass_fields__]

    def init(key: Key, x: PyTree) -> tuple[PyTree, PyTree]:
        _check_shape(x, input_shape)
        _warn_of_pixels("from_linen", preprocess, x)
        given: dict[str, Any] = {"tap": _Tap(None), "task": None, "weight": None, **_switches(False)}
        own = module.clone(**{name: given[name] for name in switches})
        dropped: list[float] = []

        def see(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            if isinstance(context.module, linen.Dropout) and context.module.rate > 0:
                dropped.append(context.module.rate)
            return call(*args, **kwargs)

        with linen.intercept_methods(see):
            variables = own.init(key, preprocess(x), **{name: given[name] for name in extra})
        made = variables.get("params", {}), {name: value for name, value in variables.items() if name != "params"}
        _check_switch("from_linen", apply, made, x, key, "batch_stats" in made[1], bool(dropped))
        return made

    def apply(
        params: PyTree,
        model_state: PyTree,
        x: PyTree,
        *,
        task: Array | None = None,
        weight: Array | None = None,
        key: Key | None = None,
        train: bool = False,
        perturb: dict[str, Array] | None = None,
    ) -> tuple[PyTree, PyTree, dict[str, tuple[Array, Array]]]:
        _check_shape(x, input_shape)
        tap = _Tap(perturb)
        given: dict[str, Any] = {"tap": tap, "task": task, "weight": weight, **_switches(train)}
        outputs, changed = module.clone(**{name: given[name] for name in switches}).apply(
            {"params": params, **model_state},
            preprocess(x),
            **{name: given[name] for name in extra},
            rngs=None if key is None else {"dropout": key},
            mutable=list(model_state),
        )
        return outputs, {**model_state, **changed}, tap.taps

    return Model(init, fast_convolutions(apply), units)


def _switches(train: bool) -> dict[str, bool]:
    """What Flax modules call the switch between training and evaluation."""
    return dict.fromkeys(_ON, train) | dict.fromkeys(_OFF, not train)


def _accepted(call: Callable[..., Any]) -> tuple[str, ...]:
    """Which of our keyword arguments a module's `__call__` names."""
    named = inspect.signature(call).parameters
    return tuple(name for name in ("tap", "task", "weight", *_switches(True)) if name in named)


def _check_switch(
    owner: str,
    apply: Callable[..., Any],
    made: tuple[PyTree, PyTree],
    x: PyTree,
    key: Key,
    statistics: bool,
    dropout: bool,
) -> None:
    """Refuses normalisation statistics that training would never move, or evaluation would; and dropout that is the
    same in both."""
    if not (statistics or dropout):
        return

    def traced(train: bool) -> Any:
        def arrays(s: PyTree, p: PyTree, x: PyTree) -> PyTree:
            outputs, after, _ = apply(p, s, x, train=train, key=key)
            return after, [leaf for leaf in jax.tree.leaves(outputs) if isinstance(leaf, jax.Array)]

        return jax.make_jaxpr(arrays)(made[1], made[0], x).jaxpr

    train, evaluate = traced(True), traced(False)
    n = len(jax.tree.leaves(made[1]))
    in_training, in_evaluation = (
        any(after is not before for after, before in zip(one.outvars, one.invars[:n])) for one in (train, evaluate)
    )
    if str(train) == str(evaluate) or (statistics and (in_evaluation or not in_training)):
        what = "batch statistics" if statistics else "dropout"
        raise ValueError(
            f"{owner}: the module has {what}, but training and evaluation are the same pass for them; its switch must"
            f" be one of {', '.join(_switches(True))}, as an argument of __call__ or an attribute"
        )


def _split(module: nnx.Module) -> Any:
    """A module's graph, its parameters, the keys it draws from, and all else that it holds."""
    return nnx.split(module, nnx.Param, nnx.RngState, ...)
