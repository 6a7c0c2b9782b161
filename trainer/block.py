"""The adapters of one layer block on one of its holders, exchanged in one piece.

A block is the layers with the same holders. Of each task's weights in it a holder keeps a ZeRO-1
partition with its optimiser's moments. The exchange is ours, because a step concerns only some
tasks: whatever their number, a block's gradients are one reduce-scatter and its new weights one
all-gather, and finished tasks are in neither.

Shape suffixes: W holders, p a task's elements per holder (its padding included), n those of all
tasks that take part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from lobra.layout.world import LayerBlock
from lobra.tasks.config import TaskConfig
from lobra.tasks.kinds import ADAMW_8BIT
from lobra.trainer.eight_bit import EightBitPartition
from lobra.trainer.zero import Partition

NOT_FINITE = "its weights would not be finite any more"


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

    def install(
        self,
        number: int,
        weights: Tensor,
        gradient: Tensor,
        rate_factors: Sequence[tuple[int, float]],
        task: TaskConfig | None,
    ) -> None:
        """Begin to optimise a task's weights in the block, as they are now, with this gradient.

        Both are flat; ``rate_factors`` are those of `Partition`. A task without tensors in the
        block has no part in it. Collective over the holders.
        """
        if not len(weights):
            return
        self.weights[number] = weights
        self.gradients[number] = gradient
        is_eight_bit = task is not None and task.optimizer == ADAMW_8BIT
        kind = EightBitPartition if is_eight_bit else Partition
        self.partitions[number] = kind(weights, task, self.group, rate_factors)

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
    def update(
        self, settings: Mapping[int, Mapping[str, Any]], clips: Mapping[int, float]
    ) -> dict[int, str]:
        """Take one optimiser step of this holder's parts; forget what was reduced.

        Parameters
        ----------
        settings
            Of every task that is updated what changes of AdamW's, in torch's names: its rate at
            least; the same on every rank.
        clips
            What their gradients are multiplied by.

        Returns
        -------
        dict
            Of every task whose update failed here, why.
        """
        failed = {}
        settings = {n: changed for n, changed in settings.items() if n in self.partitions}
        for number, changed in settings.items():
            gradient_p = self.reduced_p[number]
            if clips[number] != 1.0:
                gradient_p.mul_(clips[number])
            try:
                self.partitions[number].update(gradient_p, changed)
            except torch.OutOfMemoryError:  # the machine's failure, no task's
                raise
            except Exception as error:  # of any kind, by this task's numbers: others go on
                failed[number] = f"{type(error).__name__}: {error}".partition("\n")[0]
        self.reduced_p = {}
        masters = [self.partitions[number].master_p for number in settings]
        if masters:
            largest = torch.stack(torch._foreach_norm(masters, math.inf))  # NaN where one is NaN
            for number, is_finite in zip(settings, largest.isfinite().tolist(), strict=True):
                if not is_finite:
                    failed.setdefault(number, NOT_FINITE)
        return failed

    @torch.no_grad()
    def exchange(self, updated: Sequence[int], failed: Sequence[int]) -> None:
        """Give every holder the new weights of tasks; take back the updates that have failed.

        Collective over the holders.
        """
        for number in filter(self.partitions.__contains__, failed):
            partition = self.partitions[number]
            start = dist.get_rank(self.group) * partition.size
            partition.take_back(self.weights[number][start : start + partition.size])
        if own := [number for number in updated if number in self.partitions]:
            self._gather(own)
        for number in own:
            self.partitions[number].num_updates += 1

    def _gather(self, numbers: Sequence[int]) -> None:
        """Give every holder the updated weights of these tasks."""
        like = self.weights[numbers[0]]
        own_n = torch.cat([self.partitions[number].master_p for number in numbers])
        gathered_Wn = self._gathered(own_n.to(like.device, like.dtype))
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
        """Return a task's moments in the block, as `whole` does. Collective."""
        own = self.partitions[number].moments if number in self.partitions else {}
        return self.whole(number, own)

    @torch.no_grad()
    def whole(self, number: int, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what partitions have each their part of, flat as a task's weights, on the CPU.

        The block's first holder gets it, the others nothing. Collective.
        """
        if not own:
            return {}
        parts = torch.cat(list(own.values()))
        gathered_Wn = self._gathered(parts.to(self.gradients[number].device))
        if dist.get_rank() != self.block.holders[0]:
            return {}
        size = self.weights[number].numel()
        flats_Wp = gathered_Wn.cpu().chunk(len(own), dim=1)
        return {
            moment: flat_Wp.flatten()[:size] for moment, flat_Wp in zip(own, flats_Wp, strict=True)
        }

    @torch.no_grad()
    def load(self, number: int, flats: Mapping[str, Tensor], updates: int) -> None:
        """Set a task's moments or its `MASTER`, flat as its weights, and its count of updates."""
        if number not in self.partitions:
            return
        partition = self.partitions[number]
        start = dist.get_rank(self.group) * partition.size
        for name, flat in flats.items():
            partition.set(name, flat[start : start + partition.size])
        partition.set_updates(updates)


def _row_by_row(flat: Tensor, rows_Wp: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return views of a flat tensor and of rows that it fills, except for the end, one by one."""
    num_columns = rows_Wp.shape[1]
    num_full = len(flat) // num_columns
    full, rest = flat[: num_full * num_columns], flat[num_full * num_columns :]
    views = [(full.view(num_full, num_columns), rows_Wp[:num_full])]
    return [*views, (rest, rows_Wp[num_full, : len(rest)])] if len(rest) else views
