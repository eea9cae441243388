"""Streams that ask for what a row itself has said."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cl_zoo import Batch, Stream
from cl_zoo.losses import token_losses
from cl_zoo.streams import associative_recall, best_dictionary_scores, fresh_dictionaries
from tests.tiny import same_bytes

KEY = jax.random.key(3)


def take(stream: Stream, key: Any = KEY, step: int = 0) -> Batch:
    cursor = stream.init(key)._replace(step=jnp.int32(step))
    return jax.jit(Stream.next)(stream, cursor)[0]


def assert_even(counts: Any) -> None:
    """Within five standard deviations of draws of equal chance."""
    mean = np.mean(counts)
    assert (np.abs(counts - mean) < 5 * np.sqrt(mean)).all(), counts


@pytest.mark.parametrize("filler", ["noise", "zeros"])
def test_every_key_is_asked_once_for_the_value_it_has_in_its_row(filler: str) -> None:
    batch = take(associative_recall(length=40, pairs=4, vocabulary=24, batch_size=500, filler=filler))
    x, y = np.asarray(batch.x), np.asarray(batch.y)
    assert x.shape == y.shape == (500, 40) and x.dtype == y.dtype == np.int32
    assert batch.task is None and (batch.weight == 1).all()
    keys, values = x[:, :8:2], x[:, 1:8:2]
    assert set(keys.ravel()) == set(range(1, 12)) and set(values.ravel()) == set(range(12, 24))
    assert_even(np.bincount(keys.ravel())[1:])
    assert_even(np.bincount(values.ravel())[12:])
    for row in range(500):
        bound = dict(zip(keys[row], values[row]))
        asked = np.flatnonzero(y[row] >= 0)
        assert len(bound) == 4 == len(set(values[row]))
        assert (asked >= 8).all() and (asked % 2 == 0).all()
        assert sorted(x[row, asked]) == sorted(bound)
        assert [bound[k] for k in x[row, asked]] == y[row, asked].tolist()
    rest = np.delete(x[:, 8:].ravel(), np.flatnonzero(y[:, 8:].ravel() >= 0))
    assert (y[y < 0] == -1).all()
    if filler == "zeros":
        assert (rest == 0).all()
    else:
        assert_even(np.bincount(rest, minlength=24))


@pytest.mark.parametrize("alpha", [0.01, 1.0, 3.0])
def test_gaps_follow_the_power_law(alpha: float) -> None:
    """The first key's gap is a draw from the law, the second's one from what is left."""
    n = 20_000
    batch = take(associative_recall(length=16, pairs=2, vocabulary=32, batch_size=n, alpha=alpha))
    chance = np.arange(1.0, 7) ** (alpha - 1)
    chance /= chance.sum()
    gap = []
    for i in (0, 1):
        mine = (np.asarray(batch.y) == np.asarray(batch.x)[:, 2 * i + 1, None]) & (np.asarray(batch.y) >= 0)
        gap.append((mine.argmax(1) - 4) // 2)
    joint = np.zeros((6, 6))
    np.add.at(joint, (gap[0], gap[1]), 1 / n)
    want = chance[:, None] * chance / (1 - chance[:, None]) * (1 - np.eye(6))
    np.testing.assert_allclose(want.sum(), 1)
    assert (np.abs(joint - want) <= 5 * np.sqrt(want / n)).all()


def test_a_full_row_is_all_pairs_and_queries() -> None:
    batch = take(associative_recall(length=16, pairs=4, vocabulary=10, batch_size=50))
    assert ((batch.y >= 0) == (np.arange(16) >= 8) & (np.arange(16) % 2 == 0)).all()


def test_alpha_may_be_swept() -> None:
    def mean_gap(alpha: Any) -> Any:
        stream = associative_recall(length=64, pairs=1, vocabulary=8, batch_size=200, alpha=alpha)
        batch = stream.next(stream.init(KEY))[0]
        return jnp.mean(jnp.argmax(batch.y, axis=1).astype(jnp.float32))

    gaps = jax.jit(jax.vmap(mean_gap))(jnp.array([0.0, 1.0, 4.0]))
    assert gaps[0] + 5 < gaps[1] < gaps[2] - 5


def test_documents_keep_their_own_dictionary() -> None:
    stream = fresh_dictionaries(length=40, words=5, values=3, batch_size=400)
    batch = take(stream)
    x, y = np.asarray(batch.x), np.asarray(batch.y)
    assert x.shape == y.shape == (400, 40) and x.dtype == y.dtype == np.int32
    assert stream.tasks.active.tolist() == [[True] * 8]
    np.testing.assert_array_equal(y[:, ::2], x[:, 1::2])
    assert (y[:, 1::2] == -1).all()
    assert_even(np.bincount(x[:, ::2].ravel(), minlength=5))
    dictionaries = []
    for row in x:
        found = {word: set(row[1::2][row[::2] == word].tolist()) for word in set(row[::2].tolist())}
        assert all(len(values) == 1 for values in found.values())
        dictionaries.append({word: values.pop() for word, values in found.items()})
    for word in range(5):
        assert_even(np.bincount([found[word] - 5 for found in dictionaries if word in found], minlength=3))
    same = np.mean([found.get(0) == found.get(1) for found in dictionaries if {0, 1} <= set(found)])
    assert abs(same - 1 / 3) < 0.12  # words do not depend on each other


def test_best_scores_are_those_of_who_remembers_the_row() -> None:
    """An observer that counts: a word seen before for sure, of another all values alike."""
    length, words, values, n = 24, 4, 3, 4000
    batch = take(fresh_dictionaries(length=length, words=words, values=values, batch_size=n))
    x = np.asarray(batch.x)
    outputs = np.full((n, length, words + values), -40.0, np.float32)
    outputs[:, :, words:] = 0
    for row in range(n):
        known: dict[int, int] = {}
        for place in range(0, length, 2):
            if x[row, place] in known:
                outputs[row, place, words:] = -40
                outputs[row, place, known[x[row, place]]] = 0
            known[x[row, place]] = x[row, place + 1]
    loss, accuracy = best_dictionary_scores(length, words, values)
    found = np.asarray(token_losses(jnp.asarray(outputs), batch.y))[:, ::2]
    right = (outputs.argmax(-1) == np.asarray(batch.y))[:, ::2]
    assert loss.shape == accuracy.shape == (12,)
    np.testing.assert_allclose(found.mean(0), loss, atol=5 * np.log(values) / 2 / np.sqrt(n))
    np.testing.assert_allclose(right.mean(0), accuracy, atol=5 / 2 / np.sqrt(n))
    np.testing.assert_allclose([loss[0], accuracy[0], loss[1]], [np.log(3), 1 / 3, 0.75 * np.log(3)])


STREAMS = {
    "recall": lambda: associative_recall(length=8, pairs=2, vocabulary=8, batch_size=4, steps=3, evaluation_size=10),
    "documents": lambda: fresh_dictionaries(length=8, words=3, values=2, batch_size=4, steps=3, evaluation_size=10),
}


@pytest.mark.parametrize("name", list(STREAMS))
def test_rows_follow_from_the_cursor(name: str) -> None:
    stream = STREAMS[name]()
    assert stream.n_tasks == 1 and stream.provides == {"boundaries", "begin_sample", "end_sample", "open_outputs"}
    step = jax.jit(Stream.next)
    cursor, batches = stream.init(KEY), []
    for _ in range(3):
        batch, cursor = step(stream, cursor)
        batches.append(batch)
    same_bytes(take(stream, step=2), batches[2])
    assert not np.array_equal(batches[0].x, batches[1].x)
    assert not np.array_equal(take(stream, jax.random.key(4)).x, batches[0].x)
    keys = jax.random.split(KEY, 3)
    together = jax.jit(jax.vmap(lambda k: stream.next(stream.init(k))[0]))(keys)
    for i, key in enumerate(keys):
        same_bytes(jax.tree.map(lambda leaf, i=i: leaf[i], together), take(stream, key))


@pytest.mark.parametrize("name", list(STREAMS))
def test_evaluation_rows_are_fixed_and_differ_by_split(name: str) -> None:
    stream = STREAMS[name]()
    evaluation = jax.jit(Stream.evaluation, static_argnums=2)
    test, validation = (evaluation(stream, jnp.int32(0), split) for split in ("test", "validation"))
    assert test.x.shape == (1, 10, 8) and not np.array_equal(test.x, validation.x)
    same_bytes(test, evaluation(stream, jnp.int32(0), "test"))
    assert jax.eval_shape(stream.sample, jnp.int32(0), KEY).x.shape == (1, 100, 8)
    rows = jax.tree.map(lambda leaf: leaf[0], test)
    right = jax.nn.one_hot(rows.y, stream.tasks.active.shape[-1])
    np.testing.assert_array_equal(stream.score(right, rows), np.ones(10))
    first = np.asarray(rows.y >= 0).argmax(1)
    wrong = right.at[jnp.arange(10), first].set(-right[jnp.arange(10), first])
    asked = np.asarray(rows.y >= 0).sum(1)
    np.testing.assert_allclose(stream.score(wrong, rows), 1 - 1 / asked)


@pytest.mark.parametrize(
    ("factory", "options", "said"),
    [
        (associative_recall, {"pairs": 0}, "associative_recall: pairs is 0"),
        (associative_recall, {"pairs": 8, "length": 31}, "length is 31, but it must be at least 32"),
        (associative_recall, {"pairs": 4, "vocabulary": 8}, "vocabulary is 8, but it must be at least 10"),
        (associative_recall, {"vocabulary": 65}, "vocabulary is 65, but it must be even"),
        (associative_recall, {"alpha": -0.1}, "alpha is -0.1"),
        (associative_recall, {"filler": "ones"}, "filler is 'ones', but it must be one of 'noise', 'zeros'"),
        (associative_recall, {"batch_size": 0}, "batch_size is 0"),
        (fresh_dictionaries, {"length": 7}, "fresh_dictionaries: length is 7, but it must be even"),
        (fresh_dictionaries, {"words": 0}, "words is 0"),
        (fresh_dictionaries, {"values": 1.5}, "values is 1.5, but it must be a whole number"),
        (fresh_dictionaries, {"steps": 0}, "steps is 0"),
    ],
)
def test_impossible_values_are_refused(factory: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        factory(**options)
