"""Checkpoints that are whole or not there: orbax, with a checksum of every array."""

from __future__ import annotations

import math
import os
import time
import warnings
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cl_zoo._batches import copied
from cl_zoo.types import Key, PyTree

__all__ = ["CheckpointError", "Checkpoints", "Saver"]


class CheckpointError(ValueError):
    """A checkpoint is damaged, or of another run."""


class Checkpoints:
    """The newest `keep` checkpoints of a run, in one folder.

    A checkpoint is written beside the others and renamed when it is complete, so a kill or a full disk leaves the one
    before. Arrays are read as data: nothing in a checkpoint is ever executed.

    Args:
      directory: the folder; made if missing.
      keep: at least 1; None keeps all.
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int | None = 2):
        import orbax.checkpoint as ocp  # slow to import, and only needed here

        self._args, self._restore_args = ocp.args, ocp.checkpoint_utils.construct_restore_args
        self.directory = Path(directory).resolve()
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=False),
        )

    def save(self, step: int, tree: PyTree) -> None:
        """Writes `tree` as the checkpoint of `step`. OSError (a full disk) leaves the earlier ones whole."""
        items = self._args.Composite(
            tree=self._args.StandardSave(tree), manifest=self._args.JsonSave({"leaves": _describe(tree)})
        )
        # Left by a run that continued from an earlier checkpoint after a newer one was found damaged.
        for newer in [found for found in self._manager.all_steps() if found >= step]:
            self._manager.delete(newer)
        if not self._manager.save(step, args=items):
            raise OSError(f"{self.directory}: the checkpoint of step {step} was not written")

    def restore_newest(self, *templates: PyTree, partial: bool = False) -> tuple[int, PyTree] | None:
        """The newest checkpoint that is whole, as `(step, tree)`; None if there is none at all.

        Args:
          *templates: a tree of the same structure, of arrays or shapes; or several, one of which it must be like.
          partial: whether the checkpoint may have more than the template, a dict, has at its top.

        Raises:
          CheckpointError: there are checkpoints, but none can be used; states what is wrong with each.
        """
        problems = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                tree = self._restore(step, templates, partial)
            except Exception as error:
                problems.append(f"step {step}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
                continue
            for problem in problems:
                warnings.warn(
                    f"{self.directory}: damaged checkpoint skipped, {problem}; continuing from step {step}",
                    stacklevel=2,
                )
            return step, tree
        if problems:
            raise CheckpointError(f"{self.directory}: no usable checkpoint; " + "; ".join(problems))
        return None

    def check_place(self, done: int, step: int, found: Key, key: Key) -> None:
        """The checkpoint of step `done` must say that it is of that step, and of the run of `key`."""
        wanted = jax.random.split(key)[0]
        same = jax.tree.all(jax.tree.map(np.array_equal, *(jax.random.key_data(one) for one in (found, wanted))))
        if step != done or not same:
            other = f"of step {step}" if step != done else "of a run with another key"
            raise CheckpointError(f"{self.directory}: the checkpoint of step {done} is {other}; restore it")

    def _restore(self, step: int, templates: tuple[PyTree, ...], partial: bool) -> PyTree:
        manifest = self._manager.restore(step, args=self._args.Composite(manifest=self._args.JsonRestore()))
        leaves = manifest["manifest"]["leaves"]
        if partial:
            tops = tuple(f"[{name!r}]" for name in templates[0])
            leaves = [leaf for leaf in leaves if leaf["name"].startswith(tops)]
        for template in templates:
            if _difference(leaves, template) is None:
                break
        else:
            raise CheckpointError(_difference(leaves, templates[0]))
        abstract = jax.tree.map(_abstract, template)
        if partial:
            options = {"restore_args": self._restore_args(abstract), "partial_restore": True}
            items = self._args.Composite(tree=self._args.PyTreeRestore(abstract, **options))
        else:
            items = self._args.Composite(tree=self._args.StandardRestore(abstract))
        tree = self._manager.restore(step, args=items)["tree"]
        for have, found in zip(leaves, _describe(tree), strict=True):
            if have["crc32"] != found["crc32"]:
                raise CheckpointError(f"the bytes of {have['name']} are not those that were written")
        return tree


class Saver:
    """Checkpoints written on a thread while the run goes on, at most one in `seconds`.

    The run waits for a copy of its state on the host, and for the checkpoint before. What writing raises (OSError) is
    raised by the next `save` or `wait`. Use it in a `with`, which waits for what is being written.

    Args:
      checkpoints: where they go.
      seconds: at least 0.
    """

    def __init__(self, checkpoints: Checkpoints, seconds: float):
        self._checkpoints, self._seconds = checkpoints, seconds
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        self._begun = -math.inf
        self.step = 0
        """Of the newest checkpoint."""

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()

    def due(self) -> bool:
        """Whether the last one was begun `seconds` ago."""
        return time.monotonic() - self._begun >= self._seconds

    def save(self, step: int, tree: PyTree) -> None:
        """Copies `tree` to the host, so that its memory may be donated, and begins to write it."""
        self.wait()
        self._begun, self.step = time.monotonic(), step
        self._writing = self._thread.submit(self._checkpoints.save, step, jax.tree.map(_on_host, tree))

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._writing is not None:
            self._writing.result()


def _on_host(leaf: Any) -> Any:
    return copied(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else np.array(leaf)


def _abstract(leaf: Any) -> Any:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or device)


def _describe(tree: PyTree, checksum: bool = True) -> list[dict[str, Any]]:
    described = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        crc = None
        if checksum:
            data = jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
            crc = zlib.crc32(np.ascontiguousarray(np.asarray(data)).tobytes())
        name = jax.tree_util.keystr(path)
        described.append({"name": name, "shape": list(leaf.shape), "dtype": str(leaf.dtype), "crc32": crc})
    return described


def _difference(leaves: list[dict[str, Any]], template: PyTree) -> str | None:
    """How the arrays that a checkpoint describes differ from those of a template."""
    wanted = _describe(template, checksum=False)
    for have, want in zip(leaves, wanted, strict=False):
        if {**have, "crc32": None} != {**want, "crc32": None}:
            return f"it holds {_say(have)} where this run has {_say(want)}"
    return None if len(leaves) == len(wanted) else f"it holds {len(leaves)} arrays, this run has {len(wanted)}"


def _say(leaf: dict[str, Any]) -> str:
    return f"{leaf['name']} {leaf['dtype']}{leaf['shape']}"
