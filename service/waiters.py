"""Who waits for a request's result, woken by the coordinator's thread."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict


class Waiters:
    """Events of requests, by their names."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events: dict[str, list[tuple[asyncio.AbstractEventLoop, asyncio.Event]]]
        self._events = defaultdict(list)

    def finished(self, request_id: str) -> None:
        """Wake all who wait for a request. From any thread."""
        with self._lock:
            events = self._events.pop(request_id, [])
        for loop, event in events:
            loop.call_soon_threadsafe(event.set)

    def expect(self, request_id: str) -> asyncio.Event:
        """Return what is set when the request is finished, if it is after this call."""
        entry = asyncio.get_running_loop(), asyncio.Event()
        with self._lock:
            self._events[request_id].append(entry)
        return entry[1]

    def forget(self, request_id: str, event: asyncio.Event) -> None:
        """Wait no more."""
        with self._lock:
            left = [entry for entry in self._events.get(request_id, []) if entry[1] is not event]
            if left:
                self._events[request_id] = left
            else:
                self._events.pop(request_id, None)

    @property
    def is_waited_for(self) -> bool:
        """Whether anybody waits for any request."""
        with self._lock:
            return bool(self._events)
