"""A run that is asked to stop, saves itself first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Stopped", "stop_requests"]


class Stopped(KeyboardInterrupt):
    """The run was asked to stop, and saved itself first."""


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Turns the first SIGINT or SIGTERM into a request; the second acts as it would have."""
    asked: list[int] = []
    before: dict[int, Any] = {}

    def ask(number: int, frame: Any) -> None:
        asked.append(number)
        for signal_number, handler in before.items():
            signal.signal(signal_number, handler)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, ask)
    try:
        yield lambda: bool(asked)
    finally:
        for signal_number, handler in before.items():
            signal.signal(signal_number, handler)
