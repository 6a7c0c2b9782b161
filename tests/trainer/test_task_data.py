"""Tasks that are left out, paths of tasks that are confined, and batches that are greedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lobra.trainer.prepare import prepare
from lobra.trainer.request import TrainRequest
from lobra.trainer.run_spec import RunSpec
from tests.trainer.command import train, write_plan

GOOD = {
    "rank": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "global_batch_size": 2,
    "dataset_name": "small", "context_length": 64, "steps": 1,
}  # fmt: skip


def write_tasks(*changes: dict[str, Any]) -> None:
    tasks = [{**GOOD, "name": f"task{n}", **change} for n, change in enumerate(changes)]
    Path("tasks.json").write_text(json.dumps({"task": tasks, "train_task_num": len(tasks)}))


def prepared(base: Path, **options: Any) -> RunSpec:
    return prepare(
        TrainRequest(
            str(base), "tasks.json", "plan.yaml", Path("run"), device="cpu",
            time_profile=Path("time.csv"), **options,
        )
    )  # fmt: skip


def test_bad_tasks_are_left_out_and_named(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    Path("data/bad.jsonl").write_text('{"input_ids": [1, -5]}\n')
    write_tasks(
        {"rank": 0}, {}, {"dataset_name": "bad"}, {"name": "TASK1"}, {"resume_from": "none"}, {}
    )
    run = prepared(place, skip_bad_tasks=True)
    assert [task.name for task in run.tasks] == ["task1", "task5"]
    for said in (
        "tasks.json: task[0].rank = 0",
        "tasks.json: task[2].dataset_name = 'bad': data/bad.jsonl: line 1: input_ids[1]",
        "tasks.json: task[3].name",
        "tasks.json: task[4].resume_from",
    ):
        assert said in caplog.text
    assert "task[1]" not in caplog.text.replace("task[1] has this name already", "")


def test_all_are_told_without_leaving_out(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tasks({"dataset_name": "none"}, {"resume_from": "none"}, {"rank": 3000})
    assert train(place) == 2
    message = capsys.readouterr().err
    for said in (
        "task[0].dataset_name",
        "task[1].resume_from",
        "task[2].rank = 3000: want at most",
    ):
        assert said in message


def test_the_first_tasks_are_counted_before_bad_ones_are_left_out(place: Path) -> None:
    write_tasks({"rank": 0}, {}, {})
    run = prepared(place, skip_bad_tasks=True, num_tasks=2)
    assert [task.name for task in run.tasks] == ["task1"]


def test_paths_of_tasks_stay_inside_a_folder(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = Path("secret.jsonl")
    secret.write_text('{"input_ids": [4, 5, 6], "of": "another"}\n')
    Path("data/link.jsonl").symlink_to(secret.resolve())
    Path("data/loop.jsonl").symlink_to("loop.jsonl")
    for name in ("secret.jsonl", "data/../secret.jsonl", str(secret.resolve()), "link", "loop"):
        write_tasks({"dataset_name": name})
        assert train(place, "--confine", "data") == 2
        message = capsys.readouterr().err
        assert "no such data set in data (--confine)" in message and "another" not in message
    nowhere = message.replace("loop", "nowhere")
    write_tasks({"dataset_name": "../nowhere.jsonl"})
    assert train(place, "--confine", "data") == 2
    assert capsys.readouterr().err == nowhere, "what is outside is not told apart from nothing"
    write_tasks({})
    assert prepared(place, confine=Path("data")).tasks[0].dataset_name == "small"


def test_values_of_confined_data_are_not_told(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tasks({})
    Path("data/small.jsonl").write_text(
        '{"input_ids": [4, 5]}\n{"input_ids": "my secret"}\n"own"\n'
    )
    assert train(place) == 2
    assert "my secret" in capsys.readouterr().err
    assert train(place, "--confine", "data") == 2
    message = capsys.readouterr().err
    assert "data/small.jsonl: line 2: input_ids" in message and "line 3: is" in message
    assert "secret" not in message and "own" not in message


def test_greedy_batches_are_warned_of(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tasks({"global_batch_size": 2000}, {"global_batch_size": 4})
    prepared(place)
    assert "task task0: with global_batch_size 2000 it is 99.8 % of a step's tokens" in caplog.text
    assert "about 501 times as long" in caplog.text


def test_a_plan_of_more_processes_than_fit_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tasks({})
    write_plan({"dp": 40, "tp": 1, "pp": 1, "max_tokens": 64})
    memory = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**19}  # 2 GiB
    monkeypatch.setattr("lobra.trainer.plan_checks.os.sysconf", memory.__getitem__)
    assert train(place) == 2
    assert "40 ranks, which as CPU processes take 2 GiB or more" in capsys.readouterr().err


def test_any_seed_of_64_bits_is_one(place: Path) -> None:
    write_tasks({"seed": 2**63 - 1})
    assert prepared(place, seed=20261126120000).seed == 20261126120000
