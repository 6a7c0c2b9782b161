"""Whether a task may join a run, by its fields, its data, its longest sequence and its memory."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from lobra.common.errors import ConfigError
from lobra.layout.shapes import read_shape
from lobra.profiler.capacity import Parts
from lobra.profiler.profiles import MemoryProfile, MemoryRow
from lobra.tasks.config import TaskConfig
from lobra.tasks.text_processor import TextProcessor
from lobra.trainer.admission import check_lengths, newcomer_of, plan_beside
from lobra.trainer.live_tasks import fitting_plan, with_tasks
from lobra.trainer.prepare import prepare
from lobra.trainer.request import TrainRequest
from lobra.trainer.run_spec import Admission, RunSpec
from lobra.trainer.task_file_watch import TaskFileWatch, request_to_join
from lobra.trainer.task_progress import RunTask, TaskProgress
from tests.trainer.command import refused as refused_by_command
from tests.trainer.command import train
from tests.trainer.live import write_rows
from tests.trainer.support import make_plan, make_run, random_dataset, small_task

PLAN = make_plan([(1, 1), (2, 1)], 1024)  # of 1,024 and 2,048 tokens


@pytest.fixture
def run(base: Path, tmp_path: Path) -> RunSpec:
    task = small_task(steps=6)
    return make_run(
        tmp_path / "run", base, (task,), [random_dataset(8, 6, 50, 256, 0)], PLAN, 6,
        admission=Admission(PLAN, tmp_path, profile_of(task, base)),
    )  # fmt: skip


def profile_of(task: TaskConfig, base: Path, tokens_an_adapter: int = 300) -> MemoryProfile:
    """Return a profile measured with one adapter, beside which just what the plan says fits.

    Each further adapter takes the memory of so many tokens.
    """
    elements = read_shape(base).adapter_elements(task.rank, task.target_modules)
    each = tokens_an_adapter * 1000 / elements
    rows = {}
    for tp in (1, 2):
        tokens = 1024 * tp
        rows[f"{tp},1,1"] = {
            "parts": Parts(0.0, elements, each, 0.0, tokens, tokens * 1000.0, 1000.0).as_json()
        }
    settings = {
        "adapters": [[task.rank, list(task.target_modules)]],
        "max_seq_length": 4096,
        "device": "cpu",
    }
    budgets = 1000 * (1024 + tokens_an_adapter)
    rows["2,1,1"]["parts"]["weight_bytes"] = -1024 * 1000.0  # the same budget, twice the tokens
    meta: dict[str, Any] = {"settings": {**settings, "memory_budget_bytes": budgets}, "rows": rows}
    return MemoryProfile((MemoryRow(1, 1, 1, 1024), MemoryRow(2, 1, 1, 2048)), None, meta)


def max_tokens(run: RunSpec) -> list[int]:
    return [group.max_tokens for group in run.plan.groups]


def test_micro_batches_are_as_large_as_fits_beside_the_adapters(run: RunSpec) -> None:
    data = random_dataset(8, 6, 50, 256, 0)
    tasks = [
        RunTask(replace(run.tasks[0], name=f"t{n}"), data, TaskProgress(6 + n)) for n in range(4)
    ]
    for count, fits in ((1, [1024, 2048]), (2, [512, 1536]), (3, [256, 1280]), (1, [1024, 2048])):
        run = with_tasks(run, tasks[:count], step=2)
        assert max_tokens(run) == fits
    plan, _ = plan_beside(run, [task.config for task in tasks[:2]])
    long = random_dataset(8, 1537, 1537, 256, 0)
    with pytest.raises(ConfigError, match="8 of 8 sequences of task t0 are longer"):
        check_lengths(run, plan, [(tasks[0].config, long)])
    with pytest.raises(ConfigError, match=r"<1,1> has no room beside the adapters of 5 tasks"):
        plan_beside(run, [task.config for task in (*tasks, tasks[0])])
    assert fitting_plan(run, [task.config for task in (*tasks, tasks[0])]) == run.plan


def test_a_run_is_as_long_as_its_tasks_need_or_as_was_asked(run: RunSpec) -> None:
    tasks = [RunTask(run.tasks[0], random_dataset(8, 6, 50, 256, 0), TaskProgress(9, steps=1))]
    assert with_tasks(run, tasks, step=4).last_step == 12
    assert with_tasks(replace(run, max_steps=7), tasks, step=4).last_step == 7
    validated = [replace(tasks[0], config=replace(run.tasks[0], validation_split=0.1))]
    assert (run.validate_every, with_tasks(run, validated, step=4).validate_every) == (0, 10)


def refused(run: RunSpec, **fields: object) -> str:
    task = {**request_to_join(small_task(name="new", steps=2)).task, **fields}  # type: ignore[dict-item]
    with pytest.raises(ConfigError) as caught:
        newcomer_of(run, task, TextProcessor.of_folder(lambda: run.model_folder))
    return str(caught.value)


def test_a_task_with_mistakes_is_told_all_of_them(run: RunSpec, tmp_path: Path) -> None:
    said = refused(run, rank=-1, learning_rate=100, odd=1)
    assert all(part in said for part in ("rank = -1", "learning_rate = 100", "odd"))
    assert "no such data set" in refused(run, dataset_name="nowhere")
    long = write_rows(tmp_path / "long.jsonl", random_dataset(4, 3000, 3000, 256, 0))
    said = refused(run, dataset_name=long, context_length=4096)
    assert "4 of 4 sequences of task new are longer than any replica can take" in said
    confined = replace(run, admission=Admission(PLAN, tmp_path, confine=tmp_path / "inside"))
    assert "--confine" in refused(confined, dataset_name=long)


def test_a_watched_file_is_compared_with_what_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tasks.yaml"
    watch = TaskFileWatch(path)
    assert watch.requests(()) == []

    def written(*names: str, rank: object = 2) -> list[tuple[str, bool]]:
        """Write a file of tasks; return what is asked of a run that has had a and b."""
        task = {**asdict(small_task(steps=3)), "rank": rank, "target_modules": ["q_proj"]}
        lines = [{**task, "name": name} for name in names]
        path.write_text(repr({"task": lines}).replace("None", "null").replace("'", '"'))
        return [(one.name, one.task is not None) for one in watch.requests(("a", "b"))]

    assert written("a", "b") == []
    assert watch.requests(("a", "b")) == []
    assert written("a", "new") == [("new", True), ("b", False)]
    assert written("a", "new", rank=-1) == []
    assert "the run's tasks stay as they are" in caplog.text and "rank = -1" in caplog.text
    assert written("a", rank=4) == [("new", False)]
    assert "task a trains on as it was" in caplog.text


def test_planning_anew_needs_packed_steps_and_a_memory_profile(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(place, "--replan", "auto", "--batching", "bucketed") == 2
    refused_by_command(capsys, "only packed steps are planned anew", "no such profile")
    Path("memory.csv").write_text("tp,pp,sp,max_tokens\n1,1,1,64\n")
    plan = yaml.safe_load(Path("plan.yaml").read_text())
    plan["meta"] = {"memory_profile": {"file": "memory.csv"}}
    Path("plan.yaml").write_text(yaml.safe_dump(plan))
    request = TrainRequest(
        str(place), "tasks.json", "plan.yaml", Path("run"), num_gpus=3, device="cpu",
        replan="auto", time_profile=Path("time.csv"),
    )  # fmt: skip
    run = prepare(request)
    assert run.replanning is not None and run.admission is not None
    assert run.replanning.num_gpus == 3
    assert run.admission.memory is not None and run.admission.memory.max_tokens(1, 1) == 64
