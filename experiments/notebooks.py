"""Executes the notebooks and stores what they print and draw; progress bars and warnings are left out.

python -m experiments.notebooks                        all, each within 3 minutes on 2 cores
python -m experiments.notebooks 04_learning_while_answering
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import tyro

FOLDER = Path(__file__).parents[1] / "notebooks"


@dataclasses.dataclass(frozen=True)
class Config:
    """Which are executed."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Of notebooks, without their ending; all by default."""


def executed(path: Path, runs: Path, protocol: str = "demo") -> Any:
    """A notebook with its outputs; `runs` is where its studies keep what they finished."""
    import nbformat
    from nbclient import NotebookClient

    os.environ.update(CL_ZOO_NOTEBOOK_PROTOCOL=protocol, CL_ZOO_NOTEBOOK_DIRECTORY=str(runs))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(FOLDER)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def main(config: Config) -> None:
    """See above."""
    import nbformat

    paths = [FOLDER / f"{name}.ipynb" for name in config.names] or sorted(FOLDER.glob("*.ipynb"))
    for path in paths:
        if not path.is_file():
            raise SystemExit(f"{path}: no such notebook")
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as runs:
            nbformat.write(executed(path, Path(runs)), path)
        print(f"{path.stem}: {time.perf_counter() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
