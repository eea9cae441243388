"""The study of text domains runs end to end, in small, and does not run again what it has finished."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments import common, text_domains


def test_text_domains(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "enable_compilation_cache", lambda: None)
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "numbers.txt").write_text(" ".join(map(str, range(1000))))
    directory = tmp_path / "run"
    options = {"protocol": "smoke", "mixers": ("softmax attention",), "directory": str(directory)}
    config = text_domains.Config(methods=("naive", "ewc"), text_dir=str(texts), **options)
    text_domains.main(config)
    shown = capsys.readouterr().out
    assert "bits per byte" in shown and "after numbers" in shown and (directory / "bits_per_byte.png").exists()
    result = json.loads((directory / "results.json").read_text())
    rows = {(row["setting"], row["algorithm"]): row["ours"]["mean"] for row in result["rows"]}
    bits = -np.array(json.loads((directory / "cells/softmax_attention-naive-0-0-0.json").read_text())["accuracy"])
    assert bits.shape == (1, 4, 3) and (bits > 0).all() and result["lower_is_better"]
    for i, name in enumerate(("code", "docstrings", "numbers")):
        assert rows[f"softmax attention: {name}, after the last", "naive"] == pytest.approx(bits[0, 3, i])
    forgotten = bits[0, 3, 0] - bits[0, 1, 0]
    assert rows["softmax attention: forgetting of code", "naive"] == pytest.approx(forgotten)
    tried = json.loads((directory / "strength_softmax_attention.json").read_text())
    means = {strength: np.mean(matrix[-1]) for strength, matrix in tried["tried"].items()}
    assert tried["chosen"] == float(min(means, key=means.__getitem__))

    monkeypatch.setattr(common, "sweep", lambda *_, **__: pytest.fail("a finished part was run again"))
    text_domains.main(config)
    assert capsys.readouterr().out == shown
    with pytest.raises(SystemExit, match="texts_crc32"):
        text_domains.main(text_domains.Config(methods=("naive",), **options))
    with pytest.raises(SystemExit, match="methods names nothing, but there are naive, ewc, replay, joint"):
        text_domains.main(text_domains.Config(methods=("nothing",)))
