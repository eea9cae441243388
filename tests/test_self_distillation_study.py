"""The study of self-distillation runs, and stops where there is nothing to distil."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import common
from experiments import self_distillation as study
from experiments import self_distillation_bench as bench
from experiments import self_distillation_report as report

PRETRAINED = Path(__file__).parent / "data" / "pretrained" / "llama"
TINY = {
    "known": 2,
    "new": 2,
    "width": 8,
    "steps": 2,
    "points": 1,
    "batch_size": 4,
    "first_steps": 2,
    "rates": (1e-3, 2e-3),
}


@pytest.fixture(autouse=True)
def no_cache_of_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's is not for tests."""
    monkeypatch.setattr(common, "enable_compilation_cache", lambda: None)


def test_it_stops_where_demonstrations_do_not_help(tmp_path: Path) -> None:
    config = study.Config(directory=str(tmp_path), **TINY)
    with pytest.raises(SystemExit, match="the teacher is no better than the net itself"):
        study.main(config)


@pytest.fixture
def helpful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nets that learned too little to follow a demonstration are taken all the same."""
    real = bench.scores

    def scores(*arguments: Any) -> np.ndarray:
        found = real(*arguments)
        scores.calls += 1  # type: ignore[attr-defined]
        return found + (scores.calls % 2 == 0)  # type: ignore[attr-defined]

    scores.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(bench, "scores", scores)


FEW = ("in context", "sft", "sft + interpolation", "sdft forward")


@pytest.mark.parametrize("methods", [FEW, pytest.param(bench.METHODS, marks=pytest.mark.long)], ids=["few", "all"])
def test_methods_run_and_a_finished_run_is_not_run_again(
    methods: tuple[str, ...],
    helpful: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = study.Config(directory=str(tmp_path), methods=methods, **TINY)
    study.main(config)
    said = capsys.readouterr().out
    assert all(f"\n{method} " in said for method in methods)
    result = json.loads((tmp_path / "results.json").read_text())
    assert {row["algorithm"] for row in result["rows"]} == set(methods)
    for name in ("new_against_retained.png", "drift.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    choosing = {path.name for path in (tmp_path / "cells").glob("sft-*-[01].json")}
    assert choosing == {f"sft-{rate}-{seed}.json" for rate in ("0.001", "0.002") for seed in (0, 1)}
    (path,) = (tmp_path / "cells").glob("sdft_forward-*-10.json")  # with the rate that they chose
    cell = json.loads(path.read_text())
    assert np.array(cell["curve"]["drift"]).shape == (2, 1) and cell["curve"]["drift"][-1][-1] > 0
    assert cell["tokens"] > json.loads((tmp_path / "cells" / "sft-0.001-0.json").read_text())["tokens"]
    monkeypatch.setattr(study, "run", None)
    study.main(config)
    assert capsys.readouterr().out == said[said.index("\n") + 1 :]  # the first line is about the net
    with pytest.raises(SystemExit, match="steps"):
        study.main(dataclasses.replace(config, steps=4))


@pytest.mark.long
def test_a_published_model_with_adapters(helpful: None, tmp_path: Path) -> None:
    few = {"methods": ("sft", "sdft forward"), "rates": (1e-3,), "steps": 2, "batch_size": 4}
    config = study.Config(model=str(PRETRAINED), directory=str(tmp_path), **few)  # type: ignore[arg-type]
    study.main(config)
    cell = json.loads((tmp_path / "cells" / "sdft_forward-0.001-10.json").read_text())
    assert np.isfinite(cell["loss"]).all() and cell["after"]["drift"][0] > 0


def cell(forgetting: float, gain: float = 1.0, early: float = 0.1) -> dict[str, Any]:
    """A run with one new skill and one known, which falls by `early` while the new one rises to 0.8 of its gain, and
    then to what it is at the end; measured at both."""
    one = {"validation": [[gain]], "drift": [0.0], "perplexity": [1.0]}
    before = {"held": [1.0], "new": [0.0], "perplexity": 1.0}
    end = 1.0 - forgetting * gain
    curve = {"new": [[[0.8 * gain], [gain]]], "held": [[[1.0 - early], [end]]]}
    return {"before": before, "after": one | {"new": [[gain]], "held": [[end]]}, "curve": curve}


def test_fall_at_a_gain_is_read_off_the_curve() -> None:
    assert report.fall_at(cell(0.4), 0.4) == pytest.approx(0.05)
    assert report.fall_at(cell(0.4), 0.8) == pytest.approx(0.1)
    assert report.fall_at(cell(0.4), 0.9) == pytest.approx(0.25)
    assert np.isnan(report.fall_at(cell(0.4, 0.5), 0.9))


@pytest.mark.parametrize(
    ("sdft", "words"),
    [
        ((0.15, 0.18, 0.21), "90 %: 0.180 with sdft forward, 0.250 with sft; lower in 3 of 3 seeds, p = 0.056 "),
        ((0.17, 0.18, 0.19), "less is forgotten is confirmed at this scale."),
        ((0.1, 0.2, 0.35), "less is forgotten is undecided at this scale."),
        ((0.31, 0.32, 0.3), "less is forgotten is refuted at this scale."),
        ((0.2,), "less is forgotten is undecided at this scale."),
    ],
)
def test_the_claim_is_judged_seed_by_seed_by_the_fall_at_equal_gain(sdft: tuple[float, ...], words: str) -> None:
    cells = {
        ("sft", 0.1): [cell(0.4, early=0.1) for _ in sdft],
        ("sdft forward", 0.2): [cell(0.4, early=2 * fall - 0.4) for fall in sdft],
    }
    (judged,) = report.claim(cells)
    assert words in judged


def test_a_curve_of_one_point_is_judged_by_forgetting_per_gain() -> None:
    runs = {("sft", 0.1): [cell(0.4)] * 3, ("sdft forward", 0.2): [cell(f) for f in (0.2, 0.3, 0.3)]}
    for run in {id(run): run for found in runs.values() for run in found}.values():
        run["curve"] = {name: [values[0][-1:]] for name, values in run["curve"].items()}
    (judged,) = report.claim(runs)
    assert "at the end: 0.267 with sdft forward, 0.400 with sft; lower in 3 of 3 seeds, p = 0.057" in judged


def test_there_is_no_claim_where_nothing_was_learned() -> None:
    cells = {("sft", 0.1): [cell(0.4)], ("sdft forward", 0.1): [cell(0.4, 0.01)]}
    assert report.claim(cells) == []
    assert report.claim({("sft", 0.1): [cell(0.4)]}) == []
    config = study.Config(rates=(0.1, 0.2))
    assert report.note(config, 0.1, cells["sdft forward", 0.1]) == "rate 0.1; nothing was learned"
    assert report.note(config, 0.2, [cell(0.4)]) == "rate 0.2, the largest tried"


def test_the_smallest_rate_within_a_point_of_the_best_is_chosen() -> None:
    cells = {("sft", rate): [cell(0.4, gain)] for rate, gain in ((0.1, 0.5), (0.2, 0.995), (0.3, 1.0))}
    assert report.chosen(cells) == {"sft": 0.2}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"methods": ("magic",)}, "methods names magic"),
        ({"seeds": 0}, "seeds is 0"),
        ({"first_seed": 1}, "first_seed is 1"),
        ({"steps": 0}, "steps is 0"),
        ({"skip": -1}, "skip is -1"),
        ({"teacher_rate": 5.0}, "teacher_rate is 5"),
        ({"rates": (-1.0,)}, "rates is -1"),
        ({"model": "nowhere", "batch_size": 13}, "batch_size is 13, but it must be in \\[1, 12\\]"),
        ({"model": "nowhere", "new": 5}, "new is 5, but it must be in \\[1, 4\\]"),
        ({"steps": 7, "points": 2}, "points is 2"),
        ({"model": "nowhere"}, "nowhere does not exist"),
    ],
)
def test_what_is_refused(changed: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=words):
        study.main(study.Config(**({"directory": str(tmp_path)} | changed)))
