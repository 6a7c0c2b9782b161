"""A task's bad day is its own; a slow replica gets less work; a stop request saves."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lobra.common.storage import StorageError
from lobra.layout.order import StepOrder
from lobra.layout.shapes import read_shape
from lobra.model.flat_tensors import FlatTensors
from lobra.model.rank_results import RankError
from lobra.report.run_summary import task_summary
from lobra.tasks.config import TaskConfig
from lobra.tasks.target_modules import TARGET_MODULES
from lobra.trainer import coordinator
from lobra.trainer import rank as one_rank
from lobra.trainer.adapters import adapter_spec, save_adapter
from lobra.trainer.checkpoint import CheckpointState
from lobra.trainer.checkpoint_folder import list_checkpoints
from lobra.trainer.coordinator import Coordinator
from lobra.trainer.engine import Engine
from lobra.trainer.live_run import LiveRun
from lobra.trainer.metrics import as_json
from lobra.trainer.orders import Attendance
from lobra.trainer.run import run_local
from lobra.trainer.run_spec import RunSpec
from lobra.trainer.step_report import StepReport
from lobra.trainer.task_progress import MAX_SKIPPED_IN_ROW, RunTask, TaskProgress
from tests.trainer.faults import (
    EVALUATION_BYTES,
    FAST_S,
    FAULT_STEPS,
    FAULT_TASK,
    SLOW_REPLICA,
    SLOW_S,
    STEP_BYTES,
    WARNINGS,
)
from tests.trainer.support import make_plan, make_run, random_dataset, steps_of, train_steps

COMMON = dict(dataset_name="random", context_length=64, learning_rate=1e-2)
TASKS = (
    TaskConfig("steady", 4, 8.0, TARGET_MODULES, 4, **COMMON),
    TaskConfig("broken", 2, 4.0, ("q_proj", "down_proj"), 3, weight_decay=0.1, **COMMON),
)


def new_run(folder: Path, base: Path, layouts: list, steps: int = 4, **changes: object) -> RunSpec:
    data = [random_dataset(15, 6, 50, 256, seed) for seed in range(2)]
    return make_run(folder, base, TASKS, data, make_plan(layouts, 64), steps, **changes)


@pytest.mark.long
def test_bad_data_touches_no_other_task(base: Path, tmp_path: Path) -> None:
    layouts = [(1, 1), (2, 1), (1, 2)]
    bad = new_run(tmp_path / "bad", base, layouts)
    absent = new_run(tmp_path / "absent", base, layouts)
    with_fault = train_steps(bad, "tests.trainer.faults:train_with_bad_data")
    run_local(absent, "tests.trainer.faults:train_without_task")
    for number in range(2):
        ours = load_file(bad.adapter_folder(number) / "adapter_model.safetensors")
        theirs = load_file(absent.adapter_folder(number) / "adapter_model.safetensors")
        for name, value in theirs.items():
            assert torch.equal(ours[name], value), f"{TASKS[number].name} {name}"
            assert torch.isfinite(value).all()
    for step in with_fault:
        assert step.tasks["steady"].applied
        assert step.tasks["broken"].applied == (step.step not in FAULT_STEPS)
        assert math.isnan(step.tasks["broken"].grad_norm) == (step.step in FAULT_STEPS)
    assert FAULT_TASK == 1


def test_bad_data_touches_no_other_task_that_it_is_joined_with(base: Path, tmp_path: Path) -> None:
    layouts = [(1, 1), (2, 1), (1, 2)]
    bad = new_run(tmp_path / "bad", base, layouts, precision="fp64")
    absent = new_run(tmp_path / "absent", base, layouts, precision="fp64")
    run_local(bad, "tests.trainer.faults:train_joined_with_bad_data")
    run_local(absent, "tests.trainer.faults:train_without_task")
    for number in range(2):
        ours = load_file(bad.adapter_folder(number) / "adapter_model.safetensors")
        theirs = load_file(absent.adapter_folder(number) / "adapter_model.safetensors")
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-8, atol=1e-10, msg=name)


def test_a_stop_request_saves_and_reports(base: Path, tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", base, [(1, 1), (1, 1)], steps=50)
    ranks = run_local(run, "tests.trainer.faults:train_and_signal")
    assert [rank.stopped_at for rank in ranks] == [3, 3]
    assert ranks[0].stop_signal == 15
    assert list_checkpoints(run.output_dir) == [3]
    assert not run.adapter_folder(0).exists()


def test_work_moves_away_from_a_slow_replica(base: Path, tmp_path: Path) -> None:
    # 160 sequences of one length, one in a micro-batch: two replicas that are thought to be equal
    # get 80 each. One takes three times as long as the other.
    data = [random_dataset(100, 64, 64, 256, seed) for seed in range(2)]
    tasks = tuple(replace(task, global_batch_size=80) for task in TASKS)
    run = make_run(
        tmp_path / "run", base, tasks, data, make_plan([(1, 1), (1, 1)], 64), 12, feedback=True
    )
    steps = train_steps(run, "tests.trainer.faults:train_asleep")
    work = [[replica.micro_batches for replica in step.replicas] for step in steps]
    assert work[0] == [80, 80]
    assert all(sum(split) == 160 for split in work)
    best_s = min(max(n * SLOW_S, (160 - n) * FAST_S) for n in range(161))
    reached_s = sorted(max(r.busy_s for r in step.replicas) for step in steps[9:])
    assert reached_s[len(reached_s) // 2] < 1.1 * best_s, f"best {best_s:.3f} s, splits {work}"
    assert abs(work[-1][SLOW_REPLICA] - 40) <= 4
    idle = [step.replica_wait_s for step in steps]  # rank 0 is the slow one: nobody is waited for
    assert sorted(idle)[len(idle) // 2] < 0.1 * best_s


def test_a_rank_without_memory_says_what_to_do(base: Path, tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", base, [(1, 1), (2, 1)], steps=50)
    with pytest.raises(RankError) as caught:
        run_local(run, "tests.trainer.faults:run_out_of_memory")
    before_s = (run.output_dir / "metrics.jsonl").stat().st_mtime  # when the step before had ended
    assert time.time() - before_s < 60, "the other ranks went on waiting"
    assert caught.value.rank == 1
    for part in ("step 2: out of GPU memory on replica 1 <2,1>", "lower its max_tokens (128)"):
        assert part in str(caught.value)
    lines = (run.output_dir / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 1, "the step before is in the metrics"


def test_a_run_goes_on_while_there_is_no_room(base: Path, tmp_path: Path) -> None:
    """Neither checkpoints, nor metrics, nor an ended task's adapter find room in two steps."""
    layouts = [(1, 1), (1, 1)]
    plain = new_run(tmp_path / "plain", base, layouts, steps=4, save_every=1, num_steps=(4, 2))
    run = replace(plain, output_dir=tmp_path / "full")
    shutil.copytree(plain.output_dir, run.output_dir)
    expected = train_steps(plain)
    steps = train_steps(run, "tests.trainer.faults:run_out_of_disk")
    assert [step.tasks for step in steps] == [step.tasks for step in expected]
    assert list_checkpoints(run.output_dir) == [1, 4], "kept until there was room for another"
    assert list_checkpoints(plain.output_dir) == [2, 3, 4]
    assert not [path for path in run.output_dir.rglob(".*") if path.suffix in (".partial", ".tmp")]
    for number in range(2):
        name = "adapter_model.safetensors"
        written = [one.adapter_folder(number) / name for one in (run, plain)]
        assert written[0].read_bytes() == written[1].read_bytes()
    said = (run.output_dir / WARNINGS).read_text()
    assert "the checkpoint of step 2 is not written, the run goes on" in said
    assert "step_2: cannot be written (File too large): need " in said
    assert "or lower --keep-checkpoints" in said
    assert said.count("metrics.jsonl: cannot be written (File too large)") == 1


