"""One writer at a time: a run in its folder, a sweep on its profile."""

from __future__ import annotations

import errno
import fcntl
import logging
from pathlib import Path
from typing import IO

from lobra.common.errors import ConfigError

log = logging.getLogger(__name__)

HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)  # anything else: there are no locks here

_held: dict[Path, IO[str]] = {}


def is_held(lock: Path) -> bool:
    """Return whether a process keeps a lock file (`hold`); True where that cannot be known."""
    try:
        with lock.open("r", encoding="ascii") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def hold(lock: Path, what: str, writer: str, remedy: str) -> None:
    """Keep a lock file to this process until it ends (the kernel frees it, also after a crash).

    On a file system that cannot lock, this warns and does nothing.

    Parameters
    ----------
    lock
        the file, made if it is not there.
    what
        what it stands for, such as "--output-dir runs/a".
    writer
        what else may hold it, such as "run".
    remedy
        what to do then.

    Raises
    ------
    ConfigError
        Another process holds it.
    OSError
        It cannot be made.
    """
    path = lock.resolve()
    if path in _held:
        return
    file = path.open("w", encoding="ascii")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno not in HELD:
            log.warning(
                "%s: its file system cannot lock (%s); see that no other %s writes to it",
                what, error.strerror, writer,
            )  # fmt: skip
            return
        raise ConfigError(f"{what}: another {writer} is writing to it; {remedy}") from error
    _held[path] = file
