"""A clock with a limit, for searches that stop in time."""

from __future__ import annotations

import time

WALL_FACTOR = 3.0


class Clock:
    """Seconds since a start, and what is left of a limit.

    ``processor``: the limit is of processor time, so that what else the machine does hardly
    changes how far a search gets; wall-clock time may then be three times the limit.
    """

    def __init__(self, limit_s: float | None = None, processor: bool = False) -> None:
        self._start = time.perf_counter()
        self._processor_start = time.process_time()
        self._spent_s = 0.0
        self.limit_s = limit_s
        self.processor = processor

    def spend(self, seconds: float) -> None:
        """Count processor seconds that other processes spent on the search."""
        self._spent_s += seconds

    @property
    def elapsed_s(self) -> float:
        """Wall-clock seconds since the start."""
        return time.perf_counter() - self._start

    @property
    def left_s(self) -> float:
        """Seconds left; infinite without a limit."""
        if self.limit_s is None:
            return float("inf")
        if not self.processor:
            return self.limit_s - self.elapsed_s
        used_s = time.process_time() - self._processor_start + self._spent_s
        return min(self.limit_s - used_s, WALL_FACTOR * self.limit_s - self.elapsed_s)

    def part(self, share: float) -> Clock:
        """Return a clock of the same kind with a share of what is left."""
        if self.limit_s is None:
            return Clock()
        return Clock(share * max(0.0, self.left_s), self.processor)
