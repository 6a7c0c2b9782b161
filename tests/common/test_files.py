from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from lobra.common.files import atomic_path, new_draft, remove_folder, replace_folder, write_atomic


def test_writes_text_and_bytes_into_new_folders(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a" / "b.txt", "grün\r\n")
    write_atomic(tmp_path / "c.bin", b"\x00\xff")
    assert (tmp_path / "a" / "b.txt").read_bytes() == "grün\r\n".encode()
    assert (tmp_path / "c.bin").read_bytes() == b"\x00\xff"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    write_atomic(path, "old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["plan.yaml"]


def test_the_temporary_name_keeps_the_suffix_and_the_folder(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "x.npy") as temporary:
        assert temporary.suffix == ".npy" and temporary.parent == tmp_path
        assert not (tmp_path / "x.npy").exists()
        temporary.write_bytes(b"1")
    assert os.listdir(tmp_path) == ["x.npy"]


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "x"):
        pass
    assert os.listdir(tmp_path) == []


def test_files_get_the_permissions_of_an_ordinary_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    write_atomic(tmp_path / "atomic", "")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_takes_another_s_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr("lobra.common.files._exchange", lambda one, other: False)
    target = tmp_path / "target"
    for version in ("first", "second"):
        draft = tmp_path / ".draft"
        (draft / "below").mkdir(parents=True)
        (draft / "below" / version).write_text(version)
        replace_folder(draft, target)
        assert [path.name for path in (target / "below").iterdir()] == [version]
        assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_folder_is_there_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system can exchange two names: nothing is removed or moved away before."""
    draft, target = tmp_path / ".draft", tmp_path / "target"
    for folder in (draft, target):
        folder.mkdir()
        (folder / "content").write_text(folder.name)

    def forbidden(*_: object) -> None:
        raise AssertionError("the target was away for a moment")

    monkeypatch.setattr("lobra.common.files.os.rename", forbidden)
    seen: list[tuple[Path, str]] = []

    def removed(folder: Path) -> None:
        seen.append((folder, (target / "content").read_text()))

    monkeypatch.setattr("lobra.common.files.shutil.rmtree", removed)
    try:
        replace_folder(draft, target)
    except AssertionError:
        pytest.skip("this file system cannot exchange two names")
    assert seen == [(draft, ".draft")]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_an_old_folder_that_cannot_be_removed_is_removed_later(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    can_exchange: bool,
) -> None:
    def busy(folder: Path) -> None:
        raise OSError(errno.EBUSY, "somebody reads it", str(folder))

    target = tmp_path / "target"
    for version in ("first", "second", "third"):
        draft = new_draft(target)
        (draft / version).write_text(version)
        with monkeypatch.context() as patch:
            if not can_exchange:
                patch.setattr("lobra.common.files._exchange", lambda one, other: False)
            if version == "second":
                patch.setattr("lobra.common.files.shutil.rmtree", busy)
            replace_folder(draft, target)
        assert [path.name for path in target.iterdir()] == [version]
        left = [path for path in tmp_path.iterdir() if path != target]
        assert len(left) == (version == "second")
        assert all(path.name.startswith(".") for path in left)
    assert "somebody reads it" in caplog.text


def test_a_folder_vanishes_before_any_of_its_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "step_1" / "below").mkdir(parents=True)
    rmtree = shutil.rmtree
    seen: list[list[str]] = []

    def removed(folder: Path) -> None:
        seen.append(sorted(path.name for path in tmp_path.glob("[!.]*")))
        rmtree(folder)

    monkeypatch.setattr("lobra.common.files.shutil.rmtree", removed)
    remove_folder(tmp_path / "step_1")
    assert seen == [[]]
    assert os.listdir(tmp_path) == []


def test_everything_is_on_disk_before_it_is_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = tmp_path / ".draft"
    (draft / "below").mkdir(parents=True)
    for name in ("one", "below/two"):
        (draft / name).write_text(name)
    flushed: list[str] = []

    def note(path: Path) -> None:
        flushed.append(f"{path.name}{'' if (tmp_path / 'target').exists() else ' early'}")

    monkeypatch.setattr("lobra.common.files._flush", note)
    replace_folder(draft, tmp_path / "target")
    assert set(flushed[:-1]) == {"one early", "two early", "below early", ".draft early"}
    assert flushed[-1] == tmp_path.name
