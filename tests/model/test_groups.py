"""Groups of large plans, built over a process group that only pretends to communicate."""

from __future__ import annotations

import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.testing._internal.distributed.fake_pg import FakeStore

from lobra.layout.topology import layer_blocks, role_of
from lobra.model.groups import build_groups
from tests.layout.test_topology import layouts, make_grids

LAYOUTS = [(1, 1)] * 12 + [(2, 1)] * 6 + [(1, 4)] * 4 + [(4, 2)] * 3


def test_every_rank_of_sixty_four_finds_its_groups() -> None:
    for rank in range(64):
        check_groups(LAYOUTS, rank, num_layers=32)


@given(st.data(), layouts)
def test_a_rank_of_any_plan_finds_its_groups(
    data: st.DataObject, plan: list[tuple[int, int]]
) -> None:
    world = sum(tp * pp for tp, pp in plan)
    check_groups(plan, data.draw(st.integers(0, world - 1), label="rank"), num_layers=6)


def check_groups(plan: list[tuple[int, int]], rank: int, num_layers: int) -> None:
    grids = make_grids(plan)
    world = sum(tp * pp for tp, pp in plan)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
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
        for block in layer_blocks(grids, num_layers):
            assert len(set(block.holders)) == len(block.holders)
    finally:
        dist.destroy_process_group()