def test_a_last_checkpoint_without_room_ends_the_run(base: Path, tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", base, [(1, 1), (1, 1)], steps=1)
    with pytest.raises(StorageError, match=r"adapters/steady: cannot be written \(File too large"):
        run_local(run, "tests.trainer.faults:run_out_of_disk_for_good")
    assert list_checkpoints(run.output_dir) == []
    assert not list(run.output_dir.rglob(".*partial"))


def test_steps_count_from_one_on_a_screen(caplog: pytest.LogCaptureFixture) -> None:
    told = Coordinator.__new__(Coordinator)
    bad = TaskProgress(num_steps=9, skipped_in_row=MAX_SKIPPED_IN_ROW - 1)
    tasks = {3: RunTask(TASKS[1], None, bad)}  # type: ignore[arg-type]
    told.live = SimpleNamespace(tasks=tasks, step=5)  # type: ignore[assignment]
    bad_report = StepReport({3: 1.0}, {3: math.nan}, (), (), (), False)
    told._record(3, 1.0, bad_report)
    assert "step 5: the gradient of task broken" in caplog.text
    assert "step 5: task broken is stopped: gradient not finite" in caplog.text


def test_a_stopped_task_is_seen_at_the_end(base: Path, tmp_path: Path) -> None:
    """The steps of a NaN adapter are skipped, and one without a limit is stopped for it."""
    start = tmp_path / "start"
    spec = adapter_spec(TASKS[1])
    tensors = FlatTensors.of_layers(spec, read_shape(base), range(4)).tensors
    save_adapter(start, spec, {t.name: torch.full(t.shape, math.nan) for t in tensors}, "base")
    tasks = (TASKS[0], replace(TASKS[1], resume_from=str(start)))
    data = [random_dataset(15, 6, 50, 256, seed) for seed in range(2)]
    run = make_run(tmp_path / "run", base, tasks, data, make_plan([(1, 1)], 64), 7)
    steps = train_steps(run)
    assert ["broken" in step.tasks for step in steps] == [True] * 5 + [False] * 2
    lines = [as_json(step) for step in steps]
    reason = lines[4]["tasks"]["broken"]["stopped"]
    assert "not finite" in reason
    assert all(line["tasks"]["steady"]["stopped"] is None for line in lines)
    assert task_summary("steady", lines, 7).ended == "done"
    assert task_summary("steady", lines, 9).ended == "step 7 of 9"
    ended = task_summary("broken", lines, 7).ended
    assert ended == "stopped at step 5: gradient not finite in 5 steps in a row"


def test_adapters_are_exchanged_once_per_block_and_finished_tasks_not_at_all(
    base: Path, tmp_path: Path
) -> None:
    tasks = (TASKS[0], replace(TASKS[1], steps=1))
    data = [random_dataset(15, 6, 50, 256, seed) for seed in range(2)]
    plan = make_plan([(1, 1), (1, 2)], 64)
    run = make_run(tmp_path / "run", base, tasks, data, plan, 3)
    shape = read_shape(base)
    sizes = [shape.adapter_elements(task.rank, task.target_modules) for task in tasks]
    blocks = 2  # rank 0 holds four layers, the ranks of the pipeline two each
    for rank, calls in enumerate(
        run_local(run, "tests.trainer.faults:train_and_count_collectives")
    ):
        own = blocks if rank == 0 else 1
        for elements in calls.values():
            assert len(elements) == 3 * own, "one call a step and block"
            of_a_block = [sum(sizes) // blocks] + 2 * [sizes[0] // blocks]
            for step, expected in enumerate(of_a_block):
                for sent in elements[step * own : (step + 1) * own]:
                    assert expected <= sent <= expected + 8, "finished tasks are still exchanged"


def test_no_rank_waits_in_a_gather_of_moments_for_files(base: Path, tmp_path: Path) -> None:
    """NCCL's patience is short: while rank 0 writes, the others wait on the control group."""
    data = [random_dataset(15, 6, 50, 256, seed) for seed in range(2)]
    plan = make_plan([(1, 1), (1, 1)], 64)
    run = make_run(tmp_path / "run", base, TASKS[:2], data, plan, 1)
    first, second = run_local(run, "tests.trainer.faults:save_slowly")
    assert len(first["written"]) == len(first["gather"]) == len(second["gather"]) == 2
    for times in (first, second):
        assert times["gather"][1] >= first["written"][0]


LATECOMER, JOINS_AT = "broken", 2


def train_with_a_latecomer(run: RunSpec) -> one_rank.RankResult:
    """Train; one task takes part from a later step of the run on, and has no slot before."""
    (latecomer,) = ((n, task) for n, task in enumerate(run.tasks) if task.name == LATECOMER)

    class Growing(Engine):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.remove(latecomer[0])

        def carry_out(
            self, order: StepOrder, state: CheckpointState | None = None
        ) -> StepReport | None:
            if order.updates and order.step == JOINS_AT:
                self.install(dict([latecomer]))
            return super().carry_out(order, state)

    class Late(LiveRun):
        def attendance(self, after: Attendance | None = None) -> Attendance:
            whole = super().attendance(after)
            if whole.step >= JOINS_AT:
                return whole
            own_steps = (pair for pair in whole.own_steps if pair[0] != latecomer[0])
            return Attendance(whole.step, tuple(own_steps))

    one_rank.Engine, coordinator.LiveRun = Growing, Late  # type: ignore[misc]
    return one_rank.train_rank(run)


def test_a_latecomer_and_another_order_of_tasks_change_no_adapter(
    base: Path, tmp_path: Path
) -> None:
    """Sequences, rates and clipping follow a task's own steps and name, and nothing else."""
    varied = dict(lr_scheduler="cosine", warmup_steps=2, steps=4)
    tasks = (replace(TASKS[0], max_grad_norm=0.1, **varied), replace(TASKS[1], **varied))
    data = [random_dataset(15, 6, 50, 256, seed) for seed in range(2)]
    plan, single = make_plan([(1, 1), (2, 1)], 64), make_plan([(1, 1)], 64)
    joint = make_run(
        tmp_path / "joint", base, tasks[::-1], data[::-1], plan, 4 + JOINS_AT, precision="fp64"
    )
    steps = train_steps(joint, "tests.trainer.test_coordinator:train_with_a_latecomer")
    assert [sorted(step.tasks) for step in steps] == [
        ["steady"], ["steady"], ["broken", "steady"], ["broken", "steady"], ["broken"], ["broken"]
    ]  # fmt: skip
    lines = [as_json(step) for step in steps]
    assert task_summary(LATECOMER, lines, 4).ended == "done"
    assert task_summary(LATECOMER, lines, 5).ended == "step 4 of 5"
    for task, own in zip(tasks, data, strict=True):
        alone = make_run(tmp_path / task.name, base, (task,), [own], single, 4, precision="fp64")
        before = [step.tasks[task.name] for step in train_steps(alone)]
        ours = [step.tasks[task.name] for step in steps if task.name in step.tasks]
        assert [step.own_step for step in ours] == [0, 1, 2, 3]
        assert [step.lr for step in ours] == [step.lr for step in before]
        name = "adapter_model.safetensors"
        found = load_file(tmp_path / "joint" / "adapters" / task.name / name)
        for key, expected in load_file(alone.adapter_folder(0) / name).items():
            error = float((found[key] - expected).norm() / expected.norm())
            assert error < 1e-10, f"{task.name} {key}: relative error {error:.1e}"


def test_a_task_is_stopped_where_it_would_be_alone(base: Path, tmp_path: Path) -> None:
    """Its plateau is its own: others, their steps and the plan have no say in it."""
    fields = dict(learning_rate=2e-3, early_stopping_patience=1, steps=12)
    careful = replace(TASKS[0], early_stopping_min_delta=0.02, **fields)
    other = replace(TASKS[1], steps=5)
    data = [random_dataset(15, 6, 50, 256, seed) for seed in range(2)]
    # The other task ends at step 5, in the middle of a period of this one.
    together = make_run(
        tmp_path / "together", base, (careful, other), data, make_plan([(1, 1), (2, 1)], 64), 12,
        validate_every=2, precision="fp64",
    )  # fmt: skip
    alone = make_run(
        tmp_path / "alone", base, (careful,), data[:1], make_plan([(1, 1)], 64), 12,
        validate_every=2, precision="fp64",
    )  # fmt: skip
    ran = [
        [step.step for step in train_steps(run) if "steady" in step.tasks]
        for run in (together, alone)
    ]
    assert ran[0] == ran[1]
    assert 2 < len(ran[0]) < 12, "never stopped: the test shows nothing"
    ours, theirs = (
        load_file(run.adapter_folder(0) / "adapter_model.safetensors") for run in (together, alone)
    )
    for name, expected in theirs.items():
        error = float((ours[name] - expected).norm() / expected.norm())
        assert error < 1e-9, f"{name}: relative error {error:.1e}"


def test_validation_and_early_stop_in_a_run(base: Path, tmp_path: Path) -> None:
    tasks = (replace(TASKS[0], early_stopping_patience=1, early_stopping_min_delta=10.0), TASKS[1])
    data = [random_dataset(15, 6, 50, 256, seed) for seed in range(2)]
    plan = make_plan([(1, 1), (1, 2)], 64)
    run = make_run(tmp_path / "run", base, tasks, data, plan, 6, validate_every=2)
    for task, held_out in enumerate(data):
        held_out.save(run.validation_folder(task))
    steps = train_steps(run, "tests.trainer.faults:train_without_data")
    # Period 1 sets the best loss, period 2 does not beat it by 10 nats: the task leaves.
    assert ["steady" in step.tasks for step in steps] == [True] * 4 + [False] * 2
    assert all("broken" in step.tasks for step in steps)
    validated = [step.step for step in steps if step.tasks["broken"].validation_loss is not None]
    assert validated == [1, 3, 5]
    first, last = steps[1].tasks["broken"], steps[5].tasks["broken"]
    assert first.validation_loss is not None and last.validation_loss is not None
    assert last.validation_loss < first.validation_loss, "it validates on what it trains on"


def test_the_memory_of_an_evaluation_counts(base: Path, tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", base, [(1, 1), (1, 1)], steps=3, validate_every=2)
    random_dataset(6, 6, 50, 256, 9).save(run.validation_folder(0))
    ranks = run_local(run, "tests.trainer.faults:train_with_a_counter")
    memory = [step.memory_bytes for step in steps_of(run)]
    assert memory == [2 * STEP_BYTES, 2 * EVALUATION_BYTES, 2 * EVALUATION_BYTES]
    assert [rank.peak_memory_bytes for rank in ranks] == [EVALUATION_BYTES, 2 * EVALUATION_BYTES]
