"""What a task's paths may reach: one folder, whatever links point out of it."""

from __future__ import annotations

from pathlib import Path


def is_inside(path: Path, folder: Path | None) -> bool:
    """Return whether a path, its links followed, lies in a folder; None: anywhere does.

    It need not exist, so the answer tells nothing of what does outside.
    """
    if folder is None:
        return True
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # a loop of links, a name no file can have
        return False
