"""The process groups of one rank inside its replica."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from lobra.layout.topology import Grid, RankRole, check_grids, role_of


@dataclass(frozen=True)
class ReplicaGroups:
    """This rank's role and the process groups it communicates in.

    `tp_group` is None when tp is 1, `pipe_group` is None when pp is 1. `pipe_ranks[stage]` is the
    global rank of each stage that has this rank's tensor-parallel index.
    """

    role: RankRole
    tp_group: dist.ProcessGroup | None
    tp_ranks: tuple[int, ...]
    pipe_group: dist.ProcessGroup | None
    pipe_ranks: tuple[int, ...]

    @property
    def previous_rank(self) -> int:
        """Return the global rank of the stage before this one."""
        return self.pipe_ranks[self.role.stage - 1]

    @property
    def next_rank(self) -> int:
        """Return the global rank of the stage after this one."""
        return self.pipe_ranks[self.role.stage + 1]


def build_groups(grids: Sequence[Grid]) -> ReplicaGroups:
    """Create every replica's process groups and return this rank's.

    Collective: all ranks of the world call it with the same grids (torch.distributed requires
    every rank to create every group, in the same order).

    Raises:
        ValueError: the grids do not use every rank of the world exactly once.
    """
    check_grids(grids, dist.get_world_size())
    role = role_of(grids, dist.get_rank())
    tp_group = pipe_group = None
    for replica, grid in enumerate(grids):
        for stage, ranks in enumerate(grid):
            if len(ranks) > 1:
                group = dist.new_group(list(ranks))
                if (replica, stage) == (role.replica, role.stage):
                    tp_group = group
        if len(grid) > 1:
            for tp_index in range(len(grid[0])):
                group = dist.new_group([ranks[tp_index] for ranks in grid])
                if (replica, tp_index) == (role.replica, role.tp_index):
                    pipe_group = group
    grid = grids[role.replica]
    return ReplicaGroups(
        role=role,
        tp_group=tp_group,
        tp_ranks=grid[role.stage],
        pipe_group=pipe_group,
        pipe_ranks=tuple(ranks[role.tp_index] for ranks in grid),
    )
