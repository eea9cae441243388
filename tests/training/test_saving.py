"""States and parameters outside of a run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_zoo import compose, fit, replay, run_stream, supervised
from cl_zoo.models import mlp
from cl_zoo.training import load_params, load_state, save_params, save_state
from cl_zoo.training.checkpoint import CheckpointError
from tests.tiny import same_bytes, tiny_learner, tiny_stream

KEY = jax.random.key(2)


@pytest.fixture(scope="module")
def run(tiny_images: Any) -> Any:
    stream = tiny_stream(tiny_images)
    learner = tiny_learner(stream, supervised(), replay(12, batch_size=4))
    batch, _ = stream.next(stream.init(KEY))
    return stream, learner, batch, run_stream(learner, stream, KEY).state


def test_a_state_comes_back(run: Any, tmp_path: Path) -> None:
    _, learner, batch, state = run
    save_state(tmp_path / "kept", learner.init(KEY, batch))
    save_state(tmp_path / "kept", state)
    found = load_state(tmp_path / "kept", learner, batch)
    same_bytes(found, state)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["0", "18"]
    after, _ = jax.jit(learner.update)(found, batch)  # it is a state like others
    same_bytes(after, jax.jit(learner.update)(state, batch)[0])


def test_the_state_of_a_run_directory(run: Any, tmp_path: Path) -> None:
    stream, learner, batch, _ = run
    result = fit(learner, stream, KEY, tmp_path, progress=False)
    same_bytes(load_state(tmp_path, learner, batch), result.state)


def test_what_is_not_there_or_another_learners(run: Any, tmp_path: Path) -> None:
    stream, learner, batch, state = run
    with pytest.raises(FileNotFoundError, match="none: no such folder"):
        load_state(tmp_path / "none", learner, batch)
    assert not (tmp_path / "none").exists()
    with pytest.raises(FileNotFoundError, match="no state of a learner"):
        load_state(tmp_path, learner, batch)
    save_state(tmp_path / "kept", state)
    with pytest.raises(CheckpointError, match=r"holds 'state'|holds \['state'\]\.parts\['replay'\]|holds \d+ arrays"):
        load_state(tmp_path / "kept", tiny_learner(stream, supervised()), batch)
    with pytest.raises(CheckpointError, match=r"float32\[5\] where this run has .* float32\[9\]"):
        other = compose(mlp((4, 4), 6, hidden=(9,)), optax.adam(1e-2), supervised(), tasks=stream.tasks)
        load_state(tmp_path / "kept", other, batch)
    with pytest.raises(ValueError, match="state is dict"):
        save_state(tmp_path / "kept", state.params)
    with pytest.raises(ValueError, match="learner is Model"):
        load_state(tmp_path / "kept", learner.model, batch)


LOADS = """
import sys, jax, numpy as np, optax
from cl_zoo import compose, supervised
from cl_zoo.models import mlp
from cl_zoo.training import load_params
model = mlp((4,), 3, hidden=(5,))
like = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 4), np.float32))[0]
params = load_params(sys.argv[1], like)
print(np.asarray(model.apply(params, {}, np.arange(8, dtype=np.float32).reshape(2, 4))[0]).tobytes().hex())
"""


def test_parameters_in_a_fresh_process(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model = mlp((4,), 3, hidden=(5,))
    params, state = model.init(KEY, jnp.zeros((1, 4)))
    save_params(tmp_path / "a.safetensors", params)
    told = subprocess.run(
        [sys.executable, "-c", LOADS, str(tmp_path / "a.safetensors")], capture_output=True, text=True, check=True
    )
    outputs = model.apply(params, state, jnp.arange(8, dtype=jnp.float32).reshape(2, 4))[0]
    np.testing.assert_allclose(
        np.frombuffer(bytes.fromhex(told.stdout.strip()), np.float32).reshape(2, 3), outputs, 1e-6
    )


def test_training_begins_from_parameters_that_were_loaded(run: Any, tmp_path: Path) -> None:
    """Of any model."""
    pytest.importorskip("safetensors")
    _, learner, batch, state = run
    save_params(tmp_path / "a.safetensors", state.params)
    params = load_params(tmp_path / "a.safetensors", state.params)
    same_bytes(params, state.params)
    same_bytes(learner.bind(params).init(KEY, batch).params, state.params)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state.params)
    save_params(tmp_path / "a.safetensors", half)
    same_bytes(load_params(tmp_path / "a.safetensors", half), half)


def test_parameters_that_do_not_fit(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    save_params(path := tmp_path / "a.safetensors", {"a": {"b": np.zeros((2, 3), np.float32)}})
    for like, message in (
        ({"a": {"b": np.zeros((3, 2), np.float32)}}, r"'a/b' has the shape \(2, 3\), but it must be \(3, 2\)"),
        ({"a": {"c": np.zeros((2, 3), np.float32)}}, "no 'a/c'"),
        ({"a": {}}, "'a/b', for which the model has no place"),
    ):
        with pytest.raises(ValueError, match=message):
            load_params(path, like)
    path.write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_params(path, {})
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_params(tmp_path / "b.safetensors", {})
    with pytest.raises(ValueError, match="two parameters have one name"):
        save_params(path, {"a": {"b": np.zeros(2)}, "a/b": np.zeros(2)})
