"""A run in numbers: speed, validation losses, and where its adapters are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from lobra.report.run_report import print_run_report, tera
from lobra.report.run_summary import summarise
from lobra.trainer.metrics import ReplicaMetrics, as_json
from tests.report.test_run_plans import TWO, config
from tests.trainer.test_forecast import step


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return the folder of a run of three steps on two GPUs; the first is slow by itself."""
    tasks = [{"name": "a", "num_steps": 9}, {"name": "b", "num_steps": 3}]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config(TWO, tasks=tasks, device="cuda")))
    replicas = [ReplicaMetrics("<1,1>", 0.5, 0.5, 1.0, 1, 8)] * 2
    lines = []
    for number, (loss, mfu, time_s) in enumerate(
        [(3.5, 0.01, 9.0), (2.0, 0.5, 1.0), (None, 0.2, 3.0)]
    ):
        one = step({"a": 6e12, "b": 2e12}, 1.0)
        own = replace(one.tasks["a"], own_step=number, validation_loss=loss)
        one = replace(
            one, step=number, tasks={**one.tasks, "a": own}, replicas=replicas, mfu=mfu,
            step_time_s=time_s, gpu_seconds=2 * time_s, tokens=100, padded_tokens=100,
        )  # fmt: skip
        lines.append(json.dumps(as_json(one)))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_speed_is_of_the_steps_after_the_first(run: Path) -> None:
    summary = summarise(run)
    assert summary.tokens_per_s == 200 / 4
    assert summary.flops_per_s == 16e12 / 8
    assert summary.mfu == pytest.approx((0.5 * 1 + 0.2 * 3) / 4)
    assert [task.validation for task in summary.tasks] == [((1, 3.5), (2, 2.0)), ()]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:  # as an older version wrote them
        del line["mfu"], line["flops"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = summarise(run)
    assert summary.mfu is None and summary.flops_per_s is None


def report(run: Path) -> str:
    console = Console(width=200)
    with console.capture() as shown:
        print_run_report(run, console)
    return shown.get()


def test_a_report_has_validation_losses_and_says_where_adapters_are(run: Path) -> None:
    shown = report(run)
    for part in (
        "Validation losses",
        "3.500",
        "2 TFLOP/s a GPU, 27.5% of its peak (MFU)",
        "none saved yet",
    ):
        assert part in shown
    for folder in ("adapters/b", "checkpoints/step_2/adapters/a"):
        (run / folder).mkdir(parents=True)
    (run / "checkpoints/step_2/state.json").touch()
    shown = report(run)
    assert f"adapters (PEFT format): {run / 'adapters'}" in shown
    assert f"not over, as last saved: {run / 'checkpoints/step_2/adapters'}" in shown
    (run / "adapters/a").mkdir()
    assert "not over" not in report(run)


def test_large_numbers() -> None:
    numbers = (12.0, 3.456e6, 989e12, 1e9)
    assert [tera(number) for number in numbers] == ["12 ", "3.46 M", "989 T", "1 G"]


def test_a_model_that_is_trained_whole_is_called_none_of_an_adapter(run: Path) -> None:
    written = yaml.safe_load((run / "config.yaml").read_text())
    written["tasks"] = [{"name": "a", "num_steps": 9, "adapter": "full"}]
    (run / "config.yaml").write_text(yaml.safe_dump(written))
    (run / "checkpoints/step_2/adapters/a").mkdir(parents=True)
    (run / "checkpoints/step_2/state.json").touch()
    shown = report(run)
    assert f"the model, as last saved: {run / 'checkpoints/step_2/adapters/a'}" in shown
    (run / "adapters/a").mkdir(parents=True)
    shown = report(run)
    assert f"the model, as transformers loads it: {run / 'adapters/a'}" in shown
    assert "adapters" not in shown.replace(str(run / "adapters"), "")


def test_a_homogeneous_plan_is_not_compared_with_itself(run: Path) -> None:
    written = yaml.safe_load((run / "config.yaml").read_text())
    for tp, told in ((1, "the same plan"), (2, "2.00 against 4.00 GPU-seconds per step")):
        best = {"step_time_s": 2.0, "plan": [{"tp": tp, "pp": 1, "replicas": 2 // tp}]}
        written["plan_meta"] = {"step_time_s": 1.0, "homogeneous": best}
        (run / "config.yaml").write_text(yaml.safe_dump(written))
        assert told in report(run)
