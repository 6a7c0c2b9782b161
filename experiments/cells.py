"""Cells of an experiment: each computed once, kept on disk, computed again if its inputs change."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks.files import write_atomic

Record = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
SOURCES = (
    "planner/**/*.py",
    "profiler/**/*.py",
    "experiments/synthetic.py",
    "experiments/study.py",
)


def code_digest() -> str:
    """Return a digest of the sources a simulated figure depends on."""
    digest = hashlib.sha256()
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            digest.update(path.relative_to(ROOT).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@dataclass
class CellStore:
    """A folder of finished cells, one JSON file each.

    ``context`` is what every cell depends on (profiles, lengths, seeds, code): a cell made in
    another context is computed again. ``tell`` is given one line per cell.
    """

    folder: Path
    context: Mapping[str, Any]
    tell: Callable[[str], None]
    total: int = 0
    number: int = 0
    computed: int = 0
    started: float = field(default_factory=time.perf_counter)

    def get(self, name: str, compute: Callable[[], Record]) -> Record:
        """Return the cell's record: from its file if that is of this context, else computed."""
        self.number += 1
        path = self.folder / f"{name}.json"
        found = _read(path)
        place = f"[{self.number}/{self.total}]" if self.total else f"[{self.number}]"
        if found is not None and found.get("context") == dict(self.context):
            self.tell(f"{place} {name}: already there")
            record: Record = found["record"]
            return record
        start = time.perf_counter()
        record = compute()
        seconds = time.perf_counter() - start
        write_atomic(
            path,
            json.dumps({"context": dict(self.context), "seconds": seconds, "record": record})
            + "\n",
        )
        self.computed += 1
        elapsed = time.perf_counter() - self.started
        self.tell(f"{place} {name}: {seconds:.1f} s ({elapsed:.0f} s so far)")
        # what is read back is what was written: figures do not depend on whether a cell was kept
        read: Record = json.loads(json.dumps(record))
        return read


def _read(path: Path) -> Record | None:
    """Return the file's object; None if it is missing or was cut off."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return None
    return found if isinstance(found, dict) and "record" in found else None
