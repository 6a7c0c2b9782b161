"""Where each rank of this machine is: ranks note it in shared memory, their parent reads it.

A note costs a few microseconds: some words in a file that all map. A rank without such a file
notes nothing.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

#: What a rank does in a step, in this order; those who wait for others are further than these.
PHASES = (
    *("joining the others", "loading", "dispatching", "waiting for its order", "preparing"),
    *("computing", "reducing", "comparing norms", "updating", "evaluating", "writing", "ending"),
)
#: In these, files or other machines decide how long it takes.
SLOW_PHASES = ("joining the others", "loading", "writing", "ending")
_NOTE = struct.Struct("<qqqd")  # count, step, phase, expected_s
SIZE = 64  # of a rank's part of the file: a cache line


@dataclass(frozen=True)
class Beat:
    """What a rank has noted last.

    Attributes
    ----------
    count
        How many notes it has made.
    step
        The run's step, from 1; 0 before the first.
    phase
        One of `PHASES`.
    expected_s
        The longest of its last steps; 0 before the first has ended.
    """

    count: int
    step: int
    phase: str
    expected_s: float = 0.0

    @property
    def progress(self) -> tuple[int, int]:
        """How far it is, to be compared with others."""
        return self.step, PHASES.index(self.phase)

    def __str__(self) -> str:
        """Return the step, if there is one yet, and the phase."""
        return f"{self.phase} in step {self.step}" if self.step else self.phase


class Heartbeats:
    """A file with a part for each rank."""

    def __init__(self, path: Path, num_ranks: int) -> None:
        """Map a file that has been `made`."""
        self.num_ranks = num_ranks
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), num_ranks * SIZE)

    @classmethod
    def made(cls, path: Path, num_ranks: int) -> Heartbeats:
        """Make the file, in which no rank has noted anything, and map it."""
        path.write_bytes(bytes(num_ranks * SIZE))
        return cls(path, num_ranks)

    @classmethod
    def shared(cls, path: Path, num_ranks: int) -> Heartbeats:
        """Map a file that whichever rank comes first makes."""
        with path.open("ab") as file:
            file.truncate(num_ranks * SIZE)  # new bytes are zero, those that are there stay
        return cls(path, num_ranks)

    def note(self, rank: int, beat: Beat) -> None:
        """Note where a rank is."""
        phase = PHASES.index(beat.phase)
        _NOTE.pack_into(self._map, rank * SIZE, beat.count, beat.step, phase, beat.expected_s)

    def read(self) -> Sequence[Beat]:
        """Return what each rank has noted last."""
        notes = (_NOTE.unpack_from(self._map, rank * SIZE) for rank in range(self.num_ranks))
        return [Beat(count, step, PHASES[phase], s) for count, step, phase, s in notes]


_own: tuple[Heartbeats, int] | None = None  # of this process
_last = Beat(0, 0, PHASES[0])


def attach(heartbeats: Heartbeats, rank: int) -> None:
    """Have `beat` note where this process is, as a rank's."""
    global _own
    _own = heartbeats, rank


def phase() -> str:
    """Return the phase that this process has noted last."""
    return _last.phase


def beat(phase: str, step: int | None = None, expected_s: float | None = None) -> None:
    """Note that this rank is in a phase; what is not given is as it was."""
    global _last
    if _own is not None:
        _last = Beat(
            _last.count + 1,
            _last.step if step is None else step,
            phase,
            _last.expected_s if expected_s is None else expected_s,
        )
        _own[0].note(_own[1], _last)
