"""The ledger finds what was trained twice, left out, or is another than was drawn."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lobra.layout.order import StepOrder
from lobra.layout.sequences import MicroBatch
from lobra.trainer.batches import draw_sequences
from lobra.trainer.ledger import check_ledger, drawn_batches
from lobra.trainer.metrics import DrawnBatch
from lobra.trainer.task_progress import RunTask, TaskProgress
from tests.tiers import examples
from tests.trainer.support import random_dataset, small_task

STEPS = 7


def batches(size: int, num_examples: int, seed: int) -> list[DrawnBatch]:
    """Return what the steps of a task draw, their sequences in a micro-batch of each of two."""
    config = small_task(global_batch_size=size, seed=seed)
    task = RunTask(config, random_dataset(num_examples, 4, 9, 64, 0), TaskProgress(STEPS))
    found = []
    for own_step in range(STEPS):
        drawn = draw_sequences(3, config, task.data, 0, own_step)
        halves = tuple(drawn[1::2]), tuple(drawn[::2])
        order = StepOrder(own_step, tuple((MicroBatch(half),) for half in halves if half))
        found.append(drawn_batches(order, {3: own_step}, {3: task})["t"])
    return found


def problems(
    folder: Path, lines: list[DrawnBatch], seed: int, objective: str = "supervised"
) -> tuple[str, ...]:
    config = {"seed": 0, "tasks": [{"name": "t", "seed": seed, "objective": objective}]}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    replica = {
        "layout": "<1,1>", "busy_s": 1, "predicted_s": 1, "micro_batches": 1, "padded_tokens": 1,
    }  # fmt: skip
    step = {
        "step_time_s": 1.0, "predicted_step_time_s": 1.0, "tokens": 1, "padded_tokens": 1,
        "gpu_seconds": 1.0, "memory_bytes": 1, "tasks": {}, "replicas": [replica],
    }  # fmt: skip
    written = [{"step": n, **step, "drawn": {"t": batch.__dict__}} for n, batch in enumerate(lines)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))
    return check_ledger(folder).problems


@examples(20, 200)
@given(size=st.integers(1, 9), num_examples=st.integers(1, 12), seed=st.integers(0, 5))
def test_a_run_without_faults_has_no_problem(
    size: int, num_examples: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("ledger")
    for objective in ("supervised", "ppo"):
        assert problems(folder, batches(size, num_examples, seed), seed, objective) == ()


FAULTS: dict[str, tuple[Callable[[list[DrawnBatch]], list[DrawnBatch]], str]] = {
    "left out": (lambda own: own[:3] + own[4:], "4 examples before its step 5 were never trained"),
    "twice": (lambda own: [*own[:4], *own[3:]], "4 examples were trained again in its step 4"),
    "others": (
        lambda own: [*own[:3], replace(own[3], digest=own[2].digest), *own[4:]],
        "its step 4 trained other sequences than were drawn for it",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault: str, tmp_path: Path) -> None:
    change, said = FAULTS[fault]
    (found,) = problems(tmp_path, change(batches(4, 9, 1)), 1)
    assert found == f"task t: {said}"
