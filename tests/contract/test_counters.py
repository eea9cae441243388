"""Counters of state, parts and cursor near their ends: nothing turns negative, and nothing stops without a word."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cl_zoo.buffers import (
    class_balanced_memory,
    reservoir_add,
    reservoir_init,
    reservoir_sample,
    ring_add,
    ring_init,
    ring_sample,
)
from cl_zoo.counters import LAST, counted, cycled
from cl_zoo.training import loop
from tests.contract.cases import SUBJECTS
from tests.contract.test_laws import COVER
from tests.tiny import entry_learner, tiny_stream

KEY = jax.random.key(4)
COUNTERS = {"seen", "updates", "calls", "finished", "age", "counts", "recycled", "replaced"}
"""Fields of parts that count without a bound."""
BOUNDED = {"rows", "memory", "owner", "labels", "held", "ranks", "classes", "mean_count", "number", "label", "rank"}
"""Whole numbers that are stored, or count what there is room for."""


def field(path: tuple[Any, ...]) -> str:
    """The name of a part's field that a leaf lies in."""
    names = [entry.name for entry in path if isinstance(entry, jax.tree_util.GetAttrKey)]
    return names[-1] if names else ""


def counters(tree: Any) -> dict[str, jax.Array]:
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if leaf.dtype == jnp.int32 and field(path) in COUNTERS:
            found[jax.tree_util.keystr(path)] = leaf
    return found


@pytest.mark.parametrize("name", [n if n in COVER else pytest.param(n, marks=pytest.mark.long) for n in SUBJECTS])
def test_counters_near_their_end(tiny_images: Any, name: str) -> None:
    """Two updates and the end of a task, from counters two before their end."""
    entry = SUBJECTS[name]
    stream = tiny_stream(tiny_images, entry.scenarios[0])
    learner, (state, cursor) = loop.start(entry_learner(stream, entry), stream, KEY)
    near = LAST - 2

    def full(path: tuple[Any, ...], leaf: Any) -> Any:
        return jnp.full_like(leaf, near) if leaf.dtype == jnp.int32 and field(path) in COUNTERS else leaf

    parts = jax.tree_util.tree_map_with_path(full, state.parts)
    state = state._replace(parts=parts, step=jnp.int32(near))
    cursor = cursor._replace(step=jnp.int32(near)) if hasattr(cursor, "step") else cursor

    @jax.jit
    def run(learner: Any, stream: Any, state: Any, cursor: Any) -> Any:
        (after, cursor), first = loop.update(learner, stream, (state, cursor))
        (after, cursor), second = loop.update(learner, stream, (after, cursor))
        return loop.finish(learner, stream, KEY, after, 2), cursor, (first, second)

    after, cursor, metrics = run(learner, stream, state, cursor)
    assert int(after.step) == LAST
    assert all(np.isfinite(value) for value in jax.tree.leaves(metrics))
    assert bool(loop.is_finite(after))
    for path, count in counters(after.parts).items():
        assert jnp.all(count >= 0) and jnp.all(count <= LAST), path


@pytest.mark.parametrize("name", SUBJECTS)
def test_every_whole_number_of_a_part_is_known(tiny_images: Any, name: str) -> None:
    """A new counter must be named above, and so set near its end."""
    entry = SUBJECTS[name]
    stream = tiny_stream(tiny_images, entry.scenarios[0])
    _, (state, _) = jax.eval_shape(lambda: loop.start(entry_learner(stream, entry), stream, KEY))
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.parts):
        known = COUNTERS | BOUNDED | {"count"}  # of optax's states, which saturate
        assert leaf.dtype != jnp.int32 or field(path) in known, jax.tree_util.keystr(path)


def test_a_reservoir_goes_on_beyond_its_last_number() -> None:
    memory = reservoir_init(jnp.zeros(1), 4)._replace(seen=jnp.int32(2**31 - 5))
    entered = 0
    for i in range(50):
        memory = reservoir_add(memory, jnp.full(8, 1.0 + i), jnp.ones(8), jax.random.fold_in(KEY, i))
        entered += int(jnp.any(memory.rows > 0))
        assert int(memory.seen) == LAST
        rows, weight = reservoir_sample(memory, 4, KEY)
        assert weight.tolist() == [1, 1, 1, 1] and rows.shape == (4,)
    assert entered == 0, "400 of 2^31 examples do not enter a memory of four"


def test_a_ring_keeps_its_turn() -> None:
    ring = ring_init(jnp.zeros(1, int), 6, 2)  # three of each class
    plain, near = ring, ring._replace(seen=jnp.array([2**30 - 1, 3 * 2**20 * 341 + 3], jnp.int32))
    for i in range(7):
        rows, labels = jnp.array([10 * i, 10 * i + 1]), jnp.array([0, 1])
        plain = ring_add(plain, rows, labels, jnp.ones(2))
        near = ring_add(near, rows, labels, jnp.ones(2))
        assert jnp.all(near.seen >= 3)
        assert ring_sample(near, 6, KEY)[1].tolist() == [1] * 6
    turn = (2**30 - 1) % 3
    assert [near.rows[(turn + i) % 3].item() for i in (4, 5, 6)] == [40, 50, 60]
    assert near.rows[3:].tolist() == plain.rows[3:].tolist()


def test_counts() -> None:
    count = jnp.array([0, LAST - 1, LAST], jnp.int32)
    assert counted(count, jnp.array([3, 3, 3])).tolist() == [3, LAST, LAST]
    for period in (1, 3, 7):
        seen = jnp.int32(2**30 - 3)
        for i in range(8):
            assert int(seen) % period == (2**30 - 3 + i) % period
            seen = cycled(seen, 1, period, least=5 * period)
    assert class_balanced_memory(4, 2).init((jnp.zeros((1, 2)), jnp.zeros(1, int), None)).held.dtype == jnp.int32
