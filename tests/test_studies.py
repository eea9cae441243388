"""Studies run end to end, in small, and do not run again what they have finished."""

import json
from pathlib import Path

import numpy as np
import pytest

from cl_zoo.evaluation.metrics import average_anytime_accuracy
from experiments import anytime, common


def test_anytime(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anytime, "enable_compilation_cache", lambda: None)
    config = anytime.Config(protocol="smoke", seeds=1, settings=("i-blurry", "gaussian"), directory=str(tmp_path))
    anytime.main(config)
    shown = capsys.readouterr().out
    assert "area under the curve of anytime accuracy" in shown and (tmp_path / "anytime_accuracy.png").exists()
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(row["setting"], row["algorithm"]) for row in rows] == [
        ("i-blurry", "none"), ("i-blurry", "replay"), ("gaussian", "none"), ("gaussian", "replay")
    ]  # fmt: skip
    kept = json.loads((tmp_path / "cells" / "gaussian-replay-0-0-0.json").read_text())
    assert np.shape(kept["curve"]) == (1, 5, 2, 5)
    assert rows[3]["ours"]["mean"] == pytest.approx(100 * float(average_anytime_accuracy(kept["curve"])[0]))

    monkeypatch.setattr(common, "sweep", lambda *_, **__: pytest.fail("a finished part was run again"))
    anytime.main(config)
    assert capsys.readouterr().out == shown
    with pytest.raises(SystemExit, match="share was 0.1, now it is 0.2"):
        anytime.main(anytime.Config(protocol="smoke", share=0.2, directory=str(tmp_path)))
    with pytest.raises(SystemExit, match="share is 0.0125, but it must be a multiple"):
        anytime.main(anytime.Config(protocol="smoke", share=0.0125, directory=str(tmp_path)))
