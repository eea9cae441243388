"""What a run costs, told before it compiles, against what the compiler says of the program."""

from __future__ import annotations

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from cl_zoo import accuracy, at, compose, ewc, replay, run_stream, supervised
from cl_zoo.compilation import DoesNotFitError, device_bytes, told_bytes, tree_bytes
from cl_zoo.evaluation.operations import operations
from cl_zoo.models import mlp
from cl_zoo.training import cost, loop, stream_program
from tests.contract.cases import SUBJECTS
from tests.tiny import entry_learner, tiny_learner, tiny_stream

KEY = jax.random.key(0)
SOME = ("ewc", "der", "maml", "sdft")
IDLE = ("gdumb",)
"""Updates that train nothing: how much of a step on a gradient of zero is left depends on the compiler's flags."""


def compiled(function: Any, *arguments: Any) -> float:
    analysis = jax.jit(function).lower(*arguments).compile().cost_analysis()
    return float(analysis["flops"])


@pytest.mark.parametrize(
    "name", [name if name in SOME else pytest.param(name, marks=pytest.mark.long) for name in SUBJECTS]
)
def test_told_is_what_is_compiled(tiny_images: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Operations of an update, its loops written out for the compiler; bytes of what goes in and comes out."""
    entry = SUBJECTS[name]
    stream = tiny_stream(tiny_images, entry.scenarios[0])
    learner = entry_learner(stream, entry)
    found = cost(learner, stream)

    program = stream_program(learner, stream).lower(learner, stream, KEY)
    memory = program.compile().memory_analysis()
    given = found.bytes["data"] + KEY.size * 8
    assert abs(memory.argument_size_in_bytes - given) <= 0.2 * given
    result = jax.eval_shape(lambda: run_stream(learner, stream, KEY))
    kept = sum(
        found.bytes[part] for part in ("params", "model_state", "opt_state", "metrics", "measures", *result.state.parts)
    )
    assert abs(memory.output_size_in_bytes - kept) <= 0.2 * kept

    scan = jax.lax.scan
    monkeypatch.setattr(jax.lax, "scan", functools.partial(scan, unroll=True))
    carry = jax.eval_shape(lambda: loop.start(learner, stream, KEY)[1])
    written_out = compiled(lambda a, s, c: loop.update(a, s, c), learner, stream, carry)
    assert abs(found.operations["update"] - written_out) <= (0.2 if name not in IDLE else 1) * written_out


def test_operations_of_loops_and_branches() -> None:
    a = jnp.ones((4, 4))
    product = 2 * 4**3
    assert operations(lambda a: a @ a, a) == product
    counted = operations(lambda a: jax.lax.fori_loop(0, 7, lambda i, a: a @ a, a), a)
    assert 0 <= counted - 7 * product < 10  # XLA also counts the step of the loop's index

    def nested(a: Any) -> Any:
        inner = lambda a, _: (a @ a, None)  # noqa: E731
        return jax.lax.scan(lambda a, _: (jax.lax.scan(inner, a, length=3)[0], None), a, length=5)[0]

    assert 0 <= operations(nested, a) - 15 * product < 10
    unknown = lambda a: jax.lax.while_loop(lambda a: jnp.sum(a) < 9, lambda a: a @ a, a)  # noqa: E731
    assert product <= operations(unknown, a) < 2 * product


def test_the_run_is_the_sum_of_its_parts(tiny_images: Any) -> None:
    stream = tiny_stream(tiny_images, "class")
    learner = tiny_learner(stream, supervised(), replay(20, batch_size=8), ewc(1.0))
    measure = {"R": accuracy(), "curve": at(2, accuracy(batches=1))}
    found = cost(learner, stream, measure=measure, metrics=("loss",))
    each = found.operations
    wanted = 3 * 6 * each["update"] + 3 * (each["begin_task"] + each["end_task"]) + 4 * each["R"] + 9 * each["curve"]
    assert found.run == pytest.approx(wanted)
    assert found.bytes["metrics"] == 3 * 6 * 4
    assert found.bytes["measures"] == (4 * 3 + 9 * 3) * 4
    result = run_stream(learner, stream, KEY, measure=measure, metrics=("loss",))
    assert found.bytes["replay"] == tree_bytes(result.state.parts["replay"])
    assert found.grows["replay"] == "examples kept: 20" and found.grows["ewc"] == "parameters: 2 of each"
    assert "replay" in str(found) and "the whole run" in str(found)


def test_a_memory_that_does_not_fit_is_refused_by_name(tiny_images: Any) -> None:
    stream = tiny_stream(tiny_images, "class")
    room = device_bytes()
    assert room is not None and room > 10**8
    for capacity, said in (
        (2 * 10**9, rf"rehearsal: 2000000000 examples in memory take .* GB, but the device has {told_bytes(room)}"),
        (10**12, "rehearsal: capacity is 1000000000000, but it must be a whole number up to 2147483647"),
    ):
        begun = time.perf_counter()
        with pytest.raises(ValueError, match=said):
            component = replay(capacity, batch_size=8, name="rehearsal")
            net = mlp((4, 4), 6, hidden=(4,))
            run_stream(compose(net, optax.sgd(0.1), supervised(), component, tasks=stream.tasks), stream, KEY)
        assert time.perf_counter() - begun < 20
    assert issubclass(DoesNotFitError, ValueError)
