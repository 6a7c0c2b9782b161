"""Beginning a sweep: its files new, to be continued, or set aside.

A sweep that is killed at any moment and started again with the same settings measures no row
twice and loses none. The sidecar is written before a row's line, so that every line of the CSV
has its details there.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lobra.common.errors import ConfigError, show
from lobra.common.lock import hold
from lobra.profiler.profiles import DEFAULT_POLICY
from lobra.profiler.sidecar import PUBLISHED, meta_path, read_meta, timestamp, write_meta
from lobra.profiler.sweep_rows import SweepFile, read_sweep

log = logging.getLogger(__name__)

Restart = Literal["never", "changed", "always"]
# What of a sidecar's environment must agree for rows to be of one machine.
SAME_MACHINE = (("hardware", "name"), ("hardware", "num_cores"), ("versions", "torch"))
REMEDY = "--restart changed sets it aside and begins anew, --output takes another file"


def open_sweep(
    path: Path,
    columns: Sequence[str],
    num_keys: int,
    settings: Mapping[str, Any],
    *,
    kind: str,
    restart: Restart = "never",
    environment: Mapping[str, Any] | None = None,
    memory: str = DEFAULT_POLICY,
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
    memory
        The memory policy of the rows to be measured. The file may hold those of others too.

    Raises
    ------
    ConfigError
        If the file is one that others published, has other settings and ``restart`` is "never", a
        line of it is broken, another sweep is writing to it, or it cannot be written.
    """
    if read_meta(path).get("kind") == PUBLISHED:
        raise ConfigError(f"{path}: was published by others and is kept as it is; give --output")
    _hold(path, restart)
    if path.is_file() and restart == "always":
        _set_aside(path)
    if path.is_file():
        meta = read_meta(path)
        problem = _settings_problem(path, meta, settings) or _hardware_problem(
            path, meta, environment or {}
        )
        if problem and restart == "changed":
            _set_aside(path)
        elif problem:
            raise ConfigError(problem)
        else:
            return read_sweep(path, tuple(columns), num_keys, meta, memory)
    meta = {
        "kind": kind,
        "settings": dict(settings),
        "environment": dict(environment or {}),
        "started": timestamp(),
        "rows": {},
        "skipped": {},
    }
    write_meta(path, meta)
    apart = memory != DEFAULT_POLICY
    return SweepFile(path, tuple(columns), num_keys, meta, memory=memory, has_policies=apart)


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


def _settings_problem(
    path: Path, meta: Mapping[str, Any], settings: Mapping[str, Any]
) -> str | None:
    """Return why the rows of `path` cannot be continued under `settings`, None if they can."""
    if not meta:
        return _not_ours(path)
    if "settings" not in meta:
        return f"{meta_path(path)}: settings: is missing, want an object; {REMEDY}"
    before = meta["settings"]
    was_estimated, is_estimated = ("accelerator" in one for one in (before, settings))
    if was_estimated != is_estimated:
        kind = "estimates" if was_estimated else "measurements"
        return f"{path}: holds {kind}, which are not mixed with others; {REMEDY}"
    differences = list(_differences(before, settings))
    if differences:
        return f"{path}: was made under other settings ({'; '.join(differences)}); {REMEDY}"
    return None


def _differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """Yield what of two settings differs; of two things with names, or of two lists, in short."""
    if before == now:
        return
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        is_another = before.get("name") != now.get("name")
        for key in ("name",) if is_another else sorted({*before, *now}):
            yield from _differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif isinstance(before, list) and isinstance(now, list):
        if len(before) != len(now):
            yield f"{name} were {len(before)}, are now {len(now)}"
            return
        place = [one == other for one, other in zip(before, now, strict=True)].index(False)
        yield f"{name}[{place}] was {show(before[place])}, is now {show(now[place])}"
    else:
        was, is_now = ("not given" if one is None else show(one) for one in (before, now))
        yield f"{name} was {was}, is now {is_now}"


def _hardware_problem(
    path: Path, meta: Mapping[str, Any], environment: Mapping[str, Any]
) -> str | None:
    """Return what says that the rows were measured on another kind of machine, or None."""
    for part, name in SAME_MACHINE:
        before, now = (
            entry.get(part, {}).get(name) for entry in (meta.get("environment", {}), environment)
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
