"""What algorithms claim of themselves, beside being what their papers write."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cl_zoo import Batch, compose, supervised, synaptic_intelligence
from cl_zoo.estimators.projection import project_conflict
from cl_zoo.models import mlp


def test_path_integral_is_the_drop_of_the_loss() -> None:
    """Along small steps of gradient descent, sum_i w_i is the loss before less the loss after."""
    random = np.random.default_rng(0)
    batch = Batch(
        jnp.asarray(random.normal(size=(32, 6)), jnp.float32),
        jnp.asarray(random.integers(0, 3, 32)),
        None,
        jnp.ones(32),
    )
    learner = compose(mlp((6,), 3, hidden=(8,)), optax.sgd(1e-3), supervised(), synaptic_intelligence(0.0))
    state = learner.init(jax.random.key(0), batch)

    def step(state: Any, _: None) -> tuple[Any, Any]:
        state, metrics = learner.update(state, batch)
        return state, metrics["loss"]

    state, losses = jax.jit(lambda s: jax.lax.scan(step, s, length=2000))(state)
    after = learner.update(state, batch)[1]["loss"]
    path = sum(float(jnp.sum(leaf)) for leaf in jax.tree.leaves(state.parts["synaptic_intelligence"].path))
    assert losses[0] - after > 0.3
    np.testing.assert_allclose(path, losses[0] - after, rtol=2e-3)


def test_projection_leaves_no_conflict_and_nothing_else_changed() -> None:
    random = np.random.default_rng(1)
    for _ in range(50):
        g, r = ({"a": random.normal(size=(3, 2)), "b": random.normal(size=4)} for _ in range(2))
        g, r = (jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree) for tree in (g, r))
        projected = project_conflict(g, r)
        dot = float(optax.tree.vdot(g, r))
        after = float(optax.tree.vdot(projected, r))
        assert after >= -1e-5
        if dot >= 0:
            jax.tree.map(np.testing.assert_array_equal, projected, g)
        else:
            moved = optax.tree.sub(projected, g)  # along r alone
            np.testing.assert_allclose(after, 0, atol=1e-5)
            cosine = optax.tree.vdot(moved, r) / (optax.tree.norm(moved) * optax.tree.norm(r))
            np.testing.assert_allclose(cosine, 1, rtol=1e-5)
    zero = optax.tree.zeros_like(r)
    jax.tree.map(np.testing.assert_array_equal, project_conflict(g, zero), g)
