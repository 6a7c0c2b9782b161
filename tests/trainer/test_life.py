"""A task's bad day is its own; a slow replica gets less work; a stop request saves."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tasks.config import TARGET_MODULES, TaskConfig
from tests.model.support import save_llama
from tests.trainer.faults import FAULT_STEPS, FAULT_TASK, SLEEP_S, SLOW_REPLICA
from tests.trainer.support import make_plan, make_run, random_dataset
from trainer.checkpoint import list_checkpoints
from trainer.feedback import SpeedFeedback
from trainer.life import MAX_SKIPPED_IN_ROW, TaskLife, lives_from_json, lives_to_json
from trainer.run import run_local
from trainer.run_spec import RunSpec

COMMON = dict(dataset_name="random", context_length=64, learning_rate=1e-2)
TASKS = (
    TaskConfig("steady", 4, 8.0, TARGET_MODULES, 4, **COMMON),
    TaskConfig("broken", 2, 4.0, ("q_proj", "down_proj"), 3, weight_decay=0.1, **COMMON),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("life") / "base")


def new_run(folder: Path, base: Path, layouts: list, steps: int = 4, **changes: object) -> RunSpec:
    data = [random_dataset(15, 6, 50, 256, seed) for seed in range(2)]
    return make_run(folder, base, TASKS, data, make_plan(layouts, 64), steps, **changes)


def test_a_bad_gradient_touches_no_other_task(base: Path, tmp_path: Path) -> None:
    layouts = [(1, 1), (2, 1)]
    bad = new_run(tmp_path / "bad", base, layouts)
    absent = new_run(tmp_path / "absent", base, layouts)
    with_fault = run_local(bad, "tests.trainer.faults:train_with_bad_gradient")
    run_local(absent, "tests.trainer.faults:train_without_task")
    for number in range(2):
        ours = load_file(bad.adapter_folder(number) / "adapter_model.safetensors")
        theirs = load_file(absent.adapter_folder(number) / "adapter_model.safetensors")
        for name, value in theirs.items():
            assert torch.equal(ours[name], value), f"{TASKS[number].name} {name}"
            assert torch.isfinite(value).all()
    for step in with_fault[0].steps:
        assert step.tasks["steady"].applied
        assert step.tasks["broken"].applied == (step.step not in FAULT_STEPS)
        assert math.isnan(step.tasks["broken"].grad_norm) == (step.step in FAULT_STEPS)
    assert FAULT_TASK == 1


def test_a_stop_request_saves_and_reports(base: Path, tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", base, [(1, 1), (1, 1)], steps=50)
    ranks = run_local(run, "tests.trainer.faults:train_and_signal")
    assert [rank.stopped_at for rank in ranks] == [3, 3]
    assert ranks[0].stop_signal == 15
    assert list_checkpoints(run.output_dir) == [3]
    assert not run.adapter_folder(0).exists()


def test_work_moves_away_from_a_slow_replica(base: Path, tmp_path: Path) -> None:
    # Many equal sequences of one length: with two equal replicas each gets half of them. The slow
    # one takes a fixed SLEEP_S more per micro-batch of at most two sequences.
    data = [random_dataset(64, 60, 64, 256, seed) for seed in range(2)]
    tasks = tuple(replace(task, global_batch_size=20) for task in TASKS)
    run = make_run(
        tmp_path / "run", base, tasks, data, make_plan([(1, 1), (1, 1)], 128), 12, feedback=True
    )
    steps = run_local(run, "tests.trainer.faults:train_with_slow_replica")[0].steps
    slow = [step.replicas[SLOW_REPLICA] for step in steps]
    fast = [step.replicas[1 - SLOW_REPLICA] for step in steps]
    assert slow[0].micro_batches == fast[0].micro_batches == 10
    assert slow[-1].micro_batches < 0.6 * fast[-1].micro_batches
    # What the two really cost per micro-batch, and the best split of 20 between them.
    own = [r.busy_s / r.micro_batches for r in fast[3:]]
    fast_s = sorted(own)[len(own) // 2]
    slow_s = fast_s + SLEEP_S
    best_s = min(max(n * slow_s, (20 - n) * fast_s) for n in range(21))
    reached = sorted(max(s.busy_s, f.busy_s) for s, f in zip(slow[8:], fast[8:], strict=True))
    one_chunk = slow_s  # a split is whole micro-batches, and this machine is noisy
    assert reached[len(reached) // 2] < 1.1 * best_s + one_chunk


def test_feedback_finds_the_factors_and_ignores_the_first_step() -> None:
    feedback = SpeedFeedback([1.0, 1.0, 1.0])
    feedback.update([1.0, 1.0, 1.0], [50.0, 50.0, 50.0])
    assert feedback.factors == [1.0, 1.0, 1.0]
    for _ in range(60):
        feedback.update([1.0, 2.0, 0.0], [3.0, 1.0, 0.0])
    # The third had no work: it approaches the middle of the others.
    assert feedback.factors == pytest.approx([3.0, 0.5, 1.5**0.5], rel=1e-2)


def test_one_hiccup_does_not_starve_a_replica() -> None:
    feedback = SpeedFeedback([1.0, 1.0], warm=True)
    feedback.update([1.0, 1.0], [60.0, 1.0])
    assert feedback.factors == pytest.approx([2.0, 1.0])
    feedback.factors[0] = 60.0
    for _ in range(80):
        feedback.update([0.0, 1.0], [0.0, 1.0])
    assert feedback.factors[0] < 1.1, "an idle replica is never tried again"


def test_a_task_is_stopped_after_bad_gradients_in_a_row() -> None:
    life = TaskLife(num_steps=100)
    for _ in range(MAX_SKIPPED_IN_ROW - 1):
        assert life.record(False, math.nan) is None
    assert life.record(True, 1.0) is None, "one good step starts the count anew"
    for _ in range(MAX_SKIPPED_IN_ROW - 1):
        assert life.record(False, math.nan) is None
    message = life.record(False, math.nan)
    assert message is not None and "not finite" in message
    assert not life.runs_at(20)
    assert (life.updates, life.skipped) == (1, 2 * MAX_SKIPPED_IN_ROW - 1)


def test_early_stopping_on_a_plateau() -> None:
    task = replace(TASKS[0], early_stopping_patience=2, early_stopping_min_delta=0.1)
    life = TaskLife(num_steps=100)
    for loss in (3.0, 2.5, 2.45):  # the last improves by less than the minimum
        life.record(True, loss)
        assert life.end_period(task, None) is None
    life.record(True, 2.44)
    message = life.end_period(task, None)
    assert message is not None and "training loss" in message
    assert lives_from_json(lives_to_json([life, TaskLife(3)])) == [life, TaskLife(3)]
    patient = TaskLife(num_steps=100)
    for _ in range(50):
        patient.record(True, 1.0)
        assert patient.end_period(TASKS[0], 1.0) is None, "patience 0 never stops"


def test_validation_and_early_stop_in_a_run(base: Path, tmp_path: Path) -> None:
    tasks = (replace(TASKS[0], early_stopping_patience=1, early_stopping_min_delta=10.0), TASKS[1])
    data = [random_dataset(15, 6, 50, 256, seed) for seed in range(2)]
    plan = make_plan([(1, 1), (1, 2)], 64)
    run = make_run(tmp_path / "run", base, tasks, data, plan, 6, validate_every=2)
    for task, held_out in enumerate(data):
        held_out.save(run.validation_folder(task))
    steps = run_local(run)[0].steps
    # Period 1 sets the best loss, period 2 does not beat it by 10 nats: the task leaves.
    assert ["steady" in step.tasks for step in steps] == [True] * 4 + [False] * 2
    assert all("broken" in step.tasks for step in steps)
    validated = [step.step for step in steps if step.tasks["broken"].validation_loss is not None]
    assert validated == [1, 3, 5]
    first, last = steps[1].tasks["broken"], steps[5].tasks["broken"]
    assert first.validation_loss is not None and last.validation_loss is not None
    assert last.validation_loss < first.validation_loss, "it validates on what it trains on"
