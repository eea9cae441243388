"""What A-GEM keeps of a finished task."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cl_zoo import agem, supervised
from tests.tiny import tiny_learner, tiny_stream


def test_a_memory_that_is_large_enough_holds_every_example_of_the_sample(tiny_images: Any) -> None:
    stream = tiny_stream(tiny_images)
    learner = tiny_learner(stream, supervised(), agem(capacity=60, batch_size=4))
    batch, _ = stream.next(stream.init(jax.random.key(0)))
    sample = stream.sample(1, jax.random.key(1))
    part = learner.end_task(learner.init(jax.random.key(2), batch), sample).parts["agem"]
    counts = np.asarray(sample.weight).ravel() > 0
    assert int(part.seen) == counts.sum() == 40
    kept, offered = (np.asarray(x).reshape((-1, 16)) for x in (part.rows[0][:40], sample.x))
    assert sorted(map(bytes, kept)) == sorted(map(bytes, offered[counts]))
    assert jnp.all(part.rows[2][:40] == 1)
