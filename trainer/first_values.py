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
from lobra.model.base_linear import Shard
from lobra.model.checkpoint import CheckpointReader
from lobra.model.pissa import principal_factors
from lobra.model.quantised_linear import read_linear
from lobra.model.site import Site
from lobra.tasks.target_modules import EMBEDDING, HEAD
from lobra.trainer.optimizer import AdapterOptimizer


def first_values(
    spec: AdapterSpec,
    tensors: Sequence[AdapterTensor],
    name: str,
    reader: CheckpointReader,
    quantised: str | None,
) -> Sequence[Tensor]:
    """Return what tensors start as (PEFT's shapes), by the base's tensor of this name.

    ``quantised`` is what the base's linears are kept in.
    """
    if tensors[0].base_name == name:
        return [reader.read(name)]
    site = tensors[0].site
    weight = _weight(site, name, reader, quantised)
    if spec.kind == "pissa":
        return principal_factors(weight, spec.rank_at(site), spec.scaling(site))
    return [torch.linalg.vector_norm(weight, dim=1)]  # DoRA's: B is zero


def _weight(site: Site, name: str, reader: CheckpointReader, quantised: str | None) -> Tensor:
    """Return the weight [O, I] of a linear, the head or the embedding, as the base computes."""
    if site.module in (HEAD, EMBEDDING):  # the head may be tied to the embedding
        return reader.read(name if name in reader else checkpoint.EMBEDDING)
    inputs, outputs = site.in_features, site.out_features
    whole = Shard(range(inputs), range(outputs), inputs, outputs)
    return read_linear(reader, site.path, whole, quantised).weight_oi()


@torch.no_grad()
def start_from_base(folder: Path, optimizer: AdapterOptimizer, number: int) -> None:
    """Set what of a task's weights starts from the base's, before they are optimised. Collective.

    The holders of a block share its sites out, and a sum brings all to each. So no processor's
    choice of a singular vector's sign differs from another's.
    """
    stage, slot = optimizer.stage, optimizer.stage.slots[number]
    reader = CheckpointReader(folder, slot.weights.dtype, stage.device)
    started = torch.zeros_like(slot.weights)
    quantised = stage.shape.quantised
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
            values = first_values(slot.spec, tensors, name, reader, quantised)
            for tensor, value in zip(tensors, values, strict=True):
                slot.layout.rows(started, tensor).copy_(tensor.as_rows(value))
        if by_weight:
            dist.all_reduce(started[slot.layout.span(block.block.layers)], group=block.group)
    if slot.start is not None:
        slot.start.copy_(started)
    for tensor in starting:
        slot.layout.rows(slot.weights, tensor).copy_(slot.layout.rows(started, tensor))
    stage.refresh()
