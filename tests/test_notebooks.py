"""Notebooks run from top to bottom, on the embedded digits, and show what they are stored with."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest

from experiments.notebooks import FOLDER, executed

PATHS = sorted(FOLDER.glob("*.ipynb"))


def printed(notebook: Any) -> str:
    return "".join(
        output.get("text", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream"
    )


def numbers(text: str) -> list[float]:
    """Those with a decimal point, but for the last column of a table whose last column is seconds."""
    found, timed = [], False
    for line in text.splitlines():
        row = re.findall(r"-?\d+\.\d+", line)
        timed = line.endswith(" s") or (timed and bool(row))
        found += [float(number) for number in (row[:-1] if timed else row)]
    return found


@pytest.fixture
def same_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Notebooks are told by environment variables what to run; they are put back."""
    for name in ("CL_ZOO_NOTEBOOK_PROTOCOL", "CL_ZOO_NOTEBOOK_DIRECTORY"):
        monkeypatch.setenv(name, "")


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, tmp_path: Path, same_environment: None) -> None:
    shown = printed(executed(path, tmp_path, "smoke"))
    assert "accuracy (%)" in shown or "squared error" in shown


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_notebook_is_stored_with_its_figures(path: Path) -> None:
    """Executed in order, without an error or a warning; the last cell says what was learnt."""
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert all(output.output_type != "error" and output.get("name") != "stderr" for output in outputs)
    assert "## What was learned" in [cell.source for cell in notebook.cells if cell.cell_type == "markdown"][-1]
    assert path.stat().st_size < 500_000


@pytest.mark.long
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_notebook_shows_what_it_is_stored_with(path: Path, tmp_path: Path, same_environment: None) -> None:
    """Up to rounding that grows."""
    stored, found = (numbers(printed(one)) for one in (nbformat.read(path, 4), executed(path, tmp_path)))
    assert len(stored) == len(found) > 2
    near = np.isclose(stored, found, rtol=0.05, atol=3.0)
    assert near.mean() > 0.9, list(zip(stored, found, strict=True))
