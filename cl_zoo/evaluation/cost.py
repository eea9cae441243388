"""What a learner costs: operations per update, bytes of state, seconds to compile and to run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from cl_zoo._learner import Learner
from cl_zoo.compilation import jit, tree_bytes
from cl_zoo.types import Batch, TrainState

__all__ = ["Timing", "state_bytes", "timed", "update_flops"]


class Timing(NamedTuple):
    """Attributes:
    result: of the last call.
    compile_seconds: tracing, lowering and compiling.
    run_seconds: of each call of the compiled program.
    """

    result: Any
    compile_seconds: float
    run_seconds: list[float]


def timed(function: Callable[..., Any], *arguments: Any, repeats: int = 1) -> Timing:
    """Compiles a jitted function, then calls it: the two are timed separately."""
    begun = time.perf_counter()
    compiled = function.lower(*arguments).compile()  # type: ignore[attr-defined]
    compile_seconds = time.perf_counter() - begun
    seconds, result = [], None
    for _ in range(repeats):
        begun = time.perf_counter()
        result = jax.block_until_ready(compiled(*arguments))
        seconds.append(time.perf_counter() - begun)
    return Timing(result, compile_seconds, seconds)


def update_flops(learner: Learner, state: TrainState, batch: Batch) -> float:
    """Floating-point operations of one update by XLA's cost analysis (a multiply-add is two)."""
    analysis = jit(learner.update).lower(state, batch).compile().cost_analysis()
    return float((analysis or {}).get("flops", float("nan")))


def state_bytes(state: TrainState) -> dict[str, int]:
    """Bytes of each part of a `TrainState`: "params", "opt_state", ... and each component under its name."""
    trees = {"params": state.params, "model_state": state.model_state, "opt_state": state.opt_state, **state.parts}
    return {name: tree_bytes(tree) for name, tree in trees.items()}
