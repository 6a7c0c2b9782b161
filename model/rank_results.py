"""What the processes of ranks return or fail with, and which failure is the cause of the others."""

from __future__ import annotations

import math
import signal
import time
from multiprocessing.connection import Connection, wait
from typing import Any

from lobra.model.heartbeat import Beat, Heartbeats
from lobra.model.watch import LOOK_S, Watch

LOST = 2  # how a lost connection ranks among failures, see `_blame`
SIGNS_OF_LOSS = ("Connection closed by peer", "Connection reset", "Broken pipe", "remote process")
GRACE_S = 2.0


class RankError(RuntimeError):
    """A rank failed; `.rank` says which, the message carries its traceback."""

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(f"rank {rank} failed: {message}")
        self.rank = rank


class Stalled(RankError):
    """A rank stood still and held all others up, for longer than is allowed."""


def collect(
    processes: list[Any],
    pipes: list[Connection],
    timeout_s: float | None,
    heartbeats: Heartbeats,
    watch: Watch | None,
) -> list[Any]:
    """Wait for every rank's message; raise on the first failure."""
    deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
    results: dict[int, Any] = {}
    pending = dict(enumerate(pipes))
    while pending:
        left = max(0.0, deadline - time.monotonic())
        pause = min(left, math.inf if watch is None else LOOK_S)
        ready = wait(list(pending.values()), timeout=None if pause == math.inf else pause)
        if not ready:
            if not left:
                raise RankError(min(pending), f"no result after {timeout_s:.0f} s")
            if watch is not None and (stall := watch.look()):
                rank, why = stall
                assert rank is not None, "all ranks are watched"
                raise Stalled(rank, why)
            continue
        failures = _take(processes, pending, ready, results, heartbeats)
        until = time.monotonic() + GRACE_S
        # Who lost a connection lost it to a rank that is about to be heard of: it knows why.
        while pending and failures and min(map(_blame, failures.items()))[0] == LOST:
            ready = wait(list(pending.values()), timeout=max(0.0, until - time.monotonic()))
            if not ready:
                break
            failures |= _take(processes, pending, ready, results, heartbeats)
        if failures:
            rank, payload = min(failures.items(), key=_blame)
            if isinstance(payload, BaseException):
                raise payload
            raise RankError(rank, str(payload))
    for process in processes:
        process.join()
    return [results[rank] for rank in range(len(processes))]


def _take(
    processes: list[Any],
    pending: dict[int, Connection],
    ready: list[Any],
    results: dict[int, Any],
    heartbeats: Heartbeats,
) -> dict[int, Any]:
    """Receive from the ranks whose pipes are ready: add to results, return what failed."""
    failures: dict[int, Any] = {}
    for rank in [rank for rank, pipe in pending.items() if pipe in ready]:
        try:
            status, payload = pending.pop(rank).recv()
        except (EOFError, ConnectionResetError):  # the latter: it died before it was told to start
            processes[rank].join(timeout=5)
            failures[rank] = _cause_of_death(processes[rank].exitcode, heartbeats.read()[rank])
            continue
        (results if status == "ok" else failures)[rank] = payload
    return failures


def _cause_of_death(exit_code: int | None, last: Beat) -> str:
    """Return what a person should know about a process that ended without a word."""
    where = f" ({last})" if last.count else ""
    if exit_code is None or exit_code >= 0:
        return f"the process died{where}, with exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    hint = "; the system may have run out of memory (see dmesg)" if name == "SIGKILL" else ""
    return f"the process was killed by {name}{where}{hint}"


def _blame(failure: tuple[int, Any]) -> tuple[int, int]:
    """Order failures: a user's mistake first, then a real error, then a lost connection."""
    rank, payload = failure
    if isinstance(payload, BaseException):
        return 0, rank
    lost = any(sign in payload for sign in SIGNS_OF_LOSS)
    return (LOST if lost else 1), rank
