"""Tasks join and leave while a run trains: each is as alone, and bad changes are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lobra.trainer import restarts
from lobra.trainer.checkpoint import read_state
from lobra.trainer.checkpoint_folder import list_checkpoints
from lobra.trainer.restarts import run_with_restarts
from lobra.trainer.run import run_local
from lobra.trainer.run_spec import Admission, RunSpec
from lobra.trainer.task_file_watch import request_to_join
from lobra.trainer.task_requests import FOLDER, TaskAnswer, TaskRequest, accepted_changes
from tests.model.support import save_llama
from tests.trainer.alone import TASKS, VOCAB, make_starts, tasks_from, train_alone
from tests.trainer.live import write_rows, write_script
from tests.trainer.support import make_plan, make_run, random_dataset, steps_of

pytestmark = pytest.mark.ranks
TARGET = "tests.trainer.live:train_as_scripted"
STEPS = (5, 9, 4)  # of alone.TASKS: the second one leaves after its sixth
LEAVES_AFTER = 6
PLAN = make_plan([(1, 1), (2, 1), (1, 2)], 128)
LENGTHS = ((8, 40), (6, 60), (70, 90))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("live") / "base", vocab_size=VOCAB)


@pytest.fixture(scope="module")
def starts(base: Path) -> list[Path]:
    return make_starts(base, base.parent / "starts")


@pytest.fixture
def make(base: Path, starts: list[Path], tmp_path: Path) -> Callable[..., RunSpec]:
    """Return what makes a run of the second task, that the others are to join."""
    data = [random_dataset(20, *LENGTHS[number], VOCAB, number) for number in range(3)]
    tasks = [replace(task, steps=n) for task, n in zip(tasks_from(starts), STEPS, strict=True)]
    others = [
        replace(tasks[number], dataset_name=write_rows(tmp_path / f"{number}.jsonl", data[number]))
        for number in (0, 2)
    ]

    def made(name: str, killed_at: int | None = None, **changes: object) -> RunSpec:
        run = make_run(
            tmp_path / name, base, (tasks[1],), [data[1]],
            PLAN, STEPS[1], precision="fp64",
            admission=Admission(PLAN, tmp_path), **changes,
        )  # fmt: skip
        requests = {
            0: [TaskRequest("nobody")],
            2: [request_to_join(others[1])],
            3: [request_to_join(others[0]), request_to_join(tasks[1])],
            LEAVES_AFTER: [TaskRequest(tasks[1].name)],
            LEAVES_AFTER + 1: [TaskRequest(tasks[1].name)],
        }
        write_script(run, requests, killed_at)
        return run

    return made


def adapters(run: RunSpec) -> dict[str, torch.Tensor]:
    return {
        f"{folder.name}.{name}": value
        for folder in (run.output_dir / "adapters").iterdir()
        for name, value in load_file(folder / "adapter_model.safetensors").items()
    }


def answers(run: RunSpec) -> list[TaskAnswer]:
    paths = sorted((run.output_dir / FOLDER).glob("*.answer.json"))
    found = (json.loads(path.read_text()) for path in paths)
    return [TaskAnswer(**{**one, "request": TaskRequest(**one["request"])}) for one in found]


def test_who_joins_and_who_leaves_is_as_alone(
    make: Callable[..., RunSpec], base: Path, starts: list[Path]
) -> None:
    run = make("run")
    run_local(run, TARGET)
    given = answers(run)
    assert [(one.request.name, one.step, one.accepted) for one in given] == [
        ("nobody", 0, False), ("few", 2, True), ("attention", 3, True), ("everything", 3, False),
        ("everything", LEAVES_AFTER, True), ("everything", LEAVES_AFTER + 1, False),
    ]  # fmt: skip
    assert given[0].text == "the run has no such task; it has everything"
    assert "the run has, or had, a task of this name" in given[3].text
    assert given[5].text == f"it was cancelled already, after step {LEAVES_AFTER}"
    steps = steps_of(run)
    assert [sorted(step.tasks) for step in steps] == [
        *2 * [["everything"]], ["everything", "few"], *3 * [["attention", "everything", "few"]],
        *2 * [["attention"]],
    ]  # fmt: skip
    found = adapters(run)
    data = [random_dataset(20, *LENGTHS[number], VOCAB, number) for number in range(3)]
    made = (*STEPS[:1], LEAVES_AFTER, STEPS[2])
    alone = [{**task, "steps": n} for task, n in zip(TASKS, made, strict=True)]
    for number, peft in enumerate(train_alone(base, data, starts, torch.float64, tasks=alone)):
        name = str(TASKS[number]["name"])
        for key, expected in peft["tensors"].items():
            ours = found[f"{name}.{key}"]
            error = float((ours - expected).norm() / expected.norm())
            assert error < 1e-10, f"{name} {key}: relative error {error:.1e}"
        losses = [step.tasks[name].loss for step in steps if name in step.tasks]
        assert losses == pytest.approx(peft["losses"], rel=1e-10)


@pytest.mark.long
def test_a_run_that_is_killed_makes_its_changes_again(
    make: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restarts, "FIRST_PAUSE_S", 0.0)
    straight = make("straight", save_every=2)
    run_local(straight, TARGET)
    # After the checkpoints of steps 2 and 4, tasks had joined that were in none, or in the last.
    for killed_at in (4, 7):
        run = make(f"killed-{killed_at}", save_every=2, killed_at=killed_at)
        run_with_restarts(run, 1, partial(run_local, target=TARGET))
        ours, theirs = adapters(run), adapters(straight)
        assert ours.keys() == theirs.keys()
        assert all(ours[name].equal(theirs[name]) for name in theirs)
        assert [step.tasks for step in steps_of(run)] == [s.tasks for s in steps_of(straight)]
        assert len(accepted_changes(run.output_dir)) == 3
    state = read_state(straight.output_dir, list_checkpoints(straight.output_dir)[-1])
    assert [record["name"] for record in state.tasks] == ["few", "attention"]
    assert [change.step for change in state.changes] == [2, 3, LEAVES_AFTER]
