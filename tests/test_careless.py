"""What a user may give by mistake to `compose`, the runners, losses and masks: refused in one line, or right."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_zoo import (
    Batch,
    NonFiniteError,
    Stream,
    agem,
    catalogue,
    compose,
    der,
    ewc,
    fisher_merging,
    fit,
    lwf,
    maml,
    replay,
    reptile,
    run_stream,
    slda,
    supervised,
    sweep,
    synaptic_intelligence,
    weight_interpolation,
    wise_ft,
)
from cl_zoo.losses import (
    IGNORED,
    all_tokens_right,
    cross_entropy,
    divergence,
    label_accuracy,
    mask_outputs,
    next_token_loss,
    soft_cross_entropy,
    squared_error,
    token_accuracy,
    weighted_mean,
)
from cl_zoo.models import mlp
from cl_zoo.training import loop
from cl_zoo.types import TaskInfo
from tests.contract.cases import case
from tests.tiny import array_tasks, close, same_bytes, tiny_learner, tiny_stream

KEY = jax.random.key(3)
MODEL = mlp((4, 4), 6, hidden=(5,))


@pytest.fixture(scope="module")
def stream(tiny_images: Any) -> Any:
    return tiny_stream(tiny_images, "class")


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        (
            (MODEL, optax.sgd(0.1), supervised),
            {},
            "the function supervised, but it must be a Component; call it: supervised()",
        ),
        ((MODEL, optax.sgd(0.1), [supervised()]), {}, "a component is list, .* one by one"),
        ((MODEL, optax.sgd(0.1), None), {}, "a component is NoneType"),
        ((MODEL, optax.sgd, supervised()), {}, "optimiser is the function sgd"),
        ((MODEL, 0.1, supervised()), {}, "optimiser is float, but it must be an optax"),
        ((mlp, optax.sgd(0.1), supervised()), {}, "model is the function mlp, but it must be a Model; call it"),
        ((lambda x: x, optax.sgd(0.1), supervised()), {}, "model is the function <lambda>"),
        (
            (MODEL, optax.sgd(0.1), supervised()),
            {"tasks": 5},
            "tasks is int, but it must be a TaskInfo, as stream.tasks",
        ),
        ((MODEL, optax.sgd(0.1), supervised()), {"tasks": [0, 1]}, "tasks is list"),
    ],
)
def test_what_compose_refuses(arguments: Any, options: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"compose: .*{said.replace('(', '[(]').replace(')', '[)]')}") as error:
        compose(*arguments, **options)
    assert "\n" not in str(error.value)


def test_tasks_of_a_stream_itself_and_of_another(stream: Any, tiny_images: Any) -> None:
    with pytest.raises(ValueError, match="tasks is Stream"):
        compose(MODEL, optax.sgd(0.1), supervised(), tasks=stream)
    for other, said in (
        (tiny_stream(tiny_images, "task"), "with other outputs active"),
        (tiny_stream(tiny_images, "class", outputs="all"), "with other outputs active"),
    ):
        learner = compose(MODEL, optax.sgd(0.1), supervised(), tasks=other.tasks)
        with pytest.raises(ValueError, match=f"composed with tasks of another stream.*{said}"):
            run_stream(learner, stream, KEY)
        with pytest.raises(ValueError, match=f"composed with tasks of another stream.*{said}"):
            sweep(lambda s, learner=learner: learner, jnp.zeros(1), stream, KEY[None])
    few = TaskInfo(stream.tasks.index[:2], stream.tasks.active[:2])
    with pytest.raises(
        ValueError, match=r"active \[2, 6\] where this one has \[3, 6\]; give compose tasks=stream.tasks"
    ):
        run_stream(compose(MODEL, optax.sgd(0.1), supervised(), tasks=few), stream, KEY)


def test_what_runners_refuse(stream: Any, tmp_path: Any) -> None:
    learner = tiny_learner(stream, supervised())
    make = lambda s: learner  # noqa: E731
    keys = jax.random.split(KEY, 2)
    for call, said in (
        (lambda: run_stream(learner, stream, 0), "run_stream: key is int"),
        (lambda: run_stream(learner, stream, keys), r"key has the shape \(2,\), but it must be one key"),
        (lambda: run_stream(stream, learner, KEY), "learner is Stream"),
        (lambda: run_stream(learner, stream.data, KEY), "stream is ImageData"),
        (lambda: run_stream(supervised(), stream, KEY), "learner is Component"),
        (lambda: fit(learner, stream, 7, tmp_path), "fit: key is int"),
        (
            lambda: sweep(make, jnp.zeros(2), stream, KEY),
            r"sweep: keys has the shape \(\), but it must be an array of keys",
        ),
        (lambda: sweep(make, jnp.zeros(2), stream, [0, 1]), "sweep: keys is list"),
        (lambda: sweep(learner, jnp.zeros(2), stream, keys), "sweep: make is Learner"),
        (lambda: sweep(make, [0.1, 0.2], stream, keys), "settings need one common leading axis"),
        (lambda: sweep(make, jnp.zeros(2), stream, keys, orders=3), "sweep: orders is int"),
    ):
        with pytest.raises(ValueError, match=said) as error:
            call()
        assert "\n" not in str(error.value)


def test_outputs_that_are_a_dict(stream: Any) -> None:
    inner = MODEL.apply_function
    model = type(MODEL)(MODEL.init_function, lambda *a, **k: ({"logits": inner(*a, **k)[0]}, {}, {}))
    with pytest.raises(ValueError, match="outputs are a dict, but with tasks they must be one array"):
        run_stream(compose(model, optax.sgd(0.1), supervised(), tasks=stream.tasks), stream, KEY)


# Labels and tasks that are none.


def test_labels_that_are_none_of_the_outputs() -> None:
    logits = jnp.array([[2.0, 1.0, 0.5]] * 5)
    found = cross_entropy(logits, jnp.array([0, IGNORED, 3, -2, 2]))
    assert np.isnan(found).tolist() == [False, False, True, True, False] and found[1] == 0
    np.testing.assert_allclose(found[0], -jax.nn.log_softmax(logits[0])[0], rtol=1e-6)
    tokens = next_token_loss(logits[None], jnp.array([[0, IGNORED, 2, IGNORED, 1]]))
    np.testing.assert_allclose(tokens, -jnp.mean(jax.nn.log_softmax(logits[0])), rtol=1e-6)
    assert np.isnan(next_token_loss(logits[None], jnp.array([[0, -100, 2, 1, 1]]))).all()
    gradient = jax.grad(lambda z: jnp.sum(cross_entropy(z, jnp.array([IGNORED] * 5))))(logits)
    assert (gradient == 0).all()
    for labels in (jnp.zeros(5), jnp.zeros((5, 1), int), jnp.zeros(4, int)):
        with pytest.raises(ValueError, match="cross_entropy: .*labels"):
            cross_entropy(logits, labels)


@pytest.mark.parametrize("components", [(), (replay(20, batch_size=8),), (der(20, alpha=0.5, beta=0.5, batch_size=8),)])
def test_an_ignored_label_has_weight_0(stream: Any, components: Any) -> None:
    """Parameters and loss are as if its example were absent."""
    learner = tiny_learner(stream, supervised(), *components)
    batch, _ = stream.next(stream.init(KEY))
    state, _ = jax.jit(learner.update)(learner.init(KEY, batch), batch)
    rows = jnp.arange(batch.weight.shape[0]) % 3 == 0
    ignored = batch._replace(y=jnp.where(rows, IGNORED, batch.y))
    absent = batch._replace(weight=jnp.where(rows, 0.0, 1.0))
    (one, told), (two, wanted) = (jax.jit(learner.update)(state, each) for each in (ignored, absent))
    same_bytes((one.params, one.opt_state, told["loss"]), (two.params, two.opt_state, wanted["loss"]))


def test_a_label_outside_is_told_and_not_blamed_on_the_rate(tiny_images: Any) -> None:
    import dataclasses

    given = tiny_stream(tiny_images, "domain")

    def off(data: Any, cursor: Any, agent: Any) -> Any:
        batch, cursor = given.next_function(data, cursor, agent)
        return batch._replace(y=batch.y + 1), cursor

    with pytest.raises(NonFiniteError, match="loss is nan at task 0, step 0; .*a label that is none of the outputs"):
        run_stream(tiny_learner(given, supervised()), dataclasses.replace(given, next_function=off), KEY)


def test_a_task_that_does_not_exist(tiny_images: Any) -> None:
    given = tiny_stream(tiny_images, "task")
    learner = tiny_learner(given, supervised())
    batch, _ = given.next(given.init(KEY))
    state = learner.init(KEY, batch)
    for task in (3, -1):
        told = jnp.full(batch.weight.shape[0], task)
        with pytest.raises(ValueError, match=f"predict: task is {task}, but the tasks are 0 to 2"):
            learner.predict(state, batch.x, told)
        assert np.isnan(jax.jit(learner.predict)(state, batch.x, told)).all()
        _, metrics = jax.jit(learner.update)(state, batch._replace(task=told))
        assert np.isnan(metrics["loss"])
    assert np.isfinite(learner.predict(state, batch.x, batch.task)).all()


# Shapes that broadcast.


def test_means_take_one_number_for_each_example() -> None:
    for shape in ((4, 1), (1,), (3,), ()):
        with pytest.raises(ValueError, match=r"weighted_mean: values are .* and weights \(4,\), but a loss"):
            weighted_mean(jnp.ones(shape), jnp.ones(4))
    assert weighted_mean(jnp.array([1.0, jnp.nan, 3.0]), jnp.array([1.0, 0.0, 1.0])) == 2


def test_masks_are_of_outputs_or_of_examples() -> None:
    outputs = jnp.ones((2, 3, 4))
    own = jnp.array([[True, False, True, True], [False, True, True, True]])
    found = mask_outputs(outputs, own)
    assert (found[0, :, 1] < -1e37).all() and (found[1, :, 0] < -1e37).all() and (found > 0).sum() == 18
    for mask in (jnp.ones((3, 4), bool), jnp.ones(3, bool), jnp.ones((2, 3, 4), bool)):
        with pytest.raises(ValueError, match="mask_outputs: active is"):
            mask_outputs(outputs, mask)


def test_squared_errors() -> None:
    outputs, y = jnp.array([[1.0], [4.0]]), jnp.array([3.0, 3.0])
    assert squared_error(outputs, y).tolist() == squared_error(outputs, y[:, None]).tolist() == [4.0, 1.0]
    assert squared_error(jnp.eye(2), jnp.zeros((2, 2))).tolist() == [0.5, 0.5]
    for other in (jnp.zeros(3), jnp.zeros((2, 2)), jnp.zeros((1, 2))):
        with pytest.raises(ValueError, match="squared_error: outputs are"):
            squared_error(outputs, other)


def test_a_loss_of_another_shape_is_refused(stream: Any) -> None:
    column = supervised(lambda outputs, y: cross_entropy(outputs, y)[:, None])
    with pytest.raises(ValueError, match="a loss or score must give one number for each example"):
        run_stream(tiny_learner(stream, column), stream, KEY)


def test_minus_infinity_is_probability_0() -> None:
    closed = jnp.array([[1.0, -jnp.inf, 0.0]])
    for direction in ("forward", "reverse", "jsd"):
        value, gradient = jax.value_and_grad(lambda z, d=direction: jnp.sum(divergence(z, closed, d)))(closed)
        assert value == pytest.approx(0, abs=1e-6) and np.isfinite(gradient).all()
    value = soft_cross_entropy(closed, closed, 1.0)
    p = np.exp([1.0, 0.0]) / np.exp([1.0, 0.0]).sum()
    np.testing.assert_allclose(value, [-(p * np.log(p)).sum()], rtol=1e-5)


def test_one_output_has_no_softmax() -> None:
    for call in (lambda: soft_cross_entropy(jnp.zeros((2, 1)), jnp.zeros((2, 1)), 1.0),):
        with pytest.raises(ValueError, match="there is one output.*softmax is always 1"):
            call()


@pytest.mark.parametrize("component", [ewc(1.0), ewc(1.0, labels="observed"), lwf()])
def test_regression_is_refused_where_a_softmax_is_needed(component: Any) -> None:
    from cl_zoo.streams import slowly_changing_regression

    stream = slowly_changing_regression(2, steps=3, bits=4, slow_bits=2, target_units=3, evaluation_size=8)
    learner = compose(
        mlp((4,), 1, hidden=(4,)), optax.sgd(0.1), supervised(squared_error), component, tasks=stream.tasks
    )
    with pytest.raises(
        ValueError, match="targets must be classes|for other targets give ewc|one whole number for each example"
    ):
        run_stream(learner, stream, KEY)
    fine = compose(
        mlp((4,), 1, hidden=(4,)),
        optax.sgd(0.1),
        supervised(squared_error),
        ewc(1.0, labels="loss"),
        tasks=stream.tasks,
    )
    assert run_stream(fine, stream, KEY).metrics["ewc/penalty"][1].max() > 0


# What is not a number.


def test_nan_scores_nan() -> None:
    outputs = jnp.array([[jnp.nan, 0.0], [0.0, 1.0], [1.0, 0.0]])
    found = label_accuracy(outputs, jnp.array([0, 1, 1]))
    assert np.isnan(found[0]) and found[1:].tolist() == [1.0, 0.0]
    for score in (token_accuracy, all_tokens_right):
        found = score(jnp.stack([outputs, outputs[::-1]]), jnp.array([[0, 1, 1], [0, 1, IGNORED]]))
        assert np.isnan(found[0]) and not np.isnan(found[1])


def test_a_run_of_a_sweep_that_diverged_scores_nan(stream: Any) -> None:
    make = lambda rate: tiny_learner(stream, supervised(), optimiser=optax.sgd(rate))  # noqa: E731
    result = sweep(make, jnp.array([0.1, jnp.inf]), stream, KEY[None])
    assert np.isfinite(result.accuracy[0]).all() and np.isnan(result.accuracy[1, 0, 1:]).all()
    assert result.finite[0].all() and not result.finite[1].any()


def test_a_part_that_is_not_a_number_is_told(stream: Any, tmp_path: Any) -> None:
    """No loss shows it: an image that is nan goes into the means of `slda` alone."""
    import dataclasses

    def spoilt(data: Any, cursor: Any, agent: Any) -> Any:
        batch, after = stream.next_function(data, cursor, agent)
        x = batch.x.astype(jnp.float32) / 255
        return batch._replace(x=x.at[0].set(jnp.where(cursor.step == 8, jnp.nan, x[0]))), after

    given = dataclasses.replace(stream, next_function=spoilt)
    learner = compose(MODEL, optax.sgd(0.1), slda(), tasks=stream.tasks)
    with pytest.raises(NonFiniteError, match=r"state.parts\['slda'\] is not finite at task 1, step \d"):
        run_stream(learner, given, KEY)
    with pytest.raises(NonFiniteError, match=r"state.parts\['slda'\] is not finite at task 1, step 2.*that of step 6"):
        fit(learner, given, KEY, tmp_path, checkpoint_every=3, checkpoint_seconds=0, progress=False)


# Optimisers that need more.


def test_an_optimiser_that_reads_the_loss(stream: Any) -> None:
    plateau = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1, factor=0.5))
    result = run_stream(tiny_learner(stream, supervised(), optimiser=plateau), stream, KEY)
    assert result.state.opt_state[1].scale < 1 or result.state.opt_state[1].best_value < jnp.inf


def test_inner_losses_of_another_shape_are_refused() -> None:
    from cl_zoo.streams import sinusoids
    from cl_zoo.wrappers import episodic

    stream = sinusoids(steps=2, batch_size=2)
    column = lambda outputs, y: (outputs[:, 0] - y)[:, None] ** 2  # noqa: E731
    learner = compose(episodic(mlp((1,), 1)), optax.adam(1e-3), maml(column, inner=optax.sgd(0.01)), tasks=stream.tasks)
    with pytest.raises(ValueError, match="one number for each example"):
        run_stream(learner, stream, KEY)


def test_the_fisher_is_that_of_the_network_as_it_predicts(stream: Any) -> None:
    """With batch normalisation, a single example's own statistics would leave a gradient of zero."""
    found = {}
    for labels in ("loss", "observed"):
        net = mlp((4, 4), 6, hidden=(8,), norm="batch")
        learner = compose(net, optax.sgd(0.1), supervised(), ewc(0.0, labels=labels), tasks=stream.tasks)
        found[labels] = run_stream(learner, stream, KEY).state.parts["ewc"].precision
    close(found["loss"], found["observed"], rtol=1e-3, atol=1e-6)
    assert max(float(leaf.max()) for leaf in jax.tree.leaves(found["loss"])) > 1e-4


