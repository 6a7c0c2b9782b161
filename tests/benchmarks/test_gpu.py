"""The command that runs every check of a GPU: what it keeps, and what it makes of the parts."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from benchmarks.gpu_packages import NEEDED, lacking, message
from benchmarks.gpu_report import BARS, judge, read_parts
from benchmarks.sides.job import JOBS
from benchmarks.sides.lengths import find_lengths
from benchmarks.training_run import step_medians, write_tasks
from lobra.tasks.task_file import load_trainer_config


def test_every_part_says_how_it_ended_and_keeps_what_it_found(tmp_path: Path) -> None:
    (tmp_path / "parts.tsv").write_text(
        "tests\t5\t7\nequality\t0\t31\nmulti_lora\t124\t110\ntraining\t1\t12\n"
    )
    (tmp_path / "equality.json").write_text('{"rows": [1]}')
    (tmp_path / "multi_lora.json").write_text('{"rows": [2]}')
    (tmp_path / "training.json").write_text('{"rows": [3]}')
    assert read_parts(tmp_path) == {
        "tests": {"ended": "there was nothing to test", "seconds": 7, "found": None},
        "equality": {"ended": "ok", "seconds": 31, "found": {"rows": [1]}},
        "multi_lora": {"ended": "out of time", "seconds": 110, "found": {"rows": [2]}},
        "training": {"ended": "failed with 1", "seconds": 12, "found": {"rows": [3]}},
    }


def test_what_was_found_is_held_to_its_bars() -> None:
    def sides(tasks: int, **speeds: float) -> list[dict]:
        return [
            {"tasks": tasks, "side": side.replace("_", "-"), "tokens_per_s": speed,
             "share": speed / 100, "compute_share": speed / 100 + 0.01}
            for side, speed in speeds.items()
        ]  # fmt: skip

    rows = [
        {"device": "cuda", "name": "a card"},
        *sides(4, base=100.0, ours=82.0, peft_switching=40.0, peft_sorted=50.0),
        *sides(16, base=100.0, ours=80.0),
    ]
    parts = {
        "multi_lora": {"found": {"rows": rows}},
        "activations": {"found": {"rows": [{"memory": "lean", "kept_bytes": 40e3}]}},
        "training": {"found": None},
    }
    bars = list(judge(parts))
    assert [bar["met"] for bar in bars] == [False, True, True, True, None]
    assert bars[3]["found"] == 82.0 / 50.0
    assert {bar.part for bar in BARS} <= set(NEEDED)


@pytest.mark.parametrize(("python", "ended", "status"), [("true", "ok", 0), ("false", "1", 1)])
def test_a_part_that_fails_is_noted_and_ends_nothing(
    python: str, ended: str, status: int, project_root: Path, tmp_path: Path
) -> None:
    """With `true` or `false` in place of Python all parts run at once, and the report is ours."""
    done = subprocess.run(
        ["bash", "benchmarks/gpu.sh", tmp_path],
        cwd=project_root, env={**os.environ, "DEVICE": "cpu", "PYTHON": python},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    parts = read_parts(tmp_path)
    assert set(parts) == set(NEEDED)
    assert {part["ended"].split()[-1] for part in parts.values()} == {ended}


def test_parts_that_need_what_is_missing_are_left_out(project_root: Path, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\ncase $1 in *gpu_packages.py) echo training ranks;; esac\n")
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", "benchmarks/gpu.sh", tmp_path],
        cwd=project_root, env={**os.environ, "DEVICE": "cpu", "PYTHON": str(python)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    ended = {name: part["ended"] for name, part in read_parts(tmp_path).items()}
    left_out = "left out, as packages are missing"
    assert {name for name, how in ended.items() if how == left_out} == {"training", "ranks"}
    assert set(ended.values()) == {"ok", left_out}


def test_what_is_missing_is_told_at_once() -> None:
    assert lacking(lambda module: True) == {}
    missing = ("yaml", "deepspeed", "peft")
    parts = lacking(lambda module: module not in missing)
    assert parts["activations"] == ["yaml", "deepspeed"]
    assert parts["linears"] == ["yaml"]
    told = message(parts)
    assert "pyyaml>=6.0,<7" in told and "deepspeed>=0.19,<0.20" in told and "peft>=0.19" in told


def test_the_command_without_a_folder_says_how_it_is_used(project_root: Path) -> None:
    done = subprocess.run(
        ["bash", "benchmarks/gpu.sh"],
        cwd=project_root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "bash benchmarks/gpu.sh OUT" in done.stderr


def test_the_tasks_of_a_training_run_are_the_sequences_of_the_benchmark(tmp_path: Path) -> None:
    job = JOBS["tiny"]
    lengths = find_lengths(job.datasets)
    write_tasks(job, lengths, tmp_path, 2)
    config = load_trainer_config(str(tmp_path / "tasks.json"))
    assert [task.name for task in config.tasks] == list(job.datasets)
    assert {task.global_batch_size for task in config.tasks} == {4}
    step = [s for number in range(2) for s in job.step(lengths, number, 4) if s.task == 1]
    lines = (tmp_path / "data" / f"{job.datasets[1]}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["input_ids"] for row in rows] == [s.tokens.tolist() for s in step]
    learned = [[n for n, label in enumerate(row["labels"]) if label != -100] for row in rows]
    assert learned == [s.targets.tolist() for s in step]


def test_predicted_and_measured_steps(tmp_path: Path) -> None:
    """The first two steps warm up."""
    same = {"padded_tokens": 60, "prepare_time_s": 0.1, "optimizer_time_s": 0.2}
    steps = [
        {"tokens": 40, "step_time_s": time_s, "predicted_step_time_s": 1.0, "memory_bytes": n}
        | same
        for n, time_s in enumerate((90.0, 90.0, 2.0, 1.0, 0.8))
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(step) + "\n" for step in steps))
    found = step_medians(path)
    assert found["steps"] == 3
    assert found["tokens_per_s"] == 40.0
    assert found["padded_per_real"] == 1.5
    assert found["median_error"] == pytest.approx(0.25)
    assert found["memory_bytes"] == 4
