"""An adapter is written as its task ends: the best one of a task that may stop early."""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from lobra.common.errors import ConfigError
from lobra.tasks.config import TaskConfig
from lobra.trainer.checkpoint import read_state, step_folder
from lobra.trainer.run import run_local
from lobra.trainer.run_spec import RunSpec
from lobra.trainer.step_trace import steps_of
from tests.trainer.support import make_plan, make_run, random_dataset, train_steps

COMMON = dict(dataset_name="random", context_length=64, learning_rate=1e-2)
SHORT = TaskConfig("short", 4, 8.0, ("q_proj", "down_proj"), 4, steps=1, **COMMON)
STEADY = TaskConfig("steady", 2, 4.0, ("o_proj",), 3, **COMMON)
WEIGHTS = "adapter_model.safetensors"


def weights(folder: Path) -> bytes:
    return (folder / WEIGHTS).read_bytes()


def test_an_adapter_is_written_as_its_task_ends(base: Path, tmp_path: Path) -> None:
    data = [random_dataset(15, 6, 50, 256, seed) for seed in range(2)]
    plan = make_plan([(1, 2)], 64)
    run = make_run(tmp_path / "run", base, (SHORT, STEADY), data, plan, 50)
    run_local(run, "tests.trainer.faults:train_and_signal")  # after three steps
    short, steady = run.adapter_folder(0), run.adapter_folder(1)
    assert not steady.exists()
    saved = step_folder(run.output_dir, 3) / "adapters/short"
    assert weights(short) == weights(saved), "it was not trained after it had ended"
    written = short.stat().st_ino
    run_local(replace(run, resume_step=3, last_step=4))
    assert steady.is_dir()
    assert short.stat().st_ino == written, "written once"
    shutil.rmtree(short)
    run_local(replace(run, resume_step=4, last_step=4))
    assert weights(short) == weights(saved), "missing, so it is written again"


def careful_run(folder: Path, base: Path, last_step: int, **changes: object) -> RunSpec:
    """Return the run of a task that learns which tokens there are, then its own by heart."""
    task = TaskConfig("careful", 8, 16.0, ("q_proj", "up_proj", "down_proj"), 4, **COMMON)
    task = replace(task, early_stopping_patience=2, steps=20, learning_rate=3e-2)
    data = [random_dataset(8, 6, 50, 40, 1)]
    plan = make_plan([(1, 2)], 64)
    run = make_run(folder, base, (task,), data, plan, last_step, validate_every=2, **changes)
    random_dataset(8, 6, 50, 40, 2).save(run.validation_folder(0))
    return run


def test_early_stopping_exports_the_best_adapter(base: Path, tmp_path: Path) -> None:
    run = careful_run(tmp_path / "run", base, 20)
    steps = [step.tasks["careful"] for step in train_steps(run)]
    losses = {s.own_step + 1: s.validation_loss for s in steps if s.validation_loss is not None}
    best = min(losses, key=lambda step: losses[step])
    assert best > 2 and steps[-1].own_step + 1 == best + 4 < 20, f"shows nothing: {losses}"

    straight = careful_run(tmp_path / "straight", base, best)
    task = replace(straight.tasks[0], early_stopping_patience=0)
    run_local(replace(straight, tasks=(task,), validate_every=0))
    exported = weights(run.adapter_folder(0))
    assert exported == weights(straight.adapter_folder(0))

    parts = careful_run(tmp_path / "parts", base, best + 2)
    run_local(parts)
    assert read_state(parts.output_dir, best + 2).progress["careful"].lowest_step == best
    run_local(replace(parts, last_step=20, resume_step=best + 2))
    assert weights(parts.adapter_folder(0)) == exported, "the best one was in the checkpoint"
    shutil.rmtree(step_folder(parts.output_dir, best + 4) / "best/careful")
    with pytest.raises(ConfigError, match="best/careful/adapter_model.safetensors is missing"):
        read_state(parts.output_dir, best + 4)


def test_a_task_whose_run_ends_before_it_may_be_better_than_its_best(
    base: Path, tmp_path: Path
) -> None:
    """The last evaluation is of no period, so that adapter is not kept, but it is exported."""
    run = careful_run(tmp_path / "run", base, 3)
    losses = [step.tasks["careful"].validation_loss for step in train_steps(run)]
    assert losses[0] is None and losses[1] is not None and losses[2] is not None
    assert losses[2] < losses[1], "shows nothing"
    saved = step_folder(run.output_dir, 3)
    assert weights(run.adapter_folder(0)) == weights(saved / "adapters/careful")
    assert weights(run.adapter_folder(0)) != weights(saved / "best/careful")
    assert read_state(run.output_dir, 3).progress["careful"].lowest_step == 2


def test_steps_are_traced_on_every_rank(base: Path, tmp_path: Path) -> None:
    data = [random_dataset(15, 6, 50, 256, 0)]
    run = make_run(tmp_path / "run", base, (STEADY,), data, make_plan([(1, 2)], 64), 3)
    run_local(replace(run, profiled_steps=steps_of("2")))
    paths = sorted((run.output_dir / "torch_profiler").iterdir())
    assert [path.name for path in paths] == [f"step_2_rank_{rank}.json.gz" for rank in range(2)]
    for path in paths:
        trace = json.loads(gzip.decompress(path.read_bytes()))
        assert "aten::mm" in {event.get("name") for event in trace["traceEvents"]}


@pytest.mark.parametrize(
    ("text", "steps"), [("3-5", {3, 4, 5}), ("3,7", {3, 7}), ("2-3, 9", {2, 3, 9})]
)
def test_steps_in_words(text: str, steps: set[int]) -> None:
    assert steps_of(text) == steps


@pytest.mark.parametrize("text", ["", "0", "5-3", "a", "1,,2", "-3"])
def test_what_is_no_list_of_steps(text: str) -> None:
    with pytest.raises(ConfigError, match="want steps, such as 3-5 or 3,7"):
        steps_of(text)
