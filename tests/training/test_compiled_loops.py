"""How programs are compiled on a CPU, and that no loop copies what it carries."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from cl_zoo import compilation, replay
from cl_zoo.compilation import compiler_options, jit
from cl_zoo.training.loop import histories, start, train_steps
from cl_zoo.wrappers import episodic
from tests.compiled import copies
from tests.contract.cases import SUBJECTS, case
from tests.tiny import entry_components, tiny_learner, tiny_stream

SOME = ("supervised", "ewc", "replay", "der")
EXCEPTIONS = {
    "synaptic_intelligence": "w - g (new - old) reads the parameters before the step and after it",
    "la_maml": "the look-ahead begins from a copy of the parameters, and keeps those of each step",
    "c_maml": "as la_maml",
    "continual_backprop": "one kernel, before the loop that resets units; XLA's",
    "redo": "as continual_backprop",
    "together": "as continual_backprop",
}
"""Entries whose update copies leaves of the state, and why; no memory is among these leaves."""


def loop_text(name: str, images: Any, compiled: Callable[..., Any] = jit) -> tuple[str, set[str]]:
    """Three updates of an entry with large kernels and a large memory, as compiled outside of the tests (which compile
    loops otherwise to save time); and the large leaves of its state, as the program writes them."""
    entry, (made, wrap) = SUBJECTS[name], case(name)
    stream = tiny_stream(images, entry.scenarios[0])

    def net(shape: Any, outputs: int, hidden: Any, **options: Any) -> Any:
        return made(shape, outputs, hidden=WIDTHS.get(name, (96, 64)), **options)

    larger = {"capacity": 20_000} if "capacity" in entry.arguments else {}
    learner = tiny_learner(
        stream, *entry_components(entry, **larger), wrap=lambda model: episodic(wrap(model)), net=net
    )
    _, carry = jax.eval_shape(start, learner, stream, jax.random.key(0))

    def train(learner: Any, stream: Any, carry: Any) -> Any:
        strides, kept = histories(learner, stream, carry, 3)
        return train_steps(learner, stream, carry, 0, 3, strides, kept)

    own = "--xla_cpu_use_fusion_emitters=false" in os.environ["XLA_FLAGS"]
    options = {"xla_cpu_use_fusion_emitters": True} if own else None
    text = compiled(train).lower(learner, stream, carry).compile(options).as_text()
    short = {"float32": "f32", "int32": "s32", "uint8": "u8", "uint32": "u32", "bool": "pred", "bfloat16": "bf16"}
    large = {
        f"{short[str(leaf.dtype)]}[{','.join(map(str, leaf.shape))}]"
        for leaf in jax.tree.leaves(carry[0])
        if str(leaf.dtype) in short and leaf.size >= LARGE
    }
    return text, large


WIDTHS: dict[str, Any] = {"ttt": (5,)}  # its head for rotations reads five numbers
LARGE = 1000


def copied(text: str, large: set[str]) -> set[str]:
    """Which leaves of the state are copied inside of loops."""
    return large & {line.split("= ")[1].split("{")[0] for line in copies(text, size=LARGE)}


@pytest.mark.parametrize(
    "name", [name if name in SOME else pytest.param(name, marks=pytest.mark.long) for name in SUBJECTS]
)
def test_loops_copy_neither_memory_nor_parameters(tiny_images: Any, name: str) -> None:
    text, large = loop_text(name, tiny_images)
    found = copied(text, large)
    if name in EXCEPTIONS:
        assert all("20000" not in leaf for leaf in found)
    else:
        assert found == set()


@pytest.mark.parametrize("name", ["replay", "der"])
def test_the_law_finds_what_plain_jit_copies(tiny_images: Any, name: str) -> None:
    assert "u8[20000,4,4]" in copied(*loop_text(name, tiny_images, jax.jit))


@pytest.mark.long
def test_the_law_finds_a_component_that_keeps_its_old_memory(tiny_images: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads the memory as it was, at a place that the memory as it is now tells."""

    def factory(**arguments: Any) -> Any:
        made = replay(**arguments)

        def observe(context: Any, state: Any, part: Any, record: Any, key: Any) -> Any:
            state, new = made.observe(context, state, part, record, key)
            late = part.rows[0][jnp.sum(new.rows[0][:2], dtype=jnp.int32)]
            return state, new._replace(seen=new.seen + jnp.min(late) // 255)

        return made._replace(observe=observe)

    monkeypatch.setitem(SUBJECTS, "replay", dataclasses.replace(SUBJECTS["replay"], factory=factory))
    assert "u8[20000,4,4]" in copied(*loop_text("replay", tiny_images))


def test_options_leave_flags_alone_and_leave_out_what_is_not_known(monkeypatch) -> None:
    options = compiler_options()
    assert options["xla_cpu_copy_insertion_use_region_analysis"] is True
    # Tests set their own level.
    assert "xla_backend_optimization_level" not in options
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_copy_insertion_use_region_analysis=false")
    assert set(compiler_options()) == set(compilation._CPU_OPTIONS) - {"xla_cpu_copy_insertion_use_region_analysis"}
    monkeypatch.setattr(compilation, "_CPU_OPTIONS", {"xla_no_such_option": 1})
    monkeypatch.setenv("XLA_FLAGS", "")
    compilation._known_options.cache_clear()
    assert compiler_options() is None
    compilation._known_options.cache_clear()


def test_jit_inside_of_other_programs() -> None:
    double = jit(lambda x: 2 * x, donate_argnums=())
    assert float(jax.jit(lambda x: double(x) + 1)(1.0)) == 3
    assert jax.vmap(double)(jnp.arange(3)).tolist() == [0, 2, 4]
    assert float(jax.grad(lambda x: double(x) ** 2)(1.0)) == 8
    # What is traced may come from outside of its arguments.
    assert float(jax.jit(lambda x: jit(lambda y: x + y)(1.0))(2.0)) == 3
    assert jax.eval_shape(lambda: double(1.0)).shape == ()


def test_importing_starts_no_device() -> None:
    code = "import cl_zoo, jax; assert not jax._src.xla_bridge._backends"
    subprocess.run([sys.executable, "-c", code], check=True)
