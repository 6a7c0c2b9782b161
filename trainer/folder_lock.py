"""One run at a time in a run's folder."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO

from tasks.errors import ConfigError

LOCK_FILE = ".lock"

_held: dict[Path, IO[str]] = {}


def hold_folder(folder: Path) -> None:
    """Keep the folder to this process until it ends (the kernel frees it, also after a crash).

    Raises:
        ConfigError: another process holds it.
    """
    path = (folder / LOCK_FILE).resolve()
    if path in _held:
        return
    file = path.open("w", encoding="ascii")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ConfigError(
            f"--output-dir {folder}: another run is writing to it; choose another folder"
        ) from error
    _held[path] = file
