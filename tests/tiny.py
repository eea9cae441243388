"""A stream and learners small enough to compile fast."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cl_zoo import Component, Learner, Model, Stream, compose, supervised
from cl_zoo.datasets import LabelledImages
from cl_zoo.entries import Entry
from cl_zoo.losses import cross_entropy, next_token_loss
from cl_zoo.models import mlp
from cl_zoo.streams import SymbolWorld, few_shot, split_mnist
from cl_zoo.streams.arrays import array_stream, scenario_tasks
from cl_zoo.wrappers import episodic
from tests.contract.cases import case

STEPS, BATCH = 6, 8


def tiny_stream(images: LabelledImages, scenario: str = "task", **options: Any) -> Stream:
    """Three tasks of two classes, of problems of two classes, or of questions."""
    if scenario == "skills":
        world = SymbolWorld(symbols=5, known=1, new=3, length=2, pairs=2)
        return world.skills(steps=STEPS, batch_size=BATCH, examples=40, tests=30)
    if scenario == "episodes":
        problems = {"n_tasks": 3, "n_way": 2, "shots": 3, "queries": 2, "rotations": True}
        sizes = {"batch_size": BATCH, "steps": STEPS, "sample_size": 40, "evaluation_size": 40, "evaluation_batch": 20}
        return few_shot(images, **problems, **sizes)
    settings = {"batch_size": BATCH, "steps": STEPS, "sample_size": 40, "sample_batch": 20, "evaluation_batch": 30}
    return split_mnist(3, scenario, images=images, **{**settings, **options})


def array_tasks(x: Any, y: Any, outputs: int, **options: Any) -> Stream:
    """Tasks of the same 40 examples for training and testing: x and y are `[T, 40, ...]`, all outputs open."""
    given = {"size": lambda data, split: jnp.full(len(x), 40), "smallest": 40, "batch_size": BATCH} | options
    return array_stream(
        {"x": jnp.asarray(x), "y": jnp.asarray(y)},
        scenario_tasks("domain", len(x), outputs),
        fetch=lambda data, split, task, i: (data["x"][task, i], data["y"][task, i]),
        largest={"train": 40, "validation": 0, "test": 40},
        task_ids=False,
        reorder=lambda data, key: data,
        **given,
    )


def tiny_learner(
    stream: Stream,
    *components: Component,
    optimiser: Any = None,
    wrap: Callable[[Model], Model] = episodic,
    net: Callable[..., Model] = mlp,
) -> Learner:
    """An MLP 16-5-C."""
    model = net((4, 4), stream.tasks.active.shape[-1], hidden=(5,))
    return compose(wrap(model), optimiser or optax.adam(1e-2), *components, tasks=stream.tasks)


def naive_component(scenario: str) -> Component:
    """What learns, and keeps nothing; of episodes, their queries alone."""
    if scenario == "skills":
        return supervised(next_token_loss)
    if scenario != "episodes":
        return supervised()
    return supervised(lambda outputs, y: jnp.mean(jax.vmap(cross_entropy)(outputs, y), axis=1))


def entry_components(entry: Entry, **changes: Any) -> list[Component]:
    """Those of a catalogue entry, beside the supervised one unless it brings a loss of its own."""
    made = entry.factory(**{**entry.arguments, **changes})
    components = made if isinstance(made, list) else [made]
    return components if entry.own_loss else [supervised(), *components]


def entry_learner(
    stream: Stream,
    entry: Entry,
    optimiser: Any = None,
    around: Callable[[Model], Model] = lambda model: model,
    **changes: Any,
) -> Learner:
    """The learner of a catalogue entry; `around` the network itself."""
    made, wrap = case(entry.name)

    def net(*arguments: Any, **options: Any) -> Model:
        return around(made(*arguments, **options))

    components = entry_components(entry, **changes)
    return tiny_learner(stream, *components, optimiser=optimiser, wrap=lambda model: episodic(wrap(model)), net=net)


def close(a: Any, b: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Two trees hold the same numbers, up to rounding."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(raw(x), raw(y), rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path))


def same_bytes(a: Any, b: Any) -> None:
    """Two trees hold the same bytes."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert raw(x).tobytes() == raw(y).tobytes(), jax.tree_util.keystr(path)


def raw(leaf: Any) -> np.ndarray:
    """A NumPy array, of a key's data where it is a key."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def in_bfloat16(model: Model) -> Model:
    """The same network with parameters in bfloat16."""

    def init(key: Any, x: Any, **options: Any) -> Any:
        params, model_state = model.init_function(key, x, **options)
        return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params), model_state

    return dataclasses.replace(model, init_function=init)


def kinds(tree: Any) -> Any:
    """Structure, and shape, dtype and weak type of every leaf."""
    return jax.tree.structure(tree), [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in jax.tree.leaves(tree)]
