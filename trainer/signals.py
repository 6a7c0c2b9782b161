"""Stop requests: Ctrl-C and SIGTERM end a run after the step in progress, with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lobra.model.launch import Interrupted
from lobra.model.rank_process import early_stop

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_REQUEST_S = 2.0  # a launcher repeats within milliseconds what the terminal sent to all
EXIT_CODES: dict[int, int] = {signal.SIGINT: 130, signal.SIGTERM: 143}


@contextmanager
def interruptible() -> Iterator[None]:
    """Have SIGINT and SIGTERM raise `Interrupted` where nothing is to be saved: between two starts.

    Only on the main thread, and not what this process was started to ignore.
    """

    def interrupt(number: int, _frame: FrameType | None) -> None:
        raise Interrupted(number)

    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


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
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                # Ranks started by `lobra train` ignore Ctrl-C: their parent passes it on.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)
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

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