def test_batches_are_of_one_kind() -> None:
    assert Batch(jnp.zeros((1, 2)), None, None, jnp.ones(1)).replayed is None


def test_what_averages_stands_before_what_anchors(stream: Any) -> None:
    """An anchor of weights that are thrown away a moment later pulls to nowhere."""
    for anchors in (ewc(1.0), ewc(1.0, decay=0.9), synaptic_intelligence(1.0), lwf()):
        for averages in (wise_ft(0.5), weight_interpolation(0.5, alignment=None), fisher_merging()):
            wrong = tiny_learner(stream, supervised(), anchors, averages)
            with pytest.raises(ValueError, match=f"{averages.name} changes the parameters.*put {averages.name} before"):
                jax.eval_shape(lambda learner, stream: run_stream(learner, stream, KEY), wrong, stream)
    fine = tiny_learner(stream, supervised(), agem(20, batch_size=8), wise_ft(0.5), ewc(1.0))
    jax.eval_shape(lambda learner, stream: run_stream(learner, stream, KEY), fine, stream)


def test_schedule_free_optimisers_are_refused(stream: Any) -> None:
    free = optax.contrib.schedule_free_sgd(0.1)
    with pytest.raises(ValueError, match="compose: the optimiser is schedule-free"):
        run_stream(tiny_learner(stream, supervised(), optimiser=free), stream, KEY)


