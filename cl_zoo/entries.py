"""What the catalogue states about an algorithm or a layer: an `ENTRY` beside each factory."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["Entry", "LayerEntry", "Null", "bibliography"]

FAMILIES = (
    "baseline",
    "regularisation",
    "distillation",
    "replay",
    "weight averaging",
    "parameter isolation",
    "meta-learning",
    "plasticity",
    "test-time training",
    "self-distillation",
)
"""Families of algorithms, in the order of the table."""


@dataclasses.dataclass(frozen=True)
class Null:
    """The setting in which an algorithm does nothing, and so equals the naive learner.

    Attributes:
      arguments: arguments of the factory that differ from its defaults.
      why: the reason, in words.
      sgd: whether it holds under plain SGD only.
    """

    arguments: Mapping[str, Any]
    why: str
    sgd: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Cited:
    """Attributes:
    name: in the catalogue and the ledger.
    summary: what is kept, or what the state is, and how.
    factory: see below.
    arguments: of the factory, for examples and tests.
    numbers: which of them may be traced, and so swept.
    papers: keys in `papers.bib`, the first one the source.
    """

    name: str
    summary: str
    factory: Callable[..., Any]
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    numbers: tuple[str, ...] = ()
    papers: tuple[str, ...]

    @property
    def bibtex(self) -> str:
        """BibTeX of its papers."""
        return "\n".join(bibliography()[key] for key in self.papers)

    @property
    def paper(self) -> str:
        """Authors and year of its source."""
        fields = dict(re.findall(r"(\w+)=\{(.*?)\}[,\n]", bibliography()[self.papers[0]] + "\n", re.DOTALL))
        names = [author.split(",")[0] for author in fields["author"].split(" and ")]
        return f"{names[0]} et al. {fields['year']}" if len(names) > 2 else f"{' and '.join(names)} {fields['year']}"

    @property
    def url(self) -> str:
        """Address of its source."""
        return re.findall(r"url=\{(.*?)\}", bibliography()[self.papers[0]])[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry(_Cited):
    """An algorithm; its factory gives a `Component`.

    Attributes:
      family: one of `FAMILIES`.
      scenarios: those that it can be used in; in "episodes" examples are learning problems of their own, in "skills"
        they are questions with a demonstration; the laws are tested in the first.
      null: where it equals the naive learner; None if nowhere.
      results: name of its reproduction in `experiments/LEDGER.md`; "" while there is no result yet.
      found: what came out there, where it is less than the paper would make one expect.
      own_loss: whether it replaces `supervised` rather than joining it.
      trains: whether the network's parameters change.
    """

    family: str
    scenarios: tuple[str, ...] = ("task", "domain", "class")
    null: Null | None = None
    results: str = ""
    found: str = ""
    own_loss: bool = False
    trains: bool = True

    @property
    def needs(self) -> frozenset[str]:
        """Which of `cl_zoo.types.NEEDS` it needs."""
        return self.factory(**self.arguments).needs


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerEntry(_Cited):
    """A sequence layer; its factory, `(width, heads, **arguments)`, gives a `Mixer`.

    Attributes:
      state: "grows" (with the tokens seen, and time with their square) or "constant" (time is linear).
      frozen: arguments under which nothing is written, with the same parameters; None where the state begins empty.
    """

    state: str
    frozen: Mapping[str, Any] | None = None


@functools.cache
def bibliography() -> dict[str, str]:
    """The entries of `papers.bib` by key."""
    text = (Path(__file__).parent / "papers.bib").read_text(encoding="utf-8")
    return {
        found.group(1): found.group(0)
        for found in re.finditer(r"^@\w+\{(.*?),\n.*?^\}", text, re.DOTALL | re.MULTILINE)
    }
