"""What a new user does first: LobRA's commands for 7B in a clone, the page for own data."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lobra.commands.plan import main as plan
from lobra.layout.plan import load_plan
from lobra.model.tiny import build_tiny

BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PATTERNS = (("BALANCE", "OFF"), ("BALANCE", "ON"), ("GROUP", "ON"), ("PRUNE", "ON"), ("EXACT", ""))


@pytest.fixture
def clone(project_root: Path, tmp_path: Path) -> Path:
    """A copy of the files that git keeps, and of no other: no data, no profiles of one's own."""
    kept = subprocess.run(
        ["git", "-C", str(project_root), "ls-files", "-z"], capture_output=True, text=True
    )
    if kept.returncode != 0:
        pytest.skip("not a checkout")
    place = tmp_path / "clone"
    for name in filter(None, kept.stdout.split("\0")):
        source, copy = project_root / name, place / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(source):
            shutil.copy2(source, copy, follow_symlinks=False)
    return place


def shell(
    command: str, place: Path, code: int = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command line there, with this environment's Python and without a network."""
    for name in ("EXPR_DEPLOY_PATTERN", "EXPR_SCHEME_PROPOSAL", "BUCKET_PLAN", "DP_BUCKET"):
        environment.setdefault(name, "")
    environment |= {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(place),
        "VIRTUAL_ENV": sys.prefix,
        "COLUMNS": "200",
    }
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", command],
        cwd=place, env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_7b_is_planned_from_what_comes_with_the_project(
    clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(clone)
    monkeypatch.delenv("EXPR_SCHEME_PROPOSAL", raising=False)
    words = "--model 7B --num-gpus 16 --num-buckets 16 --num-tasks 6 --max-seq-length 16384"
    words += " --trainer-config exp_task6 --strategy-config my_plan --pattern GROUP --json"
    assert plan([*words.split(), "--time-limit", "5"]) == 0
    captured = capsys.readouterr()
    notes = " ".join(json.loads(captured.out)["notes"])
    assert "A100-40GB" in notes and "LobRA's authors" in notes
    assert "lengths are SYNTHETIC" in notes
    assert load_plan("my_plan").max_tokens == 16384
    assert not (clone / "data").exists()


@pytest.mark.long
def test_lobras_documented_workflow_in_a_clone(clone: Path) -> None:
    settings = "16 16 6 16384"
    for pattern, proposal in PATTERNS:
        name = f"exp_task6_{pattern.lower()}_{proposal.lower()}"
        command = f"bash scripts/deploy_strategy_plan.sh 7B {settings} exp_task6 {name}"
        done = shell(
            f"{command} --time-limit 5", clone,
            BUCKET_PLAN="DYNAMIC", EXPR_DEPLOY_PATTERN=pattern, EXPR_SCHEME_PROPOSAL=proposal,
        )  # fmt: skip
        assert f"plan by {pattern}" in done.stdout
        assert "lengths are SYNTHETIC" in done.stdout + done.stderr
        assert load_plan(clone / "strategy_config" / f"{name}.yaml").max_tokens == 16384
    for name in ("7B_homo_fuse", "7B_hetero_fuse", "exp_task6_prune_on"):
        simulate = f"lobra simulate --model 7B --trainer-config exp_task6 --strategy-config {name}"
        assert "A100-40GB" in shell(f"{simulate} --steps 2", clone).stdout
    missing = shell(
        f"bash scripts/llama_lora_multi_task.sh 7B {settings} ip 23333 exp_task6 7B_hetero_fuse",
        clone, code=2, CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    assert "dataset_name = 'dolly'" in missing.stderr or "7B" in missing.stderr
    shell("bash experiments/expr_7b.sh --simulate --steps 2 --time-limit 1", clone)
    shell("lobra report exp_result/expr_7b", clone)
    assert (clone / "exp_result/expr_7b/report").is_dir()


@pytest.mark.long
@pytest.mark.ranks
def test_the_page_for_ones_own_data_and_model_works_as_it_stands(
    project_root: Path, tmp_path: Path
) -> None:
    build_tiny(tmp_path / "models/my-model")
    page, further = (
        (project_root / "docs" / name).read_text(encoding="utf-8")
        for name in ("my_data.md", "adapters.md")
    )
    blocks = BLOCK.findall(page)
    assert len(blocks) == page.count("```") / 2
    blocks += [block for block in BLOCK.findall(further) if block[0] == "python"]
    for language, text in blocks:
        if language == "python":
            (tmp_path / "block.py").write_text(text, encoding="utf-8")
            text = "python block.py"
        # of the page, not of a checkout: only what is installed is there
        shell(text, tmp_path, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    for task in ("capitals", "summaries"):
        assert (tmp_path / "runs/mine/adapters" / task / "adapter_model.safetensors").is_file()
    assert (tmp_path / "runs/mine/report/losses.png").stat().st_size > 1000
    assert (tmp_path / "models/my-merged-model/config.json").is_file()
