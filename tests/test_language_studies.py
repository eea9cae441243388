"""Studies of sequence layers run end to end, in small, and do not run again what they have finished."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from experiments import common, documents, fast_weights, formal_languages, learning_along, recall, switching_bigrams


@pytest.fixture(autouse=True)
def no_cache_of_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's is not for tests."""
    monkeypatch.setattr(common, "enable_compilation_cache", lambda: None)


@pytest.mark.long
def test_recall(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    mixers = ("linear attention", "ttt-linear")
    sizes = {"vocabulary": 12, "width": 8, "heads": 2, "layers": 1, "hidden": 8, "mini_batch": 4}
    config = recall.Config(
        mixers=mixers, pairs=(2, 3), first_steps=3, steps=3, batch_size=4, directory=str(tmp_path), **sizes
    )
    recall.main(config)
    shown = capsys.readouterr().out
    assert "2 pairs" in shown and (tmp_path / "accuracy.png").exists()
    result = json.loads((tmp_path / "results.json").read_text())
    assert [(row["setting"], row["algorithm"]) for row in result["rows"]] == [
        (f"{pairs} pairs", name) for pairs in (2, 3) for name in mixers
    ]
    assert "lower_is_better" not in result
    kept = json.loads((tmp_path / "cells" / "ttt-linear-0.json").read_text())
    assert np.shape(kept["training_loss"]) == (2, 3) and np.isfinite(kept["training_loss"]).all()
    assert result["rows"][3]["ours"]["mean"] == pytest.approx(100 * kept["accuracy"][1])

    monkeypatch.setattr(recall, "run", lambda *_: pytest.fail("a finished part was run again"))
    recall.main(config)
    assert capsys.readouterr().out == shown
    with pytest.raises(SystemExit, match="steps was 3, now it is 4"):
        recall.main(dataclasses.replace(config, steps=4))
    with pytest.raises(SystemExit, match="mixers names nothing, but there are softmax attention"):
        recall.main(dataclasses.replace(config, mixers=("nothing",)))
    with pytest.raises(SystemExit, match="pairs names 6, but it must be in 1 to 5"):
        recall.main(dataclasses.replace(config, pairs=(2, 6)))


def test_fast_weights(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"length": 16, "words": 3, "values": 4, "width": 8, "heads": 2, "layers": 1, "hidden": 8, "mini_batch": 4}
    config = fast_weights.Config(mixers=("ttt-linear",), steps=60, batch_size=8, directory=str(tmp_path), **sizes)
    fast_weights.main(config)
    shown = capsys.readouterr().out
    assert "bits above the best" in shown and (tmp_path / "document.png").exists()
    result = json.loads((tmp_path / "results.json").read_text())
    rows = {(row["setting"], row["algorithm"]): row["ours"]["mean"] for row in result["rows"]}
    names = ("ttt-linear", "ttt-linear, frozen")
    assert list(rows) == [(f"{kind} words", name) for kind in ("known", "new") for name in names]
    assert result["lower_is_better"] and "times its norm" in result["remarks"][1]
    kept = json.loads((tmp_path / "cells" / "ttt-linear-0.json").read_text())
    gone = np.array(kept["movement"])
    assert gone.shape == (1, 2, 16) and (gone[..., 3:] > 0).all()
    assert (gone[..., :3] == 0).all() and (np.diff(gone)[..., 3:6] == 0).all()  # they move once a mini-batch
    assert rows["known words", "ttt-linear"] == kept["known"] < kept["frozen"]["known"]

    cell = {"movement": [gone], "known": [kept["known"]], "frozen": {"known": [kept["frozen"]["known"]]}}
    fast_weights.check_that_weights_matter(cell)
    with pytest.raises(SystemExit, match="did not move in all heads"):
        fast_weights.check_that_weights_matter(cell | {"movement": [0 * gone]})
    with pytest.raises(SystemExit, match="do not help"):
        fast_weights.check_that_weights_matter(cell | {"known": cell["frozen"]["known"]})

    monkeypatch.setattr(fast_weights, "run", lambda *_: pytest.fail("a finished part was run again"))
    fast_weights.main(config)
    assert capsys.readouterr().out == shown
    with pytest.raises(SystemExit, match="words was 3, now it is 5"):
        fast_weights.main(dataclasses.replace(config, words=5))


def test_seen_before() -> None:
    assert fast_weights.seen_before(np.array([[2, 1, 2, 0, 1]])).tolist() == [[False, False, True, False, True]]


@pytest.mark.long
def test_switching_bigrams(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"length": 6, "vocabulary": 5, "tables": 2, "width": 8, "hidden": 8, "batch_size": 4}
    grid = {"rates": (1e-2, 3e-2), "inner_rates": (0.1, 0.3)}
    config = switching_bigrams.Config(segments=(3,), seeds=2, steps=3, directory=str(tmp_path), **sizes, **grid)
    switching_bigrams.main(config)
    shown = capsys.readouterr().out
    assert "ttt-e2e - attention, nats, paired by seed" in shown and (tmp_path / "by_place.png").exists()
    result = json.loads((tmp_path / "results.json").read_text())
    rows = {row["algorithm"]: row for row in result["rows"]}
    assert list(rows) == list(learning_along.SHOWN) and result["lower_is_better"]
    assert all(len(row["scores"]) == 2 and row["ours"]["mean"] > 0 for row in rows.values())
    assert rows["ttt-e2e"]["scores"] != rows["ttt-e2e, rate 0"]["scores"]
    assert rows["dynamic evaluation"]["scores"] != rows["none"]["scores"]
    assert len(json.loads((tmp_path / "chosen" / "ttt-e2e.json").read_text())["loss"]) == 4

    monkeypatch.setattr(learning_along, "sweep", lambda *_, **__: pytest.fail("a finished part was run again"))
    switching_bigrams.main(config)
    assert capsys.readouterr().out == shown
    with pytest.raises(SystemExit, match="methods names nothing, but there are none, attention, ttt-e2e"):
        switching_bigrams.main(dataclasses.replace(config, methods=("nothing",)))


@pytest.mark.long
def test_formal_languages(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"longest": 4, "tested": 7, "strings": 10, "width": 8, "blocks": 1, "hidden": 8, "batch_size": 4}
    languages, layers = ("parity", "shuffle-2"), ("delta rule", "hope")
    config = formal_languages.Config(
        languages=languages, layers=layers, seeds=2, steps=3, directory=str(tmp_path), **sizes
    )
    formal_languages.main(config)
    shown = capsys.readouterr().out
    assert "right, % (longer)" in shown and (tmp_path / "right.png").exists()
    result = json.loads((tmp_path / "results.json").read_text())
    rows = {(row["setting"], row["algorithm"]): row for row in result["rows"]}
    assert list(rows) == [(a + said, b) for said in ("", ", longer") for a in languages for b in layers]
    assert all(len(row["scores"]) == 2 and row["note"].startswith("rate 0.0") for row in rows.values())
    monkeypatch.setattr(formal_languages, "sweep", lambda *_, **__: pytest.fail("a finished part was run again"))
    formal_languages.main(config)
    assert capsys.readouterr().out == shown
    with pytest.raises(SystemExit, match="layers names nothing, but there are softmax attention"):
        formal_languages.main(dataclasses.replace(config, layers=("nothing",)))


@pytest.mark.long
def test_documents(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sizes = {"length": 16, "words": 3, "values": 3, "width": 8, "window": 4, "chunk": 4, "hidden": 8, "prime": 8}
    grid = {"rates": (1e-2,), "inner_rates": (0.3,), "batch_size": 4}
    config = documents.Config(seeds=2, steps=3, directory=str(tmp_path), **sizes, **grid)
    documents.main(config)
    shown = capsys.readouterr().out
    assert "ttt-e2e - dynamic evaluation, nats" in shown and (tmp_path / "by_place.png").exists()
    rows = {row["algorithm"]: row for row in json.loads((tmp_path / "results.json").read_text())["rows"]}
    assert list(rows) == list(learning_along.SHOWN)
    kept = json.loads((tmp_path / "cells" / "16_tokens,_window_4-ttt-e2e-0-1.json").read_text())
    assert np.shape(kept["loss"]) == (2, 6)  # of eight values, those beyond the window
