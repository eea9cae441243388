"""How programs are compiled, and the cache of them between processes."""

from __future__ import annotations

import os
from pathlib import Path

import jax

__all__ = ["compiler_options", "enable_compilation_cache"]


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


def compiler_options() -> dict[str, int] | None:
    """For `jax.jit`: on a CPU, level 1 of LLVM takes a quarter off the compile time of a stream, and nothing off its
    speed (`experiments/speed`). A level that XLA_FLAGS sets is left as it is."""
    level = "xla_backend_optimization_level"
    if jax.default_backend() != "cpu" or level in os.environ.get("XLA_FLAGS", ""):
        return None
    return {level: 1}
