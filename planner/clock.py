"""A clock with a limit, for searches that stop in time."""

from __future__ import annotations

import time


class Clock:
    """Seconds since a start, and what is left of a limit."""

    def __init__(self, limit_s: float | None = None) -> None:
        self._start = time.perf_counter()
        self.limit_s = limit_s

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    @property
    def left_s(self) -> float:
        """Seconds left; infinite without a limit."""
        return float("inf") if self.limit_s is None else self.limit_s - self.elapsed_s
