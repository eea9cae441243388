"""Symptoms from reports about other libraries, tried here: right, or refused in one line."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from cl_zoo import accuracy, compose, der, ewc, fit, gdumb, la_maml, replay, run_stream, supervised, sweep
from cl_zoo.datasets import LabelledImages
from cl_zoo.evaluation import dormant_fraction, effective_rank
from cl_zoo.evaluation.metrics import average_accuracy, average_incremental_accuracy
from cl_zoo.language import decoder
from cl_zoo.layers import softmax_attention
from cl_zoo.losses import (
    IGNORED,
    all_tokens_right,
    cross_entropy,
    divergence,
    label_accuracy,
    mask_outputs,
    soft_cross_entropy,
    squared_error,
    token_accuracy,
    token_losses,
    weighted_mean,
)
from cl_zoo.models import from_linen, from_nnx, mlp
from cl_zoo.streams import split_mnist
from cl_zoo.wrappers import lora, merge_adapters
from tests.tiny import array_tasks, tiny_learner, tiny_stream

KEY = jax.random.key(0)
NET = mlp((4,), 2, hidden=(8,))


def stream_of(x: Any, y: Any, outputs: int, **options: Any) -> Any:
    """One task of 40 examples."""
    return array_tasks(x[None], y[None], outputs, **{"steps": 30, **options})


X = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
SIDE = np.where(X[:, 0] > 0, 1, -1)


def test_minus_one_is_a_number_for_losses_that_do_not_read_labels() -> None:
    """Hinge losses on -1 and +1, and regression on whole numbers."""
    for loss, y in (
        (lambda o, y: optax.hinge_loss(o[:, 0], y.astype(jnp.float32)), SIDE),
        (squared_error, SIDE[:, None]),
    ):
        score = lambda o, batch: (jnp.sign(o[:, 0]) == jnp.ravel(batch.y)).astype(jnp.float32)  # noqa: E731
        both = [
            run_stream(compose(NET if y.ndim == 1 else mlp((4,), 1), optax.adam(0.05), supervised(loss)), stream, KEY)
            for stream in (stream_of(X, y.astype(t), 1 + (y.ndim == 1), score=score) for t in (np.int32, np.float32))
        ]
        np.testing.assert_allclose(both[0].metrics["loss"], both[1].metrics["loss"], rtol=1e-5)
        np.testing.assert_array_equal(both[0].accuracy, both[1].accuracy)
        assert both[0].accuracy[-1, 0] > 0.9


def test_minus_one_is_a_number_for_the_losses_of_other_components_too() -> None:
    score = lambda o, batch: -jnp.abs(o[:, 0] - batch.y[:, 0].astype(jnp.float32))  # noqa: E731
    loss = lambda o, y: squared_error(o, y.astype(jnp.float32))  # noqa: E731
    whole, fractions = (
        run_stream(
            compose(mlp((4,), 1), optax.sgd(0.01), la_maml(20, rate=0.01, loss=loss)),
            stream_of(X, SIDE[:, None].astype(kind), 1, score=score),
            KEY,
        )
        for kind in (np.int32, np.float32)
    )
    np.testing.assert_allclose(whole.metrics["loss"], fractions.metrics["loss"], rtol=1e-5)


def test_a_label_that_is_no_output_scores_nan() -> None:
    outputs = jnp.eye(5)[jnp.array([1, 2, 3, 3])]
    np.testing.assert_array_equal(label_accuracy(outputs, jnp.array([1, 2, -100, 7])), [1, 1, jnp.nan, jnp.nan])
    assert jnp.isnan(token_accuracy(outputs[None], jnp.array([[1, 2, -100, 3]])))
    assert jnp.isnan(all_tokens_right(outputs[None], jnp.array([[1, 2, 3, 9]])))
    assert token_accuracy(outputs[None], jnp.array([[1, 2, IGNORED, IGNORED]])) == 1
    with pytest.raises(ValueError, match="label_accuracy: labels are float32, but must be whole numbers"):
        label_accuracy(outputs, jnp.zeros(4))


def test_narrow_labels_are_labels() -> None:
    assert float(cross_entropy(jnp.zeros((1, 256)), jnp.array([3], jnp.uint8))[0]) == pytest.approx(np.log(256))
    assert float(cross_entropy(jnp.zeros((1, 200)), jnp.array([3], jnp.int8))[0]) == pytest.approx(np.log(200))
    assert jnp.isnan(cross_entropy(jnp.zeros((1, 5)), jnp.array([255], jnp.uint8)))[0]
    outputs = jnp.eye(256)[jnp.array([[255, 255]])]
    assert float(token_accuracy(outputs, jnp.array([[255, 0]], jnp.uint8))[0]) == 0.5
    assert jnp.all(jnp.isfinite(token_losses(outputs, jnp.array([[255, 0]], jnp.uint8))))


def test_bfloat16_logits_have_a_loss() -> None:
    logits = jnp.array([[8.0, 0, 0, 0]])
    half = cross_entropy(logits.astype(jnp.bfloat16), jnp.array([0]))
    np.testing.assert_allclose(half, cross_entropy(logits, jnp.array([0])), rtol=1e-2)


def test_the_label_of_a_masked_class_is_no_loss(tiny_images: Any) -> None:
    stream = tiny_stream(tiny_images, "class")
    learner = tiny_learner(stream, supervised())
    batch, _ = stream.next(stream.init(KEY))
    state = learner.init(KEY, batch)
    wrong = batch._replace(y=batch.y.at[0].set(5))
    assert jnp.isfinite(learner.update(state, batch)[1]["loss"])
    assert jnp.isnan(learner.update(state, wrong)[1]["loss"])
    assert jnp.isfinite(learner.update(state, wrong._replace(weight=wrong.weight.at[0].set(0)))[1]["loss"])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: mask_outputs(jnp.ones((1, 3)), jnp.array([0.0, -jnp.inf, 0.0])), "active is float32.* array of bool"),
        (lambda: mask_outputs(jnp.ones((1, 3)), [True, False, True]), "active is list, .* array of bool"),
        (lambda: mask_outputs(jnp.ones((1, 3), int), jnp.ones(3, bool)), "outputs are int32.* floating point"),
        (lambda: divergence(jnp.ones((4, 5)), jnp.ones((4, 1)), "forward"), "must be of one shape"),
        (lambda: soft_cross_entropy(jnp.ones((4, 5)), jnp.ones((1, 5)), 1.0), "must be of one shape"),
        (lambda: soft_cross_entropy(jnp.ones((4, 5)), jnp.ones((4, 5)), 0.0), "temperature is 0, .* above 0"),
        (lambda: average_accuracy(run_stream(LEARNER, LABELLED, KEY)), "is a Result"),
        (lambda: run_stream(LEARNER, LABELLED, KEY, measure=accuracy()), "measure is a Measure, .* mapping by name"),
        (lambda: run_stream(LEARNER, LABELLED, KEY, measure={"a": accuracy}), "'a' is the function accuracy; call it"),
        (lambda: fit(LEARNER, LABELLED, KEY, None), "fit: directory is None, but it must be a path"),
        (lambda: LABELLED.evaluation(99, "test"), "stream: task is 99, but the tasks are 0 to 0"),
        (lambda: ewc(jnp.array([100.0])), "strength is .* must be a finite number"),
        (lambda: stream_of(X, X[:, 0], 1, size=lambda d, s: jnp.array([0])), "size gives a task of 0"),
        (lambda: sweep(with_ewc, jnp.array([1.0, -1e4]), LABELLED, KEY[None]), "strength is -10000"),
        (lambda: run_stream(LBFGS, LABELLED, KEY), "compose: the optimiser needs more than gradients"),
    ],
)  # fmt: skip
def test_what_is_refused(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        call()
    assert "\n" not in str(error.value)


LABELLED = stream_of(X, (SIDE > 0).astype(np.int32), 2)
LEARNER = compose(NET, optax.sgd(0.1), supervised())
LBFGS = compose(NET, optax.lbfgs(), supervised())


def with_ewc(strength: Any) -> Any:
    return compose(NET, optax.sgd(0.1), supervised(), ewc(strength))


def test_what_a_learner_is_given_is_looked_at() -> None:
    batch, _ = LABELLED.next(LABELLED.init(KEY))
    state = LEARNER.init(KEY, batch)
    for call, said in (
        (lambda: LEARNER.init(KEY, (batch.x, batch.y)), "init: batch is tuple, but it must be a Batch"),
        (lambda: LEARNER.init(0, batch), "init: key is int"),
        (lambda: LEARNER.update(state, batch._replace(task=0)), "task of the batch is 0, but it must be an array"),
        (lambda: LEARNER.update(state, batch._replace(weight=None)), "weight of the batch is None, but it must be"),
        (
            lambda: LEARNER.update(state, batch._replace(y=batch.y[:6])),
            "y of the batch has 6 examples, .* 8",
        ),
        (lambda: LEARNER.update(batch, state), "state is Batch, but it must be a TrainState"),
        (lambda: LEARNER.predict(state.params, batch.x), "state is dict, but it must be a TrainState"),
        (lambda: LEARNER.predict(state, batch.x[:0]), "x has no examples"),
        (lambda: LEARNER.update(state, jax.tree.map(lambda leaf: leaf[:0], batch)), "the batch has no examples"),
        (lambda: LEARNER.begin_task(state, 9), "task is int, but it must be a TaskInfo"),
    ):
        with pytest.raises(ValueError, match=said):
            call()


def test_weights_that_are_whole_or_negative() -> None:
    assert weighted_mean(jnp.array([1.0, 5.0]), jnp.array([1.0, -1.0])) == 1
    batch, _ = LABELLED.next(LABELLED.init(KEY))
    learner = compose(NET, optax.sgd(0.1), supervised(), replay(60, batch_size=8, weighting="tasks"))
    state = learner.init(KEY, batch)
    states = [state, state]
    for _ in range(3):
        for i, weight in enumerate((jnp.ones(8), jnp.ones(8, jnp.int32))):
            later = states[i]._replace(task=jnp.int32(1))
            states[i] = learner.update(later, batch._replace(weight=weight))[0]
    for a, b in zip(*(jax.tree.leaves(one.params) for one in states), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_memory_takes_one_kind_of_examples() -> None:
    learner = compose(NET, optax.sgd(0.1), supervised(), replay(8, batch_size=4))
    batch, _ = LABELLED.next(LABELLED.init(KEY))
    state = learner.init(KEY, batch._replace(x=batch.x.astype(jnp.uint8)))
    with pytest.raises(ValueError, match="memory: an example is float32.*, but the memory was made for uint8"):
        learner.update(state, batch)


@pytest.mark.parametrize("component", [replay(50, batch_size=4, memory="ring", n_classes=1), gdumb(50, 1)])
def test_a_memory_by_class_has_place_for_all(component: Any) -> None:
    batch, _ = LABELLED.next(LABELLED.init(KEY))
    parts = [component] if component.name == "gdumb" else [supervised(), component]
    with pytest.raises(ValueError, match="n_classes is 1, but the model has 2 outputs"):
        compose(NET, optax.sgd(0.1), *parts).init(KEY, batch)


def test_adapters_are_not_a_state() -> None:
    model = lora(mlp((4,), 2, hidden=(8,)), 2, targets=("kernel",), merged=True)
    learner = compose(model, optax.sgd(0.1), supervised())
    batch, _ = LABELLED.next(LABELLED.init(KEY))
    learner = learner.drawn(KEY, batch)
    state = learner.init(KEY, batch)
    merge_adapters(learner.model, state.params, learner.model.weights)
    for wrong in (state, {}):
        with pytest.raises(ValueError, match="params has .* arrays, of which .* but it must be the model's parameters"):
            merge_adapters(learner.model, wrong, learner.model.weights)


def test_outputs_of_minus_infinity_are_kept() -> None:
    def net(rngs: Any) -> Any:
        return Closed(rngs)

    learner = compose(from_nnx(net), optax.sgd(0.1), supervised(), der(20, alpha=0.5, batch_size=4))
    assert jnp.all(jnp.isfinite(run_stream(learner, LABELLED, KEY).metrics["loss"]))


class Closed(nnx.Module):
    """Its third output is never."""

    def __init__(self, rngs: nnx.Rngs):
        self.inner = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return jnp.concatenate([self.inner(x), jnp.full((x.shape[0], 1), -jnp.inf)], axis=1)


def test_tokens_outside_of_the_vocabulary_are_nan() -> None:
    net = decoder(5, [(softmax_attention(8, 2), 8, 1)])
    tokens = jnp.array([[1, 2], [1, 9], [-1, 2], [-100, 2]])
    params, state = net.model.init(KEY, tokens)
    outputs, _, _ = net.model.apply(params, state, tokens)
    assert jnp.all(jnp.isfinite(outputs[0])) and jnp.all(jnp.any(jnp.isnan(outputs[1:]), axis=(1, 2)))


def test_probes_and_scores_of_nan() -> None:
    assert jnp.isnan(dormant_fraction(jnp.array([[jnp.nan, 1.0], [2.0, 1.0]])))
    assert jnp.isnan(effective_rank(jnp.full((3, 3), jnp.nan)))
    h = jnp.array([[0.0, 1.0, 2.0], [jnp.nan] * 3])
    assert float(dormant_fraction(h, jnp.array([1.0, 0.0]))) == pytest.approx(1 / 3)
    matrix = np.array([[0.1, 0.1], [0.8, np.nan], [0.6, 0.8]])
    assert average_incremental_accuracy(matrix) == pytest.approx(0.75)


class OwnKeys(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.inner = nnx.Linear(4, 2, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=1))

    def __call__(self, x: Any) -> Any:
        return self.inner(self.drop(x))


class IsTraining(linen.Module):
    @linen.compact
    def __call__(self, x: Any, is_training: bool = False) -> Any:
        return linen.Dense(2)(linen.Dropout(0.5)(x, deterministic=not is_training))


class NoSwitch(linen.Module):
    @linen.compact
    def __call__(self, x: Any, at_work: bool = False) -> Any:
        return linen.Dense(2)(linen.Dropout(0.5)(x, deterministic=not at_work))


class Frozen(nnx.Module):
    """Statistics that never move, beside a dropout that does."""

    def __init__(self, rngs: nnx.Rngs):
        self.inner = nnx.Linear(4, 2, rngs=rngs)
        self.drop, self.norm = nnx.Dropout(0.5, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.inner(self.norm(self.drop(x), use_running_average=True))


@pytest.mark.parametrize("made", [lambda: from_nnx(OwnKeys), lambda: from_linen(IsTraining())], ids=["nnx", "linen"])
def test_every_step_has_its_own_dropout(made: Any) -> None:
    model, x = made(), jnp.ones((3, 4))
    params, state = model.init(KEY, x)
    passes = [model.apply(params, state, x, key=jax.random.key(i), train=True)[0] for i in range(3)]
    assert not np.array_equal(passes[0], passes[1]) and not np.array_equal(passes[1], passes[2])
    still = [model.apply(params, state, x)[0] for _ in range(2)]
    np.testing.assert_array_equal(*still)


@pytest.mark.parametrize(
    ("made", "what"), [(lambda: from_linen(NoSwitch()), "dropout"), (lambda: from_nnx(Frozen), "batch statistics")]
)
def test_switches_that_nobody_turns(made: Any, what: str) -> None:
    with pytest.raises(ValueError, match=f"the module has {what}, but training and evaluation are the same pass"):
        made().init(KEY, jnp.ones((3, 4)))


def test_label_smoothing_of_masked_outputs_is_named(tiny_images: Any) -> None:
    def smooth(outputs: Any, y: Any) -> Any:
        return optax.softmax_cross_entropy(outputs, optax.smooth_labels(jax.nn.one_hot(y, 6), 0.1))

    stream = tiny_stream(tiny_images, "class")
    with pytest.raises(FloatingPointError, match="a loss of one's own that sees masked outputs"):
        run_stream(tiny_learner(stream, supervised(smooth)), stream, KEY)


def test_pixels_of_another_scale() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 4, 4)).astype(np.uint8)
    labels = np.arange(20) % 2
    spoilt = LabelledImages((noise / 255).astype(np.uint8), labels, noise, labels)
    with pytest.warns(UserWarning, match="train_images is uint8 from 0 to 1, of 255: were they scaled"):
        split_mnist(1, images=spoilt, steps=1, batch_size=4)
    images = LabelledImages(noise, labels, noise, labels)
    with pytest.raises(ValueError, match="epochs is 5 and steps is 8, but only one of them may be given"):
        split_mnist(1, images=images, steps=8, epochs=5, batch_size=4)
    net = mlp((4, 4), 2)
    params, state = net.init(KEY, jnp.asarray(noise))
    with pytest.raises(ValueError, match="scale_images: x is int32, but it must be uint8"):
        net.apply(params, state, jnp.asarray(noise, jnp.int32))
    with pytest.warns(UserWarning, match="from_linen: x is uint8, from 0 to 255, and nothing scales it"):
        from_linen(linen.Dense(2)).init(KEY, jnp.asarray(noise))


def test_statistics_of_one_example_are_refused() -> None:
    batch, _ = LABELLED.next(LABELLED.init(KEY))
    learner = compose(mlp((4,), 2, norm="batch"), optax.sgd(0.1), supervised())
    state = learner.init(KEY, batch)
    with pytest.raises(ValueError, match="batch normalisation: the batch is one example"):
        learner.update(state, jax.tree.map(lambda leaf: leaf[:1], batch))


def test_schedule_free_is_found_wherever_it_hides() -> None:
    free = optax.contrib.schedule_free_sgd(1.0, warmup_steps=2)
    hidden = optax.partition({"a": free}, lambda params: jax.tree.map(lambda _: "a", params))
    batch, _ = LABELLED.next(LABELLED.init(KEY))
    with pytest.raises(ValueError, match="schedule-free"):
        compose(NET, hidden, supervised()).init(KEY, batch)


def test_scores_of_a_stream_leave_out_what_has_no_label() -> None:
    y = np.where(np.arange(40) % 2, IGNORED, (SIDE > 0)).astype(np.int32)
    result = run_stream(compose(NET, optax.adam(0.05), supervised()), stream_of(X, y, 2), KEY)
    assert result.accuracy[-1, 0] > 0.9, "half of the labels are IGNORED"
