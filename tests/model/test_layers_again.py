"""Layers of a stage that run again: which do, what they are trained by, what is left of a task."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from lobra.layout.layout import Layout
from lobra.layout.world import one_replica
from lobra.model.adapter import AdapterSpec
from lobra.model.groups import ReplicaGroups
from lobra.model.memory_policy import apply_policy
from lobra.model.pipeline import run_replica
from lobra.model.stage import Stage, build_stage
from tests.model.support import micro_batch, random_batches, save_family, tensors_of

NUM_BATCHES = 3


def trained_under(
    folder: Path, specs: dict[int, AdapterSpec], policy: str | None
) -> tuple[Stage, torch.Tensor, int]:
    """Run micro-batches under a memory policy, in fp64; return how often layers ran, too."""
    groups = ReplicaGroups(one_replica(Layout(1, 1)).place(0), None, (0,), None, (0,))
    stage = build_stage(folder, groups, specs, dtype=torch.float64)
    num_runs = 0

    def counted(*_: Any) -> None:
        nonlocal num_runs
        num_runs += 1

    for layer in stage.decoder.layers:
        layer.input_layernorm.register_forward_pre_hook(counted)
    if policy is not None:
        apply_policy(stage.decoder.layers, policy)
    for task, slot in stage.slots.items():
        generator = torch.Generator().manual_seed(task)
        slot.weights.add_(torch.randn(slot.weights.shape, generator=generator).double() / 20)
    stage.refresh()
    batches = [
        micro_batch(tokens, labels, rows, seed, packed=seed % 2 == 1)
        for seed, (tokens, labels, rows) in enumerate(random_batches(NUM_BATCHES))
    ]
    losses = run_replica(stage, tensors_of(stage, batches, [0.5, 0.25]), len(specs))
    return stage, losses, num_runs


@pytest.mark.parametrize(
    ("family", "own"),
    [("llama", {"modules_to_save": ("input_layernorm",)}), ("qwen2", {"bias": "all"})],
)
def test_layers_that_only_own_vectors_train_run_again(
    family: str, own: dict[str, Any], tmp_path: Path
) -> None:
    """Where nothing below has a gradient, what a layer is trained by must say so."""
    folder = save_family(family, tmp_path / "base", num_hidden_layers=2)
    specs = {task: AdapterSpec(f"task {task}", 2, 4.0, ("lm_head",), **own) for task in range(2)}
    expected: list[torch.Tensor] = []
    for policy in (None, "keep", "full"):
        stage, losses, _ = trained_under(folder, specs, policy)
        found = [losses, *(slot.gradient for slot in stage.slots.values())]
        expected = expected or found
        assert all(map(torch.equal, found, expected)), policy
        assert all(value.any() for value in found)


def test_layers_that_nothing_trains_run_once(tmp_path: Path) -> None:
    folder = save_family("llama", tmp_path / "base", num_hidden_layers=2)
    for modules, runs in ((("lm_head",), 1), (("q_proj",), 2)):
        specs = {task: AdapterSpec(f"task {task}", 2, 4.0, modules) for task in range(2)}
        _, _, num_runs = trained_under(folder, specs, "keep")
        assert num_runs == 2 * runs * NUM_BATCHES


def test_a_task_that_is_removed_leaves_nothing(tmp_path: Path) -> None:
    folder = save_family("llama", tmp_path / "base", num_hidden_layers=2)
    specs = {task: AdapterSpec(f"task {task}", 2, 4.0, ("q_proj",)) for task in range(2)}
    stage, _, _ = trained_under(folder, specs, "keep")
    gradient = weakref.ref(stage.slots[0].gradient)
    stage.remove(0)
    gc.collect()
    assert gradient() is None
