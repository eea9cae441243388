"""What every entry of the catalogue, every layer and three studies give, kept.

    python -m tests.goldens.make            adds what is new to tests/goldens/goldens.npz
    python -m tests.goldens.make --all      writes it afresh

Update what is there only if the mathematics changed, and say why in the commit. Everything is computed in float64,
where the mathematics allows it, on the tiny stream of the tests; numbers are those of the JAX version that the file
names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cl_zoo import layer_catalogue, run_stream
from cl_zoo.types import Model
from tests.conftest import tiny_images
from tests.contract import test_layers
from tests.contract.cases import SUBJECTS
from tests.tiny import entry_learner, raw, tiny_stream

FILE = Path(__file__).with_name("goldens.npz")
KEY = jax.random.key(3)


def wide(model: Model) -> Model:
    """The same model with parameters and inputs in float64."""

    def init(*arguments: Any) -> Any:
        return jax.tree.map(
            lambda leaf: leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf,
            model.init(*arguments),
        )

    return dataclasses.replace(model, init_function=init)


def flattened(name: str, tree: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Every leaf under its path."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield name + jax.tree_util.keystr(path, simple=True, separator="/"), raw(leaf)


def of_entry(name: str, images: Any, double: bool) -> dict[str, np.ndarray]:
    """Final parameters, parts and optimiser, all metrics, and R."""
    entry = SUBJECTS[name]
    stream = tiny_stream(images, entry.scenarios[0])
    learner = entry_learner(stream, entry, around=wide if double else lambda model: model)
    result = run_stream(learner, stream, KEY)
    state = result.state
    kept = {
        "params": state.params,
        "opt_state": state.opt_state,
        "parts": state.parts,
        "metrics": result.metrics,
        "R": result.accuracy,
    }
    return dict(flattened(f"entries/{name}/", kept))


def of_layer(name: str) -> dict[str, np.ndarray]:
    """Both forms of a layer, the cache that they leave, and the gradient to its parameters."""
    mixer = test_layers.make(layer_catalogue()[name])
    params = jax.tree.map(lambda leaf: leaf.astype(float), test_layers.off_centre(jax.jit(mixer.init)(test_layers.KEY)))
    x = jnp.asarray(test_layers.draw(test_layers.B, test_layers.T, test_layers.WIDTH), jnp.float64)
    parallel, recurrent, _, end = test_layers.two_forms(mixer)(params, x)
    slope = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(mixer.apply(p, x)))))(params)
    kept = {"parallel": parallel, "recurrent": recurrent, "cache": end, "gradient": slope}
    return dict(flattened(f"layers/{name}/", kept))


STUDIES = ("split_mnist", "anytime", "text_domains")


def of_study(name: str) -> dict[str, np.ndarray]:
    """The mean of every row, in the studies' own float32."""
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
        study = importlib.import_module(f"experiments.{name}")
        study.main(study.Config(protocol="smoke", seeds=1, directory=directory))
        rows = json.loads((Path(directory) / "results.json").read_text())["rows"]
    label = lambda row: "/".join(str(row[part]) for part in ("setting", "algorithm", "metric") if part in row)  # noqa: E731
    return {f"studies/{name}/{label(row)}": np.array(row["ours"]["mean"]) for row in rows if row["ours"]}


def names() -> list[str]:
    """Of all that is kept."""
    return (
        [f"entries/{name}" for name in SUBJECTS]
        + [f"layers/{n}" for n in layer_catalogue()]
        + [f"studies/{name}" for name in STUDIES]
    )


def found(name: str, images: Any, double: bool) -> dict[str, np.ndarray]:
    """What is computed now under that name, in float64 or in float32."""
    kind, _, rest = name.partition("/")
    if kind == "studies":
        return of_study(rest)
    with jax.enable_x64(double):
        return of_entry(rest, images, double) if kind == "entries" else of_layer(rest)


def first_found(name: str, images: Any) -> tuple[dict[str, np.ndarray], bool]:
    """The same where nothing is kept yet, and whether it was computed in float64."""
    if not name.startswith("studies/"):
        try:
            return found(name, images, True), True
        except TypeError as error:  # a part that is float32 by definition: the loop refuses another type
            print(f"{name}: float32, since in float64 {str(error).strip().splitlines()[-1]}")
    return found(name, images, False), False


def main() -> None:
    """Adds what is missing to the file; with --all, writes it afresh."""
    images = tiny_images.__wrapped__()  # type: ignore[attr-defined]
    arrays: dict[str, np.ndarray] = {"jax_version": np.array(jax.__version__)}
    doubles: list[str] = []
    if "--all" not in sys.argv[1:] and FILE.exists():
        with np.load(FILE, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        doubles = arrays.pop("in_float64").tolist()
    for name in names():
        if any(key.startswith(f"{name}/") for key in arrays):
            continue
        new, double = first_found(name, images)
        doubles += [name] * double
        print(f"{name:40s} {len(new):4d} arrays, {sum(a.nbytes for a in new.values()):8d} bytes", flush=True)
        arrays |= new
        jax.clear_caches()
    arrays["in_float64"] = np.array(sorted(set(doubles)))
    np.savez_compressed(FILE, **arrays)
    print(f"{FILE}: {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
