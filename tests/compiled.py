"""What the text of a compiled program says of its loops."""

from __future__ import annotations

import math
import re

FAST_FORMS = {"b0f_0io->b0f", "b01f_01io->b01f", "b012f_012io->b012f"}


def computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation of a program."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if head := re.match(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = head.group(1)
        found.setdefault(name, []).append(line)
    return found


def called(lines: list[str], parts: dict[str, list[str]]) -> set[str]:
    """Computations that these lines call, and those that they call in turn."""
    found: set[str] = set()
    waiting = set(re.findall(r"(?<=[=,{] |[=,{]%)[\w.\-]+|%[\w.\-]+", "\n".join(lines)))
    while waiting:
        name = waiting.pop().lstrip("%")
        if name in parts and name not in found:
            found.add(name)
            waiting |= set(re.findall(r"%[\w.\-]+", "\n".join(parts[name])))
    return found


def bodies(text: str) -> list[list[str]]:
    """The lines of each loop's body, with all that it calls."""
    parts = computations(text)
    names = set(re.findall(r" while\(.*body=%?([\w.\-]+)", text))
    return [[line for part in {name, *called(parts[name], parts)} for line in parts[part]] for name in names]


def slow_convolutions(text: str) -> list[str]:
    """Convolutions inside of loops in another form than that of the fast routine for CPUs."""
    lines = {line.strip() for body in bodies(text) for line in body if " convolution(" in line}
    form = re.compile(r"dim_labels=([\w>-]+)")
    return sorted(
        line
        for line in lines
        if form.search(line).group(1) not in FAST_FORMS or "group_count" in line  # type: ignore
    )


def copies(text: str, size: int) -> list[str]:
    """Copies of at least `size` elements inside of loops."""

    def elements(line: str) -> int:
        shape = re.search(r"= \w+\[([\d,]*)\]", line)
        return math.prod(int(n) for n in shape.group(1).split(",") if n) if shape else 0

    lines = {line.strip() for body in bodies(text) for line in body if " copy(" in line}
    return sorted(line for line in lines if elements(line) >= size)
