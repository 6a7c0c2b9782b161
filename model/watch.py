"""Who holds a run up: a watch over the ranks of this machine, by their heartbeats.

Ranks wait for each other, so when one stands still, all do soon. Which it is, is told by what the
system says of its process (stopped, waiting for a disk), else by the stacks: all others are in a
collective. If all are, it is the one that is least far.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import time
from collections.abc import Mapping
from pathlib import Path

from lobra.common.files import drafted
from lobra.model.heartbeat import SLOW_PHASES, Beat, Heartbeats

log = logging.getLogger(__name__)

LOOK_S = 1.0  # between two looks
WARN_AFTER_S, WARN_AFTER_STEPS = 30.0, 5  # of what a step is expected to take
END_AFTER_S, END_AFTER_STEPS = 600.0, 20
SLOW_S = 7200.0  # for files and other machines: as long as ranks wait for them
DUMP_SIGNAL = signal.SIGUSR1
DUMP_S = 1.0  # for all ranks to write their stacks
PROCESS_STATES = {  # Linux's letters
    "T": "stopped by a signal (T)",
    "t": "stopped by a debugger (t)",
    "D": "waiting for a disk or a device (D)",
    "Z": "dead (Z)",
    "X": "dead (X)",
    "S": "asleep (S)",
    "R": "running (R)",
    "": "gone",
}
STOPPED, HALTED = ("T", "t"), ("T", "t", "D", "Z", "X", "")
_IN_COLLECTIVE = re.compile(r"torch/distributed/|torch/cuda/__init__.py.* in synchronize")


class Watch:
    """Looks at ranks again and again, and tells when they have not moved for too long."""

    def __init__(
        self,
        heartbeats: Heartbeats,
        pids: Mapping[int, int],
        stacks: Mapping[int, Path],
        end_after_s: float | None,
        has_other_hosts: bool = False,
    ) -> None:
        """Watch the ranks of this machine.

        Parameters
        ----------
        heartbeats
            Where they note what they do.
        pids
            The process of each.
        stacks
            The file in which each writes its stacks when it gets `DUMP_SIGNAL`.
        end_after_s
            How long all may stand still in a step; by default ten minutes, or more where steps are
            long.
        has_other_hosts
            Whether ranks that are not seen here take part: then it may be one of them.
        """
        self._heartbeats = heartbeats
        self._pids = pids
        self._stacks = stacks
        self._end_after_s = end_after_s
        self._has_other_hosts = has_other_hosts
        self._counts: list[int] = []
        self._looked_s = time.monotonic()
        self._silent_s = 0.0  # since any has moved
        self._stopped_s: dict[int, float] = {}
        self._has_warned = False

    def look(self) -> tuple[int | None, str] | None:
        """Return the rank that holds all up and what is known of it, if that is so for too long.

        None for the rank is one of another host. It is warned of before. That is when none has
        moved for too long, or one has been stopped for as long.
        """
        now = time.monotonic()
        # No more than what is between two looks: this process may have been stopped with them all.
        passed_s, self._looked_s = min(now - self._looked_s, 2 * LOOK_S), now
        noted = self._heartbeats.read()
        beats = {rank: noted[rank] for rank in self._pids}
        counts = [beat.count for beat in beats.values()]
        self._silent_s = 0.0 if counts != self._counts else self._silent_s + passed_s
        self._counts = counts
        stopped = [rank for rank, pid in self._pids.items() if process_state(pid) in STOPPED]
        self._stopped_s = {rank: self._stopped_s.get(rank, 0.0) + passed_s for rank in stopped}
        # Others move for as long as what they send to a stopped rank finds room on the way.
        still_s = max([self._silent_s, *self._stopped_s.values()])
        expected_s = max(beat.expected_s for beat in beats.values())
        warn_s, end_s = self._limits(beats, expected_s)
        if still_s >= end_s:
            self._dump()
            return self._blamed(beats, expected_s, still_s)
        if still_s >= warn_s and not self._has_warned:
            log.warning("%s", held_up(*self._blamed(beats, expected_s, still_s)))
        self._has_warned = still_s >= warn_s
        return None

    def keep_stacks(self, target: Path) -> str:
        """Copy the stacks that ranks have written to a folder; return where they are."""
        try:
            with drafted(target) as draft:
                for rank in self._pids:
                    if text := self._stack(rank):
                        (draft / f"rank_{rank}.txt").write_text(text, encoding="utf-8")
        except OSError as error:
            return f"the ranks' stacks cannot be written to {target} ({error.strerror})"
        return f"stacks of all ranks that could write them: {target}"

    def _limits(self, beats: Mapping[int, Beat], expected_s: float) -> tuple[float, float]:
        """Return after how many seconds to warn, and to end the run."""
        warn_s = max(WARN_AFTER_S, WARN_AFTER_STEPS * expected_s)
        end_s = self._end_after_s or max(END_AFTER_S, END_AFTER_STEPS * expected_s)
        if not self._stopped_s:
            if any(beat.phase in SLOW_PHASES for beat in beats.values()):
                return max(warn_s, END_AFTER_S), max(end_s, SLOW_S)
            if not expected_s:  # the first step: much is compiled and made in it
                warn_s, end_s = max(warn_s, END_AFTER_S / 2), max(end_s, END_AFTER_S)
        return min(warn_s, end_s / 2), end_s

    def _blamed(
        self, beats: Mapping[int, Beat], expected_s: float, still_s: float
    ) -> tuple[int | None, str]:
        states = {rank: process_state(pid) for rank, pid in self._pids.items()}
        halted = [rank for rank, state in states.items() if state in HALTED]
        outside = [rank for rank in beats if self._is_outside(rank)]
        rank: int | None = min(halted or outside or beats, key=lambda one: beats[one].progress)
        are_alike = len({beat.progress for beat in beats.values()}) == 1
        if self._has_other_hosts and are_alike and not halted and not outside:
            rank = None
        waiting: dict[str, list[str]] = {}
        for other, beat in beats.items():
            if other != rank:
                waiting.setdefault(str(beat), []).append(str(other))
        usual = f" (a step takes up to {expected_s:.1f} s)" if expected_s else ""
        if rank is None:
            parts = [f"nothing has moved here for {still_s:.0f} s{usual}"]
        else:
            known = PROCESS_STATES.get(states[rank], f"in state {states[rank]}")
            parts = [
                f"it has not moved for {still_s:.0f} s, {beats[rank]}{usual}",
                f"its process {self._pids[rank]} is {known}",
            ]
        if waiting:
            told = [
                f"rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)}, {where}"
                for where, ranks in waiting.items()
            ]
            parts.append(f"waiting for it: {'; '.join(told)}")
        return rank, "; ".join(parts)

    def _dump(self) -> None:
        """Have every rank that can write its stack."""
        for pid in self._pids.values():
            if process_state(pid) not in ("Z", "X", ""):
                os.kill(pid, DUMP_SIGNAL)
        time.sleep(DUMP_S)

    def _stack(self, rank: int) -> str:
        """Return what a rank has written of its stacks, "" if it has not."""
        try:
            return self._stacks[rank].read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def _is_outside(self, rank: int) -> bool:
        """Return whether a rank's stack was written and is in no collective."""
        text = self._stack(rank)
        return bool(text) and not _IN_COLLECTIVE.search(_main_thread(text))


def held_up(rank: int | None, why: str) -> str:
    """Return who holds a run up (None: a rank that is not seen here), and what is known of it."""
    who = "a rank of another host" if rank is None else f"rank {rank}"
    return f"{who} holds the run up: {why}"


def stack_file(folder: Path, rank: int) -> Path:
    """Return where a rank writes its stack."""
    return folder / f"rank_{rank}.txt"


def process_state(pid: int) -> str:
    """Return the letter that Linux has for what a process does; "" if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[0]


def _main_thread(stacks: str) -> str:
    """Return the part of a dump that is of the main thread, which is the last one."""
    return stacks.rpartition("hread 0x")[2]
