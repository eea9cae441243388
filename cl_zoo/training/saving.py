"""States and parameters that are kept outside of a run, and read again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cl_zoo._learner import Learner
from cl_zoo.checks import check_weights
from cl_zoo.training.checkpoint import Checkpoints
from cl_zoo.types import Batch, PyTree, TrainState

__all__ = ["load_params", "load_state", "save_params", "save_state"]


def save_state(directory: str | os.PathLike[str], state: TrainState) -> None:
    """Writes a state as a checkpoint of its step; those that are there stay.

    Args:
      directory: made if missing.
      state: of any learner. Frozen weights are not in it.

    Raises:
      ValueError: it is no TrainState.
      OSError: it was not written; earlier ones are whole.
    """
    if not isinstance(state, TrainState):
        raise ValueError(f"save_state: state is {type(state).__name__}, but it must be a TrainState")
    Checkpoints(directory, keep=None).save(int(state.step), {"state": state})


def load_state(directory: str | os.PathLike[str], learner: Learner, batch: Batch) -> TrainState:
    """The newest state in a folder that `save_state` or `fit` wrote: `run_stream(..., state=...)` goes on from it,
    `learner.predict(state, x)` predicts.

    Args:
      directory: the folder, or that of a run.
      learner: composed as the one whose state it is. Frozen weights are bound to it, or drawn from the run's key.
      batch: any batch of the stream, for its shapes.

    Raises:
      FileNotFoundError: no such folder, or nothing in it.
      CheckpointError: none of the states there is whole, or of this learner; names what differs.

    Example:
      >>> import jax, optax, tempfile
      >>> from cl_zoo import compose, supervised
      >>> from cl_zoo.models import mlp
      >>> from cl_zoo.streams import split_mnist
      >>> batch, _ = (stream := split_mnist(2, "domain", steps=1)).next(stream.init(jax.random.key(0)))
      >>> learner = compose(mlp((28, 28), 5), optax.adam(1e-3), supervised())
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_state(folder, learner.init(jax.random.key(0), batch))
      ...     load_state(folder, learner, batch).params["output"]["kernel"].shape
      (256, 5)
    """
    if not isinstance(learner, Learner):
        raise ValueError(f"load_state: learner is {type(learner).__name__}, but it must be what compose returns")
    folder = Path(directory) / "checkpoints"
    folder = folder if folder.is_dir() else Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(f"{directory}: no such folder")
    template = {"state": jax.eval_shape(learner.init, jax.random.key(0), batch)}
    found = Checkpoints(folder, keep=None).restore_newest(template, partial=True)
    if found is None:
        raise FileNotFoundError(f"{directory}: no state of a learner is in this folder")
    return found[1]["state"]


def save_params(path: str | os.PathLike[str], params: PyTree) -> None:
    """Parameters as a .safetensors file, which other libraries read: `{"hidden_0/kernel": f32[784, 256], ...}`.

    Args:
      path: of the file; one that is there is replaced.
      params: `state.params`; or `(params, model_state)` of a net with statistics.

    Raises:
      ValueError: safetensors is missing; two leaves of one name.
    """
    flat = dict(_named(params))
    if len(flat) < len(jax.tree.leaves(params)):
        raise ValueError("save_params: two parameters have one name, but each must have its own")
    beside = Path(path).with_name(Path(path).name + ".part")
    _safetensors().numpy.save_file(jax.tree.map(np.ascontiguousarray, flat), os.fspath(beside))
    os.replace(beside, path)


def load_params(path: str | os.PathLike[str], like: PyTree) -> PyTree:
    """Parameters that `save_params` wrote: `learner.bind(load_params(...))` begins from them.

    Args:
      path: of the file.
      like: a tree of the same structure, of arrays or shapes: `jax.eval_shape(model.init, key, x)[0]`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: safetensors is missing, no such file format, parameters of other names, shapes or types.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with _safetensors().safe_open(os.fspath(path), "flax") as file:
            have = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # of its own kinds
        raise ValueError(f"{path}: not a whole safetensors file ({str(error).splitlines()[0]})") from error
    check_weights("load_params", have, like)
    return jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(have[name]) for name, _ in _named(like)])


def _named(tree: PyTree) -> list[tuple[str, Any]]:
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ValueError("parameters in safetensors need that package: pip install 'cl_zoo[language]'") from error
    return safetensors
