"""Refusals of invalid values: one line that names the field, its value, and what is allowed."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import optax

__all__ = [
    "Count",
    "Fraction",
    "NonNegative",
    "Positive",
    "Whole",
    "check_choice",
    "check_classes",
    "check_key",
    "check_kind",
    "check_range",
    "check_softmax",
    "check_weights",
    "check_whole",
    "checked",
]


LARGEST = 2**31 - 1
"""The largest whole number that is allowed: what is counted is counted in int32."""

F = TypeVar("F", bound=Callable[..., Any])


class Range(NamedTuple):
    """Numbers from `low` to `high`, both allowed, or above `low`."""

    low: float = float("-inf")
    high: float = float("inf")
    above: bool = False


Count = Annotated[int, Range(1)]
Whole = Annotated[int, Range(0)]
NonNegative = Annotated[jax.Array | float, Range(0)]
Positive = Annotated[jax.Array | float, Range(0, above=True)]
Fraction = Annotated[jax.Array | float, Range(0, 1)]
"""Kinds of arguments, as annotations: `checked` refuses what lies outside."""


def checked(function: F) -> F:
    """The function, refusing arguments that are not what its annotations say, before anything else happens.

    What an annotation means: `int`, a whole number up to `LARGEST`; `float`, a finite real number, and with `Array |`
    a tracer or an array of them; `Annotated[..., Range]`, one in a range, unless it is a tracer; `bool`, true or false;
    `str`, a word; `Literal`, one of these; `Callable`, what can be called; a class, its instances; `Sequence[...]`, a
    list, tuple or array, not a word. Ranges that depend on other arguments are checked by the function itself.
    """
    signature = inspect.signature(function)
    named = isinstance(getattr(signature.parameters.get("name"), "default", None), str)  # a component's own name

    @functools.cache  # annotations are looked up at the first call: modules may import each other
    def hints() -> dict[str, Any]:
        return get_type_hints(function, include_extras=True)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise TypeError(f"{function.__name__}: {error}") from None
        owner = given.get("name", "") if named and isinstance(given.get("name", ""), str) else ""
        owner = owner or function.__name__
        for field, value in given.items():
            if field == "key" and value is not None:
                check_key(owner, field, value)
            elif field in hints() and signature.parameters[field].kind not in (_VARIADIC, _KEYWORDS):
                check_kind(owner, field, value, hints()[field])
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


_VARIADIC, _KEYWORDS = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD


def check_kind(owner: str, field: str, value: Any, hint: Any) -> None:
    """Refuses a value that is not of the kind that an annotation says."""
    if not _fits(value, hint):
        told = " ".join(repr(value).split())
        told = told if len(told) < 60 else f"a {type(value).__name__}"
        raise ValueError(f"{owner}: {field} is {told}, but it must be {_told(hint)}")
    _check_ranges(owner, field, value, hint)


def _check_ranges(owner: str, field: str, value: Any, hint: Any) -> None:
    """Refuses numbers outside of the ranges of an annotation, which they fit otherwise."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        allowed = hint.__metadata__[0]
        check_range(owner, field, value, allowed.low, allowed.high, above=allowed.above)
    elif origin in (Union, UnionType):
        _check_ranges(owner, field, value, next(one for one in inner if _fits(value, one)))
    elif origin in (Sequence, list, tuple) and inner and get_origin(inner[0]) is Annotated:
        for one in value:
            _check_ranges(owner, f"each of {field}", one, inner[0])


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin is Annotated:
        return _fits(value, hint.__origin__)
    if origin is Literal:
        return _is_one_of(value, get_args(hint))
    if hint is Any or isinstance(hint, TypeVar):
        return True
    if hint is None or hint is type(None):
        return value is None
    if origin in (Union, UnionType):
        kinds = set(get_args(hint))
        if jax.Array in kinds and kinds & {int, float}:  # a number, which may be traced
            kinds = kinds - {int, jax.Array} | {float}
        return any(_fits(value, one) for one in kinds)
    if hint is bool:
        return isinstance(value, (bool, np.bool_))
    if hint is int:
        return _is_whole(value) and abs(int(value)) <= LARGEST
    if hint is float:
        return _is_real(value) and np.ndim(value) == 0
    if hint is jax.Array:
        return isinstance(value, (jax.Array, np.ndarray, np.number, int, float)) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str) and value != ""
    if origin is Callable or hint is Callable:
        return callable(value)
    if origin in (Sequence, list, tuple):
        if not isinstance(value, (list, tuple, range, np.ndarray, jax.Array)):
            return False
        inner = [one for one in get_args(hint) if one is not ...]
        if origin is tuple and len(inner) > 1:
            return len(value) == len(inner) and all(map(_fits, value, inner))
        return all(_fits(one, inner[0]) for one in value) if inner else True
    if origin is Mapping:
        return isinstance(value, Mapping)
    if hint is optax.GradientTransformation:
        return callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))
    kind = origin or hint
    return isinstance(value, kind) if isinstance(kind, type) else True


def _is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    plain = value.item() if isinstance(value, np.generic) else value
    return any(type(one) is type(plain) and one == plain for one in allowed)  # True is not 1


def _is_whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    """A finite real number, or an array or a tracer of them."""
    if isinstance(value, (bool, np.bool_, str, bytes)) or value is None:
        return False
    if isinstance(value, int):
        return abs(value) < 2**1000
    if isinstance(value, (float, np.number, np.ndarray, jax.Array)):
        dtype = jnp.result_type(value)
        if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
            return False
        return isinstance(value, jax.core.Tracer) or bool(np.isfinite(np.asarray(value, np.float64)).all())
    return False