def test_meta_learning_refuses_statistics(tiny_images: Any) -> None:
    from functools import partial

    episodes = tiny_stream(tiny_images, "episodes")
    for component in (maml(inner=optax.sgd(0.1)), reptile(inner=optax.sgd(0.1))):
        learner = tiny_learner(episodes, component, net=partial(mlp, norm="batch"))
        with pytest.raises(ValueError, match=f"{component.name}: the model keeps statistics"):
            run_stream(learner, episodes, KEY)


def test_a_loss_may_see_open_outputs_alone(stream: Any) -> None:
    """Label smoothing spreads over the open classes; masked logits of -1e38 would give 1e37."""

    def smooth(outputs: Any, y: Any, active: Any) -> Any:
        active = jnp.broadcast_to(active, outputs.shape)
        log_p = jax.nn.log_softmax(mask_outputs(outputs, active))
        spread = jnp.sum(jnp.where(active, log_p, 0), axis=1) / jnp.sum(active, axis=1)
        return 0.9 * cross_entropy(log_p, y) - 0.1 * spread

    result = run_stream(tiny_learner(stream, supervised(smooth)), stream, KEY)
    assert 0 < result.metrics["loss"].max() < 50


SOFTMAX = 'y is float32\\[8, 3\\], but labels="expected" is for classes.*give ewc labels="loss"'
CLASSES = "y is float32\\[8, 3\\], but .*: it must be one whole number for each example"
VECTORS: dict[str, str | None] = {
    **dict.fromkeys(("ewc", "online_ewc", "fisher_merging"), SOFTMAX),
    "lwf": "lwf: y is float32.*, but lwf distils the softmax of the outputs, so targets must be classes",
    **dict.fromkeys(("der_plus_plus", "er_ace", "gdumb", "icarl", "slda"), CLASSES),
    **dict.fromkeys(("la_maml", "c_maml"), "cross_entropy: outputs are .* and labels"),
    "tent": "none of the model's layers normalises",
    "ttt": "square images",
}
"""Entries that refuse targets of several numbers; all others take them."""


