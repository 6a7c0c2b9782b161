"""`lobra data fetch`, which `scripts/create_finetune_datasets.sh` calls: the published data sets.

Each becomes a file, written whole or not at all, and a line of ``SHA256SUMS`` beside it, which
``sha256sum -c`` reads; ``REVISIONS.json`` has the hub's commit of each, and a set that is fetched
again is fetched at that commit. A set that fails does not stop the others; the same command tries
it again.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lobra.common.errors import ConfigError
from lobra.common.files import write_atomic
from lobra.common.options import DataDir
from lobra.tasks.published import DATASETS, HubUnreachable, check_names, fetch, find_revision

SUMS, REVISIONS = "SHA256SUMS", "REVISIONS.json"
DatasetName = Annotated[str, Parameter(help=f"Of {', '.join(DATASETS)}; by default all twelve.")]


def fetch_all(*dataset: DatasetName, data_dir: DataDir = Path("data")) -> int:
    """Fetch and convert LobRA's public data sets into <data-dir>/<name>.jsonl.

    Those that are there already are left out. Ends 1 if one failed.

    Raises
    ------
    ConfigError
        For an unknown name, or a folder that cannot be written to.
    """
    failures = 0
    unreachable = False
    wanted = check_names(dataset)
    check_writable(data_dir)
    for name in wanted:
        path = data_dir / f"{name}.jsonl"
        try:
            if path.is_file():
                check_sum(path)
                print(f"{name}: {path} is there already")
                continue
            if unreachable:
                failures += 1
                continue
            revision = read_revisions(data_dir).get(name) or find_revision(name)
            path, count = fetch(name, data_dir, revision)
            record_sum(path)
            record_revision(data_dir, name, revision)
        except HubUnreachable as error:
            print(error, file=sys.stderr)
            unreachable = True
            failures += 1
        except (ConfigError, OSError) as error:
            print(error, file=sys.stderr)
            failures += 1
        else:
            print(f"{name}: {count} rows in {path}")
    return 1 if failures else 0


def check_writable(folder: Path) -> None:
    """Make the folder and a file in it, so that nothing is fetched that cannot be kept.

    Raises
    ------
    ConfigError
        If that fails.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"--data-dir {folder}: cannot be written to: {error}") from error


def read_revisions(folder: Path) -> dict[str, str]:
    """Return the hub's commit of every data set that was fetched into the folder.

    Raises
    ------
    ConfigError
        If the file is broken.
    """
    path = folder / REVISIONS
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: an object is expected")
    return found


def record_revision(folder: Path, name: str, revision: str | None) -> None:
    """Write a data set's commit into ``REVISIONS.json``; nothing where it is not known."""
    if revision is not None:
        found = {**read_revisions(folder), name: revision}
        write_atomic(folder / REVISIONS, json.dumps(found, indent=2, sort_keys=True) + "\n")


def check_sum(path: Path) -> None:
    """Compare a file with its recorded checksum; record it if there is none.

    Raises
    ------
    ConfigError
        If the file is not the one that was fetched.
    """
    recorded = _read_sums(path.parent).get(path.name)
    if recorded is None:
        record_sum(path)
    elif recorded != _sum(path):
        raise ConfigError(
            f"{path}: has changed since it was fetched: its SHA-256 is not that in "
            f"{path.parent / SUMS}; delete the file to fetch it again, or the line to keep the file"
        )


def record_sum(path: Path) -> None:
    """Write the file's SHA-256 into ``SHA256SUMS`` of its folder."""
    sums = {**_read_sums(path.parent), path.name: _sum(path)}
    text = "".join(f"{value}  {name}\n" for name, value in sorted(sums.items()))
    write_atomic(path.parent / SUMS, text)


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_sums(folder: Path) -> dict[str, str]:
    path = folder / SUMS
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return {name: value for value, _, name in (line.partition("  ") for line in lines) if name}
