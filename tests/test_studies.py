"""Studies run end to end, in small, and do not run again what they have finished."""

import json
from pathlib import Path

import numpy as np
import pytest

from cl_zoo.evaluation.metrics import average_anytime_accuracy
from experiments import anytime, common, corrupted_digits, ledger


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


def test_corrupted_digits(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corrupted_digits, "enable_compilation_cache", lambda: None)
    methods = ("joint", "ttt", "norm")
    config = corrupted_digits.Config(protocol="smoke", seeds=1, methods=methods, directory=str(tmp_path))
    corrupted_digits.main(config)
    shown = capsys.readouterr().out
    assert "noise, equal rows" in shown and (tmp_path / "errors.png").exists()
    result = json.loads((tmp_path / "results.json").read_text())
    rows = {(row["setting"], row["algorithm"]): row["ours"] for row in result["rows"]}
    assert {method for setting, method in rows if setting == "noise, equal rows"} == set(methods)
    assert ("all 15", "ttt") not in rows and ("all 15", "norm") in rows
    kept = {method: json.loads((tmp_path / "cells" / f"{method}-0.json").read_text())["errors"] for method in methods}
    assert len(kept["joint"]) == 17 and len(kept["ttt"]) == 5 and kept["ttt"]["speckle_noise/5"][0] is None
    equal = np.mean([kept["joint"][name][1] for name in kept["ttt"]])
    assert rows["noise, equal rows", "joint"]["mean"] == pytest.approx(equal)
    assert result["lower_is_better"] and rows["CIFAR-10-C, severity 5, fog", "ttt online"] is None
    (tmp_path / "results").mkdir()
    (tmp_path / "results.json").rename(tmp_path / "results" / "one.json")
    page = ledger.ledger(tmp_path / "results")
    assert "| CIFAR-10-C, severity 5, fog | ttt online | 16.90 | Sun et al. 2020" in page and "not attempted |" in page

    monkeypatch.setattr(corrupted_digits, "trained", lambda *_: pytest.fail("a finished part was run again"))
    corrupted_digits.main(config)
    assert capsys.readouterr().out == shown
    with pytest.raises(SystemExit, match="methods names nothing, but there are baseline, joint"):
        corrupted_digits.main(corrupted_digits.Config(methods=("nothing",)))
