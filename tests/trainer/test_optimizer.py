"""A task's update touches its own adapter and moments, and nothing of another task."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lobra.layout.layout import Layout
from lobra.layout.world import consecutive
from lobra.model.groups import build_groups
from lobra.model.launch import run_ranks
from lobra.model.stage import build_stage
from lobra.trainer.adapters import adapter_spec
from lobra.trainer.optimizer import AdapterOptimizer, TaskUpdate
from lobra.trainer.zero import start_deepspeed
from tests.model.support import save_llama
from tests.trainer.support import small_task


@pytest.mark.ranks
@pytest.mark.parametrize("num_holders", [1, 2])
def test_tasks_come_and_go_and_sit_out(tmp_path: Path, num_holders: int) -> None:
    """Another task's weights and moments stay as they are, bit for bit, and so does its future."""
    folder = save_llama(tmp_path / "llama", num_hidden_layers=1)
    target = "tests.trainer.test_optimizer:alone_and_among_others"
    for alone, among_others in run_ranks(target, num_holders, {"folder": folder}):
        for step, (expected, found) in enumerate(zip(alone, among_others, strict=True)):
            for name, value in expected.items():
                assert np.array_equal(found[name], value), (step, name)
        assert all(
            (after["weights"] != before["weights"]).any() for before, after in pairwise(alone)
        )


def alone_and_among_others(folder: Path) -> tuple[list[dict], list[dict]]:
    """Return a task's weights and moments after each step, when others come, go and break."""
    start_deepspeed("cpu")
    world = consecutive([Layout(1, 1)] * dist.get_world_size())
    kept, others = 7, {2: small_task(name="early"), 9: small_task(name="late", weight_decay=0.1)}
    results = []
    for lively in (False, True):
        stage = build_stage(folder, build_groups(world), {kept: adapter_spec(small_task())})
        optimizer = AdapterOptimizer(stage, world)
        optimizer.install(kept)
        result = []
        for step in range(4):
            if lively and step in (1, 2):
                number = (0, 2, 9)[step]
                stage.install({number: adapter_spec(others[number])})
                optimizer.install(number, others[number])
            if lively and step == 3:
                stage.remove(2)
                optimizer.remove(2)
            for number, slot in stage.slots.items():
                generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
                slot.gradient.copy_(torch.randn(len(slot.gradient), generator=generator))
                if number == 9:  # what it holds does not matter: its update is not applied
                    slot.gradient[3] = float("nan")
            optimizer.reduce(sorted(stage.slots))
            before = {number: state_of(optimizer, number) for number in stage.slots}
            optimizer.update({number: TaskUpdate(number != 9, 0.1, 0.5) for number in stage.slots})
            assert not any(slot.gradient.any() for slot in stage.slots.values())
            if 9 in before:
                for name, value in state_of(optimizer, 9).items():
                    assert np.array_equal(value, before[9][name]), name
            result.append(state_of(optimizer, kept))
        results.append(result)
    return results[0], results[1]


def state_of(optimizer: AdapterOptimizer, number: int) -> dict[str, np.ndarray]:
    """Return a task's weights, and this rank's part of its moments with their count of updates."""
    (block,) = optimizer.blocks
    partition = block.partitions[number]
    values = {"weights": optimizer.stage.slots[number].weights, **partition.moments}
    values["updates"] = next(iter(partition.optimizer.state.values()))["step"]
    return {name: value.clone().numpy() for name, value in values.items()}
