"""ER-ACE against its oracle, and what its asymmetry says."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_zoo import Batch, compose, er_ace
from cl_zoo.models import mlp
from tests.algorithms.test_oracles import ACTIVE, INPUTS, _hook_key, agree, ids_of, make_tasks, rows_seen, run_ours
from tests.oracles import er_ace as oracle


@pytest.mark.parametrize("scenario", list(ACTIVE))
@pytest.mark.parametrize(("incoming", "replayed"), [("present", "seen"), ("unseen", "all")])
def test_it_equals_the_oracle(scenario: str, incoming: str, replayed: str) -> None:
    tasks = make_tasks(scenario)
    component = er_ace(20, batch_size=6, incoming=incoming, replayed=replayed)
    first, metrics, state, states = run_ours(scenario, tasks, "adam", component, own_loss=True)
    seen, drawn = rows_seen(tasks), []
    told = jnp.zeros(1, jnp.int32) if scenario == "task" else None
    empty = Batch(jnp.zeros((1, INPUTS)), jnp.zeros(1, jnp.int32), told, jnp.ones(1))
    for before in states:
        key = _hook_key(before, "prepare", "er_ace")
        joined, _ = component.prepare(None, before, before.parts["er_ace"], empty, key)
        assert joined.replayed.tolist() == [False] + [True] * 6
        weight = np.asarray(joined.weight[1:], np.float64)
        drawn.append((ids_of(seen, joined.x[1:], weight), weight[weight > 0]))
    mask = "own" if scenario == "task" else "now"
    history, final = oracle.run(
        first, tasks, drawn, 0.01, incoming=incoming, replayed=replayed, mask=mask, optimizer="adam"
    )
    for term, wanted in zip(("incoming", "replayed"), zip(*history, strict=True), strict=True):
        np.testing.assert_allclose([m[f"er_ace/{term}"] for m in metrics], wanted, rtol=1e-3, atol=1e-6)
    agree(state.params, final)


def test_incoming_examples_do_not_move_the_outputs_of_other_classes() -> None:
    """Without replay, the gradient to the output weights of classes that the batch does not hold is zero."""
    learner = compose(mlp((4,), 5, hidden=(3,)), optax.sgd(1.0), er_ace(8, batch_size=0))
    batch = Batch(jax.random.normal(jax.random.key(0), (6, 4)), jnp.array([1, 3, 1, 1, 3, 0]), None,
                  jnp.array([1.0, 1, 1, 1, 1, 0]))  # fmt: skip
    state = learner.init(jax.random.key(1), batch)
    after, metrics = learner.update(state, batch)
    moved = np.abs(np.asarray(after.params["output"]["kernel"] - state.params["output"]["kernel"])).max(0) > 0
    assert moved.tolist() == [False, True, False, True, False]
    assert after.parts["er_ace"].seen.tolist() == [False, True, False, True, False]
    assert float(metrics["er_ace/replayed"]) == 0


@pytest.mark.parametrize("arguments", [{"incoming": "all"}, {"replayed": "present"}, {"batch_size": 9}])
def test_impossible_values_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} is"):
        er_ace(8, **arguments)
