"""A sweep's files: the CSV that grows row by row and the sidecar that says how it was made.

A sweep that is killed at any moment and started again with the same settings measures no row
twice and loses none. The sidecar is written before a row's line, so that every line of the CSV
has its details there.
"""

from __future__ import annotations

import csv
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from lobra.common.errors import ConfigError
from lobra.common.files import write_atomic
from lobra.common.lock import hold
from lobra.profiler.csv_rows import append_row, cut_torn_line
from lobra.profiler.profiles import meta_path, read_meta, write_meta

log = logging.getLogger(__name__)

Restart = Literal["never", "changed", "always"]
RESTARTS: tuple[Restart, ...] = ("never", "changed", "always")
Key = tuple[int | str, ...]
NAMES_COLUMN = "kind"  # the one column of keys that are names
# What of a sidecar's environment must agree for rows to be of one machine.
SAME_MACHINE = (("hardware", "name"), ("hardware", "num_cores"), ("versions", "torch"))
REMEDY = "--restart changed sets it aside and measures anew, --output takes another file"


@dataclass
class SweepFile:
    """The rows of one profile on disk.

    Attributes
    ----------
    path
        The CSV; its sidecar lies beside it.
    columns
        The CSV's columns; the first ``num_keys`` of them name a row.
    meta
        The sidecar: ``settings`` (what must agree for rows to be comparable) and ``rows`` (details
        of each row by its key, such as "1,512,4").
    done
        Keys of the rows measured, in the order of the file.
    """

    path: Path
    columns: tuple[str, ...]
    num_keys: int
    meta: dict[str, Any]
    done: dict[Key, tuple[str, ...]] = field(default_factory=dict)

    def add(self, row: Sequence[int | float | str], details: Mapping[str, Any]) -> None:
        """Append a measured row: first its details to the sidecar, then its line, flushed."""
        key = tuple(_key_part(value) for value in row[: self.num_keys])
        self.meta["rows"][_name(key)] = dict(details)
        self.meta["last_measured"] = _now()
        write_meta(self.path, self.meta)
        append_row(self.path, self.columns, row)
        self.done[key] = tuple(str(value) for value in row)

    def revise(self, row: Sequence[int | float | str], details: Mapping[str, Any]) -> None:
        """Replace a row measured before: the CSV is written anew and renamed, then the sidecar."""
        key = tuple(_key_part(value) for value in row[: self.num_keys])
        self.done[key] = tuple(str(value) for value in row)
        lines = [self.columns, *self.done.values()]
        write_atomic(self.path, "".join(",".join(line) + "\n" for line in lines))
        self.meta["rows"][_name(key)] = dict(details)
        self.meta["last_measured"] = _now()
        write_meta(self.path, self.meta)

    def details(self, key: Sequence[int | str]) -> dict[str, Any]:
        """Return the details of a row, {} if the sidecar has none."""
        return dict(self.meta["rows"].get(_name(tuple(key)), {}))

    def skip(self, key: Sequence[int | str], reason: str) -> None:
        """Note in the sidecar that a row cannot be measured, so that it is not tried again."""
        self.meta["skipped"][_name(tuple(key))] = reason
        write_meta(self.path, self.meta)

    def reopened(self) -> SweepFile:
        """Return the file as it now is on disk (another process may have written it)."""
        if not self.path.is_file():
            return self
        return _resume(self.path, self.columns, self.num_keys, read_meta(self.path))

    def num_rows_on_disk(self) -> int:
        """Return how many complete rows the file holds now, without reading them closely."""
        return max(0, self.path.read_bytes().count(b"\n") - 1) if self.path.is_file() else 0

    @property
    def skipped(self) -> set[Key]:
        """Keys of the rows that could not be measured."""
        return {tuple(map(_key_part, name.split(","))) for name in self.meta["skipped"]}


def open_sweep(
    path: Path,
    columns: Sequence[str],
    num_keys: int,
    settings: Mapping[str, Any],
    *,
    kind: str,
    restart: Restart = "never",
    environment: Mapping[str, Any] | None = None,
) -> SweepFile:
    """Open the files of a sweep, new or to be continued.

    Parameters
    ----------
    path, columns, num_keys
        The CSV, its columns, and how many of them (whole numbers) name a row.
    settings
        What was measured and how; rows of other settings are never mixed with these.
    kind
        "measured" or "estimated".
    restart
        What to do with a file of other settings: "never" refuses it, "changed" sets it aside (as
        ``.csv.old``, ``.csv.old.2``, ...) and starts anew; "always" does so with any file.
    environment
        Versions and the like, recorded; the hardware's name, its cores and torch's version are
        compared.

    Raises
    ------
    ConfigError
        If the file has other settings and ``restart`` is "never", a line of it is broken, another
        sweep is writing to it, or it cannot be written.
    """
    _hold(path, restart)
    if path.is_file():
        meta = read_meta(path)
        problem = _settings_problem(path, meta, settings) or _hardware_problem(
            path, meta, environment or {}
        )
        if restart == "always" or (problem and restart == "changed"):
            _set_aside(path)
        elif problem:
            raise ConfigError(problem)
        else:
            return _resume(path, tuple(columns), num_keys, meta)
    meta = {
        "kind": kind,
        "settings": dict(settings),
        "environment": dict(environment or {}),
        "started": _now(),
        "rows": {},
        "skipped": {},
    }
    write_meta(path, meta)
    return SweepFile(path, tuple(columns), num_keys, meta)


