"""A folder with everything `lobra train` needs; tests break something in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from lobra.cli import main


def write_config(**changes: object) -> None:
    task = {
        "rank": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "global_batch_size": 2,
        "dataset_name": "small", "context_length": 64, "json_key": "text", "steps": 1,
    }  # fmt: skip
    content = {"variant": "canonical", "train_task_num": 1, "task": [{**task, **changes}]}
    Path("tasks.json").write_text(json.dumps(content))


def write_plan(*groups: dict) -> None:
    Path("plan.yaml").write_text(yaml.safe_dump({"strategy_config": list(groups)}))


def train(base: Path, *more: str) -> int:
    return main(
        ["train", "--model", str(base), "--trainer-config", "tasks.json", "--strategy-config",
         "plan.yaml", "--output-dir", "run", "--device", "cpu", "--time-profile", "time.csv", *more]
    )  # fmt: skip


def refused(capsys: pytest.CaptureFixture[str], *expected: str) -> None:
    message = capsys.readouterr().err
    for part in expected:
        assert part in message
    assert "Traceback" not in message
    assert not Path("run").exists()
