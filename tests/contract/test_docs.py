"""What every algorithm says of itself."""

import doctest
import importlib
import inspect
import pkgutil
import re

import pytest

import cl_zoo
from cl_zoo import catalogue, cite, layer_catalogue

ENTRIES = dict(catalogue()) | dict(layer_catalogue())
MODULES = [module.name for module in pkgutil.walk_packages(cl_zoo.__path__, "cl_zoo.")]


@pytest.mark.parametrize("name", list(ENTRIES))
def test_docstring_is_whole(name: str) -> None:
    entry = ENTRIES[name]
    text = inspect.getdoc(entry.factory) or ""
    for section in ("Args:", "Returns:", "Raises:", "Source:", "Differences from the paper or its code:", "Example:"):
        assert section in text, f"{name}: no {section!r}"
    described = set(re.findall(r"\w+", " ".join(re.findall(r"^  ((?:\w+, )*\w+):", text, re.MULTILINE))))
    for argument in inspect.signature(entry.factory).parameters:
        assert argument in described, f"{name}: {argument} is not described"
    assert "=" in text.split("Args:")[0], f"{name}: no equation"


@pytest.mark.parametrize("name", list(ENTRIES))
def test_paper_can_be_cited(name: str) -> None:
    entry = ENTRIES[name]
    assert entry.bibtex.startswith("@") and "title=" in entry.bibtex and "year=" in entry.bibtex
    assert entry.bibtex in cite(name)
    assert entry.url.startswith("https://")


@pytest.mark.parametrize("name", list(catalogue()))
def test_numbers_are_arguments(name: str) -> None:
    assert set(catalogue()[name].numbers) <= set(catalogue()[name].arguments)


def test_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="no algorithm or layer is named 'ewcc'; there are supervised, ewc"):
        cite("ewcc")


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module: str) -> None:
    found = doctest.testmod(importlib.import_module(module))
    assert found.failed == 0


@pytest.mark.parametrize("name", cl_zoo.__all__)
def test_public_names_are_described(name: str) -> None:
    assert inspect.getdoc(getattr(cl_zoo, name)), name
