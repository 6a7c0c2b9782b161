"""One run at a time in a run's folder."""

from __future__ import annotations

import errno
import fcntl
import logging
from pathlib import Path
from typing import IO

from tasks.errors import ConfigError

log = logging.getLogger(__name__)

HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)  # anything else: there are no locks here
LOCK_FILE = ".lock"

_held: dict[Path, IO[str]] = {}


def hold_folder(folder: Path) -> None:
    """Keep the folder to this process until it ends (the kernel frees it, also after a crash).

    On a file system that cannot lock, this warns and does nothing.

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
        if error.errno not in HELD:
            log.warning(
                "--output-dir %s: its file system cannot lock (%s); see that no other run writes "
                "to it",
                folder, error.strerror,
            )  # fmt: skip
            return
        raise ConfigError(
            f"--output-dir {folder}: another run is writing to it; choose another folder"
        ) from error
    _held[path] = file
