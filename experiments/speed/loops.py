"""Operations alone, in a loop and in a branch: which of them a compiler brings into its fast form only outside.

    python -m experiments.speed.loops            with nothing else running; about 5 minutes

Each operation is jitted alone, as the body of a `scan`, and as a branch of a `cond`, on arrays that come from outside.
Convolutions are here twice, by `lax` and by `cl_zoo.models.convolution`. Then the step of `replay` against the number
of rows in memory, compiled as `run_stream` does and by plain `jax.jit`: no loop is to copy what it reads and writes.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from jax import lax

from cl_zoo import Learner, Stream, compose, replay, supervised
from cl_zoo.compilation import jit
from cl_zoo.models import mlp
from cl_zoo.models.convolution import conv_general_dilated
from cl_zoo.models.pooling import max_pool
from cl_zoo.streams import split_mnist
from cl_zoo.training.loop import start, train_steps
from cl_zoo.training.run_directory import environment, write_json
from experiments.speed.convolutions import seconds

HERE = Path(__file__).parent
ROWS = (1_000, 10_000, 100_000, 500_000)


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    repeats: int = 5
    record: bool = False
    """Write experiments/speed/results/loops_cpu.json."""


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def convolution(convolve: Callable[..., Any], groups: int = 1) -> Callable[..., Any]:
    """3 x 3, of images."""
    numbers = ("NHWC", "HWIO", "NHWC")
    return lambda x, k: convolve(x, k, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups)


def gradient(function: Callable[..., Any], which: int) -> Callable[..., Any]:
    """Of the sum of squares."""
    return jax.grad(lambda *arguments: jnp.sum(jnp.square(function(*arguments))), which)


def operations() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Name -> function and its arguments."""
    square, spd = normal(256, 256), normal(64, 64) @ normal(64, 64).T + 64 * jnp.eye(64)
    image, kernel, depthwise = normal(64, 32, 32, 16), normal(3, 3, 16, 16), normal(3, 3, 1, 16)
    rows, index = normal(100_000, 16), jnp.asarray(np.random.default_rng(0).integers(0, 100_000, 512), jnp.int32)
    heads, key = normal(64, 128, 32), jax.random.key(0)
    found: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "product": (lambda a, b: a @ b, (square, square)),
        "product, left transposed": (lambda a, b: a.T @ b, (square, square)),
        "product, right transposed": (lambda a, b: a @ b.T, (square, square)),
        "product of a batch": (lambda a, b: a @ jnp.swapaxes(b, 1, 2), (heads, heads)),
        "einsum over two axes": (lambda a, b: jnp.einsum("bth,bts->hs", a, b), (heads, heads)),
        "sum over the first axis": (lambda a: jnp.sum(a, 0), (rows,)),
        "sum over the last axis": (lambda a: jnp.sum(a, 1), (rows,)),
        "softmax": (jax.nn.softmax, (rows,)),
        "cumulative sum": (lambda a: jnp.cumsum(a, 0), (rows,)),
        "argmax": (lambda a: jnp.argmax(a, 1), (rows,)),
        "top 8": (lambda a: lax.top_k(a.ravel()[:65_536], 8)[0], (rows,)),
        "sort": (lambda a: jnp.sort(a.ravel()[:65_536]), (rows,)),
        "gather": (lambda a, i: a[i], (rows, index)),
        "scatter": (lambda a, i: jnp.zeros((1000, 16)).at[i % 1000].set(a[:512]), (rows, index)),
        "scatter, added": (lambda a, i: jnp.zeros((1000, 16)).at[i % 1000].add(a[:512]), (rows, index)),
        "transpose": (jnp.transpose, (normal(1024, 1024),)),
        "Cholesky": (jnp.linalg.cholesky, (spd,)),
        "triangular solve": (lambda a: jax.scipy.linalg.solve_triangular(a, a, lower=True), (spd,)),
        "eigenvalues, symmetric": (jnp.linalg.eigvalsh, (spd,)),
        "singular values": (lambda a: jnp.linalg.svd(a, compute_uv=False), (spd,)),
        "normal numbers": (lambda a: jax.random.normal(key, a.shape), (normal(256, 1024),)),
        "categorical draws": (lambda a: jax.random.categorical(key, a), (rows,)),
        "permutation of 20 000": (lambda a: jax.random.permutation(key, 20_000) + a[0, 0], (rows,)),
        "FFT": (lambda a: jnp.abs(jnp.fft.fft(a)), (normal(256, 1024),)),
        "max pooling, windowed": (lambda x: nnx.max_pool(x, (2, 2), (2, 2)), (image,)),
        "max pooling, windowed, gradient": (gradient(lambda x: nnx.max_pool(x, (2, 2), (2, 2)), 0), (image,)),
        "max pooling, reshaped": (max_pool, (image,)),
        "max pooling, reshaped, gradient": (gradient(max_pool, 0), (image,)),
    }
    for by, convolve in (("lax", lax.conv_general_dilated), ("cl_zoo", conv_general_dilated)):
        found |= {
            f"convolution, {by}": (convolution(convolve), (image, kernel)),
            f"convolution's gradient to x, {by}": (gradient(convolution(convolve), 0), (image, kernel)),
            f"convolution's gradient to its kernel, {by}": (gradient(convolution(convolve), 1), (image, kernel)),
            f"four kernels by vmap, {by}": (
                jax.vmap(convolution(convolve)),
                (normal(4, 16, 32, 32, 16), normal(4, 3, 3, 16, 16)),
            ),
            f"depthwise convolution, {by}": (convolution(convolve, 16), (image, depthwise)),
            f"depthwise, gradient to x, {by}": (gradient(convolution(convolve, 16), 0), (image, depthwise)),
            f"depthwise, gradient to its kernel, {by}": (gradient(convolution(convolve, 16), 1), (image, depthwise)),
            f"convolution in 4 groups, {by}": (convolution(convolve, 4), (image, normal(3, 3, 4, 16))),
        }
    return found