def _told(hint: Any) -> str:
    """What an annotation means, in words."""
    words: dict[Any, str] = {
        None: "None",
        type(None): "None",
        bool: "True or False",
        int: f"a whole number up to {LARGEST}",
        float: "a finite number",
        jax.Array: "an array",
        str: "a word",
        optax.GradientTransformation: "an optax optimiser, as optax.adam(1e-3)",
    }
    origin = get_origin(hint)
    if origin is Annotated:
        return _told(hint.__origin__)
    if origin is Literal:
        return f"one of {', '.join(map(repr, get_args(hint)))}"
    if origin in (Union, UnionType):
        kinds = [one for one in get_args(hint) if one is not jax.Array or float not in get_args(hint)]
        return " or ".join(dict.fromkeys(map(_told, kinds)))
    if origin is Callable or hint is Callable:
        return "a function"
    if origin in (Sequence, list, tuple):
        inner = [_told(one) for one in get_args(hint) if one is not ...]
        many = f"{len(inner)} values" if origin is tuple and len(inner) > 1 else "a sequence"
        return f"{many}, each {' and '.join(dict.fromkeys(inner))}" if inner else many
    return words.get(hint) or f"a {getattr(origin or hint, '__name__', hint)}"


def check_key(owner: str, field: str, key: Any, axes: int = 0) -> None:
    """Refuses what is not a key of `jax.random`, or with `axes`, an array of keys."""
    dtype, shape = getattr(key, "dtype", None), np.shape(key)
    typed = dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)
    if not typed and (dtype != np.uint32 or shape[-1:] != (2,)):
        of = "jax.random.key(0)" if axes == 0 else "jax.random.split(jax.random.key(0), n)"
        raise ValueError(f"{owner}: {field} is {type(key).__name__}, but it must be as {of} gives")
    found = len(shape) - (not typed)
    if found != axes:
        wanted = "one key, of shape ()" if axes == 0 else "an array of keys, as jax.random.split(key, n) gives"
        raise ValueError(f"{owner}: {field} has the shape {shape}, but it must be {wanted}")


def check_range(
    owner: str, field: str, value: Any, low: float, high: float = float("inf"), *, above: bool = False
) -> None:
    """Refuses a concrete number outside `[low, high]`, or not above `low`; a tracer (a value of a sweep) passes."""
    if isinstance(value, jax.core.Tracer):
        return
    if not _is_real(value) and not (isinstance(value, (list, tuple)) and all(map(_is_real, value))):
        raise ValueError(f"{owner}: {field} is {value!r}, but it must be a finite number")
    for number in np.ravel(np.asarray(value)):
        if not low <= float(number) <= high or (above and float(number) == low):
            least = f"above {low:g}" if above else f"at least {low:g}"
            allowed = least if high == float("inf") else f"in [{low:g}, {high:g}]"
            raise ValueError(f"{owner}: {field} is {float(number):g}, but it must be {allowed}")


def check_whole(owner: str, field: str, value: Any, low: int, high: float = LARGEST) -> None:
    """Refuses what is not a whole number in `[low, high]`: sizes and counts set shapes."""
    if not _is_whole(value):
        raise ValueError(f"{owner}: {field} is {value!r}, but it must be a whole number")
    if not low <= value <= high:
        allowed = f"at least {low}" if value < low and high == LARGEST else f"in [{low}, {high}]"
        raise ValueError(f"{owner}: {field} is {value}, but it must be {allowed}")


def check_choice(owner: str, field: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Refuses a value that is not one of `allowed`."""
    if not _is_one_of(value, allowed):
        raise ValueError(f"{owner}: {field} is {value!r}, but it must be one of {', '.join(map(repr, allowed))}")


def check_classes(owner: str, y: Any, why: str) -> None:
    """Refuses targets that are not one class for each example, `i32[B]`."""
    if y is None:
        raise ValueError(f"{owner}: the batch has no labels (y is None), but {why}")
    if not hasattr(y, "shape") or len(y.shape) != 1 or not jnp.issubdtype(y.dtype, jnp.integer):
        told = f"{y.dtype}{list(y.shape)}" if hasattr(y, "shape") else f"a {type(y).__name__}"
        raise ValueError(f"{owner}: y is {told}, but {why}: it must be one whole number for each example, [B]")


def check_softmax(owner: str, y: Any, outputs: Any, why: str) -> None:
    """Refuses targets that are not one class for each row of the outputs `[..., C]`, where their softmax is taken."""
    for leaf in jax.tree.leaves(y):
        if jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.ndim >= outputs.ndim:
            raise ValueError(f"{owner}: y is {leaf.dtype}{list(leaf.shape)}, but {why}")


def check_weights(owner: str, weights: Any, wanted: Any) -> None:
    """Refuses weights whose names or shapes are not the wanted ones, or that are not floating point numbers."""

    def named(tree: Any) -> dict[str, Any]:
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
        return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}

    given, own = named(weights), named(wanted)
    for name, leaf in own.items():
        if name not in given:
            raise ValueError(f"{owner}: the weights have no {name!r}, but the model does; they have {_few(given)}")
        if np.shape(given[name]) != leaf.shape:
            raise ValueError(
                f"{owner}: the weights' {name!r} has the shape {np.shape(given[name])}, but it must be {leaf.shape}"
            )
        if not jnp.issubdtype(given[name].dtype, jnp.floating):
            raise ValueError(f"{owner}: the weights' {name!r} is {given[name].dtype}, but it must be floating point")
    if unknown := [name for name in given if name not in own]:
        raise ValueError(f"{owner}: the weights have {_few(unknown)}, for which the model has no place")


def _few(names: Any) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:3])) + (" and others" if len(names) > 3 else "")
