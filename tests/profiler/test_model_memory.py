"""What a model that is trained whole holds is what is predicted of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lobra.layout.layout import Layout
from lobra.layout.shapes import read_shape
from lobra.layout.world import consecutive
from lobra.model.groups import build_groups
from lobra.model.launch import run_ranks
from lobra.model.stage import build_stage
from lobra.model.trained_stage import TrainedWeights
from lobra.profiler.model_memory import model_memory
from lobra.tasks.config import TaskConfig
from lobra.tasks.target_modules import TARGET_MODULES
from lobra.trainer.adapters import adapter_spec
from lobra.trainer.model_folder import files_of
from lobra.trainer.model_optimizer import ModelOptimizer
from lobra.trainer.zero import start_deepspeed
from tests.model.support import save_llama

TASK = TaskConfig("whole", 1, 1, TARGET_MODULES, 1, "none", 8, adapter="full")
LAYOUT = Layout(1, 1)


def held_on_rank(folder: Path) -> tuple[int, int, int]:
    """Return the bytes of weights, gradients and the optimiser's state."""
    start_deepspeed("cpu")
    world = consecutive([LAYOUT] * dist.get_world_size())
    stage = build_stage(folder, build_groups(world), {}, dtype=torch.bfloat16)
    (sizes,) = files_of(folder, stage.shape).values()
    weights = TrainedWeights(stage, 0, adapter_spec(TASK), sizes)
    optimizer = ModelOptimizer(stage, weights, world)
    optimizer.install(0, TASK)
    (block,) = optimizer.blocks
    state = sum(
        own.master_p.nbytes + sum(moment.nbytes for moment in own.moments.values())
        for own in block.partitions.values()
    )
    return weights.weights.nbytes, weights.gradient.nbytes, state


@pytest.mark.ranks
def test_what_is_held_is_what_is_predicted(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "base", hidden_size=128, intermediate_size=256)
    for found in run_ranks("tests.profiler.test_model_memory:held_on_rank", 2, {"folder": folder}):
        memory = model_memory(read_shape(folder), LAYOUT, 2, "bf16")
        predicted = (memory.weight_bytes, memory.gradient_bytes, memory.optimizer_bytes)
        assert found == pytest.approx(predicted, rel=0.05)
