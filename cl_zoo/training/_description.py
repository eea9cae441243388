"""What must be the same where a run is resumed."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cl_zoo._learner import Learner
from cl_zoo.evaluation.measures import Measure
from cl_zoo.training.loop import Carry, example_batch
from cl_zoo.types import Key, PyTree, Stream

__all__ = ["checksum", "described_run", "fingerprint"]


def described_run(
    learner: Learner,
    stream: Stream,
    key: Key,
    weights: PyTree,
    checkpoint_every: int,
    measures: tuple[tuple[str, Measure], ...],
    chosen: tuple[tuple[str, int], ...] | None,
) -> dict[str, Any]:
    """What must be the same where a run is resumed; `weights` are those that were bound."""
    return {
        "n_tasks": stream.n_tasks,
        "outputs": stream.tasks.active.shape[-1],
        "steps": stream.steps,
        "checkpoint_every": checkpoint_every,
        "measures": {name: one.when for name, one in measures},
        "metrics": None if chosen is None else dict(chosen),
        "key": np.asarray(jax.random.key_data(key)).tolist(),
        "data_crc32": checksum((stream.data, stream.tasks, stream.task_steps)),
        "batch": [
            f"{leaf.dtype}{list(leaf.shape)}"
            for leaf in jax.tree.leaves(jax.eval_shape(lambda: example_batch(learner, stream, key)))
        ],
        **({} if weights is None else {"weights_crc32": checksum(weights)}),
    }


def fingerprint(
    programs: Mapping[str, Any], learner: Learner, stream: Stream, key: Key, carry: Carry, size: int, chosen: Any
) -> int:
    """A checksum of all transitions as they are traced, with every number that the learner and the stream hold."""
    t = jax.ShapeDtypeStruct((), jnp.int32)
    crc = 0
    for name, arguments in {
        "begin": (learner, stream, key, carry, t),
        "train": (learner, stream, carry, t, size, chosen),
        "finish": (learner, stream, key, carry, t),
    }.items():
        traced = programs[name].trace(*arguments).jaxpr
        crc = zlib.crc32(re.sub(r" at 0x[0-9a-f]+", "", str(traced.jaxpr)).encode(), crc)
        crc = zlib.crc32(str(checksum(traced.consts)).encode(), crc)
    return crc


def checksum(data: PyTree) -> int:
    crc = 0
    for leaf in jax.tree.leaves(data):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        crc = zlib.crc32(np.ascontiguousarray(np.asarray(leaf)).reshape(-1).view(np.uint8).data, crc)
    return crc
