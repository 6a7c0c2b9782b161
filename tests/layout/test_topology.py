"""Placement arithmetic: every layer, row and head is held by someone, exactly where it should."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lobra.layout.topology import (
    check_grids,
    kv_head_range,
    layer_blocks,
    role_of,
    shard_range,
    stage_layers,
)


def make_grids(layouts: list[tuple[int, int]]) -> tuple:
    """Place <tp,pp> replicas one after another."""
    grids, rank = [], 0
    for tp, pp in layouts:
        grids.append(tuple(tuple(range(rank + s * tp, rank + (s + 1) * tp)) for s in range(pp)))
        rank += tp * pp
    return tuple(grids)


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


layouts = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6)), min_size=1, max_size=12)


@given(layouts, st.integers(6, 40))
def test_blocks_cover_every_layer_with_its_holders(plan: list, num_layers: int) -> None:
    grids = make_grids(plan)
    world = sum(tp * pp for tp, pp in plan)
    check_grids(grids, world)
    blocks = layer_blocks(grids, num_layers)
    assert [layer for block in blocks for layer in block.layers] == list(range(num_layers))
    for block in blocks:
        for rank in range(world):
            role = role_of(grids, rank)
            held = set(stage_layers(num_layers, role.num_stages, role.stage))
            assert (rank in block.holders) == (set(block.layers) <= held)
            assert rank in block.holders or not set(block.layers) & held
    for left, right in zip(blocks, blocks[1:], strict=False):
        assert left.holders != right.holders


def test_sixty_four_ranks_of_mixed_layouts() -> None:
    grids = make_grids([(1, 1)] * 12 + [(2, 1)] * 6 + [(1, 4)] * 4 + [(4, 2)] * 3)
    check_grids(grids, 64)
    assert {len(block.layers) for block in layer_blocks(grids, 32)} == {8}
    assert all(role_of(grids, rank).rank == rank for rank in range(64))


@pytest.mark.parametrize("world", [5, 7])
def test_a_plan_that_does_not_fill_the_world_is_refused(world: int) -> None:
    with pytest.raises(ValueError, match=str(world)):
        check_grids(make_grids([(1, 1), (2, 1), (1, 3)]), world)
