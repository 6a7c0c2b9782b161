"""Every rank has its place; every layer, row and head is held by someone, where it should be."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lobra.layout.layout import Layout
from lobra.layout.world import World, consecutive, kv_head_range, shard_range, stage_layers


@given(st.integers(1, 100), st.integers(1, 100))
def test_shards_and_stages_partition(size: int, parts: int) -> None:
    shards = [shard_range(size, parts, index) for index in range(parts)]
    assert [x for shard in shards for x in shard] == list(range(size))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    if parts <= size:
        stages = [stage_layers(size, parts, stage) for stage in range(parts)]
        assert stages == shards


@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8, 16]))
def test_every_query_shard_meets_its_key_head(num_kv_heads: int, tp: int) -> None:
    queries = num_kv_heads * 16
    for index in range(tp):
        wanted = {q * num_kv_heads // queries for q in shard_range(queries, tp, index)}
        assert wanted == set(kv_head_range(num_kv_heads, tp, index))


layouts = st.lists(st.builds(Layout, st.integers(1, 4), st.integers(1, 6)), min_size=1, max_size=12)


@given(layouts, st.randoms(use_true_random=False))
def test_every_rank_has_one_place_and_its_peers(plan: list[Layout], random: Random) -> None:
    plain = consecutive(plan)
    ranks = list(range(plain.num_ranks))
    random.shuffle(ranks)
    world = World(
        plain.layouts,
        tuple(
            tuple(tuple(ranks[rank] for rank in stage) for stage in replica)
            for replica in plain.replicas
        ),
    )
    assert world.num_ranks == sum(layout.num_gpus for layout in plan)
    for rank in range(world.num_ranks):
        place = world.place(rank)
        assert place.rank == rank
        assert place.layout == plan[place.replica]
        assert world.tp_ranks(rank)[place.tp_index] == rank
        assert world.pipe_ranks(rank)[place.stage] == rank
        assert {*world.tp_ranks(rank), *world.pipe_ranks(rank)} <= {*world.ranks(place.replica)}
    owners = [world.place(rank) for rank in range(world.num_ranks) if world.place(rank).owns_loss]
    assert sorted(owner.replica for owner in owners) == list(range(len(plan)))
    assert all(owner.is_last_stage for owner in owners)
    with pytest.raises(ValueError, match="in no replica"):
        world.place(world.num_ranks)


@given(layouts, st.integers(6, 40))
def test_blocks_cover_every_layer_with_its_holders(plan: list[Layout], num_layers: int) -> None:
    world = consecutive(plan)
    blocks = world.blocks(num_layers)
    assert [layer for block in blocks for layer in block.layers] == list(range(-1, num_layers + 1))
    for block in blocks:
        assert list(block.holders) == sorted(block.holders)
        for rank in range(world.num_ranks):
            place = world.place(rank)
            held = set(place.adapted_layers(num_layers))
            assert held >= set(place.layers(num_layers))
            assert (-1 in held, num_layers in held) == (place.is_first_stage, place.is_last_stage)
            assert (rank in block.holders) == (set(block.layers) <= held)
            assert rank in block.holders or not set(block.layers) & held
    for left, right in zip(blocks, blocks[1:], strict=False):
        assert left.holders != right.holders


@given(st.builds(Layout, st.integers(1, 4), st.integers(1, 6)), st.integers(1, 4))
def test_like_replicas_share_each_shard(layout: Layout, count: int) -> None:
    world = consecutive([layout] * count)
    blocks = world.shard_blocks(24)
    holders = [rank for block in blocks for rank in block.holders]
    assert sorted(holders) == list(range(world.num_ranks))
    for block in blocks:
        places = [world.place(rank) for rank in block.holders]
        assert {place.replica for place in places} == set(range(count))
        assert len({(place.stage, place.tp_index) for place in places}) == 1
        assert block.layers == places[0].layers(24)


def test_sixty_four_ranks_of_mixed_layouts() -> None:
    sizes = [(1, 1)] * 12 + [(2, 1)] * 6 + [(1, 4)] * 4 + [(4, 2)] * 3
    world = consecutive([Layout(tp, pp) for tp, pp in sizes])
    assert world.num_ranks == 64
    num_layers = [len(block.layers) for block in world.blocks(32)]
    assert num_layers == [9, 8, 8, 9]  # embedding, 32 layers, head


@pytest.mark.parametrize(
    ("replicas", "problem"),
    [
        ((((0,),),), "1 replicas for 2 layouts"),
        ((((0,),), ((1,), (2,))), r"the ranks \[\[1\], \[2\]\] are no <2,1>"),
        ((((0,),), ((1, 1),)), "exactly once"),
        ((((0,),), ((1, 3),)), "exactly once"),
        ((((0,),), ((1,),)), "are no <2,1>"),
    ],
)
def test_ranks_that_are_not_those_of_the_layouts_are_refused(replicas: tuple, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        World((Layout(1, 1), Layout(2, 1)), replicas)


def test_groups_spread_over_nodes() -> None:
    layouts = (Layout(2, 1), Layout(2, 1), Layout(4, 1))
    world = World(layouts, (((0, 2),), ((1, 3),), ((4, 5, 6, 7),)))
    assert world.spread_groups(8) == world.spread_groups(4) == []
    assert world.spread_groups(2) == [(0, 2), (1, 3)], "four never fit into a node of two"
