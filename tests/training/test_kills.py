"""Twenty kills at random moments of a run with EWC and replay: every resumed run ends in the same bytes."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from tests.training.test_running import final_bytes, start_process


@pytest.mark.long
def test_twenty_kills(tmp_path: Path) -> None:
    begun = time.perf_counter()
    assert start_process(tmp_path / "once").wait(timeout=600) == 0
    assert start_process(tmp_path / "warm").wait(timeout=600) == 0  # with the compilation cache, as the resumed ones
    span = (time.perf_counter() - begun) / 2
    wanted = final_bytes(tmp_path / "once")
    random = np.random.default_rng(0)
    kills = landed = 0
    for number in range(5):
        directory = tmp_path / f"killed-{number}"
        for _ in range(4):
            process = start_process(directory)
            try:
                process.wait(timeout=random.uniform(0.2, 0.9) * span)
            except Exception:
                process.kill()
                landed += process.wait() != 0
            kills += 1
        assert start_process(directory).wait(timeout=600) == 0
        assert final_bytes(directory) == wanted
    assert kills == 20
    assert landed >= 15, "most kills must land while the run is going"
