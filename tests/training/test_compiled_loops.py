"""How programs are compiled on a CPU, and that no loop copies what it carries."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest

from cl_zoo import compilation, compose, der, ewc, replay, supervised
from cl_zoo.compilation import compiler_options, jit
from cl_zoo.models import mlp
from cl_zoo.training.loop import histories, start, train_steps
from tests.compiled import copies
from tests.tiny import tiny_stream

COMPONENTS = {
    "supervised": list,
    "ewc": lambda: [ewc(1.0)],
    "replay": lambda: [replay(500)],
    "der": lambda: [der(500, alpha=0.5)],
}


@pytest.mark.parametrize("name", COMPONENTS)
def test_loops_copy_neither_memory_nor_parameters(tiny_images, name: str) -> None:
    stream = tiny_stream(tiny_images, "class")
    model = mlp((4, 4), 6, hidden=(96, 64))
    learner = compose(model, optax.adam(1e-2), supervised(), *COMPONENTS[name](), tasks=stream.tasks)
    _, carry = jax.eval_shape(start, learner, stream, jax.random.key(0))

    def train(learner, stream, carry):
        strides, kept = histories(learner, stream, carry, 3)
        return train_steps(learner, stream, carry, 0, 3, strides, kept)

    def text(compiled) -> str:
        """As outside of the tests, which compile loops otherwise to save time."""
        own = "--xla_cpu_use_fusion_emitters=false" in os.environ["XLA_FLAGS"]
        options = {"xla_cpu_use_fusion_emitters": True} if own else None
        return compiled(train).lower(learner, stream, carry).compile(options).as_text()

    assert copies(text(jit), size=16 * 96) == []
    if name in ("replay", "der"):
        assert copies(text(jax.jit), size=500 * 16), "the test finds nothing where there is something"


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
