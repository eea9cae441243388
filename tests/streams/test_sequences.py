"""Streams that tell sequence layers apart: what they draw, and the best that can be done with it."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cl_zoo import Stream
from cl_zoo.losses import token_losses
from cl_zoo.streams import associative_recall, best_bigram_losses, formal_language, switching_bigrams

KEY = jax.random.key(3)


def take(stream: Stream) -> Any:
    return jax.jit(Stream.next)(stream, stream.init(KEY))[0]


def test_tokens_follow_the_tables_of_their_segment() -> None:
    stream = switching_bigrams(length=12, segment=4, vocabulary=3, tables=2, batch_size=20_000, temperature=0.5)
    batch, tables = take(stream), np.exp(stream.data.log_tables)
    x, y = np.asarray(batch.x), np.asarray(batch.y)
    np.testing.assert_array_equal(y[:, :-1], x[:, 1:])
    np.testing.assert_allclose(tables.sum(-1), 1, rtol=1e-5)
    for t in (0, 3, 4, 11):  # one table or the other, half of the time
        for token in range(3):
            seen = y[:, t][x[:, t] == token]
            likely = tables[:, token].mean(0)
            found = np.bincount(seen, minlength=3) / len(seen)
            if t % 4 == 0:  # later, what came before in the segment tells of the table
                np.testing.assert_allclose(found, likely, atol=5 * np.sqrt(0.25 / len(seen)))
    # Within a segment both transitions are of one table.
    found = np.zeros((3, 3, 3))
    np.add.at(found, (x[:, 0], y[:, 0], y[:, 1]), 1)
    found /= found.sum((1, 2), keepdims=True)
    np.testing.assert_allclose(found, np.einsum("cij,cjk->ijk", tables, tables) / 2, atol=0.025)


def test_the_best_loss_is_that_of_every_way_the_tables_could_be() -> None:
    """Against a sum over all sequences of tables; and less than that is not had on average."""
    stream = switching_bigrams(length=7, segment=3, vocabulary=4, tables=3, batch_size=5)
    batch = take(stream)
    tables = np.exp(np.asarray(stream.data.log_tables, np.float64))
    found = best_bigram_losses(stream.data, batch.x, batch.y, segment=3)
    for row, (x, y) in enumerate(zip(np.asarray(batch.x), np.asarray(batch.y))):
        totals = np.zeros(8)
        totals[0] = 3**3
        for ways in itertools.product(range(3), repeat=3):
            p = 1.0
            for t in range(7):
                p *= tables[ways[t // 3], x[t], y[t]]
                totals[t + 1] += p
        np.testing.assert_allclose(found[row], -np.log(totals[1:] / totals[:-1]), rtol=1e-4, atol=1e-5)


def test_no_guess_beats_the_best_loss_on_average() -> None:
    stream = switching_bigrams(length=16, segment=8, vocabulary=6, tables=4, batch_size=4000)
    batch = take(stream)
    best = best_bigram_losses(stream.data, batch.x, batch.y, segment=8)
    marginal = jnp.log(jnp.mean(jnp.exp(stream.data.log_tables), axis=0))[batch.x]
    oracle = -jnp.max(stream.data.log_tables[:, batch.x, batch.y], axis=0)
    assert oracle.mean() < best.mean() < token_losses(marginal, batch.y).mean()
    by_place = np.asarray(best.mean(0))
    assert by_place[7] < by_place[0] - 0.3 and by_place[8] > by_place[7] + 0.3  # it starts anew


def allowed(language: str, prefix: list[int], longest: int = 12) -> Any:
    """What may follow, by the definition of the language alone: all its strings up to a length."""
    if language == "parity":
        return prefix.count(2) % 2
    if language == "(aa)*":
        return len(prefix) % 2
    if language == "(abab)*":
        return len(prefix) % 4
    found = set()
    for string in strings(language, longest):
        if string[: len(prefix)] == prefix:
            found.add("end" if len(string) == len(prefix) else string[len(prefix)])
    return found


def strings(language: str, longest: int) -> list[list[int]]:
    if language == "a^n b^n":
        return [[1] * n + [2] * n for n in range(1, longest // 2 + 1)]
    if language == "a^n b^n c^n":
        return [[1] * n + [2] * n + [3] * n for n in range(1, longest // 3 + 1)]
    raise AssertionError(language)


CLASSES = {
    "a^n b^n": [{1}, {1, 2}, {2}, {"end"}],
    "a^n b^n c^n": [{1}, {1, 2}, {2}, {3}, {"end"}],
}


@pytest.mark.parametrize("language", ["parity", "(aa)*", "(abab)*", "a^n b^n", "a^n b^n c^n", "shuffle-2"])
def test_labels_say_what_may_follow(language: str) -> None:
    stream = formal_language(language, shortest=2, longest=9, batch_size=60)  # type: ignore[arg-type]
    batch = take(stream)
    x, y = np.asarray(batch.x), np.asarray(batch.y)
    assert x.shape == y.shape == (60, 10) and (x[:, 0] == 0).all()
    lengths = (y >= 0).sum(1) - 1
    multiple = {"a^n b^n": 2, "a^n b^n c^n": 3, "shuffle-2": 2}.get(language, 1)
    assert set(lengths) == {n for n in range(2, 10) if n % multiple == 0}
    outputs = stream.tasks.active.shape[1]
    assert x.max() < outputs and y.max() < outputs
    for row, labels, n in zip(x, y, lengths):
        string = row[1 : n + 1].tolist()
        assert min(string) >= 1 and (row[n + 1 :] == 0).all() and (labels[n + 1 :] == -1).all()
        if language == "shuffle-2":
            depth = np.zeros(2, int)
            for i, symbol in enumerate([0, *string]):
                if symbol:
                    depth[(symbol - 1) // 2] += 1 if symbol % 2 else -1
                assert (depth >= 0).all() and labels[i] == (depth[0] > 0) + 2 * (depth[1] > 0)
            assert (depth == 0).all()
        elif language in CLASSES:
            assert string in strings(language, 9)
            for i in range(n + 1):
                may = allowed(language, string[:i])
                # Which prefix of b's it is, is known from the whole string; the labels are of who counts.
                assert CLASSES[language][labels[i]] == may
        else:
            assert [allowed(language, string[:i]) for i in range(n + 1)] == labels[: n + 1].tolist()
    if language == "shuffle-2":  # crossing: one closes within the other
        assert any(_crosses(row[1 : n + 1].tolist()) for row, n in zip(x, lengths))


def _crosses(string: list[int]) -> bool:
    stack: list[int] = []
    for symbol in string:
        if symbol % 2:
            stack.append(symbol)
        elif stack.pop() != symbol - 1:
            return True
    return False


def test_a_string_is_right_where_every_place_is() -> None:
    stream = formal_language("parity", longest=6, batch_size=3)
    batch = take(stream)
    outputs = jax.nn.one_hot(batch.y, 3)
    np.testing.assert_array_equal(stream.score(outputs, batch), 1)
    np.testing.assert_array_equal(stream.score(outputs.at[1, 0].set(0), batch), [1, 1, 1])  # a tie is the first class
    np.testing.assert_array_equal(stream.score(outputs.at[1, 0].set(jnp.array([0, 1, 0])), batch), [1, 0, 1])


def test_updated_keys_are_asked_for_their_last_value() -> None:
    batch = take(associative_recall(length=40, pairs=4, updates=3, vocabulary=40, batch_size=200))
    x, y = np.asarray(batch.x), np.asarray(batch.y)
    for row, labels in zip(x, y):
        bound = dict(zip(row[:14:2], row[1:14:2]))  # later pairs replace earlier ones
        assert len(bound) == 4 and len(set(row[:8:2])) == 4 and len(set(row[8:14:2])) == 3
        assert len(set(row[1:14:2])) == 7
        asked = np.flatnonzero(labels >= 0)
        assert (asked >= 14).all() and sorted(row[asked]) == sorted(bound)
        assert [bound[k] for k in row[asked]] == labels[asked].tolist()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: switching_bigrams(segment=0), "segment is 0"),
        (lambda: switching_bigrams(temperature=0.0), "temperature is 0"),
        (lambda: formal_language("dyck"), "language is 'dyck'"),  # type: ignore[arg-type]
        (lambda: formal_language("a^n b^n", shortest=5, longest=5), "multiples of 2"),
        (lambda: associative_recall(length=64, pairs=4, updates=5), r"updates is 5, but it must be in \[0, 4\]"),
        (lambda: associative_recall(length=16, pairs=4, updates=1), "length is 16"),
    ],
)
def test_what_is_refused(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()
