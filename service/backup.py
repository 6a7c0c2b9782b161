"""A copy of a state folder, also of one that a service is using."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

from lobra.common.errors import ConfigError
from lobra.common.files import drafted
from lobra.common.storage import told_as_storage
from lobra.service.ledger import Ledger
from lobra.service.retention import named_folders, remove_unnamed
from lobra.service.state_folder import DEPLOYMENT_FILE, LEDGER_FILE, StateFolder

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
        There is no service's folder, or a damaged one, the target exists, or folders went faster
        than they could be copied.
    StorageError
        The copy finds no room.
    """
    if not all((source / name).is_file() for name in (LEDGER_FILE, DEPLOYMENT_FILE)):
        raise ConfigError(f"--state-dir {source}: no service has been there")
    if target.exists():
        raise ConfigError(f"{target}: is there already; give the name of a new folder")
    with told_as_storage(target, "or choose another disk"), drafted(target) as draft:
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
        try:
            one.backup(other)
        except sqlite3.DatabaseError as error:
            text = f"cannot be copied ({error}); restore an earlier backup"
            raise ConfigError(f"{source}: {text}") from error


def _copy_folders(source: Path, draft: Path) -> bool:
    """Copy the folders that the draft's ledger names; return whether all were there."""
    kept = StateFolder(draft)
    with closing(Ledger(draft)) as ledger:
        for folder in named_folders(kept, ledger):
            if not folder.is_dir():
                try:
                    shutil.copytree(source / folder.relative_to(draft), folder)
                except (FileNotFoundError, shutil.Error):
                    shutil.rmtree(folder, ignore_errors=True)
                    return False
        remove_unnamed(kept, ledger)
    return True
