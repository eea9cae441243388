"""The project's own pages say what is so."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cl_zoo._catalogue import catalogue, layer_table, table
from experiments import ledger

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("marker", "table"), [("catalogue", table), ("layers", layer_table)])
def test_readme_shows_the_catalogues(marker: str, table: Callable[[], str]) -> None:
    shown = re.search(rf"<!-- {marker}.*?-->\n(.*?)\n<!-- end", (ROOT / "README.md").read_text(), re.DOTALL)
    assert shown and shown.group(1) == table()


def test_readme_code_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    code = "\n".join(blocks).replace("steps=300", "steps=3").replace("(256, 256)", "(8,)")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "(8, 8, 6, 5)"


def test_ledger_says_what_the_result_files_say() -> None:
    assert ledger.LEDGER.read_text() == ledger.ledger(), "run: make ledger"


@pytest.mark.parametrize(
    "entry", [entry for entry in catalogue().values() if entry.results], ids=lambda entry: entry.name
)
def test_every_reproduction_is_in_the_ledger(entry) -> None:
    assert f"| {entry.results} |" in ledger.LEDGER.read_text()


@pytest.mark.parametrize(
    ("ours", "published", "found"),
    [
        ((99.0, 0.1), (99.1, 0.1), "matched"),
        ((99.0, 0.1), (98.0, 0.1), "better"),
        ((97.0, 0.1), (98.0, 0.1), "not matched"),
        ((97.0, 0.1), (98.0, 0.6), "matched"),
        ((97.9, None), (98.0, None), "matched"),
    ],
)
def test_verdicts(ours: tuple, published: tuple, found: str) -> None:
    as_row = lambda pair: {"mean": pair[0], "sem": pair[1]}  # noqa: E731
    assert ledger.verdict(as_row(ours), as_row(published)) == found


def test_studies_refuse_unknown_and_impossible_values() -> None:
    for arguments, said in (
        (["--protocol", "none_such"], "none_such"),
        (["--no-such-field", "1"], "no-such-field"),
        (["--seeds", "0"], "seeds is 0"),
    ):
        command = [sys.executable, "-m", "experiments.split_mnist", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        assert result.returncode != 0
        assert said in result.stderr + result.stdout


def test_nothing_is_ever_unpickled() -> None:
    for path in [*ROOT.glob("cl_zoo/**/*.py"), *ROOT.glob("experiments/**/*.py")]:
        text = path.read_text()
        assert "pickle.load" not in text and "allow_pickle=True" not in text, path
        assert len(re.findall(r"np\.load\(", text)) == len(re.findall(r"np\.load\([^)]*allow_pickle=False", text)), path
