"""Cells of an experiment: each computed once, kept on disk, computed again if its inputs change."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from lobra.common.files import write_atomic

Record = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
SOURCES = (
    "planner/**/*.py",
    "profiler/**/*.py",
    "layout/**/*.py",
    "experiments/bench.py",
    "experiments/runs.py",
    "tasks/sampling.py",
)


def code_digest() -> str:
    """Return a digest of the sources a simulated figure depends on."""
    digest = hashlib.sha256()
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            digest.update(path.relative_to(ROOT).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Cell:
    """One computation: a module-level function, its arguments, and what tells it from others.

    ``label`` is for people. Cells of the same function and ``key`` are the same cell, whatever
    their labels; the key must name everything the result depends on that the store's context does
    not. ``free_of``: entries of the context that the result does not depend on.
    """

    label: str
    function: Callable[..., Record]
    arguments: tuple[Any, ...]
    key: Mapping[str, Any]
    free_of: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of the cell's file."""
        text = json.dumps(dict(self.key), sort_keys=True)
        return f"{self.function.__name__}_{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@dataclass
class Workers:
    """Processes that compute cells; with ``number`` 1 they are computed in this process."""

    number: int
    pool: ProcessPoolExecutor | None = None

    def compute(self, cells: Sequence[Cell]) -> Iterator[tuple[Cell, Record, float]]:
        """Yield cell, record and seconds of every cell, as they are finished."""
        if self.pool is None:
            for cell in cells:
                yield cell, *_timed(cell)
            return
        waiting: dict[Future[tuple[Record, float]], Cell] = {
            self.pool.submit(_timed, cell): cell for cell in cells
        }
        for done in as_completed(waiting):
            yield waiting[done], *done.result()


@contextmanager
def start_workers(number: int) -> Iterator[Workers]:
    """Start worker processes; on an error or Ctrl-C what is still waiting is dropped."""
    if number == 1:
        yield Workers(1)
        return
    pool = ProcessPoolExecutor(number, get_context("spawn"), initializer=_end_on_interrupt)
    try:
        yield Workers(number, pool)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _end_on_interrupt() -> None:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))


def _timed(cell: Cell) -> tuple[Record, float]:
    """Return the cell's record, with the processor's seconds it took, and seconds."""
    start, processor = time.perf_counter(), processor_seconds()
    record = cell.function(*cell.arguments)
    record = {**record, "cell_processor_s": round(processor_seconds() - processor, 3)}
    return record, time.perf_counter() - start


def processor_seconds() -> float:
    """Return the processor's seconds of this process and of its children that have ended."""
    return float(sum(os.times()[:4]))


@dataclass
class CellStore:
    """A folder of finished cells, one JSON file each.

    ``context`` is what every cell depends on (profiles, lengths, seeds, code): a cell made in
    another context is computed again. ``tell`` is given one line per cell. ``used`` has the files
    of all cells asked for, ``computed`` how many were not there.
    """

    folder: Path
    context: Mapping[str, Any]
    tell: Callable[[str], None]
    workers: Workers = field(default_factory=lambda: Workers(1))
    used: set[Path] = field(default_factory=set)
    started: float = field(default_factory=time.perf_counter)
    computed: int = 0

    def _context(self, cell: Cell) -> dict[str, Any]:
        return {name: value for name, value in self.context.items() if name not in cell.free_of}

    def get(self, cells: Sequence[Cell], group: str = "") -> list[Record]:
        """Return the cells' records, in order: from their files if of this context, else computed.

        Equal cells are computed once. A finished cell is written at once, whatever others do.
        """
        records: dict[str, Record] = {}
        missing: dict[str, Cell] = {}
        for cell in cells:
            found = _read(self.folder / f"{cell.name}.json")
            if found is not None and found.get("context") == self._context(cell):
                records[cell.name] = found["record"]
            else:
                missing.setdefault(cell.name, cell)
            self.used.add(self.folder / f"{cell.name}.json")
        if records and group:
            self.tell(f"{group}: {len(records)} there already")
        finished = self.workers.compute(list(missing.values()))
        for number, (cell, record, seconds) in enumerate(finished, 1):
            content: Record = {
                "label": cell.label,
                "key": dict(cell.key),
                "context": self._context(cell),
            }
            content |= {"seconds": seconds, "record": record}
            write_atomic(self.folder / f"{cell.name}.json", json.dumps(content) + "\n")
            # what is used is what was written: figures do not depend on whether a cell was kept
            records[cell.name] = json.loads(json.dumps(record))
            self.computed += 1
            elapsed = time.perf_counter() - self.started
            self.tell(
                f"{group} [{number}/{len(missing)}] {cell.label}: {seconds:.1f} s "
                f"({elapsed:.0f} s so far)"
            )
        return [records[cell.name] for cell in cells]


def _read(path: Path) -> Record | None:
    """Return the file's object; None if it is missing or was cut off."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return None
    return found if isinstance(found, dict) and "record" in found else None