def vectors(y: Any) -> Stream:
    sizes = {"steps": 4, "sample_size": 16, "sample_batch": 8, "evaluation_batch": 20}
    score = lambda outputs, batch: -several(outputs, batch.y)  # noqa: E731
    return array_tasks(jax.random.normal(KEY, (2, 40, 4)), y, 3, score=score, **sizes)


def several(outputs: Any, y: Any) -> Any:
    return jnp.mean(optax.sigmoid_binary_cross_entropy(outputs, y), axis=1)


@pytest.mark.parametrize(
    "name", [entry.name for entry in catalogue().values() if {"domain", "class"} & {*entry.scenarios}]
)
def test_targets_of_several_numbers_are_learned_or_refused(name: str) -> None:
    """Several labels an example, by a loss of one's own."""
    entry = catalogue()[name]
    stream = vectors(jax.random.bernoulli(KEY, 0.3, (2, 40, 3)).astype(jnp.float32))
    made = entry.factory(several) if name == "supervised" else entry.factory(**entry.arguments)
    components = made if isinstance(made, list) else [made]
    if not entry.own_loss:
        components = [supervised(several), *components]

    def program(key: Any) -> Any:
        net = case(name).wrap(mlp((4,), 3, hidden=(5,)))
        learner, carry = loop.start(compose(net, optax.sgd(0.1), *components, tasks=stream.tasks), stream, key)
        state = loop.begin(learner, stream, key, carry[0], 0)
        (state, _), _ = loop.update(learner, stream, (state, carry[1]))
        return loop.finish(learner, stream, key, state, 0)

    if wanted := VECTORS.get(name):
        with pytest.raises(ValueError, match=wanted):
            jax.eval_shape(program, KEY)
    else:
        jax.eval_shape(program, KEY)


