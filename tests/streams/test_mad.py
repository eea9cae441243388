"""MAD's tasks: every answer that is asked for follows from what came before, by who reads the sequence."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_zoo import Stream, compose, run_stream, supervised
from cl_zoo.language import compressing, decoder
from cl_zoo.layers import softmax_attention
from cl_zoo.losses import next_token_loss
from cl_zoo.streams import mad

KEY = jax.random.key(3)


def train(stream: Stream) -> tuple[np.ndarray, np.ndarray]:
    batch = jax.jit(Stream.next)(stream, stream.init(KEY))[0]
    return np.asarray(batch.x), np.asarray(batch.y)


def test(stream: Stream) -> tuple[np.ndarray, np.ndarray]:
    batch = stream.evaluation(0, "test")
    return tuple(np.asarray(leaf).reshape((-1, leaf.shape[-1])) for leaf in (batch.x, batch.y))  # type: ignore[return-value]


test.__test__ = False  # type: ignore[attr-defined]


@pytest.mark.parametrize("task", ["recall", "noisy recall"])
def test_recalled_values_are_those_of_the_sequence(task: str) -> None:
    stream = mad(task, batch_size=50, evaluation_size=50)  # type: ignore[arg-type]
    v, noise = stream.tasks.active.shape[1], 16 if task == "noisy recall" else 0
    x, y = train(stream)
    assert x.shape == (50, 127)
    np.testing.assert_array_equal(x[:, 1:], y[:, :-1])
    x, y = test(stream)
    noisy, pairs = 0, 0
    for row, labels in zip(x, y):
        whole = [*row, labels[-1]]
        known: dict[int, int] = {}
        for i in range(0, 128, 2):
            k, value = whole[i], whole[i + 1]
            pairs += 1
            if k >= v - noise:
                noisy += 1
                assert value >= v - noise and labels[i] == -1
                continue
            half = (v - noise) // 2
            assert k < half <= value < v - noise
            assert labels[i] == known.get(k, -1)
            assert known.setdefault(k, value) == value
            assert i == 0 or labels[i - 1] == -1
        assert labels[-1] >= 0
    assert (0.15 < noisy / pairs < 0.25) == (task == "noisy recall")


def test_fuzzy_values_are_those_of_their_keys() -> None:
    stream = mad("fuzzy recall", batch_size=50, evaluation_size=50)
    x, y = train(stream)
    np.testing.assert_array_equal(x[:, 1:], y[:, :-1])
    assert x.shape == (50, 128) and set(x.ravel()) == set(range(16))
    lengths = set()
    for split, (x, y) in (("train", train(stream)), ("test", test(stream))):
        for row, labels in zip(x, y):
            whole = np.array([*row, labels[-1]])
            start = int(np.argmax(whole < 15))
            assert (whole[:start] == 15).all() and (whole[start:] < 15).all()
            assert start < 12  # as full as pairs let it be
            known: dict[tuple[int, ...], tuple[int, ...]] = {}
            # Keys are of tokens below 7, values of others: a sequence can be read in one way.
            cuts = [start, *(i for i in range(start + 1, 129) if whole[i] < 7 <= whole[i - 1]), 129]
            for a, b in zip(cuts, cuts[1:]):
                key = tuple(int(t) for t in whole[a:b] if t < 7)
                value = tuple(int(t) for t in whole[a:b] if t >= 7)
                lengths.add((split, len(key)))
                assert len(set(key)) == len(key) <= 3 and 1 <= len(set(value)) == len(value) <= 3
                if split == "test":
                    asked = labels[a + len(key) - 1 : b - 1]
                    assert asked.tolist() == (list(value) if key in known else [-1] * len(value))
                assert known.setdefault(key, value) == value
            assert labels[-1] >= 0
    assert lengths == {("train", 1), ("train", 2), ("train", 3), ("test", 3)}


def test_copied_tokens_come_in_order_without_blanks() -> None:
    x, y = train(mad("selective copying", batch_size=200))
    assert x.shape == (200, 256)
    for row, labels in zip(x, y):
        assert row[239] == 15 and (row[240:] == 14).all() and (labels[:240] == -1).all()
        np.testing.assert_array_equal(row[:239][row[:239] < 14], labels[240:])
    places = np.argmax(x[:, :239] < 14, axis=1)
    assert places.std() > 5


def test_what_is_memorized_is_the_same_everywhere() -> None:
    stream = mad("memorization", batch_size=200)
    (x, y), (tested, answers) = train(stream), test(stream)
    known = dict(zip(x[:, ::2].ravel(), y[:, 1::2].ravel()))
    assert len(known) == 127 == len(set(known.values())) and min(known.values()) >= 127
    assert (x[:, 1::2] == 255).all() and (y[:, ::2] == -1).all()
    assert all(known[k] == a for k, a in zip(tested[:, ::2].ravel(), answers[:, 1::2].ravel()))
    other = mad("memorization", batch_size=200, seed=1)
    assert dict(zip(train(other)[0][:, ::2].ravel(), train(other)[1][:, 1::2].ravel())) != known


def test_a_sequence_is_compressed_into_its_last_state() -> None:
    stream = mad("compression", vocabulary=5, length=4, batch_size=32, steps=150)
    x, y = train(stream)
    np.testing.assert_array_equal(x, y)
    assert (x[:, -1] == 4).all() and x[:, :-1].max() == 3
    model = compressing(decoder(5, [(softmax_attention(16, 2), 32, 1)]))
    params, state = model.init(KEY, x)
    # What comes out depends on the last state alone: a change there is all that is seen.
    outputs = model.apply(params, state, jnp.asarray(x))[0]
    assert outputs.shape == (32, 4, 5)
    result = run_stream(compose(model, optax.adam(1e-2), supervised(next_token_loss)), stream, KEY)
    assert result.accuracy[-1, 0] > 0.6 > 0.45 > result.accuracy[0, 0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"task": "other"}, "task is 'other'"),
        ({"task": "recall", "length": 7}, "length is 7, but it must be even"),
        ({"task": "recall", "vocabulary": 3}, "vocabulary is 3"),
        ({"task": "recall", "noise": 0.1}, "only noisy recall has noise"),
        ({"task": "selective copying", "length": 30}, "length is 30"),
    ],
)
def test_what_is_refused(options: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        mad(**options)
