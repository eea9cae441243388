"""Modules of the extra "language"."""

from __future__ import annotations

from typing import Any

__all__ = ["optional"]


def optional(module: str) -> Any:
    """A module of the extra "language".

    Raises:
      ImportError: it is not installed; names the command that installs it.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} is not installed; pip install 'cl_zoo[language]'") from error
