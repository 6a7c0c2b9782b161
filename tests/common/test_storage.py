"""What a file system denies is told with path, reason, room and remedy; other errors pass."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lobra.common.storage import StorageError, free_bytes, shown_bytes, told_as_storage


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "(No space left on device): need 1.5 MB, have "),
        (errno.EDQUOT, "(Disk quota exceeded): need 1.5 MB, have "),
        (errno.EROFS, "(Read-only file system); make it writable, or go home"),
        (errno.EACCES, "(Permission denied); make it writable, or go home"),
        (errno.EIO, "(Input/output error); repair its file system, or go home"),
    ],
)
def test_path_reason_room_and_remedy(number: int, said: str, tmp_path: Path) -> None:
    path = tmp_path / "not" / "there"
    with pytest.raises(StorageError) as caught, told_as_storage(path, "or go home", 1_500_000):
        raise OSError(number, os.strerror(number))
    assert str(caught.value).startswith(f"{path}: cannot be written {said}")
    assert str(caught.value).endswith("or go home")


def test_safetensors_says_it_in_its_own_words(tmp_path: Path) -> None:
    full = tmp_path / "full" / "file"
    with pytest.raises(Exception, match="os error 2") as caught:
        save_file({"a": torch.ones(1)}, full)  # no such folder: no failure of the file system
    assert not isinstance(caught.value, OSError)
    with pytest.raises(type(caught.value)), told_as_storage(full, "or go home"):
        raise caught.value
    denied = type(caught.value)("I/O error: No space left on device (os error 28)")
    said = r"No space left on device\): have"
    with pytest.raises(StorageError, match=said), told_as_storage(full, "or go home"):
        raise denied


def test_other_errors_pass(tmp_path: Path) -> None:
    for error in (FileNotFoundError(errno.ENOENT, "none"), ValueError("odd")):
        with pytest.raises(type(error)), told_as_storage(tmp_path, "or go home"):
            raise error


def test_sizes(tmp_path: Path) -> None:
    assert [shown_bytes(size) for size in (0, 999, 1500, 999_600, 2 * 10**12, 5 * 10**15)] == [
        "0 B", "999 B", "1.5 KB", "1 MB", "2 TB", "5e+03 TB",
    ]  # fmt: skip
    assert free_bytes(tmp_path / "a" / "b") > 0
