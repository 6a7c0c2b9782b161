"""What the adapters' exchange takes is what the profiler counts for it."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lobra.layout.layout import Layout
from lobra.layout.world import consecutive
from lobra.model.groups import build_groups
from lobra.model.launch import run_ranks
from lobra.model.stage import build_stage
from lobra.profiler.exchange import exchange_bytes
from lobra.tasks.config import TaskConfig
from lobra.tasks.target_modules import TARGET_MODULES
from lobra.trainer.adapters import adapter_spec
from lobra.trainer.optimizer import AdapterOptimizer, TaskUpdate
from lobra.trainer.zero import start_deepspeed
from tests.model.support import save_llama

TASKS = tuple(TaskConfig(f"task{r}", r, 2.0 * r, TARGET_MODULES, 4, "none", 512) for r in (8, 24))


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors made while it is on that were alive at once."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.made: list[weakref.ref[Tensor]] = []
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        found = result if isinstance(result, list | tuple) else [result]
        self.made += [weakref.ref(one) for one in found if isinstance(one, Tensor)]
        alive = [tensor for ref in self.made if (tensor := ref()) is not None]
        storages = {one.untyped_storage().data_ptr(): one.untyped_storage() for one in alive}
        new = (kept.nbytes() for at, kept in storages.items() if at not in self.known)
        self.peak = max(self.peak, sum(new))
        return result


def exchanged_on_rank(folder: Path) -> tuple[int, int, int]:
    """Return the adapters' elements and the most that `reduce` and `update` took, in bytes."""
    start_deepspeed("cpu")
    # Sums are of no interest here, and gloo's own buffers for them would be counted.
    dist.reduce_scatter_tensor = lambda *args, **kwargs: None
    world = consecutive([Layout(1, 1)] * dist.get_world_size())
    specs = {number: adapter_spec(task) for number, task in enumerate(TASKS)}
    stage = build_stage(folder, build_groups(world), specs)
    optimizer = AdapterOptimizer(stage, world)
    for number, task in enumerate(TASKS):
        optimizer.install(number, task)
    (block,) = optimizer.blocks
    known = [tensor for slot in stage.slots.values() for tensor in (slot.weights, slot.gradient)]
    for partition in block.partitions.values():
        known += [partition.master_p, *partition.moments.values()]
    for slot in stage.slots.values():
        slot.gradient.fill_(1e-3)
    with LiveBytes(known) as reducing:
        optimizer.reduce(range(len(TASKS)))
    known += block.reduced_p.values()
    held = sum(part.nbytes for part in block.reduced_p.values()) * (world.num_ranks > 1)
    with LiveBytes(known) as updating:
        optimizer.update({number: TaskUpdate(True, 1e-3) for number in specs})
    elements = sum(stage.shape.adapter_elements(t.rank, t.target_modules) for t in TASKS)
    return elements, reducing.peak, held + updating.peak


@pytest.mark.ranks
@pytest.mark.parametrize("num_holders", [1, 2])
def test_the_exchange_takes_what_the_profiler_counts(tmp_path: Path, num_holders: int) -> None:
    folder = save_llama(tmp_path / "llama")
    ranks = run_ranks(
        "tests.trainer.test_exchange:exchanged_on_rank", num_holders, {"folder": folder}
    )
    for elements, reducing, updating in ranks:
        counted = exchange_bytes(elements, num_holders)
        assert reducing < counted
        if num_holders > 1:
            assert updating == pytest.approx(counted, rel=0.02)
        else:  # the optimiser's own: twice the larger task's weights (once on CUDA)
            assert counted <= updating < 2 * counted
