"""Groups of large plans, over a process group that only pretends to communicate; a real one."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.testing._internal.distributed.fake_pg import FakeStore

from lobra.layout.layout import Layout
from lobra.layout.world import consecutive
from lobra.model.groups import build_groups, new_group
from lobra.model.launch import run_ranks
from tests.layout.test_world import layouts

LAYOUTS = [Layout(1, 1)] * 12 + [Layout(2, 1)] * 6 + [Layout(1, 4)] * 4 + [Layout(4, 2)] * 3


def test_every_rank_of_sixty_four_finds_its_groups() -> None:
    for rank in range(64):
        check_groups(LAYOUTS, rank, num_layers=32)


@given(st.data(), layouts)
def test_a_rank_of_any_plan_finds_its_groups(data: st.DataObject, plan: list[Layout]) -> None:
    num_ranks = consecutive(plan).num_ranks
    check_groups(plan, data.draw(st.integers(0, num_ranks - 1), label="rank"), num_layers=6)


def check_groups(plan: list[Layout], rank: int, num_layers: int) -> None:
    world = consecutive(plan)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world.num_ranks)
    try:
        groups = build_groups(world)
        place = world.place(rank)
        assert groups.place == place
        assert (groups.tp_group is None) == (place.layout.tp == 1)
        assert (groups.pipe_group is None) == (place.layout.pp == 1)
        if groups.tp_group is not None:
            assert dist.get_process_group_ranks(groups.tp_group) == list(groups.tp_ranks)
        if groups.pipe_group is not None:
            assert dist.get_process_group_ranks(groups.pipe_group) == list(groups.pipe_ranks)
            if not place.is_first_stage:
                before = world.place(groups.previous_rank)
                assert (before.replica, before.stage) == (place.replica, place.stage - 1)
            if not place.is_last_stage:
                after = world.place(groups.next_rank)
                assert (after.tp_index, after.stage) == (place.tp_index, place.stage + 1)
        for block in world.blocks(num_layers):
            group = new_group(block.holders)
            assert (group is not None) == (rank in block.holders)
            if group is not None:
                assert dist.get_process_group_ranks(group) == list(block.holders)
    finally:
        dist.destroy_process_group()


@pytest.mark.ranks
def test_groups_of_ranks_that_are_in_different_numbers_of_them() -> None:
    """Torch's `use_local_synchronization` would wait for ever: see `new_group`."""
    world = consecutive([Layout(1, 1), Layout(2, 1), Layout(1, 2)])
    blocks = world.blocks(6)
    results = run_ranks(
        "tests.model.support:sums_over_groups", 5, dict(world=world, num_layers=6), timeout_s=60
    )
    for rank, (tp_sum, *block_sums) in enumerate(results):
        assert tp_sum == sum(world.tp_ranks(rank))
        held = [block for block in blocks if rank in block.holders]
        assert block_sums == [sum(block.holders) for block in held for _ in range(2)]
