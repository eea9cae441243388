"""The Fisher diagonal against closed forms, NumPy, and itself."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cl_zoo import Batch, Model
from cl_zoo.estimators import fisher as fisher_module
from cl_zoo.estimators.fisher import fisher_diagonal
from cl_zoo.estimators.moments import logits_layer
from cl_zoo.losses import mask_outputs
from cl_zoo.models import cnn, from_nnx, mlp
from tests.oracles import ewc as oracle

KEY = jax.random.key(1)
LABELS = ("expected", "sampled", "observed")


def batches(n: int = 24, batch: int = 8, shape: tuple[int, ...] = (8, 8), classes: int = 4) -> Batch:
    x = jax.random.normal(KEY, (n, *shape))
    y = jax.random.randint(KEY, (n,), 0, classes)
    flat = Batch(x, y, None, jnp.ones(n))
    return jax.tree.map(lambda leaf: leaf.reshape(n // batch, batch, *leaf.shape[1:]), flat)


def forward(model: Model, model_state: Any, params: Any, batch: Batch, perturb: Any, taps: bool = True) -> Any:
    outputs, _, seen = model.apply(params, model_state, batch.x, perturb=perturb)
    return outputs, seen if taps else {}


def relative(a: Any, b: Any) -> float:
    return max(
        float(jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(y)))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_logistic_regression_has_a_closed_form() -> None:
    """d log p(1|x)/dw = (y - p) x, so F_w = mean p (1 - p) x^2 for two outputs [0, x w + b]."""
    x = jax.random.normal(KEY, (5, 7, 3))
    params = {"output": {"kernel": jnp.array([[0.5], [-1.0], [0.3]]), "bias": jnp.array([0.2])}}

    def logits(params: Any, batch: Batch, perturb: Any) -> Any:
        z = batch.x @ params["output"]["kernel"] + params["output"]["bias"]
        return jnp.concatenate([jnp.zeros_like(z), z], axis=1), {}

    fisher = fisher_diagonal(logits, params, Batch(x, None, None, jnp.ones((5, 7))))
    flat = np.asarray(x, np.float64).reshape(-1, 3)
    p = 1 / (1 + np.exp(-(flat @ np.array([0.5, -1.0, 0.3]) + 0.2)))
    np.testing.assert_allclose(fisher["output"]["kernel"][:, 0], (p * (1 - p)) @ flat**2 / 35, rtol=1e-5)
    np.testing.assert_allclose(fisher["output"]["bias"][0], np.mean(p * (1 - p)), rtol=1e-5)


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("net", ["mlp", "cnn"])
def test_fast_path_equals_slow_path(labels: str, net: str) -> None:
    model = mlp((8, 8), 4, hidden=(6, 5)) if net == "mlp" else cnn((8, 8), 4, channels=(3, 4), hidden=6)
    data = batches()
    params, model_state = model.init(KEY, data.x[0])
    run = partial(fisher_diagonal, params=params, batches=data, labels=labels, key=KEY)
    fast = run(partial(forward, model, model_state))
    slow = run(partial(forward, model, model_state, taps=False))
    assert relative(fast, slow) < 1e-5
    assert all(leaf.min() >= 0 for leaf in jax.tree.leaves(fast))


@pytest.mark.parametrize("labels", ["expected", "observed"])
@pytest.mark.parametrize("taps", [True, False])
def test_result_does_not_depend_on_the_batch_size(labels: str, taps: bool) -> None:
    model = mlp((8, 8), 4, hidden=(6,))
    params, model_state = model.init(KEY, jnp.zeros((1, 8, 8)))
    run = [
        fisher_diagonal(partial(forward, model, model_state, taps=taps), params, batches(batch=size), labels=labels)
        for size in (1, 3, 24)
    ]
    assert relative(run[0], run[2]) < 1e-5
    assert relative(run[1], run[2]) < 1e-5


@pytest.mark.parametrize("labels", ["expected", "observed"])
@pytest.mark.parametrize("taps", [True, False])
def test_it_equals_numpy_with_masked_outputs(labels: str, taps: bool) -> None:
    model = mlp((6,), 5, hidden=(5, 4))
    data = batches(16, 4, (6,), 2)
    params, model_state = model.init(KEY, data.x[0])
    active = jnp.array([True, True, False, False, True])

    def masked(params: Any, batch: Batch, perturb: Any) -> Any:
        outputs, seen = forward(model, model_state, params, batch, perturb, taps)
        return mask_outputs(outputs, active), seen

    ours = fisher_diagonal(masked, params, data, labels=labels)
    flat = np.asarray(data.x).reshape(16, 6).astype(np.float64)
    theirs = oracle.fisher(jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params), flat,
                           np.ravel(data.y), np.asarray(active), labels)  # fmt: skip
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-9), ours, theirs)


def test_batch_square_is_the_square_of_batch_means_and_much_smaller() -> None:
    model = mlp((6,), 2, hidden=(5, 4))
    data = batches(32, 16, (6,), 2)
    params, model_state = model.init(KEY, data.x[0])
    run = partial(fisher_diagonal, partial(forward, model, model_state), params, data, labels="observed")
    wrong = run(batch_square=True)
    doubles = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    theirs = oracle.fisher(doubles, list(np.asarray(data.x, np.float64)), list(np.asarray(data.y)),
                           np.ones(2, bool), "observed", batch_square=True)  # fmt: skip
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-8), wrong, theirs)
    total = [sum(float(leaf.sum()) for leaf in jax.tree.leaves(tree)) for tree in (wrong, run())]
    assert total[0] < total[1] / 2


def test_sampled_labels_give_the_expected_fisher_on_average() -> None:
    model = mlp((6,), 3, hidden=(4,))
    data = batches(16, 16, (6,), 3)
    params, model_state = model.init(KEY, data.x[0])
    run = partial(fisher_diagonal, partial(forward, model, model_state), params, data)
    draws = jax.vmap(lambda key: run(labels="sampled", key=key))(jax.random.split(KEY, 2000))
    for drawn, exact in zip(jax.tree.leaves(draws), jax.tree.leaves(run()), strict=True):
        error = np.abs(drawn.mean(0) - exact) / np.maximum(drawn.std(0) / np.sqrt(2000), 1e-9)
        assert error.max() < 5


def test_rows_of_weight_zero_do_not_count() -> None:
    model = mlp((8, 8), 4, hidden=(6,))
    data = batches()
    params, model_state = model.init(KEY, data.x[0])
    padded = Batch(*(jnp.concatenate([leaf, leaf[:1]]) if leaf is not None else None for leaf in data[:3]),
                   jnp.concatenate([data.weight, jnp.zeros((1, 8))]))  # fmt: skip
    run = partial(fisher_diagonal, partial(forward, model, model_state), params)
    assert relative(run(padded), run(data)) < 1e-6


def test_layers_shared_over_positions_take_the_slow_path() -> None:
    """x [B, T, in] through one kernel: the sum over positions comes before the square."""
    x = jax.random.normal(KEY, (1, 4, 3, 2))
    params = {"layer": {"kernel": jax.random.normal(KEY, (2, 3)), "bias": jnp.zeros(3)}}

    def shared(params: Any, batch: Batch, perturb: Any) -> Any:
        z = batch.x @ params["layer"]["kernel"] + params["layer"]["bias"]
        z = z + perturb["layer"] if perturb else z
        return jnp.sum(jnp.tanh(z), axis=1), {"layer": (batch.x, z)}

    data = Batch(x, jnp.array([[0, 1, 2, 0]]), None, jnp.ones((1, 4)))
    ours = fisher_diagonal(shared, params, data, labels="observed")

    def log_likelihood(params: Any, x: Any, y: Any) -> Any:
        return jax.nn.log_softmax(jnp.sum(jnp.tanh(x @ params["layer"]["kernel"] + params["layer"]["bias"]), axis=0))[y]

    gradients = jax.vmap(jax.grad(log_likelihood), (None, 0, 0))(params, x[0], data.y[0])
    assert relative(ours, jax.tree.map(lambda g: jnp.mean(jnp.square(g), axis=0), gradients)) < 1e-5


@pytest.mark.parametrize("first", [True, False])
def test_kernels_that_are_also_used_beside_their_tap_take_the_slow_path(first: bool) -> None:
    """Weights that are tied: x^2 and g^2 of the recorded use are not the gradient of both."""

    class Tied(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.inner = nnx.Linear(5, 5, rngs=rngs)
            self.output = nnx.Linear(5, 4, rngs=rngs)

        def __call__(self, x: Any, tap: Any) -> Any:
            if first:
                x = jnp.tanh(tap("inner", self.inner, x))
                x = jnp.tanh(self.inner(x))
            else:
                x = jnp.tanh(self.inner(x))
                x = jnp.tanh(tap("inner", self.inner, x))
            return tap("output", self.output, x)

    model = from_nnx(Tied)
    data = batches(shape=(5,))
    params, model_state = model.init(KEY, data.x[0])
    found = fisher_diagonal(partial(forward, model, model_state), params, data, labels="observed")
    slow = fisher_diagonal(partial(forward, model, model_state, taps=False), params, data, labels="observed")
    assert relative(found, slow) < 1e-5


def test_positions_flattened_into_rows_take_the_slow_path() -> None:
    x = jax.random.normal(KEY, (1, 4, 3, 2))
    params = {"layer": {"kernel": jax.random.normal(KEY, (2, 3))}}

    def flattened(params: Any, batch: Batch, perturb: Any) -> Any:
        rows = batch.x.reshape(-1, 2)
        z = rows @ params["layer"]["kernel"]
        z = z + perturb["layer"] if perturb else z
        return jnp.sum(jnp.tanh(z).reshape(-1, 3, 3), axis=1), {"layer": (rows, z)}

    data = Batch(x, jnp.array([[0, 1, 2, 0]]), None, jnp.ones((1, 4)))
    untapped = partial(lambda params, batch, perturb: (flattened(params, batch, None)[0], {}))
    assert relative(fisher_diagonal(flattened, params, data), fisher_diagonal(untapped, params, data)) < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"micro_batch": 0}, "micro_batch is 0"),
        ({"labels": "true"}, "labels is 'true'"),
        ({"labels": "sampled"}, "needs a key"),
        ({"batch_square": True}, "batch_square needs labels"),
    ],
)
def test_impossible_choices_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fisher_diagonal(lambda p, b, e: (b.x, {}), {}, batches(), **options)


def test_observed_labels_must_be_there() -> None:
    with pytest.raises(ValueError, match="needs labels"):
        fisher_diagonal(lambda p, b, e: (b.x, {}), {}, batches()._replace(y=None), labels="observed")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("net", ["mlp", "cnn"])
def test_all_classes_at_once_are_one_after_another(monkeypatch: pytest.MonkeyPatch, net: str, masked: bool) -> None:
    """What is linear in classes, p_j (1 - p_j) and a row of W for each, is what one-hot cotangents give."""
    model = mlp((8, 8), 6, hidden=(5,)) if net == "mlp" else cnn((8, 8, 1), 6, channels=(2,), hidden=3)
    data = batches(8, 4, (8, 8) if net == "mlp" else (8, 8, 1), 6)
    data = data._replace(weight=data.weight.at[1, 2].set(0))
    params, state = model.init(KEY, data.x[0])
    params = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(KEY, leaf.shape), params)

    def outputs(params: Any, batch: Batch, perturb: Any) -> Any:
        logits, taps = forward(model, state, params, batch, perturb)
        return (mask_outputs(logits, jnp.arange(6) != 2) if masked else logits), taps

    assert logits_layer(outputs, params, jax.tree.map(lambda leaf: leaf[0], data)) == "output"
    found = fisher_diagonal(outputs, params, data)
    monkeypatch.setattr(fisher_module, "logits_layer", lambda *_: None)
    assert relative(found, fisher_diagonal(outputs, params, data)) < 1e-5


def test_logits_that_are_more_than_a_layer_are_not_taken_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = mlp((8, 8), 4, hidden=(5,)), batches(8, 4)
    params, state = model.init(KEY, data.x[0])
    first = jax.tree.map(lambda leaf: leaf[0], data)

    def made(change: Any) -> Any:
        def outputs(params: Any, batch: Batch, perturb: Any) -> Any:
            logits, taps = forward(model, state, params, batch, perturb)
            return change(logits, params, taps), taps

        return outputs

    changes: dict[str, Any] = {
        "scaled": lambda z, params, taps: 2 * z,
        "bent": lambda z, params, taps: jnp.tanh(z),
        "beside": lambda z, params, taps: z + taps["hidden_0"][1][:, :4],
        "twice": lambda z, params, taps: z + z,
        "mixed": lambda z, params, taps: z[:, ::-1],
        "shifted": lambda z, params, taps: z + jnp.arange(4.0),
    }
    named = {name: logits_layer(made(change), params, first) for name, change in changes.items()}
    assert named == {name: ("output" if name == "shifted" else None) for name in changes}
    slow = {name: fisher_diagonal(made(change), params, data) for name, change in changes.items()}
    monkeypatch.setattr(fisher_module, "logits_layer", lambda *_: None)
    assert relative(slow["shifted"], fisher_diagonal(made(changes["shifted"]), params, data)) < 1e-5


def test_the_fisher_of_many_classes_holds_nothing_of_classes_squared() -> None:
    classes, data = 300, batches(8, 4)
    model = mlp((8, 8), classes, hidden=(5,))
    params, state = model.init(KEY, data.x[0])
    text = str(jax.make_jaxpr(lambda p: fisher_diagonal(partial(forward, model, state), p, data))(params))
    assert "300,4,5]" in text  # a row of the last kernel for each class and example
    assert "300,4,300]" not in text
