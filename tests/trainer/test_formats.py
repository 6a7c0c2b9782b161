"""What an earlier version wrote is still used: plans, profiles, checkpoints, runs.

The files are in `tests/assets/formats`; its README says which version and how.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lobra.cli import main
from lobra.layout.layout import Layout
from lobra.layout.placement import placed
from lobra.layout.plan import load_plan
from lobra.trainer.metrics import read_metrics
from tests.assets.golden import HERE as GOLDEN

FORMATS = GOLDEN.parent / "formats"


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the old version has profiled, planned and trained; return its run."""
    for name in ("base", "data"):
        shutil.copytree(GOLDEN / name, tmp_path / name)
    for name in ("plan.yaml", "tasks.json"):
        shutil.copy(FORMATS / name, tmp_path)
    for name in ("run", "exp_result"):
        shutil.copytree(FORMATS / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def train(plan: str, *more: str) -> int:
    return main(
        ["train", "--model", "base", "--trainer-config", "tasks.json", "--strategy-config", plan,
         "--output-dir", "run", "--device", "cpu", "--validate-every", "1", *more]
    )  # fmt: skip


def adapters(run: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.parent.name}.{name}": value
        for path in sorted(run.glob("adapters/*/adapter_model.safetensors"))
        for name, value in load_file(path).items()
    }


def test_a_plan_and_its_rank_map() -> None:
    plan = load_plan(FORMATS / "plan_tiny.yaml")
    assert [(group.layout, group.replicas, group.max_tokens) for group in plan.groups] == [
        (Layout(1, 1), 2, 1536),
        (Layout(2, 1), 1, 2048),
    ]
    world = placed(plan)
    assert world is not None and world.replicas == (((2,),), ((3,),), ((0, 1),))


def test_profiles_are_planned_with(old: Path) -> None:
    code = main(
        ["plan", "--model", "base", "--num-gpus", "3", "--max-seq-length", "256",
         "--trainer-config", "tasks.json", "--strategy-config", "new.yaml",
         "--batching", "bucketed"]
    )  # fmt: skip
    assert code == 0
    before, now = load_plan("plan.yaml"), load_plan("new.yaml")
    assert now == before
    assert now.meta["time_profile"] == before.meta["time_profile"], "the file's digest"
    for name in ("step_time_s", "sync_time_s"):  # the latter is of the profile of collectives
        assert now.meta[name] == pytest.approx(before.meta[name], rel=0.2), "the model may change"


@pytest.mark.ranks
def test_a_run_goes_on_and_ends(old: Path) -> None:
    """On its own plan and, a copy of it, on another: both get the same adapters."""
    shutil.copytree(old, "kept")
    assert train("plan.yaml", "--resume") == 0
    steps = read_metrics(old)
    assert [step["step"] for step in steps] == [0, 1, 2, 3]
    before = read_metrics(Path("kept"))
    assert steps[:2] == before
    assert [sorted(step["tasks"]) for step in steps[2:]] == [["everything", "few"], ["everything"]]
    same = adapters(old)

    Path("run").rename("same")
    Path("kept").rename("run")
    Path("other.yaml").write_text("strategy_config: [{dp: 1, tp: 2, pp: 2, max_tokens: 128}]\n")
    assert train("other.yaml", "--resume", "2") == 0
    other = adapters(old)
    assert other.keys() == same.keys()
    for key, value in same.items():  # fp32: what rounding does (test_equality has the proof)
        assert float((other[key] - value).norm() / value.norm()) < 1e-3, key


def test_a_run_is_reported(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "run"]) == 0
    shown = capsys.readouterr().out
    for part in ("<1,1>x3 on 3 CPU ranks", "everything", "step 2 of 4", "step 2 of 3"):
        assert part in shown


def test_a_checkpoint_of_a_later_format_is_refused_with_what_to_do(
    old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = old / "checkpoints" / "step_2" / "state.json"
    state.write_text(state.read_text().replace('"format": 1', '"format": 4'))
    assert train("plan.yaml", "--resume") == 2
    message = capsys.readouterr().err
    assert "state.json is of format 4, this version reads 1 to 3" in message
    assert "resume_from" in message
    assert "Traceback" not in message
