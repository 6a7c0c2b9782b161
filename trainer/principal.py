"""Where PiSSA tasks start: at the principal part of every weight that they are on."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from lobra.model.checkpoint import CheckpointReader
from lobra.model.pissa import principal_factors
from lobra.trainer.optimizer import AdapterOptimizer


@torch.no_grad()
def start_from_principal_parts(folder: Path, optimizer: AdapterOptimizer, number: int) -> None:
    """Set a PiSSA task's weights, before they are optimised. Collective.

    The holders of a block share its linears out. A sum then brings all to each: two processors may
    find singular vectors of opposite signs, and all ranks must start alike.
    """
    stage, slot = optimizer.stage, optimizer.stage.slots[number]
    assert slot.start is not None, "the task's adapter is PiSSA"
    reader = CheckpointReader(folder, torch.float32, stage.device)
    slot.start.zero_()
    named = slot.layout.named(slot.start)
    for block in optimizer.blocks:
        own = [t for t in slot.layout.tensors if t.site.layer in block.block.layers]
        linears = list(dict.fromkeys(tensor.site for tensor in own))
        for site in linears[dist.get_rank(block.group) :: block.num_holders]:
            rank, scaling = slot.spec.rank_at(site), slot.spec.scaling(site)
            factors = principal_factors(reader.read(f"{site.path}.weight"), rank, scaling)
            for tensor, factor in zip(slot.spec.tensors(site), factors, strict=True):
                named[tensor.name].copy_(factor)
        dist.all_reduce(slot.start[slot.layout.span(block.block.layers)], group=block.group)
    slot.weights.copy_(slot.start)
    stage.refresh()
