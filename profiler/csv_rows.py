"""Rows of the profiles' CSV files: read with every mistake named, appended so that a crash costs
no more than the row being written."""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from lobra.common.documents import read_bytes, reading
from lobra.common.errors import ConfigError

MOST_ROWS = 5000  # of a profile; a sweep takes seconds for each
#: Of a number in a profile: as a double it is exact, and a thousand of them add up.
MOST = 10**12


def read_rows(
    path: Path, columns: tuple[str, ...], command: str, optional: tuple[str, ...] = ()
) -> tuple[list[tuple[int, dict[str, str]]], str]:
    """Return (line number, values by column) of every row, and the file's digest.

    The digest is the first 16 hexadecimal digits of the file's SHA-256. ``command`` makes such a
    file, for messages. The ``optional`` columns are "" where the file has them not.

    Raises
    ------
    ConfigError
        If the file is missing, not text, lacks a column or has no rows.
    """
    if not os.path.exists(path):
        raise ConfigError(f"{path}: no such profile; make it with `{command}` or give its path")
    data = read_bytes(path)
    with reading(path):
        rows = _rows(path, data.decode("utf-8-sig"), columns, optional)
    if not rows:
        raise ConfigError(f"{path}: has no rows; make the profile with `{command}`")
    if len(rows) > MOST_ROWS:
        raise ConfigError(f"{path}: has {len(rows)} rows, want at most {MOST_ROWS}")
    return rows, hashlib.sha256(data).hexdigest()[:16]


def _rows(
    path: Path, text: str, columns: tuple[str, ...], optional: tuple[str, ...]
) -> list[tuple[int, dict[str, str]]]:
    """Return (line number, values by column) of every row that is not blank."""
    reader = csv.DictReader(text.splitlines(), skipinitialspace=True)
    header = [(name or "").strip() for name in reader.fieldnames or ()]
    reader.fieldnames = header
    missing = [name for name in columns if name not in header]
    if missing:
        raise ConfigError(
            f"{path}: column {', '.join(missing)} is missing; the header must hold "
            f"{','.join(columns)}, it is {','.join(header) or 'empty'}"
        )
    wanted = (*columns, *optional)
    return [
        (reader.line_num, {name: (row.get(name) or "").strip() for name in wanted})
        for row in reader
        if any((value or "").strip() for value in row.values() if isinstance(value, str))
    ]


def whole_numbers(
    path: Path, line: int, row: dict[str, str], names: tuple[str, ...], problems: list[str]
) -> tuple[int, ...] | None:
    """Return the row's whole numbers, or None with the problems noted."""
    numbers = []
    for name in names:
        try:
            number = float(row[name])
            if not abs(number) <= MOST or number != int(number):
                raise ValueError
        except ValueError:
            problems.append(f"{path}: line {line}: {name}: {row[name]!r:.60} is not a whole number")
            continue
        numbers.append(int(number))
    return tuple(numbers) if len(numbers) == len(names) else None


def finite_ms(path: Path, line: int, text: str, problems: list[str]) -> float | None:
    """Return the time as a number, or None with the problem noted."""
    try:
        value = float(text)
    except ValueError:
        problems.append(f"{path}: line {line}: time: {text!r:.60} is not a number of ms")
        return None
    if not abs(value) <= MOST:
        problems.append(
            f"{path}: line {line}: time: {text} is not finite, or longer than any measurement; "
            f"measure the row again"
        )
        return None
    return value


def append_row(path: str | os.PathLike[str], columns: Sequence[str], row: Sequence[object]) -> None:
    """Append one row and flush it to disk; a new file gets the header first.

    A last line without its line end (a writer died in the middle) is cut off first, so that a
    sweep resumed after a crash leaves no broken row.

    Raises
    ------
    ValueError
        If ``row`` and ``columns`` differ in length.
    """
    if len(row) != len(columns):
        raise ValueError(f"{len(row)} values for the columns {', '.join(columns)}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_torn_line(path)
    with path.open("a+b") as file:
        text = ",".join(str(value) for value in row) + "\n"
        if file.tell() == 0:
            text = ",".join(columns) + "\n" + text
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def cut_torn_line(path: Path) -> None:
    """Cut a last line without its line end, if there is one: a writer died in the middle of it."""
    if not path.is_file():
        return
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        os.truncate(path, end)