def milliseconds(function: Callable[..., Any], arguments: tuple[Any, ...], repeats: int) -> dict[str, float]:
    """Of one call: alone, in a loop, and in a branch."""

    def loop(c: jax.Array, n: int, arguments: tuple[Any, ...]) -> Any:
        """Its result is carried, and its first argument depends on it: nothing can be left out, or out of the loop."""

        def body(carry: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], None]:
            out = function(arguments[0] + carry[0].astype(arguments[0].dtype), *arguments[1:])
            return (0 * jnp.ravel(out)[0].astype(jnp.float32), out), None

        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, *arguments))
        return lax.scan(body, (c, nothing), length=n)[0]

    def branch(flag: jax.Array, arguments: tuple[Any, ...]) -> jax.Array:
        return lax.cond(flag, lambda a: function(*a), lambda a: jnp.zeros_like(function(*a)), arguments)

    alone, looped, branched = jit(lambda a: function(*a)), jit(loop, static_argnums=1), jit(branch)
    zero, true = jnp.zeros(()), jnp.array(True)
    alone(arguments)  # compiles
    n = int(np.clip(0.05 / seconds(lambda: alone(arguments)), 3, 200))
    calls = {
        "alone": lambda: statistics.median(seconds(lambda: alone(arguments)) for _ in range(n)),
        "loop": lambda: seconds(lambda: looped(zero, n, arguments)) / n,
        "branch": lambda: statistics.median(seconds(lambda: branched(true, arguments)) for _ in range(n)),
    }
    for call in calls.values():
        call()
    rounds = [{side: 1e3 * call() for side, call in calls.items()} for _ in range(repeats)]
    return {side: statistics.median(r[side] for r in rounds) for side in calls}


class Continued:
    """Goes on from where the last call ended; the old carry's memory is given to the new one, as in a run."""

    def __init__(self, program: Callable[..., Any], learner: Learner, stream: Stream, carry: Any):
        self.program, self.learner, self.stream, self.carry = program, learner, stream, carry

    def __call__(self) -> Any:
        self.carry = self.program(self.learner, self.stream, self.carry)
        return self.carry


def replay_steps(repeats: int) -> dict[str, dict[str, float]]:
    """Microseconds of a step against rows in memory, with the compiler's options and without."""
    stream = split_mnist(scenario="class", steps=100, batch_size=64)
    found: dict[str, dict[str, float]] = {}
    calls = {}

    def begun(learner: Learner, stream: Stream) -> Any:
        return start(learner, stream, jax.random.key(0))[1]

    def steps(learner: Learner, stream: Stream, carry: Any) -> Any:
        return train_steps(learner, stream, carry, 0, 100, {}, {})[0]

    for rows in ROWS:
        learner = compose(mlp((28, 28), 10, hidden=(64,)), optax.adam(1e-3), supervised(), replay(rows, batch_size=32),
                          tasks=stream.tasks)  # fmt: skip
        carry = jit(begun)(learner, stream)
        for name, compiled in (("as run_stream", jit), ("jax.jit", jax.jit)):
            own = jax.tree.map(jnp.copy, carry)
            calls[name, rows] = Continued(compiled(steps, donate_argnums=2), learner, stream, own)
    for call in calls.values():
        call()

    def once(call: Callable[[], Any]) -> float:
        return 1e4 * seconds(call)

    rounds = [{name: once(call) for name, call in calls.items()} for _ in range(repeats)]
    for name, rows in calls:
        found.setdefault(name, {})[str(rows)] = statistics.median(r[name, rows] for r in rounds)
    return found


def main(config: Config) -> None:
    """Measures and prints tables."""
    table = {}
    print(f"{'':52s}{'alone, ms':>10s}{'loop':>8s}{'branch':>8s}  (times as long)")
    for name, (function, arguments) in operations().items():
        row = table[name] = milliseconds(function, arguments, config.repeats)
        ratios = row["loop"] / row["alone"], row["branch"] / row["alone"]
        print(f"{name:52s}{row['alone']:10.3f}{ratios[0]:8.2f}{ratios[1]:8.2f}", flush=True)
    steps = replay_steps(config.repeats)
    for name, row in steps.items():
        print(f"replay, {name}: " + ", ".join(f"{rows} rows {us:.0f} us" for rows, us in row.items()))
    if config.record:
        report = {"environment": environment(), "ms": table, "replay_us": steps}
        write_json(HERE / "results" / "loops_cpu.json", report)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
