"""A thousand tasks in one run: planned, prepared, and what the run notes of them is read again."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from lobra.cli import main
from lobra.common import yaml_text
from lobra.common.documents import read_document
from lobra.model.rank_results import RankError
from lobra.tasks.config import TaskConfig
from lobra.trainer.run_config import read_run_config
from tests.trainer.command import train, write_config

NUM_TASKS = 1000
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def test_all_fields_of_a_thousand_tasks_are_within_the_reader_s_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a tenth of them within a tenth, which takes a tenth of the time."""
    monkeypatch.setattr(yaml_text, "MOST_NODES", yaml_text.MOST_NODES // 10)
    monkeypatch.setattr(yaml_text, "MOST_CHARACTERS", yaml_text.MOST_CHARACTERS // 10)
    task = TaskConfig(
        name="a-name-as-long-as-people-write", rank=16, lora_alpha=16, target_modules=MODULES,
        global_batch_size=8, dataset_name="/some/where/data.jsonl", context_length=8192,
    )  # fmt: skip
    content = json.loads(json.dumps({"tasks": [asdict(task)] * (NUM_TASKS // 10)}))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    assert read_document(path) == content


@pytest.mark.long
def test_they_are_planned_and_prepared(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def started(_run: object) -> None:
        raise RankError(0, "this rank was started")

    monkeypatch.setattr("lobra.trainer.run.run_local", started)
    write_config()
    (entry,) = json.loads(Path("tasks.json").read_text())["task"]
    tasks = [{**entry, "name": f"task{number}"} for number in range(NUM_TASKS)]
    Path("tasks.json").write_text(json.dumps({"task": tasks}))
    Path("memory.csv").write_text("tp,pp,sp,max_tokens\n1,1,1,256\n")
    words = ["plan", "--model", str(place), "--trainer-config", "tasks.json", "--num-gpus", "2"]
    words += ["--strategy-config", "plan.yaml", "--max-seq-length", "64"]
    words += ["--time-profile", "time.csv", "--memory-profile", "memory.csv"]
    assert main(words) == 0
    assert train(place) == 1
    assert [task.name for task in read_run_config(Path("run")).tasks] == [
        f"task{number}" for number in range(NUM_TASKS)
    ]
