"""The rows of a sweep on disk: a CSV that grows row by row, each with details in its sidecar.

A file may hold rows of several memory policies, told apart by a last column; a sweep sees and adds
those of its own. Without the column all are of "keep", as in LobRA's files.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lobra.common.documents import read_bytes, reading
from lobra.common.errors import ConfigError
from lobra.common.files import write_atomic
from lobra.layout.layout import MEMORY_POLICIES
from lobra.profiler.csv_rows import append_row, cut_torn_line
from lobra.profiler.profiles import DEFAULT_POLICY, POLICY_COLUMN
from lobra.profiler.sidecar import read_meta, timestamp, write_meta

Key = tuple[int | str, ...]
NAMES_COLUMN = "kind"  # the one column of keys that are names


@dataclass
class SweepFile:
    """The rows of one profile on disk.

    Attributes
    ----------
    path
        The CSV; its sidecar lies beside it.
    columns
        A row's columns; the first ``num_keys`` of them name it. The memory policy is not one.
    meta
        The sidecar: ``settings`` (what must agree for rows to be comparable) and ``rows`` (details
        of each row by its name, such as "1,512,4", or "1,512,4,full").
    done
        Rows measured under this sweep's policy, by key, in the order of the file.
    memory
        The memory policy of this sweep's rows.
    has_policies
        Whether the CSV has the column that tells policies apart.
    others
        The lines of other policies.
    """

    path: Path
    columns: tuple[str, ...]
    num_keys: int
    meta: dict[str, Any]
    done: dict[Key, tuple[str, ...]] = field(default_factory=dict)
    memory: str = DEFAULT_POLICY
    has_policies: bool = False
    others: list[tuple[str, ...]] = field(default_factory=list)

    @property
    def header(self) -> tuple[str, ...]:
        """The CSV's columns."""
        return (*self.columns, POLICY_COLUMN) if self.has_policies else self.columns

    def name(self, key: Sequence[int | str]) -> str:
        """Return what the sidecar calls a row of this sweep's policy."""
        policy = () if self.memory == DEFAULT_POLICY else (self.memory,)
        return ",".join(map(str, (*key, *policy)))

    def add(self, row: Sequence[int | float | str], details: Mapping[str, Any]) -> None:
        """Append a measured row: first its details to the sidecar, then its line, flushed."""
        key = tuple(_key_part(value) for value in row[: self.num_keys])
        self.meta["rows"][self.name(key)] = dict(details)
        self.meta["last_measured"] = timestamp()
        write_meta(self.path, self.meta)
        append_row(self.path, self.header, self._line(row))
        self.done[key] = tuple(str(value) for value in row)

    def revise(self, row: Sequence[int | float | str], details: Mapping[str, Any]) -> None:
        """Replace a row measured before: the CSV is written anew and renamed, then the sidecar."""
        key = tuple(_key_part(value) for value in row[: self.num_keys])
        self.done[key] = tuple(str(value) for value in row)
        self.rewrite()
        self.meta["rows"][self.name(key)] = dict(details)
        self.meta["last_measured"] = timestamp()
        write_meta(self.path, self.meta)

    def rewrite(self) -> None:
        """Write the CSV anew: the rows of other policies, then those of this sweep's."""
        lines = [self.header, *self.others, *map(self._line, self.done.values())]
        write_atomic(self.path, "".join(",".join(map(str, line)) + "\n" for line in lines))

    def _line(self, row: Sequence[int | float | str]) -> tuple[int | float | str, ...]:
        return (*row, self.memory) if self.has_policies else tuple(row)

    def details(self, key: Sequence[int | str]) -> dict[str, Any]:
        """Return the details of a row, {} if the sidecar has none."""
        return dict(self.meta["rows"].get(self.name(key), {}))

    def skip(self, key: Sequence[int | str], reason: str) -> None:
        """Note in the sidecar that a row cannot be measured, so that it is not tried again."""
        self.meta["skipped"][self.name(key)] = reason
        write_meta(self.path, self.meta)

    def reopened(self) -> SweepFile:
        """Return the file as it now is on disk (another process may have written it)."""
        if not self.path.is_file():
            return self
        return read_sweep(self.path, self.columns, self.num_keys, read_meta(self.path), self.memory)

    def num_rows_on_disk(self) -> int:
        """Return how many complete rows the file holds now, without reading them closely."""
        return max(0, self.path.read_bytes().count(b"\n") - 1) if self.path.is_file() else 0

    @property
    def skipped(self) -> set[Key]:
        """Keys of the rows of this sweep's policy that could not be measured."""
        return {
            tuple(map(_key_part, name.split(",")[: self.num_keys]))
            for name in self.meta["skipped"]
            if policy_of(name) == self.memory
        }


