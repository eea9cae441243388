"""Studies run end to end, in small, and do not run again what they have finished."""

import json
from pathlib import Path

import numpy as np
import pytest

from cl_zoo.evaluation.metrics import average_anytime_accuracy
from experiments import anytime, common, corrupted_digits, ledger, result_file


@pytest.fixture(autouse=True)
def no_cache_of_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's is not for tests."""
    monkeypatch.setattr(common, "enable_compilation_cache", lambda: None)


def test_anytime(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    config = anytime.Config(protocol="smoke", seeds=1, settings=("i-blurry", "gaussian"), directory=str(tmp_path))
    anytime.main(config)
    shown = capsys.readouterr().out
    assert "area under the curve of anytime accuracy" in shown and (tmp_path / "anytime_accuracy.png").exists()
    result = json.loads((tmp_path / "results.json").read_text())
    rows = result["rows"]
    assert [(row["setting"], row["algorithm"]) for row in rows] == [
        ("i-blurry", "none"), ("i-blurry", "replay"), ("gaussian", "none"), ("gaussian", "replay")
    ]  # fmt: skip
    kept = json.loads((tmp_path / "cells" / "gaussian-replay-0-0-0.json").read_text())
    assert np.shape(kept["curve"]) == (1, 5, 2, 5)
    assert rows[3]["ours"]["mean"] == pytest.approx(100 * float(average_anytime_accuracy(kept["curve"])[0]))
    # By what the scores came about.
    assert rows[3]["scores"] == [rows[3]["ours"]["mean"]]
    assert result["configuration"]["share"] == 0.1 and result["configuration"]["directory"] == "RUN"
    assert result["data"] == {"images_crc32": json.loads((tmp_path / "config.json").read_text())["images_crc32"]}
    assert result["commit"] == result_file.commit()

    monkeypatch.setattr(common, "sweep", lambda *_, **__: pytest.fail("a finished part was run again"))
    anytime.main(config)
    assert capsys.readouterr().out == shown
    with pytest.raises(SystemExit, match="share was 0.1, now it is 0.2"):
        anytime.main(anytime.Config(protocol="smoke", share=0.2, directory=str(tmp_path)))
    with pytest.raises(SystemExit, match="fraction is 0.0125, but it must be a multiple"):
        anytime.main(anytime.Config(protocol="smoke", share=0.0125, directory=str(tmp_path)))


def test_corrupted_digits(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert result["lower_is_better"] and ("CIFAR-10-C, severity 5, fog", "ttt online") not in rows
    (tmp_path / "results").mkdir()
    (tmp_path / "results.json").rename(tmp_path / "results" / "one.json")
    page = ledger.ledger(tmp_path / "results")
    assert "| CIFAR-10-C, severity 5, fog | ttt online | 16.90 | source read | Sun et al. 2020" in page
    assert "corrupted_cifar10, not run here: 63 published figures" in page

    monkeypatch.setattr(corrupted_digits, "trained", lambda *_: pytest.fail("a finished part was run again"))
    corrupted_digits.main(config)
    assert capsys.readouterr().out == shown
    with pytest.raises(SystemExit, match="methods names nothing, but there are baseline, joint"):
        corrupted_digits.main(corrupted_digits.Config(methods=("nothing",)))


def test_cells_are_kept_seed_by_seed_or_together(tmp_path: Path) -> None:
    ran: list[object] = []

    def alone(seed: int) -> dict:
        ran.append(seed)
        return {"score": seed, "parts": {"x": [seed, None]}, "ragged": [0] * (seed + 1), "seconds": [1.0, 2.0]}

    def together(seeds: list[int]) -> dict:
        ran.append(seeds)
        return {"score": [[seed] for seed in seeds]}

    cells = [common.Cell("a", "one", "one", alone), common.Cell("a", "all", "a all", together, at_once=2)]
    found = common.run_cells(cells, tmp_path, range(3))
    assert ran == [0, 1, 2, [0, 1], [2]]
    assert sorted(path.name for path in (tmp_path / "cells").iterdir()) == [
        "a_all-0-1.json", "a_all-2-2.json", "one-0.json", "one-1.json", "one-2.json"
    ]  # fmt: skip
    one, all_ = found["a", "one"], found["a", "all"]
    np.testing.assert_array_equal(one["parts"]["x"], [[0, np.nan], [1, np.nan], [2, np.nan]])
    assert one["ragged"] == [[0], [0, 0], [0, 0, 0]] and one["seconds"].shape == (3, 2)
    assert all_["score"].tolist() == [[0], [1], [2]] and all_["seconds"].shape == (3,)
    common.run_cells(cells, tmp_path, range(2))
    assert len(ran) == 5


def test_a_result_file_holds_no_place_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["x", "--data-dir", "/home/me", "--seeds", "2", "--directory", "/tmp/x"])
    config = anytime.Config(data_dir="/home/me", directory="/tmp/x")
    rows = {("s", "m"): {"scores": np.array([1.0, 3.0]), "seconds": np.array([1.0])}}
    made = result_file.result_file("anytime", config, result_file.Report("", "title", rows), {})
    assert made["command"] == "python -m experiments.anytime --data-dir DATA --seeds 2 --directory RUN"
    assert made["configuration"]["data_dir"] == "DATA" and "home" not in json.dumps(made)
    assert made["rows"][0]["ours"]["n"] == 2 and "scores" not in made["rows"][0]  # they are not of seeds


def test_checksums(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"text")
    crc = result_file.checksums(b"text")
    array = np.frombuffer(b"text", np.uint8)
    assert result_file.checksums({"folder": tmp_path, "rows": (array[::-1][::-1],)}) == {
        "folder": {"a": crc}, "rows": [crc]
    }  # fmt: skip
