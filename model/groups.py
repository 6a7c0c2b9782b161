"""A rank's process groups: its tensor-parallel peers and its pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from lobra.layout.world import Place, World


@dataclass(frozen=True)
class ReplicaGroups:
    """This rank's place and the process groups it communicates in.

    `tp_group` is None when tp is 1, `pipe_group` is None when pp is 1. `pipe_ranks[stage]` is the
    global rank of each stage that has this rank's tensor-parallel index.
    """

    place: Place
    tp_group: dist.ProcessGroup | None
    tp_ranks: tuple[int, ...]
    pipe_group: dist.ProcessGroup | None
    pipe_ranks: tuple[int, ...]

    @property
    def previous_rank(self) -> int:
        """Return the global rank of the stage before this one."""
        return self.pipe_ranks[self.place.stage - 1]

    @property
    def next_rank(self) -> int:
        """Return the global rank of the stage after this one."""
        return self.pipe_ranks[self.place.stage + 1]


def build_groups(world: World) -> ReplicaGroups:
    """Create every replica's process groups and return this rank's.

    Collective: all ranks call it with the same world.

    Raises
    ------
    ValueError
        Torch.distributed has another number of ranks.
    """
    if world.num_ranks != dist.get_world_size():
        raise ValueError(
            f"the plan places {world.num_ranks} ranks, the world has {dist.get_world_size()}"
        )
    rank = dist.get_rank()
    return ReplicaGroups(
        place=world.place(rank),
        tp_group=_own_group(stage for replica in world.replicas for stage in replica),
        tp_ranks=world.tp_ranks(rank),
        pipe_group=_own_group(
            pipe for replica in world.replicas for pipe in zip(*replica, strict=True)
        ),
        pipe_ranks=world.pipe_ranks(rank),
    )


def _own_group(groups: Iterable[Sequence[int]]) -> dist.ProcessGroup | None:
    """Create disjoint groups, but not those of a single rank; return the one this rank is in."""
    made = [new_group(ranks) for ranks in groups if len(ranks) > 1]
    return next((group for group in made if group is not None), None)


def new_group(ranks: Sequence[int]) -> dist.ProcessGroup | None:
    """Return a new process group of these ranks, None on a rank that is not one of them.

    Every rank of the world calls it, for every group in the same order: torch names a group by how
    many there were before. (With its `use_local_synchronization` only members call, but then it
    counts those that this rank is in, and members of different layouts wait for each other under
    different names: pytorch issue 173608.) The others return at once, so that hundreds of
    replicas start as fast as one. For NCCL this holds because `init_rank` gives the whole world no
    device: else a group is split from the world, in which every rank takes part. With its own
    device a group connects now, not at its first use.
    """
    on_gpu = dist.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else None
    group = dist.new_group(list(ranks), device_id=device)
    return group if dist.get_rank() in ranks else None
