"""Random changes of examples; half precision; schedules that restart; batches of one size."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_zoo import Batch, compose, replay, reset_optimiser, run_stream, supervised
from cl_zoo.augmentation import augment, random_crop, random_flip
from cl_zoo.language import decoder
from cl_zoo.layers import linear_attention
from cl_zoo.models import mlp
from cl_zoo.streams import as_batch
from cl_zoo.wrappers import mixed_precision
from tests.tiny import tiny_learner, tiny_stream

KEY = jax.random.key(7)


def test_a_crop_is_the_image_moved() -> None:
    image = jnp.arange(1, 31, dtype=jnp.uint8).reshape(5, 6)
    padded = np.pad(np.asarray(image), 2)
    seen = set()
    for key in jax.random.split(KEY, 60):
        found = np.asarray(random_crop(2)(key, image))
        places = [(r, c) for r in range(5) for c in range(5) if np.array_equal(padded[r : r + 5, c : c + 6], found)]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) > 18  # of 25
    colours = jnp.stack([image, image, image], axis=-1)
    assert random_crop(1)(KEY, colours).shape == (5, 6, 3)


def test_a_flip_mirrors_half_of_the_images() -> None:
    image = jnp.arange(6.0).reshape(2, 3)
    found = jax.vmap(random_flip(), (0, None))(jax.random.split(KEY, 400), image)
    flipped = np.array([np.array_equal(one, image[:, ::-1]) for one in found])
    assert 160 < flipped.sum() < 240
    assert all(np.array_equal(one, image) for one in found[~flipped])


def test_the_network_learns_from_changed_examples_and_the_memory_keeps_them_as_they_came() -> None:
    seen: list[Any] = []
    add = lambda key, x: x + 100 + jax.random.randint(key, (), 0, 1000)  # noqa: E731

    def loss(outputs: Any, y: Any) -> Any:
        return jnp.zeros(outputs.shape[0]) + outputs.sum() * 0

    net = mlp((2,), 3, hidden=())

    def apply(params: Any, state: Any, x: Any, **options: Any) -> Any:
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), x)
        return net.apply(params, state, x, **options)

    model = net.__class__(net.init, apply)
    learner = compose(model, optax.sgd(0.1), supervised(loss), replay(8, batch_size=2), augment(add))
    batch = Batch(jnp.arange(8.0).reshape(4, 2), jnp.zeros(4, jnp.int32), None, jnp.ones(4))
    state = learner.init(KEY, batch)
    state, _ = learner.update(state, batch)
    first = list(seen)[-1]
    seen.clear()
    state, _ = learner.update(state, batch)
    moved = first[:4] - np.asarray(batch.x)
    assert (moved >= 100).all() and (moved[:, 0] == moved[:, 1]).all() and len(set(moved[:, 0])) > 1
    again = seen[-1][:4] - np.asarray(batch.x)
    assert (again != moved).any()
    kept = [leaf for leaf in jax.tree.leaves(state.parts["replay"]) if leaf.shape == (8, 2)]
    assert len(kept) == 1 and 0 < kept[0].max() < 10


def test_a_function_that_changes_the_kind_is_refused(tiny_images: Any) -> None:
    stream = tiny_stream(tiny_images)
    learner = tiny_learner(stream, supervised(), augment(lambda key, x: x.astype(jnp.float32)))
    with pytest.raises(ValueError, match=r"augment: function makes float32\[8, 4, 4\] of uint8\[8, 4, 4\]"):
        run_stream(learner, stream, KEY)


def test_half_precision_computes_in_half_and_trains_in_full() -> None:
    full = mlp((8, 8), 3, hidden=(16,))
    half = mixed_precision(full)
    x = jax.random.randint(KEY, (4, 8, 8), 0, 256).astype(jnp.uint8)  # scaled within the network
    params, state = half.init(KEY, x)
    found, wanted = half.apply(params, state, x)[0], full.apply(params, state, x)[0]
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, rtol=0.05, atol=0.02)
    assert np.abs(found - wanted).max() > 1e-6
    learner = compose(half, optax.adam(1e-2), supervised())
    batch = Batch(x, jnp.array([0, 1, 2, 0]), None, jnp.ones(4))
    begun = learner.init(KEY, batch)
    products = [
        line for line in str(jax.make_jaxpr(learner.update)(begun, batch)).splitlines() if "dot_general" in line
    ]
    assert len(products) >= 4 and all(":bf16[" in line for line in products)
    after, metrics = jax.jit(learner.update)(begun, batch)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((after.params, after.opt_state[0].mu)))
    assert metrics["loss"].dtype == jnp.float32
    with pytest.raises(ValueError, match="dtype is float32, but it must be bfloat16 or float16"):
        mixed_precision(full, jnp.float32)


def test_half_precision_reaches_products_inside_of_loops() -> None:
    net = decoder(11, [(linear_attention(8, heads=2), 16, 2)])
    half = mixed_precision(net.model)
    x = jnp.arange(12).reshape(2, 6) % 11
    params, state = half.init(KEY, x)
    text = str(jax.make_jaxpr(lambda p: half.apply(p, state, x)[0])(params))
    assert text.count(":bf16[") > 5
    np.testing.assert_allclose(
        half.apply(params, state, x)[0], net.model.apply(params, state, x)[0], rtol=0.1, atol=0.05
    )


@pytest.mark.parametrize("only", [True, False])
def test_schedules_restart_with_a_task(tiny_images: Any, only: bool) -> None:
    """Warm-up begins again; the moments stay if only the schedule is reset."""
    stream = tiny_stream(tiny_images)
    optimiser = optax.adam(optax.linear_schedule(0.0, 0.1, 100))
    learner = tiny_learner(stream, supervised(), reset_optimiser(only_schedule=only), optimiser=optimiser)
    states = {}
    measure = lambda learner, state, stream, key: state.opt_state  # noqa: E731
    states = run_stream(learner, stream, KEY, measure={"state": measure}).measures["state"]
    assert states[1].count.tolist() == [0, 6, 6, 6]
    assert states[0].count.tolist() == ([0, 6, 12, 18] if only else [0, 6, 6, 6])


def test_batches_of_one_size() -> None:
    batch = as_batch({"a": np.ones((3, 2), np.uint8)}, [4, 5, 6], size=5, task=1)
    assert batch.x["a"].shape == (5, 2) and batch.x["a"].dtype == jnp.uint8
    assert batch.y.tolist() == [4, 5, 6, 0, 0] and batch.weight.tolist() == [1, 1, 1, 0, 0]
    assert batch.task.tolist() == [1] * 5
    assert as_batch(np.ones((3, 2))).y is None
    for x, y, size, message in (
        (np.ones((3, 2)), np.ones(2), None, "must be of the same examples"),
        (np.ones((0, 2)), None, None, "must be of the same examples"),
        (np.ones((3, 2)), None, 2, "size is 2, but it must be at least 3"),
    ):
        with pytest.raises(ValueError, match=message):
            as_batch(x, y, size=size)
