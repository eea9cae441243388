"""Twenty kills at random moments of a run with EWC and replay: every resumed run ends in the same bytes."""

from __future__ import annotations

import subprocess
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
    landed = runs = 0
    while landed < 20:  # kill after kill, until a run gets through; then the next run
        directory = tmp_path / f"killed-{runs}"
        while True:
            process = start_process(directory)
            try:
                assert process.wait(timeout=random.uniform(0.3, 0.8) * span) == 0
                break
            except subprocess.TimeoutExpired:
                process.kill()
                landed += process.wait() != 0
        runs += 1
        assert final_bytes(directory) == wanted
    assert runs >= 2
