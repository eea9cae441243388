"""The words of the project are the field's: what is retired does not come back where users read."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RETIRED = {
    r"foretel\w*|foretold": "predict",
    r"at hand": "current",
    r"made anew|drawn anew": "re-initialised, drawn again",
    r"drawn towards|shaken": "shrunk, perturbed with noise",
    r"learn\w* to be sure": "minimise the entropy of predictions",
    r"which way up": "predict the rotation",
    r"before (?:its|their|his) eyes": "conditioned on a demonstration in context",
    r"likeliest tokens": "nucleus (top-p) sampling",
    r"\b(?:an?|the|its|their|this|same|equal|largest|smallest|what|each) shares?\b|\bshares? of\b": "fraction",
    r"\bglances?\b": "updates per batch",
    r"\bborders?\b(?! padded| as)": "boundaries",
    r"\blearnt\b": "learned",
    r"\bthe same, (?:and|of|with|of a|where|only|inner)\b": "a line that stands alone",
    r"\brows? of (?:a |the |each )?(?:batch|batches|task|memory|sample|weight)\b": "examples",
    r"\b(?:incoming|replayed|training|padded|absent) rows?\b": "examples",
    r"\banswers? of (?:a |the )?net(?:work)?s?\b": "outputs, predictions",
    r"\bturned images?\b|\bimages? turned\b": "rotated",
}
IDENTIFIERS = (
    *(
        rf"\b{name}\b"
        for name in ["glances", "dormant_share", "by_row", "evaluate_every", "evaluate_at", "evaluation_batches"]
    ),
    *(rf"\b{name}\b" for name in ["within_task_accuracy", "stream_functions", "split_state"]),
    r"\bsequence_layers\(\)",
)
ALLOWED: dict[str, tuple[str, ...]] = {
    # Files in which a phrase is what it says: the glossary itself, the record of what was renamed.
    "CHANGELOG.md": (".*",),
}


def texts() -> Iterator[tuple[str, str]]:
    """What users read: pages, docstrings, messages, notebooks, the ledger."""
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "experiments/LEDGER.md",
        "experiments/speed/README.md",
    ):
        yield name, (ROOT / name).read_text()
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        yield path.name, "\n".join("".join(cell["source"]) for cell in cells)
    for path in sorted([*(ROOT / "cl_zoo").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]):
        strings = [
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value
        ]
        yield str(path.relative_to(ROOT)), "\n".join(strings)


TEXTS = dict(texts())


@pytest.mark.parametrize("name", TEXTS)
def test_retired_words_do_not_come_back(name: str) -> None:
    if ".*" in ALLOWED.get(name, ()):
        pytest.skip("it says what was renamed")
    text = re.sub(r"\s+", " ", TEXTS[name])
    found = {
        f"{match.group(0)!r} in '...{text[max(match.start() - 40, 0) : match.end() + 40]}...', say {say}"
        for pattern, say in RETIRED.items()
        for match in re.finditer(pattern, text, re.IGNORECASE)
    }
    assert not found, "\n".join(sorted(found))


def test_retired_identifiers_do_not_come_back() -> None:
    files = [
        *(ROOT / "cl_zoo").rglob("*.py"),
        *(ROOT / "experiments").rglob("*.py"),
        *(ROOT / "notebooks").glob("*.ipynb"),
    ]
    found = [
        f"{path.relative_to(ROOT)}: {match.group(0)}"
        for path in [*files, ROOT / "README.md"]
        for pattern in IDENTIFIERS
        for match in re.finditer(pattern, path.read_text())
    ]
    assert not found


def test_a_retired_word_would_be_found() -> None:
    for wrong in (
        "the task at hand",
        "it learns which way up it is",
        "glances",
        "rows of a batch",
        "its share of the memory",
    ):
        assert any(re.search(pattern, wrong, re.IGNORECASE) for pattern in RETIRED), wrong
    for right in ("rows of a table", "both share one program", "rows and columns", "the answer to a prompt"):
        assert not any(re.search(pattern, right, re.IGNORECASE) for pattern in RETIRED), right
