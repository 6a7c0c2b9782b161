"""Whose folder a run writes into, and what it may remove there."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from lobra.cli import guarded
from lobra.model.rank_results import RankError
from lobra.tasks.dataset import TokenizedDataset
from lobra.trainer.checkpoint_folder import list_checkpoints, step_folder
from lobra.trainer.prepare import prepare
from lobra.trainer.request import TrainRequest
from lobra.trainer.run_folder import hold_folder, occupied
from tests.trainer.command import refused, train, write_config, write_plan


@pytest.fixture
def no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every run end with a failure where its ranks would be started."""

    def fail(_run: object) -> None:
        raise RankError(1, "the process was killed by SIGKILL")

    monkeypatch.setattr("lobra.trainer.run.run_local", fail)


def test_a_folder_of_other_things_is_left_alone(
    place: Path, no_ranks: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("data/training", "data/validation"):
        Path("run", name).mkdir(parents=True)
        Path("run", name, "mine.txt").write_text("mine")
    assert train(place) == 1
    for name in ("data/training", "data/validation"):
        assert Path("run", name, "mine.txt").read_text() == "mine"
    assert train(place) == 1, "a run that never started is started again in its own folder"
    capsys.readouterr()
    for name in ("config.yaml", "tokenised/training/mine.txt", "tokenised/validation/mine.txt"):
        mine = Path("other", name)
        mine.parent.mkdir(parents=True)
        mine.write_text("versions: mine")
        assert train(place, "--output-dir", "other") == 2
        assert "which is not of a run" in capsys.readouterr().err
        assert [path for path in Path("other").rglob("*") if path.is_file()] == [mine]
        mine.rename("elsewhere")
        for folder in mine.parents[: name.count("/") + 1]:
            folder.rmdir()


def test_a_file_where_the_folder_should_be(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").touch()
    write_config(rank=0)
    for resume in ((), ("--resume",)):
        for name in ("file", "file/deeper/run"):
            assert train(place, "--output-dir", name, *resume) == 2
            refused(capsys, f"--output-dir {name}: file is a file", "task[0].rank")


@pytest.mark.parametrize("name", ["mkdir", "save"])
def test_a_folder_that_cannot_be_written(
    place: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_args: object, **_named: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path if name == "mkdir" else TokenizedDataset, name, fail)
    assert train(place) == 2
    message = capsys.readouterr().err
    assert "--output-dir run: cannot be written (No space left on device)" in message
    assert "Traceback" not in message


def test_permissions_are_looked_at_beforehand(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "access", lambda path, _mode: Path(path) != Path())
    write_config(rank=0)
    assert train(place) == 2
    refused(capsys, "--output-dir run: no permission to write in .", "task[0].rank")


def test_a_run_that_ends_just_before_the_lock_is_seen(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def late(folder: Path) -> None:
        hold_folder(folder)
        (folder / "adapters/small").mkdir(parents=True)

    monkeypatch.setattr("lobra.trainer.run_folder.hold_folder", late)
    assert occupied(Path("run")) == []
    assert train(place) == 2
    assert "holds a run without a checkpoint" in capsys.readouterr().err
    assert not Path("run/config.yaml").exists()


def test_nothing_is_removed_before_a_checkpoint_is_read(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(steps=3)
    assert train(place, "--save-every", "1") == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lobra.trainer.run.run_local", lambda _run: 1 / 0)
        assert train(place, "--resume", "1") == 1
    assert list_checkpoints(Path("run")) == [1, 2, 3]
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 3
    moments = step_folder(Path("run"), 2) / "moments/small.safetensors"
    moments.write_bytes(moments.read_bytes()[:-9])
    capsys.readouterr()
    assert train(place, "--resume", "2") == 2
    message = capsys.readouterr().err
    assert "moments/small.safetensors is damaged" in message
    assert message.endswith("the last complete one is --resume 3\n")
    assert list_checkpoints(Path("run")) == [1, 2, 3]
    assert train(place, "--resume", "1", "--max-steps", "1") == 0
    assert list_checkpoints(Path("run")) == [1]
    lines = Path("run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0]


def test_a_failed_rank_is_told_without_the_launcher_s_traceback(
    place: Path, no_ranks: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(place) == 1
    message = capsys.readouterr().err
    told, how = message.splitlines()
    assert told == "lobra: rank 1 failed: the process was killed by SIGKILL"
    assert how == "no checkpoint was saved in run: begin anew, with the same command"
    assert guarded(lambda: int("x")) == 1
    assert "Traceback" in capsys.readouterr().err


def test_contexts_beyond_the_model_s_are_warned_of(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for length in (512, 600):
        assert not caplog.records
        write_config(context_length=length)
        prepare(
            TrainRequest(
                str(place), "tasks.json", "plan.yaml", Path(f"run-{length}"), device="cpu",
                time_profile=Path("time.csv"),
            )
        )  # fmt: skip
    (record,) = caplog.records
    assert "task small: its context_length 600" in record.getMessage()
    assert "max_position_embeddings 512" in record.getMessage()


def test_a_missing_profile_is_said_with_all_else(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_plan({"dp": 0, "tp": 1, "pp": 1, "max_tokens": 64})
    assert train(place, "--time-profile", "missing.csv", "--model", "nothing") == 2
    refused(capsys, "missing.csv: no such profile", "nothing", "dp")
