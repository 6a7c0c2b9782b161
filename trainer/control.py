"""Control traffic: orders go out to the ranks and their reports are summed, over a CPU group.

An order travels as one flat integer array, never pickled, whole to every rank: of what others train
a rank needs each task's labels, and a step's tokens are a few megabytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lobra.layout.order import StepOrder
from lobra.trainer.step_report import StepReport, step_memory_bytes

T = TypeVar("T")

PATIENCE = timedelta(hours=2)  # of ranks waiting for one that reads or writes files


class Control:
    """A CPU group of the whole world, apart from the devices' traffic. All methods are collective.

    Attributes
    ----------
    group
        The process group, for what else must not wait behind compute kernels.
    """

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE)

    def wait(self) -> None:
        """Wait until every rank has come here."""
        dist.barrier(group=self.group)

    def shared(self, value: T) -> T:
        """Return rank 0's value on every rank."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def send(self, order: StepOrder) -> None:
        """Send an order to all other ranks, which `receive` it (rank 0 only)."""
        flat = torch.from_numpy(order.encoded)
        dist.broadcast(torch.tensor([len(flat)]), src=0, group=self.group)
        dist.broadcast(flat, src=0, group=self.group)

    def receive(self) -> StepOrder:
        """Return rank 0's next order (all other ranks)."""
        size = torch.zeros(1, dtype=torch.int64)
        dist.broadcast(size, src=0, group=self.group)
        flat = torch.empty(int(size), dtype=torch.int64)
        dist.broadcast(flat, src=0, group=self.group)
        return StepOrder.decode(flat.numpy())

    def sum_on_first(self, own: Tensor) -> None:
        """Have rank 0 get every rank's values added up, in place."""
        dist.reduce(own, dst=0, group=self.group)

    def sum_everywhere(self, own: Tensor) -> None:
        """Have every rank get all ranks' values added up, in place, to the last bit the same."""
        dist.all_reduce(own, group=self.group)
        dist.broadcast(own, src=0, group=self.group)

    def agree(self, numbers: Sequence[int], failed: Mapping[int, str]) -> dict[int, str]:
        """Return why updates failed on any rank, by task, the same on every rank.

        Parameters
        ----------
        numbers
            All tasks that were to be updated, the same on every rank.
        failed
            Of those whose update failed on this rank, why.
        """
        if not numbers:
            return {}
        flags = torch.tensor([number in failed for number in numbers], dtype=torch.int32)
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.group)
        if not flags.any():
            return {}
        of_ranks: list[Mapping[int, str]] = [{}] * dist.get_world_size()
        dist.all_gather_object(of_ranks, failed, group=self.group)
        return {
            number: f"{why} (on rank {rank})"
            for rank, of_rank in reversed(list(enumerate(of_ranks)))
            for number, why in of_rank.items()
        }

    def exchange(
        self,
        tasks: Sequence[int],
        losses: Tensor,
        squared_norms: Tensor,
        busy_s: float,
        arrival_s: float,
        stop: bool,
    ) -> StepReport:
        """Return every rank's part, added up.

        Every rank decides from the result whether it updates a task and how it clips, so the sum
        is broadcast from rank 0: an all-reduce alone may differ in the last bit between ranks.

        Parameters
        ----------
        tasks
            The numbers of the n tasks in the order.
        losses
            [n] this rank's summed token losses, zero unless it computed them.
        squared_norms
            [n] this rank's part of the squared gradient norms.
        busy_s
            Seconds this rank computed.
        arrival_s
            Seconds from the order's arrival until this rank was ready to reduce.
        stop
            Whether this rank was told to stop.
        """
        world, rank = dist.get_world_size(), dist.get_rank()
        sizes = [len(tasks), len(tasks), world, world, world, 1]
        own = torch.zeros(sum(sizes), dtype=torch.float64)
        own_losses, own_squares, own_busy, own_arrival, own_memory, own_stop = own.split(sizes)
        own_losses.copy_(losses)
        own_squares.copy_(squared_norms)
        own_busy[rank] = busy_s
        own_arrival[rank] = arrival_s
        own_memory[rank] = step_memory_bytes()
        own_stop[0] = float(stop)
        self.sum_everywhere(own)
        return StepReport(
            losses=dict(zip(tasks, own_losses.tolist(), strict=True)),
            grad_norms=dict(zip(tasks, own_squares.sqrt().tolist(), strict=True)),
            busy_s=tuple(own_busy.tolist()),
            arrival_s=tuple(own_arrival.tolist()),
            memory_bytes=tuple(map(int, own_memory.tolist())),
            stop=bool(own_stop),
        )
