"""How programs are compiled, and the cache of them between processes."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

__all__ = [
    "DoesNotFitError",
    "compiler_options",
    "device_bytes",
    "enable_compilation_cache",
    "jit",
    "staged",
    "told_bytes",
    "tree_bytes",
]


def enable_compilation_cache(directory: str | os.PathLike[str] | None = None) -> Path:
    """Keeps every compiled program on disk, so that a second process compiles nothing that the first did.

    Args:
      directory: None takes `$CL_ZOO_CACHE_DIR`, else `cl_zoo` in the user's cache folder.

    Returns:
      The directory.
    """
    fallback = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "cl_zoo"
    path = Path(directory or os.environ.get("CL_ZOO_CACHE_DIR") or fallback)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path


_CPU_OPTIONS = {
    # Cuts the compile time of a stream by a quarter, and leaves its speed as it is.
    "xla_backend_optimization_level": 1,
    # Otherwise what a loop carries, reads and writes (a memory, parameters) is copied whole, twice a step.
    "xla_cpu_copy_insertion_use_region_analysis": True,
    # The default without what YNNPACK does slower than XLA's own routines: convolutions (half the speed), and matrix
    # products (1.0 to 1.5 times the time).
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
}


def compiler_options() -> dict[str, Any] | None:
    """For `jax.jit`: how every program of this package is compiled on a CPU (`experiments/speed`); None elsewhere.

    What XLA_FLAGS sets is left as it is, and what this version of XLA does not support is left out.
    """
    if jax.default_backend() != "cpu":
        return None
    return dict(_known_options(os.environ.get("XLA_FLAGS", ""))) or None


def jit(function: Callable[..., Any], **kwargs: Any) -> Any:
    """`jax.jit` with `compiler_options()`; inside another program, or `grad` and `vmap`, without them.

    Args:
      function: as for `jax.jit`.
      **kwargs: of `jax.jit`.

    Returns:
      A function, with `lower`, `trace`, `eval_shape` and `clear_cache` as `jax.jit` has them.

    Example:
      >>> jit(lambda x: x + 1)(1)
      Array(2, dtype=int32, weak_type=True)
    """
    inside = jax.jit(function, **kwargs)

    @functools.cache  # a device is looked up at the first call, not before
    def outermost() -> Any:
        return jax.jit(function, compiler_options=compiler_options(), **kwargs)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((args, kwargs)))
        return (inside if traced or staged() else outermost())(*args, **kwargs)

    def of_outermost(name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: getattr(outermost(), name)(*args, **kwargs)

    for name in ("lower", "trace", "eval_shape", "clear_cache", "_cache_size"):
        setattr(call, name, of_outermost(name))
    return call


def staged() -> bool:
    """Whether operations are being traced for a program, not executed."""
    return isinstance(jnp.zeros(()), jax.core.Tracer)


@functools.lru_cache(maxsize=8)
def _known_options(flags: str) -> tuple[tuple[str, Any], ...]:
    def known(name: str, value: Any) -> bool:
        try:
            jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
        except jax.errors.JaxRuntimeError:
            return False
        return True

    return tuple((name, value) for name, value in _CPU_OPTIONS.items() if name not in flags and known(name, value))


class DoesNotFitError(ValueError):
    """What a run would keep is more than its devices hold."""


def tree_bytes(tree: Any) -> int:
    """Of all arrays, or shapes, in a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def told_bytes(n: float) -> str:
    """A number of bytes in words.

    Example:
      >>> told_bytes(1_500_000)
      '1.5 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


@functools.cache
def device_bytes() -> int | None:
    """The memory of all devices of this process together, or of its machine if they are CPUs; None if unknown."""
    if jax.default_backend() == "cpu":
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (ValueError, OSError, AttributeError):
            return None
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in jax.local_devices()]
    return sum(limits) if all(limits) else None
