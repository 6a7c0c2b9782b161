"""The adapters of one layer block on one of its holders, exchanged in one piece.

A block is the layers with the same holders. Of each task's weights in it a holder keeps a ZeRO-1
partition with its optimiser's moments. The exchange is ours, because a step concerns only some
tasks: whatever their number, a block's gradients are one reduce-scatter and its new weights one
all-gather, and finished tasks are in neither.

Shape suffixes: W holders, p a task's elements per holder (its padding included), n those of all
tasks that take part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from lobra.layout.world import LayerBlock
from lobra.model.slot import Slot
from lobra.tasks.config import TaskConfig
from lobra.trainer.zero import Partition


class BlockOptimizer:
    """One layer block's part of the slots, its optimiser, and the exchange with other holders."""

    def __init__(self, block: LayerBlock, group: dist.ProcessGroup, device: torch.device) -> None:
        """Hold a block on a device, together with the other ranks of ``group``."""
        self.block = block
        self.group = group
        self.device = device
        self.num_holders = dist.get_world_size(group)
        self.weights: dict[int, Tensor] = {}
        self.gradients: dict[int, Tensor] = {}
        self.partitions: dict[int, Partition] = {}
        self.reduced_p: dict[int, Tensor] = {}

    def install(self, slot: Slot, task: TaskConfig | None) -> None:
        """Begin to optimise a task's adapter, as it is now. Collective over the holders.

        A task without tensors in the block has no part in it.
        """
        span = slot.layout.span(self.block.layers)
        if span.start == span.stop:
            return
        self.weights[slot.number] = slot.weights[span]
        self.gradients[slot.number] = slot.gradient[span]
        self.partitions[slot.number] = Partition(
            slot.weights[span], task, self.group, slot.layout.rate_factors(self.block.layers)
        )

    def remove(self, number: int) -> None:
        """Forget a task, its moments included."""
        if number in self.partitions:
            del self.weights[number], self.gradients[number]
            self.partitions.pop(number).close()

    @torch.no_grad()
    def reduce(self, numbers: Sequence[int]) -> Tensor:
        """Sum the gradients of the tasks with these numbers over the holders. Collective.

        Returns
        -------
        Tensor
            The squared norm of each task's part on this rank, fp64 [tasks], on the device.
        """
        own = [number for number in numbers if number in self.partitions]
        none = torch.zeros((), dtype=torch.float64, device=self.device)
        if not own:
            return none.repeat(len(numbers))
        gradients = [self.gradients[number] for number in own]
        sizes = [self.partitions[number].size for number in own]
        if self.num_holders == 1:
            parts = [
                gradient if len(gradient) == size else pad(gradient, (0, size - len(gradient)))
                for gradient, size in zip(gradients, sizes, strict=True)
            ]
        else:
            # One row a holder, so that its part of every task lies in one piece.
            stacked_Wn = gradients[0].new_zeros(self.num_holders, sum(sizes))
            for gradient, rows_Wp in zip(gradients, stacked_Wn.split(sizes, dim=1), strict=True):
                for part, rows in _row_by_row(gradient, rows_Wp):
                    rows.copy_(part)
            own_n = torch.empty_like(stacked_Wn[0])
            dist.reduce_scatter_tensor(own_n, stacked_Wn.flatten(), group=self.group)
            parts = list(own_n.split(sizes))
        self.reduced_p = dict(zip(own, parts, strict=True))
        norms = torch._foreach_norm(parts, 2, dtype=torch.float64)
        found = dict(zip(own, norms, strict=True))
        return torch.stack([found.get(number, none) for number in numbers]).square()

    @torch.no_grad()
    def update(self, settings: Mapping[int, Mapping[str, Any]], clips: Mapping[int, float]) -> None:
        """Take one optimiser step for the tasks with settings; forget what was reduced.

        Collective.

        Parameters
        ----------
        settings
            Of every task that is updated what changes of AdamW's, in torch's names: its rate at
            least; the same on every rank.
        clips
            What their gradients are multiplied by.
        """
        settings = {n: changed for n, changed in settings.items() if n in self.partitions}
        for number, changed in settings.items():
            gradient_p = self.reduced_p[number]
            if clips[number] != 1.0:
                gradient_p.mul_(clips[number])
            self.partitions[number].update(gradient_p, changed)
        if settings:
            self._gather(sorted(settings))
        self.reduced_p = {}

    def _gather(self, numbers: Sequence[int]) -> None:
        """Give every holder the updated weights of these tasks."""
        own_n = torch.cat([self.partitions[number].master_p for number in numbers])
        gathered_Wn = self._gathered(own_n)
        sizes = [self.partitions[number].size for number in numbers]
        for number, rows_Wp in zip(numbers, gathered_Wn.split(sizes, dim=1), strict=True):
            for part, row in _row_by_row(self.weights[number], rows_Wp):
                part.copy_(row)

    def _gathered(self, own_n: Tensor) -> Tensor:
        """Return every holder's [n] as [W, n]."""
        if self.num_holders == 1:
            return own_n.unsqueeze(0)
        gathered = own_n.new_empty(self.num_holders * len(own_n))
        dist.all_gather_into_tensor(gathered, own_n, group=self.group)
        return gathered.view(self.num_holders, -1)

    @torch.no_grad()
    def moments(self, number: int) -> dict[str, Tensor]:
        """Return a task's moments in the block, flat as its weights, on the CPU. Collective.

        The block's first holder gets them, the others nothing.
        """
        own = self.partitions[number].moments if number in self.partitions else {}
        if not own:
            return {}
        gathered_Wn = self._gathered(torch.cat(list(own.values())))
        if dist.get_rank() != self.block.holders[0]:
            return {}
        size = self.weights[number].numel()
        flats_Wp = gathered_Wn.cpu().chunk(len(own), dim=1)
        return {
            moment: flat_Wp.flatten()[:size] for moment, flat_Wp in zip(own, flats_Wp, strict=True)
        }

    @torch.no_grad()
    def load_moments(self, number: int, moments: Mapping[str, Tensor], updates: int) -> None:
        """Set a task's moments, flat as its weights in the block, and its count of updates."""
        if number not in self.partitions:
            return
        partition = self.partitions[number]
        start = dist.get_rank(self.group) * partition.size
        for moment, own_p in partition.moments.items():
            part = moments[moment][start : start + partition.size]
            own_p[: len(part)].copy_(part)
        partition.set_updates(updates)


def _row_by_row(flat: Tensor, rows_Wp: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return views of a flat tensor and of rows that it fills, except for the end, one by one."""
    num_columns = rows_Wp.shape[1]
    num_full = len(flat) // num_columns
    full, rest = flat[: num_full * num_columns], flat[num_full * num_columns :]
    views = [(full.view(num_full, num_columns), rows_Wp[:num_full])]
    return [*views, (rest, rows_Wp[num_full, : len(rest)])] if len(rest) else views
