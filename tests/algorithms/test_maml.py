"""What MAML predicts: the query, by parameters that have learned from the support."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_zoo import maml, reptile
from cl_zoo.losses import cross_entropy
from tests.tiny import tiny_learner, tiny_stream


@pytest.mark.parametrize(
    "component", [maml(inner=optax.sgd(0.5), inner_steps=3), reptile(inner=optax.sgd(0.5), inner_steps=3)]
)
def test_queries_are_predicted_after_learning_from_the_support(component: Any, tiny_images: Any) -> None:
    stream = tiny_stream(tiny_images, "episodes")
    learner = tiny_learner(stream, component)
    batch, _ = stream.next(stream.init(jax.random.key(0)))
    state = learner.init(jax.random.key(1), batch)
    outputs = learner.predict(state, batch.x)
    apply = learner.model.apply
    for i in range(3):
        support_x, support_y, query = jax.tree.map(lambda leaf, i=i: leaf[i], batch.x)

        def loss(params: Any, x: Any = support_x, y: Any = support_y) -> Any:
            return jnp.mean(cross_entropy(apply(params, state.model_state, x)[0], y))

        params = state.params
        for _ in range(3):
            params = jax.tree.map(lambda p, g: p - 0.5 * g, params, jax.grad(loss)(params))
        np.testing.assert_allclose(outputs[i], apply(params, state.model_state, query)[0], rtol=1e-4, atol=1e-5)
        plain = apply(state.params, state.model_state, query)[0]
        assert np.abs(np.asarray(outputs[i] - plain)).max() > 1e-3
