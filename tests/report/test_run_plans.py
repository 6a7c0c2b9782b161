"""Which plan a step of a run belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lobra.common.errors import ConfigError, Problems
from lobra.common.models import read_as
from lobra.layout.plan import PlanEntry
from lobra.report.run_plans import plan_parts
from lobra.trainer.run_config import (
    PlanPeriod,
    RunConfig,
    plan_history,
    read_run_config,
    resume_history,
)

ONE = [{"dp": 1, "tp": 1, "pp": 1, "max_tokens": 64}]
TWO = [{"dp": 2, "tp": 1, "pp": 1, "max_tokens": 64}]
MIXED = [
    {"dp": 1, "tp": 1, "pp": 1, "max_tokens": 64},
    {"dp": 1, "tp": 2, "pp": 2, "max_tokens": 64},
]


def config(plan: list[dict[str, int]], **fields: Any) -> dict[str, Any]:
    """Return a config.yaml of which only the plans matter."""
    about = {"versions": {"lobra": "0"}, "tasks": [], "device": "cpu", "precision": "fp32"}
    return {**about, "rank_map": [], "plan": plan, **fields}


def read(plan: list[dict[str, int]], **fields: Any) -> RunConfig:
    found = read_as(RunConfig, config(plan, **fields), Problems())
    assert found is not None
    return found


def now(step: int, plan: list[dict[str, int]], precision: str = "fp32") -> PlanPeriod:
    return PlanPeriod(step, [PlanEntry(**entry) for entry in plan], [], "cpu", precision)


def line(step: int, *layouts: str, **fields: Any) -> dict[str, Any]:
    return {"step": step, "replicas": [{"layout": layout} for layout in layouts], **fields}


def write(folder: Path, plan: list[dict[str, int]], plans: list[PlanPeriod]) -> None:
    content = config(plan, plans=[period.as_plain() for period in plans])
    (folder / "config.yaml").write_text(yaml.safe_dump(content))


def froms(plans: list[PlanPeriod]) -> list[tuple[int, Any]]:
    return [(period.from_step, period.as_plan().entries()) for period in plans]


def test_a_run_s_plans_are_remembered(tmp_path: Path) -> None:
    plans = plan_history(tmp_path, now(0, ONE))
    assert froms(plans) == [(0, ONE)]
    for step, plan, expected in (
        (5, ONE, [(0, ONE)]),  # the same plan goes on
        (8, TWO, [(0, ONE), (8, TWO)]),
        (12, MIXED, [(0, ONE), (8, TWO), (12, MIXED)]),
        (12, TWO, [(0, ONE), (8, TWO)]),  # nothing came of the other
        (6, MIXED, [(0, ONE), (6, MIXED)]),  # steps that are made again
    ):
        write(tmp_path, plan, plans)
        plans = plan_history(tmp_path, now(step, plan))
        assert froms(plans) == expected
    write(tmp_path, MIXED, plans)
    other = plan_history(tmp_path, now(9, MIXED, "fp64"))
    assert [period.precision for period in other] == ["fp32", "fp32", "fp64"]


def test_a_run_s_resumes_are_remembered(tmp_path: Path) -> None:
    assert resume_history(tmp_path, None) == []
    for earlier, step, expected in (
        ({"resumed_at": 3}, 7, [3, 7]),  # of an older version
        ({"resumes": [3, 7]}, 7, [3, 7]),
        ({"resumes": [3, 7]}, 5, [3, 5]),  # steps that are made again
    ):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config(ONE, **earlier)))
        assert resume_history(tmp_path, step) == expected
    (tmp_path / "config.yaml").unlink()
    assert resume_history(tmp_path, 7) == [7]


def test_a_folder_of_an_older_version_or_without_a_config(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config(TWO, resumed_at=3, since="then")))
    assert froms(plan_history(tmp_path, now(7, ONE))) == [(3, TWO), (7, ONE)]
    assert not caplog.text
    (tmp_path / "config.yaml").write_text("[")
    assert froms(plan_history(tmp_path, now(7, ONE))) == [(7, ONE)]
    assert "what plans the run has had so far is not known" in caplog.text


def test_a_config_that_is_none_of_a_run_is_refused(tmp_path: Path) -> None:
    wrong = [{"dp": 1, "tp": 0, "pp": 1, "max_tokens": 64}]
    for content, problem in (
        ({**config(ONE), "plan": wrong}, "plan[0].tp = 0: want a positive integer"),
        ({**config(ONE), "device": None}, "device: is missing, want a text that is not empty"),
        ([], "holds [], want an object with the fields versions, "),
    ):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
        with pytest.raises(ConfigError) as caught:
            read_run_config(tmp_path)
        assert str(caught.value).startswith(f"{tmp_path / 'config.yaml'}: {problem}")


def test_steps_belong_to_the_plan_they_ran_under() -> None:
    config = read(MIXED, plans=[{"from_step": 0, "plan": ONE}, {"from_step": 2, "plan": MIXED}])
    steps = [
        line(0, "<1,1>", plan_from=0),
        line(1, "<1,1>", plan_from=0),
        line(2, "<1,1>", "<2,2>", plan_from=2),
    ]
    first, second = plan_parts(config, steps)
    assert (first.plan, first.num_gpus, first.span) == ("<1,1>x1", 1, "steps 1-2")
    assert (second.plan, second.num_gpus, second.span) == ("<1,1>x1 <2,2>x1", 5, "step 3")
    bare = [{name: value for name, value in step.items() if name != "plan_from"} for step in steps]
    assert [part.plan for part in plan_parts(config, bare)] == [first.plan, second.plan]


def test_of_older_versions_the_layouts_tell() -> None:
    steps = [line(0, "<1,1>"), line(1, "<1,1>", "<1,1>"), line(2, "<1,1>", "<1,1>")]
    parts = plan_parts(read(TWO, resumed_at=1), steps)
    assert [(part.plan, part.span) for part in parts] == [
        ("<1,1>x1", "step 1"),
        ("<1,1>x2", "steps 2-3"),
    ]
    # died after it had resumed, before it could remove the steps it was to make again
    config = read(TWO, plans=[{"from_step": 0, "plan": ONE}, {"from_step": 1, "plan": TWO}])
    left = [line(0, "<1,1>", plan_from=0), line(1, "<1,1>", plan_from=0)]
    (part,) = plan_parts(config, left)
    assert part.plan == "<1,1>x1"


def test_plans_of_the_same_layouts_are_told_apart() -> None:
    less = [{**ONE[0], "max_tokens": 32}]
    config = read(less, plans=[{"from_step": 0, "plan": ONE}, {"from_step": 1, "plan": less}])
    steps = [line(0, "<1,1>", plan_from=0), line(1, "<1,1>", plan_from=1)]
    assert [part.span for part in plan_parts(config, steps)] == ["step 1", "step 2"]
