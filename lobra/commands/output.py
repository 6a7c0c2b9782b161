"""Files to write: seen to be possible before a search, and clearly refused where they are not."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lobra.common.errors import ConfigError


def write_problem(flag: str, path: str | os.PathLike[str]) -> str | None:
    """Return why the file of an option cannot be written, or None; nothing is left behind."""
    path = Path(path)
    if path.is_dir():
        return f"{flag}: {path} is a folder; a file is expected"
    made: list[Path] = []
    try:
        for folder in reversed([path.parent, *path.parent.parents]):
            if not folder.exists():
                folder.mkdir()
                made.append(folder)
        with tempfile.TemporaryFile(dir=path.parent):
            return None
    except OSError as error:
        return _message(flag, path, error)
    finally:
        for folder in reversed(made):
            with suppress(OSError):  # another process has put something there
                folder.rmdir()


@contextmanager
def written(flag: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn the operating system's refusals while an option's file is written into a mistake.

    Raises
    ------
    ConfigError
        If the block raises an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(_message(flag, path, error)) from error


def _message(flag: str, path: str | os.PathLike[str], error: OSError) -> str:
    return f"{flag}: {os.fspath(path)} cannot be written: {error.strerror or error}"
