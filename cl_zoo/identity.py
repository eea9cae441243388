"""When two functions are the same: made at one place in the code, over equal values."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import numpy as np

__all__ = ["alike", "identity"]


def identity(value: Any, inside: frozenset[int] = frozenset()) -> Any:
    """A hashable stand-in for a value: equal for two functions of the same code over equal closures and defaults.

    What a function finds in its module's globals belongs to its code. Arrays of JAX, and other objects that cannot be
    hashed, are equal only to themselves.

    Example:
      >>> def adder(n):
      ...     return lambda x: x + n
      >>> identity(adder(1)) == identity(adder(1)), identity(adder(1)) == identity(adder(2))
      (True, False)
    """
    if id(value) in inside:
        return "itself"  # a function that calls itself
    inside = inside | {id(value)}

    def each(values: Any) -> tuple[Any, ...]:
        return tuple(identity(one, inside) for one in values)

    if isinstance(value, FunctionType):
        cells = each(cell.cell_contents for cell in value.__closure__ or ())
        defaults = each(value.__defaults__ or ()), each((value.__kwdefaults__ or {}).items())
        return value.__code__, value.__module__, cells, defaults
    if isinstance(value, functools.partial):
        return functools.partial, identity(value.func, inside), each(value.args), each(value.keywords.items())
    if isinstance(value, np.ndarray):
        return np.ndarray, value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, (tuple, list)):
        return type(value), each(value)
    if isinstance(value, Mapping):
        return type(value), each(value.items())
    try:
        hash(value)
    except TypeError:
        return type(value), id(value)
    return type(value), value


@dataclasses.dataclass(frozen=True, eq=False)
class _Alike:
    """A function that is equal to others with the same `identity`."""

    function: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Alike) and identity(self.function) == identity(other.function)

    def __hash__(self) -> int:
        return hash(identity(self.function))


def alike(function: Callable[..., Any] | None) -> Any:
    """The function, equal to every other that has its `identity`, so that it can be part of the key of a cached
    program."""
    return function if function is None or isinstance(function, _Alike) else _Alike(function)
