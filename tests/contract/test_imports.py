"""Imports point one way."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "cl_zoo"
# What each part may import, beside itself.
ALLOWED: dict[str, set[str]] = {
    "files": set(),
    "compilation": set(),
    "checks": set(),
    "identity": set(),
    "entries": set(),
    "losses": {"checks"},
    "_model": {"checks"},
    "types": {"losses", "checks", "identity", "_model"},
    "shuffle": {"types"},
    "counters": {"types"},
}
BASE = set(ALLOWED)
ALLOWED |= {
    "estimators": BASE,
    "buffers": BASE,
    "augmentation": BASE,
    "layers": BASE | {"estimators"},
    "optimisers": BASE | {"layers"},
    "models": BASE | {"layers"},
    "wrappers": BASE | {"layers", "models"},
    "language": BASE | {"layers", "models"},
    "_batches": BASE,
    "_learner": BASE | {"models", "_batches"},
    "_compose": BASE | {"_learner"},
    "algorithms": BASE | {"augmentation", "estimators", "buffers", "models", "language", "wrappers"},
    "_catalogue": {"entries"},
    "datasets": BASE,
    "streams": BASE | {"datasets", "language"},
    "evaluation": BASE | {"estimators", "_learner"},
    "training": BASE | {"evaluation", "_learner", "_batches"},
}
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def imported(path: Path) -> set[str]:
    """Parts of the package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "cl_zoo":
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("cl_zoo"):
            found.add(node.module.split(".")[1])
        if isinstance(node, ast.Import):
            found |= {(name.name.split(".") + [""])[1] for name in node.names if name.name.startswith("cl_zoo")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert part in ALLOWED, f"{part} is a new part: say what it may import"
    assert imported(path) - {part} <= ALLOWED[part]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_adapters_and_nets_know_flax(path: Path) -> None:
    if path.relative_to(ROOT).parts[0] != "models":
        assert "flax" not in path.read_text().lower().replace('"flax"', "")
