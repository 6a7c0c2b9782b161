"""A run goes on on another plan when that pays, to the same adapters; else it stays."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lobra.common.errors import ConfigError
from lobra.layout.plan import Plan
from lobra.model.rank_results import RankError
from lobra.profiler.profiles import MemoryProfile, MemoryRow
from lobra.tasks.dataset import TokenizedDataset
from lobra.trainer import restarts
from lobra.trainer.batches import draw_sequences
from lobra.trainer.proposal import PlanningProcess, Proposal, propose, step_times_s
from lobra.trainer.rank import RankResult
from lobra.trainer.replanner import Replanner, planning_job, read_replans
from lobra.trainer.restarts import run_with_restarts
from lobra.trainer.run import run_local
from lobra.trainer.run_spec import Admission, Replanning, RunSpec
from lobra.trainer.task_file_watch import request_to_join
from lobra.trainer.task_progress import RunTask, TaskProgress
from tests.model.support import save_llama
from tests.trainer.alone import TASKS, VOCAB, make_starts, tasks_from, train_alone
from tests.trainer.live import sharding_costs, write_rows, write_script
from tests.trainer.support import make_plan, make_run, random_dataset, small_task, steps_of

TARGET = "tests.trainer.live:train_and_replan"
#: The third task's one sequence takes as long as all of the others' together.
LENGTHS = ((8, 40), (6, 40), (480, 500))
STEPS = (4, 12, 3)
MEMORY = MemoryProfile(
    tuple(MemoryRow(tp, pp, 1, 512 * tp * pp) for tp, pp in ((1, 1), (2, 1), (4, 1), (1, 2)))
)
PLAN = make_plan([(1, 1)] * 4, 512)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("replan") / "base", vocab_size=VOCAB)


def data_of(number: int) -> TokenizedDataset:
    return random_dataset(20, *LENGTHS[number], VOCAB, number)


def new_run(folder: Path, base: Path, starts: list[Path] | None = None) -> RunSpec:
    """Return a run of the second task on four ranks, that may be planned anew."""
    task = small_task(global_batch_size=8, steps=STEPS[1])
    if starts:
        task = replace(tasks_from(starts)[1], steps=STEPS[1])
    return make_run(
        folder, base, (task,), [data_of(1)], PLAN, STEPS[1], precision="fp64",
        admission=Admission(PLAN, folder.parent, MEMORY), replanning=Replanning("tiny", 4, 4),
        cost_model=sharding_costs(4),
    )  # fmt: skip


def test_both_plans_are_priced_on_the_steps_that_are_left(base: Path, tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", base)
    config = run.tasks[0]
    task = RunTask(config, data_of(1), TaskProgress(STEPS[1], steps=5))
    job = planning_job(run, [task], step=7)
    assert job.num_steps == 5, "the run ends with its twelfth step"
    for step, lengths in enumerate(job.workload.steps(9)):
        drawn = draw_sequences(0, config, task.data, run.seed, 5 + step)
        assert lengths.tolist() == [len(sequence.tokens) for sequence in drawn]
    assert step == 6, "the task has seven steps left"
    found = propose(job)
    steps = list(job.workload.steps(5))
    assert found.num_steps == len(found.present_s) == 5
    assert found.present_s == step_times_s(PLAN, steps, job.cost_model)
    assert found.proposed_s == step_times_s(found.plan, steps, job.cost_model)
    assert sum(found.proposed_s) <= sum(found.present_s)
    assert found.plan.num_gpus <= 4 and found.plan.meta["ranks"]


def test_the_planning_process_answers_or_says_why_not(base: Path, tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", base)
    task = RunTask(run.tasks[0], data_of(1), TaskProgress(STEPS[1]))
    job = planning_job(run, [task], step=0)
    process = PlanningProcess(partial(propose, replace(job, num_gpus=0)))
    with pytest.raises(ConfigError, match="at least one GPU"):
        process.result(wait_s=None)
    process.end()
    ended = PlanningProcess(partial(propose, job))
    ended.end()


#: Five steps are left, which take twice as long as predicted, 1 s each on the present plan.
DECISIONS = {
    "pays": ((0.5,) * 5, 4.0, (5, 5.0, 4.0, True)),
    "costs more": ((0.5,) * 5, 6.0, (5, 5.0, 6.0, False)),
    "is worse": ((1.5,) * 5, 0.0, (1, -1.0, 0.0, False)),
    "pays for a while": ((0.1, 0.1, 0.1, 3.0, 3.0), 2.0, (3, 5.4, 4.0, True)),
    "does not pay twice": ((0.1, 0.1, 0.1, 3.0, 3.0), 3.0, (3, 5.4, 6.0, False)),
}


@pytest.mark.parametrize("case", DECISIONS)
def test_a_switch_is_made_when_it_pays(
    case: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proposed_s, cost_s, (num_steps, gain_s, costs_s, switched) = DECISIONS[case]
    run = new_run(tmp_path / "run", base)
    monkeypatch.setattr("lobra.trainer.replanner.process_age_s", lambda: cost_s - 1.0)
    other = make_plan([(2, 1), (2, 1)], 1024)
    replanner = Replanner(run)
    replanner.note_start()
    proposal = Proposal(other, (1.0,) * 5, proposed_s, 9)
    decided = replanner.decide(run, proposal, step=7, pace=2.0, save_s=1.0)
    assert read_replans(run.output_dir) == [decided]
    assert (decided.num_steps, decided.switched) == (num_steps, switched)
    assert (decided.gain_s, decided.cost_s) == pytest.approx((gain_s, costs_s))
    assert decided.pause_s is None
    Replanner(run).note_start()
    (noted,) = read_replans(run.output_dir)
    assert (noted.pause_s is not None) == switched
    if switched:  # the next one is judged by what this one took
        replanner.decide(run, Proposal(other, (1.0,), (0.5,), 9), step=8, pace=1.0, save_s=1.0)
        assert read_replans(run.output_dir)[1].cost_s == noted.pause_s


def train_with_switches(
    folder: Path, base: Path, starts: list[Path], cost_s: float = 0.0
) -> RunSpec:
    """Train: the third task joins after two steps, the first after four."""
    run = new_run(folder, base, starts)
    tasks = [replace(task, steps=n) for task, n in zip(tasks_from(starts), STEPS, strict=True)]
    joining = {
        step: [
            request_to_join(
                replace(
                    tasks[n],
                    context_length=512,
                    dataset_name=write_rows(folder.parent / f"{n}.jsonl", data_of(n)),
                )
            )
        ]
        for step, n in ((2, 2), (7, 0))
    }
    write_script(run, joining, cost_s=cost_s)
    run_with_restarts(run, 0, partial(run_local, target=TARGET))
    return run


@pytest.mark.long
@pytest.mark.ranks
def test_adapters_are_as_alone_whatever_plans_a_run_has(base: Path, tmp_path: Path) -> None:
    starts = make_starts(base, tmp_path / "starts")
    run = train_with_switches(tmp_path / "run", base, starts)
    replans = read_replans(run.output_dir)
    made = [one for one in replans if one.switched]
    assert len(made) >= 2, replans
    assert all(one.pause_s is not None and one.pause_s > 0 for one in made)
    assert [step.step for step in steps_of(run)] == list(range(12))
    alone = [{**task, "steps": n} for task, n in zip(TASKS, STEPS, strict=True)]
    data = [data_of(number) for number in range(3)]
    for task, peft in zip(
        TASKS, train_alone(base, data, starts, torch.float64, tasks=alone), strict=True
    ):
        found = load_file(
            run.output_dir / "adapters" / str(task["name"]) / "adapter_model.safetensors"
        )
        for key, expected in peft["tensors"].items():
            error = float((found[key] - expected).norm() / expected.norm())
            assert error < 1e-9, f"{task['name']} {key}: relative error {error:.1e}"


@pytest.mark.long
@pytest.mark.ranks
def test_a_switch_that_does_not_pay_is_declined(base: Path, tmp_path: Path) -> None:
    run = train_with_switches(tmp_path / "run", base, make_starts(base, tmp_path / "starts"), 1e6)
    replans = read_replans(run.output_dir)
    assert replans and not any(one.switched for one in replans)
    assert {len(step.replicas) for step in steps_of(run)} == {4}


@pytest.mark.long
@pytest.mark.ranks
def test_a_run_goes_on_on_the_gpus_that_are_left(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restarts, "FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(restarts, "gpus_left", lambda _run: 2)
    run = replace(new_run(tmp_path / "run", base), save_every=3)
    plans: list[Plan] = []

    def lose_a_gpu(run: RunSpec) -> list[RankResult]:
        plans.append(run.plan)
        if len(plans) > 1:
            return run_local(run)
        run_local(replace(run, last_step=5, save_every=3))
        raise RankError(1, "odd")

    run_with_restarts(run, 1, lose_a_gpu)
    assert [plan.num_gpus for plan in plans] == [4, 2]
    assert [step.step for step in steps_of(run)] == list(range(STEPS[1]))
    (noted,) = read_replans(run.output_dir)
    assert noted.switched and noted.pause_s and noted.reason == "2 of 4 GPUs are left"
    straight = new_run(tmp_path / "straight", base)
    run_local(straight)
    found, expected = (
        load_file(one.output_dir / "adapters" / "t" / "adapter_model.safetensors")
        for one in (run, straight)
    )
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert (found[key] - value).norm() <= 1e-8 * value.norm(), key


def test_a_run_ends_where_what_is_left_has_no_plan(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restarts, "FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(restarts, "gpus_left", lambda _run: 0)

    def fail(_run: RunSpec) -> list[RankResult]:
        raise RankError(1, "odd")

    with pytest.raises(RankError, match="odd") as caught:
        run_with_restarts(new_run(tmp_path / "run", base), 2, fail)
    why, how = caught.value.__notes__
    assert why == "GPUs are lost, and there is no plan for the rest: no GPU is left"
    assert "no checkpoint was saved" in how


@pytest.mark.parametrize("content", ["{{", "[1]", '[{"step": -1}]', "7"])
def test_decisions_that_cannot_be_read_are_no_reason_to_end(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "replans.json").write_text(content)
    assert read_replans(tmp_path) == []
    assert f"{tmp_path}/replans.json: " in caplog.text
