"""What a file system denies: a full disk, a quota, a folder that cannot be written to."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lobra.common.errors import MachineError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_ACCESS = (errno.EROFS, errno.EACCES, errno.EPERM)
BROKEN = (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO)
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # so safetensors says it, in an error of its own


class StorageError(MachineError):
    """A file could not be written for a reason that lies in the file system."""


@contextmanager
def told_as_storage(path: Path, remedy: str, need_bytes: int | None = None) -> Iterator[None]:
    """Have what the file system denies in the block raised as a StorageError.

    Parameters
    ----------
    path
        What the block writes.
    remedy
        What to do, besides making room or giving access.
    need_bytes
        The room it takes, if that is known.

    Raises
    ------
    StorageError
        With the path, the reason, the room needed and the room there is.
    """
    try:
        yield
    except Exception as error:
        number = _errno(error)
        if number not in (*NO_ROOM, *NO_ACCESS, *BROKEN):
            raise
        raise StorageError(_explained(path, number, remedy, need_bytes)) from error


def _errno(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    told = _OS_ERROR.search(str(error))
    return int(told[1]) if told else None


def _explained(path: Path, number: int, remedy: str, need_bytes: int | None) -> str:
    why = os.strerror(number)
    if number in NO_ACCESS:
        return f"{path}: cannot be written ({why}); make it writable, {remedy}"
    if number in BROKEN:
        return f"{path}: cannot be written ({why}); repair its file system, {remedy}"
    need = "" if need_bytes is None else f"need {shown_bytes(need_bytes)}, "
    have = shown_bytes(free_bytes(path))
    return f"{path}: cannot be written ({why}): {need}have {have}; make room, {remedy}"


def free_bytes(path: Path) -> int:
    """Return the room on the file system that holds, or would hold, a path."""
    there = next(one for one in (path, *path.absolute().parents) if one.exists())
    return shutil.disk_usage(there).free


def shown_bytes(count: int) -> str:
    """Return a number of bytes with three digits and a unit."""
    size, units = float(count), ["B", "KB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.3g} {units[0]}"
