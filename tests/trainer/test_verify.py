"""A step computed again from a checkpoint has the losses and norms that were logged."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from lobra.cli import main
from tests.trainer.command import train, write_config


def test_a_log_is_verified(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(steps=4, lora_dropout=0.2)
    assert train(place, "--save-every", "2", "--deterministic") == 0
    assert main(["report", "run", "--verify"]) == 0
    shown = capsys.readouterr().out
    assert "step 3, computed again from the checkpoint before it" in shown
    assert "2 of 2 losses and norms are the same to the last bit" in shown
    path = Path("run/metrics.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    logged = copy.deepcopy(lines[2])
    lines[2]["tasks"]["small"]["loss"] *= 1.001
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr("lobra.trainer.verify._computed_again", lambda *_: logged)
    assert main(["report", "run", "--verify"]) == 1
    shown = capsys.readouterr().out
    assert "small: loss" in shown and "1 of 2 losses" in shown and "log is not true" in shown
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:2]))
    assert main(["report", "run", "--verify"]) == 2
    assert "no checkpoint of the last plan with a step after it" in capsys.readouterr().err
