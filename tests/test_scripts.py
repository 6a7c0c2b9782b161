"""The scripts: every one can be parsed, explains itself, and refuses wrong arguments (exit 2)."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

# Fewest and most positional arguments of each, as LobRA has them.
POSITIONAL = {
    "profile_memory.sh": (5, 9),
    "cost_model_benchmark.sh": (2, 6),
    "deploy_strategy_plan.sh": (7, 7),
    "llama_lora_multi_task.sh": (8, 11),
    "create_finetune_datasets.sh": (0, 12),
    "quickstart.sh": (0, 0),
}


def bash(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_script_can_be_parsed(project_root: Path) -> None:
    scripts = sorted((project_root / "scripts").glob("*.sh"))
    assert {script.name for script in scripts} >= {*POSITIONAL, "test.sh", "common.sh"}
    for script in [*scripts, project_root / ".ci" / "run"]:
        result = bash("-n", str(script), cwd=project_root)
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("script", POSITIONAL)
def test_help_and_wrong_numbers_of_arguments(script: str, project_root: Path) -> None:
    path = str(project_root / "scripts" / script)
    shown = bash(path, "--help", cwd=project_root)
    assert (shown.returncode, shown.stderr) == (0, "")
    line, explained = shown.stdout.split("\n", 1)
    assert line.startswith(f"usage: bash scripts/{script}")
    for argument in re.findall(r"[A-Z_]{4,}", line):
        assert re.search(rf"^{argument}\s", explained, re.MULTILINE), argument
    fewest, most = POSITIONAL[script]
    for count in {fewest - 1, most + 1} - {-1}:
        result = bash(path, *["x"] * count, cwd=project_root)
        assert result.returncode == 2
        assert result.stdout == ""
        assert f"{count} positional arguments" in result.stderr


@pytest.fixture
def recorded(tmp_path: Path) -> dict[str, str]:
    """Return an environment whose `lobra` and `deploy_strategy_plan` only say their arguments."""
    for command in ("lobra", "deploy_strategy_plan"):
        stub = tmp_path / command
        stub.write_text(f'#!/bin/sh\necho {command} "$@" "pattern=$EXPR_DEPLOY_PATTERN"\n')
        stub.chmod(0o755)
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}", "VIRTUAL_ENV": str(tmp_path)}


def test_published_positions_reach_the_commands(project_root: Path, recorded: dict) -> None:
    def output(line: str) -> str:
        result = bash(*line.split(), cwd=project_root, **recorded)
        assert result.returncode == 0, result.stderr
        return result.stdout

    memory = output("scripts/profile_memory.sh 7B 16 6 exp_task6 16384 10.0.0.1 23333")
    assert "memory --model 7B --num-gpus 16 --num-tasks 6 --trainer-config exp_task6" in memory
    assert "--max-seq-length 16384" in memory
    time = output("scripts/cost_model_benchmark.sh 7B 1,2,4,8 --precision bf16")
    assert "time --model 7B --tp 1,2,4,8 --precision bf16" in time
    plan = output("scripts/deploy_strategy_plan.sh 7B 16 7 6 8192 exp_task6 my_plan --dry-run")
    assert "--model 7B --num-gpus 16 --num-buckets 7 --num-tasks 6 --max-seq-length 8192" in plan
    assert "--trainer-config exp_task6 --strategy-config my_plan --dry-run" in plan


def test_training_without_a_plan_makes_one_by_pruning(project_root: Path, recorded: dict) -> None:
    script = "scripts/llama_lora_multi_task.sh"
    arguments = ["7B", "16", "16", "6", "16384", "10.0.0.1", "23333", "exp_task6"]
    result = bash(script, *arguments, cwd=project_root, **recorded)
    assert result.returncode == 0, result.stderr
    plan, train = result.stdout.splitlines()
    assert plan.startswith("deploy_strategy_plan --model 7B --num-gpus 16")
    assert plan.endswith("pattern=PRUNE")
    assert train.startswith("lobra train --model 7B --trainer-config exp_task6")
    assert "--server-addr 10.0.0.1 --server-port 23333" in train

    options = "--lengths published --time-limit=9 --data-dir here --max-steps 3 --deterministic"
    result = bash(script, *arguments, *options.split(), cwd=project_root, **recorded)
    plan, train = result.stdout.splitlines()
    assert "--lengths published --time-limit=9 --data-dir here pattern=PRUNE" in plan
    assert train.endswith("--data-dir here --max-steps 3 --deterministic pattern=")

    result = bash(script, *arguments, "my_plan", "hosts", cwd=project_root, **recorded)
    (train,) = result.stdout.splitlines()
    assert "--strategy-config my_plan" in train
    assert "--host-file hosts" in train


def test_a_missing_env_file_is_a_users_mistake(project_root: Path, recorded: dict) -> None:
    script = "scripts/cost_model_benchmark.sh"
    result = bash(
        script, "7B", "1", "addr", "1", "hosts", "no_such_file", cwd=project_root, **recorded
    )
    assert result.returncode == 2
    assert "ENV_FILE no_such_file" in result.stderr
