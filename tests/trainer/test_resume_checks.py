"""What `--resume` refuses or says, before it removes anything; and what it does not need."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from lobra.layout.shapes import read_shape
from lobra.model.fingerprint import fingerprint
from lobra.model.launch import RankError
from lobra.trainer.checkpoint import list_checkpoints
from tests.trainer.command import train, write_config


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with the checkpoints 1 and 2 of a task that is to make three steps."""
    write_config(steps=3)
    assert train(place, "--save-every", "1", "--max-steps", "2") == 0
    assert list_checkpoints(Path("run")) == [1, 2]
    return place


@pytest.fixture
def accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a run that would start end with exit code 1 instead."""

    def fail(_run: object) -> None:
        raise RankError(1, "the process was killed by SIGKILL")

    monkeypatch.setattr("lobra.trainer.run.run_local", fail)


def change_state(step: int, **changes: Any) -> None:
    """Change a checkpoint's state; a value of None removes the field."""
    path = Path(f"run/checkpoints/step_{step}/state.json")
    state = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: v for name, v in state.items() if v is not None}))


def test_another_base_model_is_refused_whichever_tensors_differ(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    tensors = load_file(run / "model.safetensors")
    tensors["model.layers.3.mlp.down_proj.weight"] += 0.01
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert train(other, "--resume", "1") == 2
    assert "--model is not the base model" in capsys.readouterr().err
    assert list_checkpoints(Path("run")) == [1, 2]


def test_a_checkpoint_of_an_older_version_goes_on(
    run: Path, accepted: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change_state(2, base_model=fingerprint(run, read_shape(run), like=""))
    assert train(run, "--resume") == 1
    assert "of an older version" in caplog.text
    other = Path(shutil.copytree(run, tmp_path / "other"))
    (other / "config.json").write_text((run / "config.json").read_text() + "\n")
    assert train(other, "--resume") == 2
