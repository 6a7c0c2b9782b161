"""Groups of large plans, built over a process group that only pretends to communicate."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from model.groups import build_groups
from model.topology import layer_blocks, role_of
from tests.model.test_topology import make_grids

LAYOUTS = [(1, 1)] * 12 + [(2, 1)] * 6 + [(1, 4)] * 4 + [(4, 2)] * 3


@pytest.mark.parametrize("rank", range(64))
def test_a_rank_of_sixty_four_finds_its_groups(rank: int) -> None:
    grids = make_grids(LAYOUTS)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=64)
    try:
        groups = build_groups(grids)
        role = role_of(grids, rank)
        assert groups.role == role
        assert (groups.tp_group is None) == (role.tp_size == 1)
        assert (groups.pipe_group is None) == (role.num_stages == 1)
        if groups.tp_group is not None:
            assert dist.get_process_group_ranks(groups.tp_group) == list(groups.tp_ranks)
        if groups.pipe_group is not None:
            assert dist.get_process_group_ranks(groups.pipe_group) == list(groups.pipe_ranks)
            if not role.is_first_stage:
                before = role_of(grids, groups.previous_rank)
                assert (before.replica, before.stage) == (role.replica, role.stage - 1)
            if not role.is_last_stage:
                after = role_of(grids, groups.next_rank)
                assert (after.tp_index, after.stage) == (role.tp_index, role.stage + 1)
        for block in layer_blocks(grids, 32):
            assert len(set(block.holders)) == len(block.holders)
    finally:
        dist.destroy_process_group()
