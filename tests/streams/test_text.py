"""Windows of text: none crosses a border, each comes as often as it should."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_zoo import Batch, Model, Stream, compose, run_stream, supervised
from cl_zoo.datasets import python_library
from cl_zoo.losses import next_token_loss
from cl_zoo.streams import text_domains
from tests.tiny import same_bytes

KEY = jax.random.key(5)
LENGTH, BATCH = 4, 5


def counted(first: int, n: int) -> bytes:
    """Bytes that say where they are, the first of them `first`."""
    return bytes(range(first, first + n))


# 60, 50 and 140 different bytes, so that a window says where it comes from: 30 % for testing, 20 % for validation.
DOMAINS = {"a": counted(0, 60), "b": counted(60, 50), "c": counted(110, 140)}
PARTS = {
    "train": [(0, 30), (60, 85), (110, 180)],
    "validation": [(30, 42), (85, 95), (180, 208)],
    "test": [(42, 60), (95, 110), (208, 250)],
}


def made(**options: Any) -> Stream:
    settings = {"length": LENGTH, "steps": 7, "batch_size": BATCH, "held_out": 0.3, "validation": 0.2}
    return text_domains(DOMAINS, **{**settings, **options})


@pytest.fixture(scope="module")
def stream() -> Stream:
    return made()


def handed_out(stream: Stream, steps: int, key: Any = KEY) -> Batch:
    """The first batches, `[steps, B, ...]`."""

    @jax.jit
    def draw(stream: Stream, key: Any) -> Batch:
        return jax.lax.scan(lambda cursor, _: stream.next(cursor)[::-1], stream.init(key), length=steps)[1]

    return draw(stream, key)


def first_bytes(batch: Batch) -> np.ndarray:
    """Where each window of weight 1 begins, once it is seen that it is a window."""
    x, y, weight = (np.asarray(leaf).reshape(-1, *leaf.shape[2:]) for leaf in (batch.x, batch.y, batch.weight))
    assert x.dtype == y.dtype == np.int32 and x.shape == y.shape == (len(weight), LENGTH)
    np.testing.assert_array_equal(x, x[:, :1] + np.arange(LENGTH))
    np.testing.assert_array_equal(y, x + 1)
    return x[weight > 0, 0]


def test_what_it_is(stream: Stream) -> None:
    assert stream.n_tasks == 3 and stream.steps == 7
    assert stream.provides == {"boundaries", "begin_sample", "end_sample", "open_outputs"}
    assert stream.tasks.active.shape == (3, 256) and stream.tasks.active.all()
    assert stream.data.text.dtype == jnp.uint8 and stream.data.text.shape == (250,)
    batch = handed_out(stream, 1)
    assert batch.task is None and batch.x.shape == (1, BATCH, LENGTH) and (batch.weight == 1).all()
    assert "task_ids" in made(task_ids=True).provides
    assert handed_out(made(task_ids=True), 8).task[:, 0].tolist() == [0] * 7 + [1]


def test_every_place_comes_once_in_an_epoch() -> None:
    steps = 26 // BATCH * 2  # the first task has 30 - 4 places, of which 25 fill five batches
    stream = made(steps=steps)
    starts = first_bytes(handed_out(stream, 3 * steps)).reshape(3, steps, BATCH)
    for task, (low, high) in enumerate(PARTS["train"]):
        assert starts[task].min() >= low and starts[task].max() + LENGTH < high, "windows stay in their part"
    epochs = starts[0].reshape(2, -1)
    assert all(len(set(epoch)) == 25 for epoch in epochs) and not np.array_equal(*epochs)
    assert set(starts[2].ravel()) <= set(range(110, 176)) and len(set(starts[2].ravel())) == 50
    many = first_bytes(handed_out(made(steps=200), 200))
    assert set(many) == set(range(26)), "every place comes, the first and the last too"


@pytest.mark.parametrize("split", ["validation", "test"])
def test_held_out_windows_follow_each_other(split: str, stream: Stream) -> None:
    for options in ({}, {"evaluation_batch": 3}):
        rows = jax.jit(made(**options).evaluation, static_argnums=1)
        for task, (low, high) in enumerate(PARTS[split]):
            batch = rows(jnp.int32(task), split)
            assert sorted(first_bytes(batch)) == list(range(low, high - LENGTH, LENGTH))
            x = np.asarray(batch.x)
            assert x.min() >= low and np.asarray(batch.y).max() < high, "rows of weight 0 too"


def test_samples_are_of_training_text_and_bounded(stream: Stream) -> None:
    sample = jax.jit(stream.sample)
    for task, (low, high) in enumerate(PARTS["train"]):
        starts = first_bytes(sample(jnp.int32(task), KEY))
        assert sorted(starts) == list(range(low, high - LENGTH))
    small = jax.jit(made(sample_size=7, sample_batch=4).sample)
    found = [first_bytes(small(jnp.int32(1), jax.random.key(i))) for i in range(2)]
    assert len(set(found[0])) == 7 and set(found[0]) != set(found[1])
    big = text_domains({"a": bytes(5000)}, length=4)
    assert jax.eval_shape(big.sample, jnp.int32(0), KEY).x.shape == (8, 32, 4)


def test_rows_follow_from_the_cursor(stream: Stream) -> None:
    batches = handed_out(stream, 10)
    step = jax.jit(Stream.next)
    cursor = stream.init(KEY)._replace(step=jnp.int32(8))
    same_bytes(step(stream, cursor)[0], jax.tree.map(lambda leaf: leaf[8], batches))
    keys = jax.random.split(KEY, 2)
    together = jax.jit(jax.vmap(lambda k: stream.next(stream.init(k))[0]))(keys)
    for i, key in enumerate(keys):
        alone = step(stream, stream.init(key))[0]
        same_bytes(jax.tree.map(lambda leaf, i=i: leaf[i], together), alone)
    assert not np.array_equal(together.x[0], together.x[1])


def test_another_order_of_domains(stream: Stream) -> None:
    keys = jax.random.split(KEY, 4)
    one_copy = stream.data._replace(text=None, start=0, size=0)
    drawn = jax.jit(jax.vmap(lambda s, k: s.reorder(k).data, in_axes=(None, 0), out_axes=one_copy))(stream, keys)
    assert drawn.text.shape == (250,)
    orders = np.asarray(drawn.start[:, 0])
    assert len({order.tobytes() for order in orders}) > 1
    for i in range(4):
        assert sorted(orders[i]) == [0, 60, 110]
        other = stream.reorder(keys[i])
        np.testing.assert_array_equal(other.data.start, drawn.start[i])
        task = list(orders[i]).index(110)
        starts = first_bytes(jax.jit(Stream.evaluation, static_argnums=2)(other, jnp.int32(task), "test"))
        assert sorted(starts) == list(range(208, 246, 4))
    np.testing.assert_array_equal(made(key=keys[1]).data.start, drawn.start[1])


def test_joint_batches_draw_from_all_domains() -> None:
    starts = first_bytes(handed_out(made(joint="all"), 7))
    assert (starts < 30).any() and ((starts >= 110) & (starts < 176)).any()


def test_score_is_minus_the_bits_of_a_byte(stream: Stream) -> None:
    batch = jax.tree.map(lambda leaf: leaf[0], handed_out(stream, 1))
    np.testing.assert_allclose(stream.score(jnp.zeros((BATCH, LENGTH, 256)), batch), -8.0, rtol=1e-6)
    halves = jnp.where(jnp.arange(256) < 128, 0.0, -1e9)
    np.testing.assert_allclose(stream.score(jnp.tile(halves, (BATCH, LENGTH, 1)), batch), -7.0, rtol=1e-6)


def bigram() -> Model:
    """A table of logits by the byte before."""

    def apply(params: Any, model_state: Any, x: Any, **_: Any) -> Any:
        return params[x], model_state, {}

    return Model(lambda key, x: (jnp.zeros((256, 256)), ()), apply)


def test_a_domain_is_learnt_and_others_are_not() -> None:
    # Bytes modulo 8, so that test windows hold the same pairs as training windows: 0 to 7, and 8 to 15.
    domains = {"low": bytes(range(8)) * 30, "high": bytes(range(8, 16)) * 30}
    stream = text_domains(domains, length=LENGTH, steps=60, batch_size=BATCH)
    learner = compose(bigram(), optax.adam(0.3), supervised(next_token_loss), tasks=stream.tasks)
    scores = np.asarray(run_stream(learner, stream, jax.random.key(0)).accuracy)
    np.testing.assert_allclose(scores[0], -8, rtol=1e-5)
    assert scores[1, 0] > -0.1 and scores[2, 1] > -0.1
    np.testing.assert_allclose(scores[1, 1], -8, rtol=1e-5)


def test_the_library_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    domains = python_library(limit=3000)
    monkeypatch.setattr("cl_zoo.streams.text.python_library", lambda: domains)
    stream = text_domains(length=16, steps=2, batch_size=2)
    assert stream.n_tasks == 2 and stream.data.size.tolist() == [[2700, 2700], [0, 0], [300, 300]]
    batch = jax.jit(Stream.evaluation, static_argnums=2)(stream, jnp.int32(1), "test")
    assert bytes(np.asarray(batch.x[0, 0]).astype(np.uint8)) == domains["docstrings"][2700:2716]
    with pytest.raises(ValueError, match="there are no validation examples"):
        stream.evaluation(jnp.int32(0), "validation")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"domains": {}}, "domains is empty"),
        ({"domains": {"a": "text"}}, "domain 'a' is str, but it must be bytes"),
        ({"domains": {"a": bytes(20)}}, "domain 'a' has 2 test bytes of 20; there must be at least 5"),
        ({"domains": {"a": bytes(50), "b": b""}}, "domain 'b' has 0 train bytes of 0"),
        ({"batch_size": 60}, "batch_size is 60, but domain 'a' has 54 train bytes of 60; there must be at least 64"),
        ({"validation": 0.01}, "domain 'a' has 1 validation bytes of 60"),
        ({"held_out": 0.0}, "held_out is 0 and validation is 0, but held_out must be above 0"),
        ({"held_out": 0.5, "validation": 0.5}, "held_out is 0.5 and validation is 0.5"),
        ({"held_out": 1.5}, "held_out is 1.5"),
        ({"length": 0}, "length is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"joint": "both"}, "joint is 'both'"),
        ({"task_ids": 2}, "task_ids is 2"),
    ],
)
def test_impossible_values_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        text_domains(**{"domains": DOMAINS, "length": LENGTH, "batch_size": BATCH, **options})
    assert "\n" not in str(error.value)
