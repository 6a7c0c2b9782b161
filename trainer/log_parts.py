"""The files of a run's log: metrics.jsonl, and the parts that were moved out of it as it grew.

A line has some 250 bytes a task, so that 5,000 steps of 100 tasks are 120 MB. What metrics.jsonl
holds when it is full is packed into a file beside it, ``metrics.until_<n>.jsonl.gz``: the steps
before the n-th from 0 that no earlier part has.
"""

from __future__ import annotations

import gzip
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from lobra.common.documents import check_regular, reading
from lobra.common.errors import ConfigError
from lobra.common.files import write_atomic

METRICS_FILE = "metrics.jsonl"
MOST_BYTES = 64 << 20  # of metrics.jsonl; packing them takes a second

_PART = re.compile(r"metrics\.until_(\d{1,15})\.jsonl(\.gz)?")


def log_parts(folder: Path) -> dict[int, Path]:
    """Return the files that lines were moved to, ascending, by the step (from 0) they end before.

    One that could not be packed has no suffix ``.gz``; where both are there, the packed one counts.
    """
    found = {}
    for path in sorted(folder.glob("metrics.until_*")):
        if match := _PART.fullmatch(path.name):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def log_files(folder: Path) -> list[Path]:
    """Return the files of a run's log that are there, in the order of their steps."""
    newest = folder / METRICS_FILE
    return [*log_parts(folder).values(), *([newest] if os.path.lexists(newest) else [])]


def move_away(folder: Path, step: int) -> None:
    """Move what metrics.jsonl holds, all of it of steps before ``step``, to a packed part.

    Raises
    ------
    OSError
        There is no room to pack it: it is moved, but not packed.
    """
    plain = folder / f"metrics.until_{step}.jsonl"
    os.replace(folder / METRICS_FILE, plain)
    write_atomic(plain.with_name(f"{plain.name}.gz"), gzip.compress(plain.read_bytes(), 6))
    plain.unlink()


def remove_log(files: Iterable[Path], keep_aside: bool = False) -> None:
    """Remove files of a log, or keep them aside, with the suffix ``.damaged``."""
    for path in files:
        if keep_aside:
            os.replace(path, path.with_name(f"{path.name}.damaged"))
        else:
            path.unlink()
        if path.suffix == ".gz":  # packing it may have been interrupted
            path.with_suffix("").unlink(missing_ok=True)


def log_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file of a log; one longer than a part may be comes in pieces.

    Raises
    ------
    ConfigError
        It cannot be read.
    """
    check_regular(path)
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with reading(path), opened(path, "rb") as file:
            while line := file.readline(MOST_BYTES):
                yield line
    except zlib.error as error:
        raise ConfigError(f"{path}: cannot be read (damaged: {error})") from None
