"""Every argument of every public function refuses what is not of its kind: in one line that names it, before anything
else happens. What an argument may be is read off its annotation, here and there independently."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
import pytest

import cl_zoo
from cl_zoo import catalogue, compose, layer_catalogue, supervised
from cl_zoo.checks import LARGEST
from cl_zoo.language import decoder
from cl_zoo.layers import softmax_attention
from cl_zoo.models import mlp
from cl_zoo.streams import BigramData, split_mnist
from cl_zoo.types import TrainState

NOT_A_NUMBER = float("nan")
ENTRIES = [*catalogue().values(), *layer_catalogue().values()]


def functions() -> Iterator[Callable[..., Any]]:
    """All that are decorated with `checked`."""
    seen = set()
    for module in pkgutil.walk_packages(cl_zoo.__path__, "cl_zoo."):
        for function in vars(importlib.import_module(module.name)).values():
            checked = inspect.isfunction(function) and function.__code__.co_filename.endswith("checks.py")
            if checked and function.__module__ == module.name and hasattr(function, "__wrapped__"):
                seen.add(function)
                yield function


FUNCTIONS = {f"{function.__module__.removeprefix('cl_zoo.')}.{function.__name__}": function for function in functions()}
NET = mlp((4,), 3, hidden=(5,))
STREAM = split_mnist(2, "domain", steps=1)
GOOD: dict[str, Any] = {
    "width": 8,
    "heads": 2,
    "input_shape": (4, 4),
    "outputs": 3,
    "model": NET,
    "rank": 2,
    "low": 0.5,
    "vocabulary": 16,
    "groups": [(softmax_attention(8, 2), 8, 1)],
    "layers": 1,
    "hidden": 8,
    "scenario": "domain",
    "n_tasks": 2,
    "classes_per_task": 2,
    "when": "end",
    "measure": lambda *_: 0,
    "score": lambda outputs, batch: batch.weight,
    "batch_size": 2,
    "steps": 2,
    "decoder": decoder(13, [(softmax_attention(8, 2), 8, 1)]),
    "make": lambda rngs: None,
    "data_dir": "nowhere",
    "path": "nowhere",
    "folder": "nowhere",
    "learner": compose(NET, optax.sgd(0.1), supervised()),
    "stream": STREAM,
    "tasks": STREAM.tasks,
    "prompts": np.zeros((1, 2), np.int32),
    "key": jax.random.key(0),
    "length": 4,
    "rows": [[1, 2], [3]],
    "head": NET,
    "reads": "hidden_0",
    "owner": "stream",
    "words": 3,
    "values": 4,
    **dict.fromkeys(("size", "fetch", "reorder", "draw"), lambda *_: None),
    "largest": {"train": 4, "validation": 0, "test": 4},
    **dict.fromkeys(("smallest", "n_outputs", "severity"), 2),
    "task_ids": False,
    "state": TrainState(*[None] * 7),
    "corruption": "fog",
}
OWN: dict[str, dict[str, Any]] = {
    "ttt_e2e": {"fast": {"ffn": 2}},
    "best_bigram_losses": {
        "data": BigramData(np.zeros((1, 2, 2))),
        "x": np.zeros((1, 2), int),
        "y": np.zeros((1, 2), int),
    },
    "formal_language": {"language": "parity"},
    "mad": {"task": "recall"},
    "clocks": {"period": lambda path: 1},
    "skills": {"tasks": [{}]},
    "augment": {"function": lambda key, x: x},
    "read_image_folder": {"size": 8},
    "load_tfds": {"name": "mnist"},
    "patience": {"n": 2},
    "task_stream": {"tasks": [(np.zeros((4, 2)), np.arange(4))]},
}
"""Values of arguments without a default."""


def good(function: Callable[..., Any]) -> dict[str, Any]:
    """Arguments that the function takes, as far as they must be given."""
    for entry in ENTRIES:
        if entry.factory is function:
            needed = {"width": 8, "heads": 2} if "heads" in inspect.signature(function).parameters else {}
            return needed | dict(entry.arguments)
    named = inspect.signature(function).parameters.values()
    needed = [one.name for one in named if one.default is one.empty and one.kind is not one.VAR_KEYWORD]
    return {name: GOOD.get(name) for name in needed} | OWN.get(function.__name__, {})


RANGES: dict[str, tuple[str, list[Any]]] = {
    "Count": ("int", [0, -1]),
    "Whole": ("int", [-1]),
    "NonNegative": ("Array | float", [-0.1]),
    "Positive": ("Array | float", [0.0, -1.0]),
    "Fraction": ("Array | float", [-0.1, 1.1, np.array([0.5, 2.0])]),
}
CHOICES = {"Scenario", "Outputs", "Joint"}


def plain(annotation: str) -> tuple[str, list[Any]]:
    """The annotation without its range, and values that lie outside of it."""
    if told := re.match(r"Annotated\[([^,\[]+), Range\((.*?)\)\](.*)", annotation):
        low = float(told[2].split(",")[0])
        return told[1] + told[3], [low if "above=True" in told[2] else low - 1]
    first, *rest = annotation.split(" | ")
    if first in CHOICES:
        return " | ".join(["Literal[]", *rest]), []
    kind, outside = RANGES.get(first, (first, []))
    return " | ".join([kind, *rest]), outside


def careless(annotation: str) -> list[Any]:
    """Values of which none is of the kind that the annotation names."""
    annotation, outside = plain(annotation)
    parts = {part.strip() for part in annotation.replace("jax.Array", "Array").split(" | ")}
    optional = [*outside] if parts & {"None", "PyTree", "Any"} else [*outside, None]
    kinds = parts - {"None"}
    if annotation.startswith("Literal["):
        return ["no such word", 3, 0.5, *optional]
    if kinds & {"PyTree", "Any", "Key"}:
        return []
    if kinds == {"bool"}:
        return ["yes", 1, 0.5, *optional]
    if kinds == {"int"}:
        return ["3", 1j, NOT_A_NUMBER, True, 10**12, 0.5, *optional]
    if kinds <= {"float", "int", "Array"} and kinds & {"float", "int"}:
        return ["3", 1j, NOT_A_NUMBER, float("inf"), True, object(), *optional]
    if kinds == {"str"}:
        return [3, "", b"word", *optional]
    if len(kinds) == 1 and (kind := next(iter(kinds))).startswith(("Callable", "Sequence", "optax.", "Mapping")):
        return [3, 1j, *([] if kind.startswith("Callable") else [len]), *optional]
    if kinds <= {"Model", "Decoder", "LabelledImages", "FewShotImages", "Learner", "Stream", "TrainState", "TaskInfo"}:
        return [3, "word", len, *optional]
    return []


def attempts() -> Iterator[Any]:
    for name, function in FUNCTIONS.items():
        for field, parameter in inspect.signature(function).parameters.items():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            for value in careless(str(parameter.annotation)):
                yield name, field, value


ATTEMPTS = list(attempts())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_not_of_its_kind_is_refused_by_name(name: str) -> None:
    function = FUNCTIONS[name]
    for _, field, value in [one for one in ATTEMPTS if one[0] == name]:
        with pytest.raises(ValueError, match=rf"\b{field}\b") as error:
            function(**{**good(function), field: value})
        assert "\n" not in str(error.value) and "but it must be" in str(error.value), f"{field} = {value!r}"


def test_choices_refuse_other_words() -> None:
    """An argument that is a word, and no name or place, is a choice."""
    free = {
        "name",
        "data_dir",
        "owner",
        "corruption",
        "source",
        "split",
        "reads",
        "path",
        "text",
        "sample",
        "directory",
        "folder",
        "source_domain",
        *("target", "task", "image", "label"),
    }
    for name, function in FUNCTIONS.items():
        for field, parameter in inspect.signature(function).parameters.items():
            if "str" in str(parameter.annotation).split(" | ") and field not in free and "steps" not in good(function):
                try:
                    function(**{**good(function), field: "no such word"})
                    pytest.fail(f"{name}: {field} may be any word")
                except ValueError as error:
                    assert re.search(rf"{field} is 'no such word', but it must be", str(error)), f"{name}: {error}"


def test_how_many_are_tried() -> None:
    assert len(FUNCTIONS) > 80 and len(ATTEMPTS) > 1200


def test_numbers_end_where_int32_does() -> None:
    with pytest.raises(ValueError, match=f"capacity is {LARGEST + 1}"):
        cl_zoo.replay(LARGEST + 1)


def test_every_factory_is_checked() -> None:
    for entry in ENTRIES:
        assert hasattr(entry.factory, "__wrapped__"), entry.name
