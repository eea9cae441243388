"""Refusals of careless values: one line that names the field, what it is, and what is allowed."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

__all__ = ["check_choice", "check_range", "check_whole"]


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
