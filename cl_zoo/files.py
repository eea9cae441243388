"""Files that are never half written."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["write_array", "write_json"]


def write_json(path: Path, value: Any) -> None:
    """Writes beside, then renames: a reader sees the old file or the new one, never half of one."""
    _replace(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def write_array(path: Path, value: np.ndarray) -> None:
    """As `write_json`, for a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, value, allow_pickle=False)
    _replace(path, buffer.getvalue())


def _replace(path: Path, content: bytes) -> None:
    beside = path.with_name(path.name + ".part")
    with open(beside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
