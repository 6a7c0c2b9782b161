"""An update that fails on one rank is made on none: its task stops there, the others go on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lobra.layout.order import Update
from lobra.tasks.config import TaskConfig
from lobra.tasks.target_modules import TARGET_MODULES
from lobra.trainer.checkpoint_folder import list_checkpoints
from lobra.trainer.engine import Engine
from lobra.trainer.run_spec import RunSpec
from tests.model.support import save_llama
from tests.trainer.faults import RAISING_TASK, SPOILT_TASK, WARNINGS
from tests.trainer.support import make_plan, make_run, random_dataset, train_steps

COMMON = dict(dataset_name="random", context_length=64, learning_rate=1e-2)
TASKS = (
    TaskConfig("steady", 4, 8.0, TARGET_MODULES, 4, **COMMON),
    TaskConfig("raising", 2, 4.0, ("q_proj", "down_proj"), 3, **COMMON),
    TaskConfig("spoilt", 2, 4.0, ("v_proj", "up_proj"), 2, weight_decay=0.1, **COMMON),
)
#: Updates that are made: the raising task fails in its second step, the spoilt one in its third.
NUM_UPDATES = (4, 1, 2)
#: Whose learning rate of B no float32 holds.
TOO_FAST = replace(TASKS[1], name="overflowing", loraplus_ratio=1e60)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("updates") / "base", num_hidden_layers=2)


def new_run(
    folder: Path, base: Path, layouts: list[tuple[int, int]], tasks: tuple[TaskConfig, ...] = TASKS,
    precision: str = "fp64",
) -> RunSpec:  # fmt: skip
    data = [random_dataset(15, 6, 50, 256, seed) for seed in range(len(tasks))]
    plan = make_plan(layouts, 64)
    return make_run(folder, base, tasks, data, plan, 4, precision=precision)


@pytest.fixture(scope="module")
def expected(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Adapters of a run whose tasks end by themselves where they are to fail in others."""
    run = new_run(tmp_path_factory.mktemp("expected") / "run", base, [(1, 1)])
    run = replace(run, num_steps=NUM_UPDATES)
    train_steps(run)
    return [adapter(run, number) for number in range(len(TASKS))]


def adapter(run: RunSpec, number: int) -> dict[str, torch.Tensor]:
    return load_file(run.adapter_folder(number) / "adapter_model.safetensors")


@pytest.mark.ranks
@pytest.mark.parametrize("layouts", [[(1, 1), (1, 1)], [(2, 1), (1, 2)]])
def test_a_task_whose_update_fails_keeps_its_last_adapter(
    layouts: list[tuple[int, int]], base: Path, expected: list[dict], tmp_path: Path
) -> None:
    run = new_run(tmp_path / "run", base, layouts)
    steps = train_steps(run, "tests.trainer.faults:train_with_failing_updates")
    for number, (task, updates) in enumerate(zip(TASKS, NUM_UPDATES, strict=True)):
        own = [step.tasks[task.name] for step in steps if task.name in step.tasks]
        fails = updates < len(steps)
        assert [entry.applied for entry in own] == [True] * updates + [False] * fails
        assert (own[-1].stopped or "").startswith("its update failed: ") == fails
        for name, value in expected[number].items():
            torch.testing.assert_close(adapter(run, number)[name], value, rtol=1e-9, atol=1e-12)
    assert list_checkpoints(run.output_dir) == [4]
    said = (run.output_dir / WARNINGS).read_text()
    last = sum(tp * pp for tp, pp in layouts) - 1
    for part in (
        f"step 2: task raising is stopped: its update failed: ValueError: odd (on rank {last}); ",
        "step 3: task spoilt is stopped: its update failed: its weights would not be finite any "
        "more (on rank 0); its weights are those of the step before",
    ):
        assert said.count(part) == 1, said
    assert "its update is skipped" not in said
    assert (RAISING_TASK, SPOILT_TASK) == (1, 2)


@pytest.mark.ranks
def test_a_rate_beyond_all_bounds_is_its_tasks_alone(base: Path, tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", base, [(1, 1)], (TASKS[0], TOO_FAST), "fp32")
    steps = train_steps(run)
    assert [step.tasks["steady"].applied for step in steps] == [True] * 4
    assert ["overflowing" in step.tasks for step in steps] == [True, False, False, False]
    assert "its update failed: " in (steps[0].tasks["overflowing"].stopped or "")
    tensors = adapter(run, 1)
    assert not any(value.any() for name, value in tensors.items() if "lora_B" in name), (
        "as it began"
    )


@pytest.mark.parametrize(
    ("norm", "max_norm", "is_made"),
    [(1e19, 0.0, True), (2e19, 0.0, False), (1e300, 0.0, False), (1e300, 1.0, True)],
)
def test_a_gradient_that_overflows_when_it_is_squared(
    norm: float, max_norm: float, is_made: bool
) -> None:
    todo: dict[int, Any] = {}
    engine = Engine.__new__(Engine)
    optimizer = SimpleNamespace(update=lambda updates, _agree: todo.update(updates) or {})
    engine.optimizer = optimizer  # type: ignore[assignment]
    engine.stage = SimpleNamespace(dtype=torch.bfloat16)  # type: ignore[assignment]
    engine.control = SimpleNamespace(agree=None)  # type: ignore[assignment]
    failed = engine.step([Update(3, 0.1, max_norm)], {3: norm})
    assert todo[3].apply == is_made
    assert list(failed) == ([] if is_made else [3])
