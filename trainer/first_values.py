"""Where tensors start that start from the base: PiSSA's, DoRA's magnitudes, norms and biases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from lobra.model import checkpoint
from lobra.model.adapter import AdapterSpec
from lobra.model.adapter_tensor import AdapterTensor
from lobra.model.checkpoint import CheckpointReader
from lobra.model.pissa import principal_factors
from lobra.trainer.optimizer import AdapterOptimizer


def first_values(
    spec: AdapterSpec, tensors: Sequence[AdapterTensor], name: str, reader: CheckpointReader
) -> Sequence[Tensor]:
    """Return what tensors start as (PEFT's shapes), by the base's tensor of this name."""
    if name not in reader:
        name = checkpoint.EMBEDDING  # which the head is tied to
    weight = reader.read(name)
    if tensors[0].base_name == name:
        return [weight]
    site = tensors[0].site
    if spec.kind == "pissa":
        return principal_factors(weight, spec.rank_at(site), spec.scaling(site))
    return [torch.linalg.vector_norm(weight, dim=1)]  # DoRA's: B is zero


@torch.no_grad()
def start_from_base(folder: Path, optimizer: AdapterOptimizer, number: int) -> None:
    """Set what of a task's weights starts from the base's, before they are optimised. Collective.

    The holders of a block share its sites out, and a sum brings all to each. So no processor's
    choice of a singular vector's sign differs from another's.
    """
    stage, slot = optimizer.stage, optimizer.stage.slots[number]
    reader = CheckpointReader(folder, slot.weights.dtype, stage.device)
    started = torch.zeros_like(slot.weights)
    starting = [tensor for tensor in slot.layout.tensors if tensor.from_base]
    for block in optimizer.blocks:
        by_weight: dict[str, list[AdapterTensor]] = {}
        for tensor in starting:
            if tensor.site.layer in block.block.layers:
                is_of_base = tensor.base_name in reader
                name = tensor.base_name if is_of_base else f"{tensor.site.path}.weight"
                by_weight.setdefault(name, []).append(tensor)
        own = list(by_weight.items())[dist.get_rank(block.group) :: block.num_holders]
        for name, tensors in own:
            values = first_values(slot.spec, tensors, name, reader)
            for tensor, value in zip(tensors, values, strict=True):
                slot.layout.rows(started, tensor).copy_(tensor.as_rows(value))
        if by_weight:
            dist.all_reduce(started[slot.layout.span(block.block.layers)], group=block.group)
    if slot.start is not None:
        slot.start.copy_(started)
    for tensor in starting:
        slot.layout.rows(slot.weights, tensor).copy_(slot.layout.rows(started, tensor))
    stage.refresh()
