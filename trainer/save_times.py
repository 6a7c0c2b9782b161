"""When a run saves checkpoints: every so many steps, or by the clock."""

from __future__ import annotations

import time

PERIOD_S = 900.0  # by the clock: what a crash may cost
SHARE = 0.05  # by the clock: of a run's time that checkpoints may take at most


class SaveTimes:
    """Whether a checkpoint is due, and after which step the last one was saved."""

    def __init__(self, every: int | None, step: int | None) -> None:
        """Save every so many steps; 0: at the end only; None: by the clock.

        ``step`` is that of the checkpoint the run goes on from.
        """
        self.every = every
        self.step = step
        self.saved_s, self.took_s = time.monotonic(), 0.0

    def is_due(self, step: int, is_end: bool) -> bool:
        """Return whether to save after so many steps; at the end always, if it is not done."""
        if is_end or self.step == step:
            return self.step != step
        if self.every is not None:
            return self.every > 0 and step % self.every == 0
        return time.monotonic() - self.saved_s >= max(PERIOD_S, self.took_s / SHARE)

    def saved(self, step: int, took_s: float) -> None:
        """Note that a checkpoint was saved after so many steps, and what it took."""
        self.step = step
        self.saved_s, self.took_s = time.monotonic(), took_s

    def failed(self) -> None:
        """Note that none could be saved: by the clock, the next is tried in a period."""
        self.saved_s = time.monotonic()