def _hold(path: Path, restart: Restart) -> None:
    """Keep the profile to this process, or say why nothing can be written there."""
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; give the CSV to write")
    if path.is_file() and not meta_path(path).is_file() and restart == "never":
        raise ConfigError(_not_ours(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f".{path.name}.lock")
        hold(lock, str(path), "sweep", "wait for it, or give another --output")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from error


def _resume(path: Path, columns: tuple[str, ...], num_keys: int, meta: dict[str, Any]) -> SweepFile:
    meta.setdefault("rows", {})
    meta.setdefault("skipped", {})
    sweep = SweepFile(path, columns, num_keys, meta)
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as CSV text ({error})") from error
    header = ",".join(columns)
    complete = text[: text.rfind("\n") + 1]
    lines = list(csv.reader(complete.splitlines()))
    if (lines and tuple(lines[0]) != columns) or (not lines and not header.startswith(text)):
        raise ConfigError(
            f"{path}: line 1: the columns are {text.partition(chr(10))[0]}, expected {header}; "
            f"repair or remove the file"
        )
    problems = []
    for number, row in enumerate(lines[1:], start=2):
        if not row:
            continue
        try:
            key = _checked_key(columns, num_keys, row)
        except ValueError as error:
            problems.append(
                f"{path}: line {number}: {','.join(row)!r}: {error}; repair or remove the line "
                f"(a removed line is measured again)"
            )
            continue
        if key in sweep.done:
            problems.append(f"{path}: line {number}: {_name(key)} is there twice; remove one line")
        sweep.done[key] = tuple(row)
    if problems:
        raise ConfigError(problems)
    cut_torn_line(path)
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


def _settings_problem(
    path: Path, meta: Mapping[str, Any], settings: Mapping[str, Any]
) -> str | None:
    """Return why the rows of `path` cannot be continued under `settings`, None if they can."""
    if not meta:
        return _not_ours(path)
    wrong = [
        name
        for name in ("settings", "environment", "rows", "skipped")
        if not isinstance(meta.get(name, None if name == "settings" else {}), dict)
    ]
    if wrong:
        return f"{meta_path(path)}: {', '.join(wrong)}: a JSON object is expected; {REMEDY}"
    before = meta["settings"]
    differences = [
        f"{name} was {before.get(name)!r}, is now {settings.get(name)!r}"
        for name in sorted({*before, *settings})
        if before.get(name) != settings.get(name)
    ]
    if differences:
        return f"{path}: was measured under other settings ({'; '.join(differences)}); {REMEDY}"
    return None


def _hardware_problem(
    path: Path, meta: Mapping[str, Any], environment: Mapping[str, Any]
) -> str | None:
    """Return what says that the rows were measured on another kind of machine, or None."""
    for part, name in SAME_MACHINE:
        before, now = (
            entry[part].get(name) if isinstance(entry.get(part), dict) else None
            for entry in (meta.get("environment", {}), environment)
        )
        if before is not None and now is not None and before != now:
            what = "" if name == "name" else f"{name} "
            return f"{path}: was measured on {what}{before}, this machine has {what}{now}; {REMEDY}"
    return None


def _not_ours(path: Path) -> str:
    return f"{path}: exists without its sidecar {meta_path(path).name}: not ours; {REMEDY}"


def _set_aside(path: Path) -> None:
    """Rename the CSV and its sidecar to .old, or .old.2, ... where there is one already."""
    suffix, number = ".old", 1
    while path.with_name(path.name + suffix).exists():
        number += 1
        suffix = f".old.{number}"
    for old in (path, meta_path(path)):
        if old.is_file():
            os.replace(old, old.with_name(old.name + suffix))
    log.warning("%s: the earlier measurement was set aside as %s%s", path, path.name, suffix)


def _name(key: Key) -> str:
    return ",".join(map(str, key))


def _key_part(value: int | float | str) -> int | str:
    """Return a whole number as int, a name as it is; ValueError for anything else."""
    if isinstance(value, str) and value.replace("_", "").isalpha() and len(value) > 1:
        return value
    return int(value)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
