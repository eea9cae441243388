"""What the tests need of an entry that the catalogue does not say: the network that it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from cl_zoo import Component, Model, catalogue, continual_backprop, ewc, replay, weight_interpolation
from cl_zoo.entries import Entry, Null
from cl_zoo.language import answering, decoder
from cl_zoo.layers import softmax_attention
from cl_zoo.models import mlp
from cl_zoo.wrappers import with_learning_rates, with_rotation_head


class Case(NamedTuple):
    """Attributes:
    net: makes the network, as `mlp` does.
    wrap: what it needs around the network.
    """

    net: Callable[..., Model] = mlp
    wrap: Callable[[Model], Model] = lambda model: model


def _rates(model: Model) -> Model:
    return with_learning_rates(model, 0.5)


def _rotations(model: Model) -> Model:
    return with_rotation_head(model, mlp((5,), 4, hidden=()), reads="output")


DECODER = decoder(13, [(softmax_attention(8, 2), 8, 1)])


def _answering(shape: tuple[int, ...], outputs: int, **options: Any) -> Model:
    return answering(DECODER)


CASES = {
    "meta_sgd": Case(wrap=_rates),
    "la_maml": Case(wrap=_rates),
    "ttt": Case(wrap=_rotations),
    "tent": Case(net=partial(mlp, norm="batch")),
    **dict.fromkeys(("sdft", "context_distillation", "offline_distillation", "dft"), Case(net=_answering)),
}


def together(rows: int, replacement_rate: Any, alpha: Any, strength: Any) -> list[Component]:
    """One component for each way of keeping."""
    return [
        replay(20, batch_size=rows),
        continual_backprop(replacement_rate, maturity=2),
        weight_interpolation(alpha),
        ewc(strength),
    ]


TOGETHER = dataclasses.replace(
    catalogue()["supervised"],
    name="together",
    factory=together,
    arguments={"rows": 8, "replacement_rate": 0.0625, "alpha": 0.5, "strength": 1e2},
    numbers=("replacement_rate", "alpha", "strength"),
    null=Null({"rows": 0, "replacement_rate": 0.0, "alpha": 0.0, "strength": 0.0}, "all of theirs", sgd=True),
    own_loss=False,
)
SUBJECTS: dict[str, Entry] = catalogue() | {"together": TOGETHER}
"""What is composed of many keeps the laws of what is one."""


def case(name: str) -> Case:
    """Of an entry."""
    return CASES.get(name, Case())
