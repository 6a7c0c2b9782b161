"""AdamW in 8 bits is that of bitsandbytes, and goes on from a checkpoint to the last bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from safetensors.torch import load_file

from lobra.layout.layout import Layout
from lobra.layout.world import consecutive
from lobra.model.groups import build_groups
from lobra.model.launch import run_ranks
from lobra.model.stage import build_stage
from lobra.tasks.target_modules import TARGET_MODULES
from lobra.trainer.adapters import adapter_spec
from lobra.trainer.eight_bit import eight_bit_problems
from lobra.trainer.optimizer import AdapterOptimizer, TaskUpdate
from lobra.trainer.run import run_local
from lobra.trainer.zero import start_deepspeed
from tests.model.support import save_llama
from tests.trainer.support import make_plan, make_run, random_dataset, small_task

TASK = small_task(
    rank=8, target_modules=TARGET_MODULES, optimizer="adamw8bit", learning_rate=3e-3,
    adam_beta2=0.9, weight_decay=0.1, global_batch_size=4, context_length=64,
)  # fmt: skip
BETAS = (0.9, 0.9)


def updated_on_rank(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return a task's weights after updates, and what bitsandbytes makes of them by itself."""
    start_deepspeed("cpu")
    world = consecutive([Layout(1, 1)])
    stage = build_stage(folder, build_groups(world), {0: adapter_spec(TASK)})
    optimizer = AdapterOptimizer(stage, world)
    optimizer.install(0, TASK)
    slot = stage.slots[0]
    plain = torch.nn.Parameter(slot.weights.clone())
    alone = AdamW8bit([plain], TASK.learning_rate, BETAS, 1e-8, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        gradient = torch.randn(len(plain), generator=generator)
        slot.gradient.copy_(gradient)
        plain.grad = 0.5 * gradient
        optimizer.reduce([0])
        optimizer.update({0: TaskUpdate(True, TASK.learning_rate, clip=0.5)})
        alone.step()
        moments = {name: own.clone() for name, own in optimizer.blocks[0].moments(0).items()}
        optimizer.blocks[0].load(0, moments, alone.state[plain]["step"])  # as a checkpoint would
    return slot.weights.numpy(), plain.detach().numpy()


@pytest.mark.ranks
def test_it_is_that_of_bitsandbytes(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "base")
    ((ours, theirs),) = run_ranks(
        "tests.trainer.test_eight_bit:updated_on_rank", 1, {"folder": folder}
    )
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.ranks
@pytest.mark.long
def test_it_goes_on_to_the_last_bit(tmp_path: Path) -> None:
    base, found = save_llama(tmp_path / "base"), []
    for ends in ((6,), (3, 6)):
        plan = make_plan([(1, 1), (2, 1)], max_tokens=128)
        data = random_dataset(15, 6, 50, 256, 0)
        folder = tmp_path / f"in{len(ends)}"
        run = make_run(folder, base, (TASK,), [data], plan, 6, batching="packed")
        for end, begin in zip(ends, (None, *ends), strict=False):
            run = replace(run, last_step=end, resume_step=begin)
            run_local(run)
        found.append(load_file(run.adapter_folder(0) / "adapter_model.safetensors"))
    straight, resumed = found
    for name, value in straight.items():
        assert torch.equal(resumed[name], value), name


def test_what_cannot_be_exact_is_refused() -> None:
    assert eight_bit_problems([TASK], "fp32", "<1,1>", "<1,1>") == []
    assert eight_bit_problems([replace(TASK, optimizer="sgd")], "fp64", "<1,1>", "<2,1>") == []
    problems = eight_bit_problems([TASK], "fp64", "<1,1>", "<2,1>")
    assert ["not made for fp64" in one for one in problems] == [True, False]
    assert "exactly on that one only" in problems[1]
