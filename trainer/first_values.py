"""Where tasks start whose first values are the base's: PiSSA's factors and DoRA's magnitudes."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from lobra.model.adapter import AdapterSpec, Site
from lobra.model.base_linear import Shard
from lobra.model.checkpoint import CheckpointReader
from lobra.model.pissa import principal_factors
from lobra.model.quantised_linear import read_linear
from lobra.trainer.optimizer import AdapterOptimizer

KINDS = ("pissa", "dora")


def first_values(spec: AdapterSpec, site: Site, weight_OI: Tensor) -> dict[str, Tensor]:
    """Return the tensors at a site (PEFT's names and shapes) that start from the base's weight."""
    A, B, *more = (tensor.name for tensor in spec.tensors(site))
    if spec.kind == "pissa":
        factors = principal_factors(weight_OI, spec.rank_at(site), spec.scaling(site))
        return dict(zip((A, B), factors, strict=True))
    return dict.fromkeys(more, torch.linalg.vector_norm(weight_OI, dim=1))  # DoRA's: B is zero


@torch.no_grad()
def start_from_base(folder: Path, optimizer: AdapterOptimizer, number: int) -> None:
    """Set what of a task's weights starts from the base's, before they are optimised. Collective.

    The holders of a block share its linears out, and a sum brings all to each. So no processor's
    choice of a singular vector's sign differs from another's.
    """
    stage, slot = optimizer.stage, optimizer.stage.slots[number]
    reader = CheckpointReader(folder, slot.weights.dtype, stage.device)
    started = torch.zeros_like(slot.weights)
    named = slot.layout.named(started)
    for block in optimizer.blocks:
        own = [t.site for t in slot.layout.tensors if t.site.layer in block.block.layers]
        for site in list(dict.fromkeys(own))[dist.get_rank(block.group) :: block.num_holders]:
            inputs, outputs = site.in_features, site.out_features
            whole = Shard(range(inputs), range(outputs), inputs, outputs)
            base = read_linear(reader, site.path, whole, stage.shape.quantised)
            for name, value in first_values(slot.spec, site, base.weight_oi()).items():
                named[name].copy_(value)
        dist.all_reduce(started[slot.layout.span(block.block.layers)], group=block.group)
    if slot.start is not None:
        slot.start.copy_(started)
    for tensor in slot.layout.tensors:
        if tensor.is_vector or slot.start is not None:
            slot.layout.rows(slot.weights, tensor).copy_(slot.layout.rows(started, tensor))
    stage.refresh()
