"""A copy of a state folder, also of one that a service is using."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import sqlalchemy as sa

from lobra.common.errors import ConfigError
from lobra.common.files import drafted
from lobra.service.ledger import Ledger
from lobra.service.state_folder import DEPLOYMENT_FILE, LEDGER_FILE, StateFolder
from lobra.service.tables import CheckpointRow, checkpoints, models

MOST_TRIES = 20  # while a service replaces what is being copied


def back_up(source: Path, target: Path) -> int:
    """Copy a state folder; the copy is there completely or not at all.

    The ledger is copied first, as it is at one moment, then the folders it names. These do not
    change; if one is gone since, both are copied anew, what is there already being kept.

    Returns
    -------
    int
        The bytes of the copy.

    Raises
    ------
    ConfigError
        There is no service's folder, the target exists, or folders went faster than they could be
        copied.
    """
    if not (source / LEDGER_FILE).is_file():
        raise ConfigError(f"--state-dir {source}: no service has been there")
    if target.exists():
        raise ConfigError(f"{target}: is there already; give the name of a new folder")
    with drafted(target) as draft:
        shutil.copy2(source / DEPLOYMENT_FILE, draft / DEPLOYMENT_FILE)
        for _ in range(MOST_TRIES):
            _copy_ledger(source / LEDGER_FILE, draft / LEDGER_FILE)
            if _copy_folders(source, draft):
                break
        else:
            raise ConfigError(f"--state-dir {source}: changes faster than it is copied; try again")
        return sum(file.stat().st_size for file in draft.rglob("*") if file.is_file())


def _copy_ledger(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    with closing(sqlite3.connect(source)) as one, closing(sqlite3.connect(target)) as other:
        one.backup(other)


def _copy_folders(source: Path, draft: Path) -> bool:
    """Copy the folders that the draft's ledger names; return whether all were there."""
    named = set(_named(draft))
    for folder in named:
        if not (draft / folder).is_dir():
            try:
                shutil.copytree(source / folder, draft / folder)
            except (FileNotFoundError, shutil.Error):
                shutil.rmtree(draft / folder, ignore_errors=True)
                return False
    for folder in draft.glob("models/*/*/*"):
        if folder.relative_to(draft) not in named:
            shutil.rmtree(folder)
    return True


def _named(folder: Path) -> Iterator[Path]:
    """Yield the folders, relative to it, that a state folder's ledger names."""
    ledger, kept = Ledger(folder), StateFolder(Path())
    for row in ledger.rows(sa.select(checkpoints)):
        yield kept.checkpoint(CheckpointRow(**row))
    query = sa.select(models.c.id, models.c.snapshot_seq)
    for row in ledger.rows(query.where(models.c.is_open, models.c.snapshot_seq >= 0)):
        yield kept.snapshot(row["id"], row["snapshot_seq"])
    ledger.engine.dispose()
