"""Every algorithm and sequence layer, collected from the `ENTRY` of each module. What is listed is tested."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import Any

from cl_zoo.entries import FAMILIES, Entry, LayerEntry

__all__ = ["catalogue", "cite", "layer_catalogue", "layer_table", "table"]


@functools.cache
def _entries(room: str) -> tuple[Any, ...]:
    package = importlib.import_module(room)
    found: list[Any] = []
    for module in pkgutil.iter_modules(package.__path__, f"{room}."):
        entry = getattr(importlib.import_module(module.name), "ENTRY", ())
        found += entry if isinstance(entry, tuple) else (entry,)
    return tuple(found)


def catalogue() -> dict[str, Entry]:
    """All algorithms by name, in the order of their families.

    Example:
      >>> sorted(catalogue()["ewc"].needs)
      ['boundaries', 'end_sample']
    """
    found = sorted(_entries("cl_zoo.algorithms"), key=lambda entry: FAMILIES.index(entry.family))
    return {entry.name: entry for entry in found}


def layer_catalogue() -> dict[str, LayerEntry]:
    """All sequence layers by name.

    Example:
      >>> entry = layer_catalogue()["ttt_linear"]
      >>> entry.factory(width=8, heads=2, **entry.arguments).name
      'ttt_linear'
    """
    return {entry.name: entry for entry in _entries("cl_zoo.layers")}


def cite(*names: str) -> str:
    """BibTeX of the papers behind the named algorithms and layers.

    Args:
      *names: keys of `catalogue()` or `layer_catalogue()`.

    Raises:
      ValueError: an unknown name; the message lists the known ones.

    Example:
      >>> print(cite("lwf").splitlines()[0])
      @inproceedings{li2016learning,
    """
    known: dict[str, Any] = {**catalogue(), **layer_catalogue()}
    for name in names:
        if name not in known:
            raise ValueError(f"no algorithm or layer is named {name!r}; there are {', '.join(known)}")
    return "\n\n".join(dict.fromkeys(known[name].bibtex for name in names))


def table() -> str:
    """The algorithms as a table for the README."""
    lines = ["| family | name | what is kept, and how | needs | paper |", "|---|---|---|---|---|"]
    for entry in catalogue().values():
        needs = ", ".join(sorted(need.replace("_", " ") for need in entry.needs)) or "nothing"
        summary = f"{entry.summary}. Found here: {entry.found}" if entry.found else entry.summary
        lines.append(f"| {entry.family} | `{entry.name}` | {summary} | {needs} | [{entry.paper}]({entry.url}) |")
    return "\n".join(lines)


def layer_table() -> str:
    """The layers as a table for the README."""
    lines = ["| name | what its state is, and how it is written | size | paper |", "|---|---|---|---|"]
    for entry in layer_catalogue().values():
        lines.append(f"| `{entry.name}` | {entry.summary} | {entry.state} | [{entry.paper}]({entry.url}) |")
    return "\n".join(lines)
