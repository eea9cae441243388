"""When two functions are the same: made at one place in the code, over equal values."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping
from types import CodeType, FunctionType
from typing import Any

import numpy as np

__all__ = ["alike", "identity"]


def identity(value: Any) -> Any:
    """A hashable stand-in for a value: equal for two functions of the same code over equal closures, defaults and
    globals.

    Of globals, a function of the same module is compared by its own code, as a notebook defines its functions again;
    what a module, a class or another module's function holds is not looked into. Arrays of JAX, and other objects that
    cannot be hashed, are equal only to themselves.

    Example:
      >>> def adder(n):
      ...     return lambda x: x + n
      >>> identity(adder(1)) == identity(adder(1)), identity(adder(1)) == identity(adder(2))
      (True, False)
    """
    return _identity(value, {}, frozenset())


def _identity(value: Any, functions: dict[int, int], inside: frozenset[int]) -> Any:
    """`functions` has the places of those that were looked into, each once; `inside` are the containers above."""

    def each(values: Iterable[Any]) -> tuple[Any, ...]:
        return tuple(_identity(one, functions, inside) for one in values)

    if isinstance(value, FunctionType):
        if id(value) in functions:
            return "seen", functions[id(value)]
        functions[id(value)], module = len(functions), value.__globals__
        cells = each(cell.cell_contents for cell in value.__closure__ or ())
        defaults = each(value.__defaults__ or ()), each((value.__kwdefaults__ or {}).items())
        # Another module's function is itself: to look into all that it calls would be to read a whole library.
        read = {name: module[name] for name in _names(value.__code__) if name in module}
        others = {name: one for name, one in read.items() if getattr(one, "__globals__", module) is not module}
        own = each((name, one) for name, one in read.items() if name not in others)
        return value.__code__, value.__module__, cells, defaults, own, tuple(others.items())
    if id(value) in inside:
        return "itself"
    inside = inside | {id(value)}
    if isinstance(value, functools.partial):
        return functools.partial, each((value.func,)), each(value.args), each(value.keywords.items())
    if isinstance(value, np.ndarray):
        return np.ndarray, value.dtype.str, value.shape, hashlib.sha256(value.tobytes()).digest()
    if isinstance(value, (tuple, list)):
        return type(value), each(value)
    if isinstance(value, Mapping):
        return type(value), each(value.items())
    try:
        hash(value)
    except TypeError:
        return type(value), id(value)
    return type(value), value


@functools.cache
def _names(code: CodeType) -> tuple[str, ...]:
    """The names that a function, or one inside of it, looks up."""
    inner = (_names(one) for one in code.co_consts if isinstance(one, CodeType))
    return tuple(sorted({*code.co_names, *itertools.chain(*inner)}))


@dataclasses.dataclass(frozen=True, eq=False)
class _Alike:
    """A function that is equal to others with the same `identity`, as it was when made: what a module defines may be
    defined anew."""

    function: Callable[..., Any]
    identity: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    @property
    def reads_ignored(self) -> bool:
        """See `losses.reads_ignored`."""
        return getattr(self.function, "reads_ignored", False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Alike) and self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity)


def alike(function: Callable[..., Any] | None) -> Any:
    """The function, equal to every other that has its `identity`, so that it can be part of the key of a cached
    program."""
    if function is None or isinstance(function, _Alike):
        return function
    # A mark changes what a program does.
    return _Alike(function, (identity(function), getattr(function, "reads_ignored", False)))
