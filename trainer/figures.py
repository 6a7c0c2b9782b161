"""The figures of one step, summed over the world and the same on every rank, bit for bit."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class StepFigures:
    """`losses[t]`: summed token loss; `grad_norms[t]`; `busy_s[rank]`; `memory_bytes[rank]`.

    `arrival_s[rank]`: when the rank was ready to reduce, since the step's order reached it;
    `stop`: some rank was told to stop.
    """

    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    busy_s: tuple[float, ...]
    arrival_s: tuple[float, ...]
    memory_bytes: tuple[int, ...]
    stop: bool


def exchange_figures(
    losses: Tensor,
    squared_norms: Tensor,
    busy_s: float,
    arrival_s: float,
    group: dist.ProcessGroup,
    stop: bool = False,
) -> StepFigures:
    """Add up every rank's part. Collective over the CPU group.

    Decisions (skip an update, stop a task, clip) are made from the result on every rank, so the
    sum is broadcast from rank 0: an all-reduce alone may differ in the last bit between ranks.

    Args:
        losses: [num_tasks] this rank's summed token losses, zero unless it computed them.
        squared_norms: [num_tasks] this rank's part of the squared gradient norms.
        busy_s: seconds this rank computed.
        arrival_s: seconds from the order's arrival until this rank was ready to reduce.
        group: a group of the whole world.
        stop: whether this rank was told to stop.
    """
    num_tasks, world, rank = len(losses), dist.get_world_size(), dist.get_rank()
    own = torch.zeros(2 * num_tasks + 3 * world + 1, dtype=torch.float64)
    own[:num_tasks] = losses.double().cpu()
    own[num_tasks : 2 * num_tasks] = squared_norms.cpu()
    own[2 * num_tasks + rank] = busy_s
    own[2 * num_tasks + world + rank] = arrival_s
    own[2 * num_tasks + 2 * world + rank] = step_memory_bytes()
    own[-1] = float(stop)
    dist.all_reduce(own, group=group)
    dist.broadcast(own, src=0, group=group)
    sizes = [num_tasks, num_tasks, world, world, world, 1]
    summed, squared, busy, arrival, memory, stops = own.split(sizes)
    return StepFigures(
        losses=tuple(summed.tolist()),
        grad_norms=tuple(squared.sqrt().tolist()),
        busy_s=tuple(busy.tolist()),
        arrival_s=tuple(arrival.tolist()),
        memory_bytes=tuple(int(value) for value in memory.tolist()),
        stop=bool(stops.item()),
    )


def step_memory_bytes() -> int:
    """Return this rank's peak of GPU memory since the last call, or its resident memory on CPU."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * PAGE_BYTES
    except OSError:  # not Linux
        return 0
