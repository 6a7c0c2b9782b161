"""Stop requests: Ctrl-C and SIGTERM end a run after the step in progress, with a checkpoint."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lobra.common.stop_signals import handled_by
from lobra.model.launch import Interrupted
from lobra.model.rank_process import early_stop

SAME_REQUEST_S = 2.0  # a launcher repeats within milliseconds what the terminal sent to all
EXIT_CODES: dict[int, int] = {signal.SIGINT: 130, signal.SIGTERM: 143}


@contextmanager
def interruptible() -> Iterator[None]:
    """Have SIGINT and SIGTERM raise `Interrupted` where nothing is to be saved: between two starts.

    Where `handled_by` has a handler.
    """

    def interrupt(number: int, _frame: FrameType | None) -> None:
        raise Interrupted(number)

    with handled_by(interrupt):
        yield


class StopRequest:
    """While active, remembers the first stop signal instead of dying of it.

    A second one ends the process, unless it comes within `SAME_REQUEST_S` of the first: one Ctrl-C
    reaches a rank from the terminal and from its launcher.
    """

    def __init__(self, on_signal: Callable[[int], None] | None = None) -> None:
        """Tell ``on_signal`` of that signal."""
        self._on_signal = on_signal
        self.received: int | None = early_stop[0] if early_stop else None
        self._received_at = time.monotonic()
        self._handling = handled_by(self._note)

    def __enter__(self) -> StopRequest:
        self._handling.__enter__()
        return self

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._received_at = number, time.monotonic()
            if self._on_signal is not None:
                self._on_signal(number)
        elif time.monotonic() - self._received_at >= SAME_REQUEST_S:
            # Asked twice: end at once, as without us.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def __exit__(self, *failure: Any) -> None:
        self._handling.__exit__(*failure)