def policy_of(name: str) -> str:
    """Return the memory policy of a row by its name in the sidecar."""
    last = name.rpartition(",")[2]
    return last if last in MEMORY_POLICIES else DEFAULT_POLICY


def read_sweep(
    path: Path, columns: tuple[str, ...], num_keys: int, meta: dict[str, Any], memory: str
) -> SweepFile:
    """Return the file as it is on disk, a line that a killed sweep left unfinished cut off.

    Raises
    ------
    ConfigError
        With every line that is not a row of these columns.
    """
    meta.setdefault("rows", {})
    meta.setdefault("skipped", {})
    sweep = SweepFile(path, columns, num_keys, meta, memory=memory)
    data = read_bytes(path)
    with reading(path):
        text = data.decode("utf-8")
        complete = text[: text.rfind("\n") + 1]
        lines = list(csv.reader(complete.splitlines()))
    with_policies = (*columns, POLICY_COLUMN)
    sweep.has_policies = tuple(lines[0]) == with_policies if lines else memory != DEFAULT_POLICY
    if lines and tuple(lines[0]) not in (columns, with_policies):
        expected = False
    else:
        expected = bool(lines) or ",".join(with_policies).startswith(text)
    if not expected:
        raise ConfigError(
            f"{path}: line 1: the columns are {text.partition(chr(10))[0]}, expected "
            f"{','.join(columns)}, and {POLICY_COLUMN} if you like; repair or remove the file"
        )
    problems = []
    seen: set[tuple[str, Key]] = set()
    for number, row in enumerate(lines[1:], start=2):
        if not row:
            continue
        values, policy = row, DEFAULT_POLICY
        try:
            if sweep.has_policies:
                *values, policy = row
                if policy not in MEMORY_POLICIES:
                    raise ValueError(f"{POLICY_COLUMN}: {policy!r} is not one")
            key = _checked_key(columns, num_keys, values)
        except ValueError as error:
            problems.append(
                f"{path}: line {number}: {','.join(row)!r}: {error}; repair or remove the line "
                f"(a removed line is measured again)"
            )
            continue
        if (policy, key) in seen:
            problems.append(
                f"{path}: line {number}: {sweep.name(key)} is there twice; remove one line"
            )
        seen.add((policy, key))
        if policy == memory:
            sweep.done[key] = tuple(values)
        else:
            sweep.others.append((*values, policy))
    if problems:
        raise ConfigError(problems)
    cut_torn_line(path)
    if memory != DEFAULT_POLICY and not sweep.has_policies:  # its first row of another policy
        sweep.has_policies = True
        sweep.rewrite()
    return sweep


def _checked_key(columns: tuple[str, ...], num_keys: int, row: Sequence[str]) -> Key:
    """Return a line's key; ValueError if a value of it cannot be what its column says."""
    if len(row) != len(columns):
        raise ValueError(f"{len(row)} values for {len(columns)} columns")
    key = tuple(_key_part(value) for value in row[:num_keys])
    for name, part in zip(columns, key, strict=False):
        if (name == NAMES_COLUMN) != isinstance(part, str) or (isinstance(part, int) and part < 1):
            raise ValueError(f"{name}: {part!r} is not one")
    for name, value in zip(columns[num_keys:], row[num_keys:], strict=True):
        number = float(value)
        if not math.isfinite(number) or number < 0 or (name == "time" and number == 0):
            raise ValueError(f"{name}: {value} cannot be")
    return key


def _key_part(value: int | float | str) -> int | str:
    """Return a whole number as int, a name as it is; ValueError for anything else."""
    if isinstance(value, str) and value.replace("_", "").isalpha() and len(value) > 1:
        return value
    return int(value)
