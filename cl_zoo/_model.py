"""A network as pure functions, and the weights that are bound to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, dataclass_transform

import jax
import jax.numpy as jnp

from cl_zoo.checks import check_weights

Array = jax.Array
Key = jax.Array
PyTree = Any
Taps = dict[str, tuple[Array, Array]]
Units = tuple[tuple[tuple[tuple[str, ...], int, str], ...], ...]


@dataclass_transform(frozen_default=True)
def of_arrays(*arrays: str) -> Callable[[type], type]:
    """A frozen dataclass whose fields of these names are pytrees of arrays, and all others static."""

    def register(cls: type) -> type:
        cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
        static = [field.name for field in dataclasses.fields(cls) if field.name not in arrays]
        return jax.tree_util.register_dataclass(cls, list(arrays), static)

    return register


@of_arrays("weights")
class Model:
    """A network: `Model(init_function, apply_function)`, and weights that may be bound to it.

    Attributes:
      init_function: `(key, x) -> (params, model_state)`.
      apply_function: `(params, model_state, x, *, task=None, weight=None, key=None, train=False, perturb=None)
        -> (outputs, model_state, taps)`. `taps[name]` is `(input, pre-activation)` of a dense or convolution
        layer whose parameters lie under the path `name` ("/" between levels) as `kernel` and `bias`;
        `perturb[name]` is added to that pre-activation, so its gradient is the layer's cotangent. A layer with
        taps is used once in a pass; one that is shared or tied has none. A block of layers may have a tap of its own,
        `(input, output)`, and no kernel.
      units: the wiring of hidden units, one tuple of `(path, axis, role)` per group of units, `path` a tuple of
        keys into `params`, `role` "out" where the axis makes the units and "in" where it reads them. An axis that
        is k times as long as its group is k blocks of it (a flattened feature map, channels last).
      draw_function: of a model with frozen weights, `(key, x) -> weights`: those that it uses where none are
        bound. Its other functions then take them as a keyword, `weights`. None where nothing is frozen.
      inner_function: of a model that wraps another: `(params) -> params` of that one. None returns `params`.
      decoder: the decoder that it wraps, for components that also use it in another form; None without one.
      takes_weights: whether `init_function` takes bound weights as a keyword, `weights`. If not, they become params.
      weights: what is bound, a pytree of arrays or None: the only field that is data, an argument of programs.
    """

    init_function: Callable[..., tuple[PyTree, PyTree]]
    apply_function: Callable[..., tuple[PyTree, PyTree, Taps]]
    units: Units = ()
    draw_function: Callable[[Key, PyTree], PyTree] | None = None
    inner_function: Callable[..., PyTree] | None = None
    decoder: Any = None
    takes_weights: bool = False
    weights: PyTree = None

    @property
    def frozen(self) -> bool:
        """Whether it keeps frozen weights, which nothing trains."""
        return self.draw_function is not None

    def bind(self, weights: PyTree) -> Model:
        """The same model, starting from these weights: they are copied into params or, where frozen, read in every
        pass. None unbinds."""
        return dataclasses.replace(self, weights=weights)

    def init(self, key: Key, x: PyTree) -> tuple[PyTree, PyTree]:
        """`(params, model_state)` for inputs like x; from the bound weights, or drawn.

        Raises:
          ValueError: bound weights of other names or shapes than the model's.
        """
        weights = self.draw_function(key, x) if self.weights is None and self.draw_function else self.weights
        if weights is None:
            return self.init_function(key, x)
        if self.takes_weights:
            return self.init_function(key, x, weights=weights)
        params, model_state = self.init_function(key, x)
        check_weights("bind", weights, params)
        return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), weights), model_state

    def apply(self, params: PyTree, model_state: PyTree, x: PyTree, **options: Any) -> tuple[PyTree, PyTree, Taps]:
        """See `apply_function`.

        Raises:
          ValueError: the model keeps weights frozen, and none are bound.
        """
        return self.apply_function(params, model_state, x, **options, **self._frozen_weights())

    def inner_params(self, params: PyTree) -> PyTree:
        """The parameters of the model that it wraps; of a decoder with adapters, those of the decoder."""
        return params if self.inner_function is None else self.inner_function(params, **self._frozen_weights())

    def _frozen_weights(self) -> dict[str, PyTree]:
        if not self.frozen:
            return {}
        if self.weights is None:
            raise ValueError(
                "the model keeps weights frozen, but none are bound: model.bind(weights), or learner.bind(weights)"
            )
        return {"weights": self.weights}
