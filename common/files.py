"""Files that are either there completely or not at all."""

from __future__ import annotations

import ctypes
import glob
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

log = logging.getLogger(__name__)

_CURRENT, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux's renameat2


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its place when the block succeeds.

    The temporary name has the suffix of ``path`` and lies in the same folder, which is made if it
    is missing. The block writes a file of that name; it is flushed to disk and renamed. If the
    block raises, the temporary file is removed and ``path`` is as it was.

    Raises
    ------
    FileNotFoundError
        If the block ended without having written the temporary file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)
    temporary = path.with_name(f".{path.stem[:100]}.{os.getpid()}.{token}.tmp{path.suffix}")
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # some network file systems cannot flush a folder; the file is there
        _flush(path.parent)


def write_atomic(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Write ``data`` (text as UTF-8, line ends as they are) to ``path``: all of it or nothing."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def flush_tree(folder: Path) -> None:
    """Have everything in a folder, and the folder itself, written to disk (files first)."""
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            _flush(Path(root, name))
        with suppress(OSError):  # some network file systems cannot flush a folder
            _flush(Path(root))


def new_draft(target: Path) -> Path:
    """Make a hidden, empty folder beside `target`, to be filled and given to `replace_folder`.

    What earlier drafts and removals of this target left behind is removed.
    """
    for left in target.parent.glob(f".{glob.escape(target.name)}.*partial"):
        remove_folder(left)
    draft = _hidden(target)
    draft.mkdir(parents=True)
    return draft


def remove_folder(folder: Path) -> None:
    """Remove a folder with all its content; it vanishes from its name in one operation.

    A visible folder is renamed to a hidden name first. If its content then cannot be removed (on
    network file systems: while somebody reads it), that is logged and left to a later `new_draft`.

    Raises
    ------
    OSError
        If there is no such folder or it cannot be renamed; it is then as it was.
    """
    if not folder.name.startswith("."):
        aside = _hidden(folder)
        os.rename(folder, aside)
        folder = aside
    try:
        shutil.rmtree(folder)
    except OSError as error:
        log.warning("%s is not needed any more, but cannot be removed: %s", folder, error)


def _hidden(folder: Path) -> Path:
    """Return a hidden name beside a folder that nothing has yet."""
    return folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")


def replace_folder(draft: Path, target: Path) -> None:
    """Put a finished folder (of `new_draft`) in its target's place.

    Everything is on disk before it is visible, and where there is a target already, the two change
    places in one operation: at no moment is there none. Only on file systems that cannot do that
    (some network ones) the old one is moved aside first. That the old one cannot be removed
    afterwards is logged and no error.
    """
    flush_tree(draft)
    aside = None
    if not target.exists():
        os.rename(draft, target)
    elif _exchange(draft, target):
        aside = draft
    else:
        aside = _hidden(target)
        os.rename(target, aside)
        os.rename(draft, target)
    with suppress(OSError):
        _flush(target.parent)
    if aside is not None:
        remove_folder(aside)


@contextmanager
def drafted(target: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the target's place when the block succeeds, else goes."""
    draft = new_draft(target)
    try:
        yield draft
        replace_folder(draft, target)
    except BaseException:
        if draft.exists():
            remove_folder(draft)
        raise


def _exchange(one: Path, other: Path) -> bool:
    """Let two names change places atomically (Linux); return whether the system can."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    names = os.fsencode(one), os.fsencode(other)
    return bool(libc.renameat2(_CURRENT, names[0], _CURRENT, names[1], _EXCHANGE) == 0)


def _flush(path: Path) -> None:
    """Have the operating system write a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
