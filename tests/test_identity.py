"""Functions that are made alike are the same key of a program; those that are not, are not."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from cl_zoo.identity import alike, identity


def made(held: Any) -> Any:
    return lambda x: (x, held)


def with_defaults(low: int, high: int) -> Any:
    def function(x: int, low: int = low, *, high: int = high) -> int:
        return min(max(x, low), high)

    return function


def inside(n: int) -> Any:
    def inner(x: int) -> int:
        return x + n

    def outer(x: int) -> int:
        return inner(x) if x > 0 else outer(-x)

    return outer


ARRAY = np.arange(6.0)
ALIKE_OR_NOT = {
    "number": (made(1), made(1), made(2)),
    "nothing": (made(None), made(None), made(0)),
    "array": (made(ARRAY), made(ARRAY.copy()), made(ARRAY + 1)),
    "shape": (made(ARRAY), made(ARRAY.copy()), made(ARRAY.reshape(2, 3))),
    "dtype": (made(ARRAY), made(ARRAY.copy()), made(ARRAY.astype(np.float32))),
    "tuple": (made((1, [2, ARRAY])), made((1, [2, ARRAY.copy()])), made((1, [2, -ARRAY]))),
    "kind": (made((1, 2)), made((1, 2)), made([1, 2])),
    "dict": (made({"a": ARRAY}), made({"a": ARRAY.copy()}), made({"b": ARRAY})),
    "function": (made(made(1)), made(made(1)), made(made(2))),
    "default": (with_defaults(0, 5), with_defaults(0, 5), with_defaults(1, 5)),
    "keyword": (with_defaults(0, 5), with_defaults(0, 5), with_defaults(0, 6)),
    "recursive": (inside(1), inside(1), inside(2)),
    "partial": (functools.partial(made, 1), functools.partial(made, 1), functools.partial(made, 2)),
    "words": (functools.partial(made, held=1), functools.partial(made, held=1), functools.partial(made, held=2)),
    "place": (made(1), made(1), lambda x: (x, 1)),
}


@pytest.mark.parametrize("name", ALIKE_OR_NOT)
def test_alike_or_not(name: str) -> None:
    one, same, other = ALIKE_OR_NOT[name]
    assert identity(one) == identity(same) and hash(identity(one)) == hash(identity(same))
    assert identity(one) != identity(other)
    assert alike(one) == alike(same) and hash(alike(one)) == hash(alike(same))
    assert alike(one) != alike(other) and alike(one) != one


def test_a_helper_that_is_defined_again_is_another() -> None:
    """As in a notebook, where a cell is run again: what was made before keeps what it was."""
    cell: dict[str, Any] = {"__name__": "__main__", "scale": 1}
    exec("def inner(x): return 2 * x\ndef helper(x): return inner(x)\ndef measure(x): return helper(x)", cell)
    before = alike(cell["measure"])
    assert before == alike(cell["measure"])
    exec("def inner(x): return 3 * x", cell)
    assert before != alike(cell["measure"])
    exec("def inner(x): return 2 * x", cell)
    assert before == alike(cell["measure"])
    exec("def measure(x): return scale * helper(x)", cell)
    one = alike(cell["measure"])
    exec("scale = 2", cell)
    assert one != alike(cell["measure"])


def test_what_cannot_be_compared_is_itself_alone() -> None:
    held = jnp.ones(3)
    assert identity(made(held)) == identity(made(held))
    assert identity(made(held)) != identity(made(jnp.ones(3)))
    mine: set[int] = set()
    assert identity(made(mine)) == identity(made(mine)) and identity(made(mine)) != identity(made(set()))


def test_it_is_still_the_function() -> None:
    function = alike(with_defaults(0, 5))
    assert function(7) == 5 and function(7, high=9) == 7
    assert alike(function) is function and alike(None) is None