def test_what_is_replayed_keeps_its_own_targets() -> None:
    """The memory of rows whose target is a function of the input holds that function."""
    x = jax.random.normal(KEY, (2, 40, 4))
    y = jnp.stack([jnp.sum(x, axis=2), x[..., 0], x[..., 1] * x[..., 2]], axis=2)
    stream = dataclasses.replace(vectors(y), data={"x": x, "y": y})
    for component in (replay(20, batch_size=4), agem(20, batch_size=4), der(20, alpha=0.5, batch_size=4)):
        learner = compose(mlp((4,), 3, hidden=(5,)), optax.sgd(0.01), supervised(several), component)
        part = run_stream(learner, stream, KEY).state.parts[component.name]
        rows = [leaf for leaf in jax.tree.leaves(part) if jnp.ndim(leaf) == 2]
        assert [leaf.shape for leaf in rows[:2]] == [(20, 4), (20, 3)], component.name
        np.testing.assert_allclose(rows[1][:, 0], jnp.sum(rows[0], axis=1), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(rows[1][:, 1], rows[0][:, 0])
        assert jnp.any(rows[1] != 0)


@pytest.mark.parametrize("y", [jnp.zeros((8, 3)), jnp.zeros((8, 3), int), jnp.zeros(8)])
def test_other_targets_are_refused_where_classes_are_meant(y: Any) -> None:
    x = jnp.zeros((8, 4, 4))
    batch = Batch(x, y, None, jnp.ones(8))
    for component, name in (
        (slda(), "slda"),
        (replay(12, batch_size=4, memory="class_balanced", n_classes=6), "memory"),
        (replay(12, batch_size=4, memory="ring", n_classes=6), "memory"),
    ):
        learner = compose(MODEL, optax.sgd(0.1), supervised(lambda outputs, y: outputs[:, 0]), component)
        with pytest.raises(ValueError, match=f"{name}: y is .*: it must be one whole number for each example"):
            jax.eval_shape(lambda key, b, learner=learner: learner.update(learner.init(key, b), b), KEY, batch)
