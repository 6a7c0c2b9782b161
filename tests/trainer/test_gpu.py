"""On a GPU: joint equals alone, as on CPU ranks and against the same PEFT, and runs repeat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lobra.layout.base_precision import QUANTISED
from lobra.trainer.run import run_local
from lobra.trainer.run_spec import RunSpec
from tests.model.support import save_family, save_llama
from tests.trainer.alone import STEPS, TASKS, make_datasets, make_starts, task_config
from tests.trainer.support import make_plan, make_run
from tests.trainer.test_equality import (
    BAR,
    Reference,
    final_tensors,
    joined_error,
    losses_of,
    relative_errors,
    train_jointly,
)

pytestmark = pytest.mark.gpu


def trained(base: Path, folder: Path, layout: tuple[Any, ...] = (1, 1), **changes: Any) -> RunSpec:
    """Train all tasks with dropout on one replica in bf16; return the run."""
    tasks = tuple(task_config({**task, "lora_dropout": 0.1}) for task in TASKS)
    plan = make_plan([layout], max_tokens=128)
    wanted = {"precision": "bf16", "device": "cuda", **changes}
    run = make_run(folder, base, tasks, make_datasets(), plan, STEPS, **wanted)
    run_local(run)
    return run


def test_joint_equals_alone_on_a_gpu(tmp_path: Path) -> None:
    base = save_family("llama", tmp_path / "base")
    reference = Reference(base, make_starts(base, tmp_path / "starts"))
    run, _ = train_jointly(reference, [(1, 1)], tmp_path / "run", "fp64", "cuda")
    for number, alone in enumerate(reference.alone(torch.float64)):
        errors = relative_errors(final_tensors(run, number), alone["tensors"])
        assert max(errors.values()) < BAR, errors


@pytest.mark.parametrize("policy", ["keep", "full"])
def test_a_run_repeats_bit_by_bit(policy: str, tmp_path: Path) -> None:
    base = save_family("llama", tmp_path / "base")
    runs = [
        trained(base, tmp_path / str(number), (1, 1, policy), deterministic=True)
        for number in range(2)
    ]
    for number, task in enumerate(runs[0].tasks):
        first, second = (final_tensors(run, number) for run in runs)
        for name, value in first.items():
            assert torch.equal(second[name], value), (task.name, name)
        assert losses_of(runs[0], task.name) == losses_of(runs[1], task.name)


@pytest.mark.parametrize("quantised", QUANTISED)
def test_a_quantised_base_trains_as_on_a_cpu(quantised: str, tmp_path: Path) -> None:
    """In bf16, as near as runs in bf16 are (tests.trainer.test_equality)."""
    if quantised == "nf4":
        pytest.importorskip("bitsandbytes")
    base = save_llama(tmp_path / "base", intermediate_size=192)
    ours, expected = (
        trained(base, tmp_path / device, device=device, base_precision=quantised)
        for device in ("cuda", "cpu")
    )
    for number, task in enumerate(ours.tasks):
        tensors = [final_tensors(run, number) for run in (ours, expected)]
        for part in ("A", "B"):
            error = joined_error(*tensors, part)
            bar = 0.1 if task.name == "few" else 0.03
            assert error < bar, f"{task.name} {part}: {error:.1e}"
        losses = [losses_of(run, task.name) for run in (ours, expected)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-2)
