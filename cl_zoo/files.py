"""Files that are never half written."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

__all__ = ["InUseError", "locked", "write_array", "write_arrays", "write_json"]


class InUseError(OSError):
    """Another process works in the directory."""


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds the directory for one process. The lock is the system's: a kill frees it.

    Raises:
      InUseError: another one holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "a+") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # not a Unix
            pass
        except OSError as error:
            file.seek(0)
            owner = file.read(20).strip() or "another"
            raise InUseError(
                f"{directory}: process {owner} works there; wait for it, stop it, or use another directory"
            ) from error
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def write_json(path: Path, value: Any) -> None:
    """Writes beside, then renames: a reader sees the old file or the new one, never half of one."""
    _replace(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def write_array(path: Path, value: np.ndarray) -> None:
    """As `write_json`, for a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, value, allow_pickle=False)
    _replace(path, buffer.getvalue())


def write_arrays(folder: Path, name: str, tree: Any) -> None:
    """NAME.npy, or NAME.KEY.npy for each array of a tree."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        key = jax.tree_util.keystr(path, simple=True, separator=".")
        write_array(folder / f"{name}{key and '.'}{key}.npy", np.asarray(leaf))


def _replace(path: Path, content: bytes) -> None:
    beside = path.with_name(path.name + ".part")
    with open(beside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
