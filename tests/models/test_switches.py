"""Flax modules of a user's own: whatever their switch between training and evaluation is called, it is turned."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from cl_zoo import compose, replay, supervised
from cl_zoo.models import from_linen, from_nnx, mlp
from tests.tiny import BATCH, tiny_stream

X = jax.random.normal(jax.random.key(0), (8, 3)) + 1
NAMES = ("train", "training", "deterministic", "use_running_average")


def training(name: str, value: bool) -> bool:
    return value == (name in ("train", "training"))


def layers(owner: Any, x: Any, train: bool) -> Any:
    x = linen.BatchNorm(use_running_average=not train)(linen.Dense(2)(x))
    return linen.Dropout(0.5, deterministic=not train)(x)


def linen_argument(name: str) -> Any:
    def call(self: Any, x: Any, **switch: bool) -> Any:
        return layers(self, x, training(name, switch[name]))

    class Module(linen.Module):
        exec(f"@linen.compact\ndef __call__(self, x, {name}): return call(self, x, {name}={name})",
             {"linen": linen, "call": call}, locals())  # fmt: skip

    return from_linen(Module())


def linen_attribute(name: str) -> Any:
    namespace: dict[str, Any] = {
        "__annotations__": {name: bool},
        name: not training(name, True),
        "__module__": __name__,
    }
    namespace["__call__"] = linen.compact(lambda self, x: layers(self, x, training(name, getattr(self, name))))
    return from_linen(type("Module", (linen.Module,), namespace)())


class Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.dense = nnx.Linear(3, 2, rngs=rngs)
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def layers(self, x: Any, train: bool) -> Any:
        x = self.norm(self.dense(x), use_running_average=not train)
        return self.dropout(x, deterministic=not train)


def nnx_argument(name: str) -> Any:
    found: dict[str, Any] = {}
    exec(
        f"def __call__(self, x, {name}): return self.layers(x, is_on('{name}', {name}))",
        {"is_on": training},
        found,
    )
    return from_nnx(type("Module", (Nnx,), found))


def nnx_attribute(name: str) -> Any:
    class Module(Nnx):
        def __init__(self, rngs: nnx.Rngs):
            super().__init__(rngs)
            setattr(self, name, not training(name, True))

        def __call__(self, x: Any) -> Any:
            return self.layers(x, training(name, getattr(self, name)))

    return from_nnx(Module)


@pytest.mark.parametrize("make", [linen_argument, linen_attribute, nnx_argument, nnx_attribute])
@pytest.mark.parametrize("name", NAMES)
def test_every_switch_is_turned(make: Any, name: str) -> None:
    model = make(name)
    params, state = model.init(jax.random.key(0), X)
    outputs, after, _ = model.apply(params, state, X, train=True, key=jax.random.key(1))
    assert np.any(np.asarray(outputs) == 0), "dropout is off in training"
    moved = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True)]
    assert max(moved) > 1e-3, "statistics do not move in training"
    outputs, after, _ = model.apply(params, state, X)
    assert not np.any(np.asarray(outputs) == 0), "dropout is on in evaluation"
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True))


class Fixed(linen.Module):
    """Its statistics are read, and never learned."""

    @linen.compact
    def __call__(self, x: Any) -> Any:
        return linen.BatchNorm(use_running_average=True)(linen.Dense(2)(x))


class FixedNnx(Nnx):
    def __call__(self, x: Any) -> Any:
        return self.norm(self.dense(x), use_running_average=True)


@pytest.mark.parametrize("make", [lambda: from_linen(Fixed()), lambda: from_nnx(FixedNnx)])
def test_what_cannot_be_turned_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="the same pass for them; its switch must be one of train,"):
        make().init(jax.random.key(0), X)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: from_nnx(nnx.Linear(3, 2, rngs=nnx.Rngs(0))), "from_nnx: make is"),
        (lambda: from_nnx(lambda rngs: 3), "from_nnx: make gives a .*, but it must give an NNX module"),
        (lambda: from_linen(Fixed), "from_linen: module is Fixed, but it must be an instance"),
        (lambda: from_linen(nnx.Linear(3, 2, rngs=nnx.Rngs(0))), "from_linen: module is Linear"),
        (lambda: from_nnx(Fixed()), "from_nnx: make is"),
    ],
)
def test_a_module_for_a_constructor_and_the_reverse(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        make()
    assert "\n" not in str(error.value)


class Net(nnx.Module):
    """A user's own, with batch normalisation that reads no weights."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(16, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.0, rngs=rngs)
        self.output = nnx.Linear(8, 6, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.output(nnx.relu(self.norm(self.hidden(x.reshape(x.shape[0], -1) / 255.0))))


@pytest.mark.parametrize("components", [[], [replay(40, batch_size=32)], [replay(40, batch_size=7)]])
def test_empty_places_of_a_memory_do_not_halve_statistics(tiny_images: Any, components: Any) -> None:
    """In the first update nothing can be replayed: the statistics are those of the batch alone, or nearly so where
    some of its examples stand in more often than others."""
    stream, key = tiny_stream(tiny_images, "domain"), jax.random.key(3)
    learner = compose(from_nnx(Net), optax.sgd(0.1), supervised(), *components)
    batch, _ = stream.next(stream.init(key))
    first = learner.init(key, batch)
    state, _ = jax.jit(learner.update)(first, batch)
    hidden = jax.tree.map(np.asarray, first.params["hidden"])
    wanted = (np.asarray(batch.x, float).reshape(BATCH, -1) / 255.0 @ hidden["kernel"] + hidden["bias"]).mean(0)
    error = np.abs(np.asarray(state.model_state["norm"]["mean"]) - wanted).max()
    assert error < (0.1 * np.abs(wanted).max() if components else 1e-5)


def test_bundled_nets_are_driven_too() -> None:
    model = mlp((3,), 2, hidden=(4,), norm="batch")
    params, state = model.init(jax.random.key(0), X)
    _, after, _ = model.apply(params, state, X, train=True, key=jax.random.key(1))
    assert any(np.abs(a - b).max() > 0 for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True))
    assert jnp.all(jnp.isfinite(model.apply(params, after, X)[0]))
