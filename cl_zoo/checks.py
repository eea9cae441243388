"""Refusals of invalid values: one line that names the field, its value, and what is allowed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["check_choice", "check_range", "check_weights", "check_whole"]


def check_range(owner: str, field: str, value: Any, low: float, high: float = float("inf")) -> None:
    """Refuses a concrete number outside `[low, high]`; a tracer (a value of a sweep) passes."""
    if isinstance(value, jax.core.Tracer):
        return
    for number in np.ravel(np.asarray(value)):
        if not low <= float(number) <= high:
            allowed = f"at least {low:g}" if high == float("inf") else f"in [{low:g}, {high:g}]"
            raise ValueError(f"{owner}: {field} is {float(number):g}, but it must be {allowed}")


def check_whole(owner: str, field: str, value: Any, low: int, high: float = float("inf")) -> None:
    """Refuses what is not a whole number in `[low, high]`: sizes and counts set shapes."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise ValueError(f"{owner}: {field} is {value!r}, but it must be a whole number")
    check_range(owner, field, value, low, high)


def check_choice(owner: str, field: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Refuses a value that is not one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{owner}: {field} is {value!r}, but it must be one of {', '.join(map(repr, allowed))}")


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
