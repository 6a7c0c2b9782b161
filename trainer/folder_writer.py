"""Writing a folder piece by piece, whole or not at all, whatever the file system says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lobra.common.files import new_draft, remove_folder, replace_folder
from lobra.common.storage import StorageError, told_as_storage


class FolderWriter:
    """Fills a hidden folder, then makes it visible.

    What the file system denies is raised by `show`, not before: until then other ranks send what
    they hold. The hidden folder is gone by then, and nothing more is written.
    """

    def __init__(self, target: Path, remedy: str, need_bytes: int | None = None) -> None:
        """Begin a folder that takes so much room, if that is known; say what helps if it fails."""
        self.target = target
        self._remedy, self._need_bytes = remedy, need_bytes
        self._failure: StorageError | None = None
        self._attempt(self._begin)

    def add(self, write: Callable[[Path], None]) -> None:
        """Have something written into the hidden folder."""
        self._attempt(lambda: write(self.draft))

    def show(self) -> None:
        """Make the folder visible.

        Raises
        ------
        StorageError
            It could not be written; nothing is left of it.
        """
        self._attempt(lambda: replace_folder(self.draft, self.target))
        if self._failure is not None:
            raise self._failure

    def drafts(self) -> list[Path]:
        """Return the hidden folders of this name."""
        return [*self.target.parent.glob(f".{self.target.name}.*.partial")]

    def _begin(self) -> None:
        self._remove_drafts()  # of a run that died
        self.draft = new_draft(self.target)

    def _remove_drafts(self) -> None:
        for left in self.drafts():
            remove_folder(left)

    def _attempt(self, write: Callable[[], None]) -> None:
        """Write, unless something could not be written before; note if this cannot be."""
        if self._failure is not None:
            return
        try:
            with told_as_storage(self.target, self._remedy, self._need_bytes):
                write()
        except StorageError as error:
            self._failure = error
            self._remove_drafts()
