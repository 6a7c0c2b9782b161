from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lobra.common.errors import ConfigError
from lobra.layout.layout import Layout, parse_layout
from lobra.layout.placement import is_placeable, pack, place
from lobra.layout.plan import Plan, ReplicaGroup, load_plan, make_plan, save_plan
from tests.tiers import examples


def plan_of(*groups: tuple[int, int, int]) -> Plan:
    return make_plan([ReplicaGroup(Layout(tp, pp), dp, 2048 * tp) for tp, pp, dp in groups])


def test_layouts_read_as_written() -> None:
    assert parse_layout(str(Layout(2, 4))) == Layout(2, 4)
    assert Layout(1, 8) < Layout(2, 1)
    with pytest.raises(ConfigError):
        parse_layout("2x4")
    with pytest.raises(ConfigError):
        Layout(0, 1)


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    plan = make_plan(plan_of((8, 1, 1), (1, 1, 6), (2, 1, 1)).groups, {"model": "7B"})
    path = save_plan(plan, tmp_path / "plan.yaml")
    assert load_plan(path) == plan
    assert load_plan(path).meta == {"model": "7B"}
    assert [str(replica.layout) for replica in plan.replicas] == ["<1,1>"] * 6 + ["<2,1>", "<8,1>"]
    assert plan.num_gpus == 16
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.yaml"]


def test_a_plan_without_meta_loads(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("strategy_config: [{dp: 6, tp: 1, pp: 1, max_tokens: 2048}]\n")
    assert load_plan(path) == plan_of((1, 1, 6))


def test_all_mistakes_of_a_plan_file_are_named(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(
        "strategy_config: [{dp: 0, tp: 1, pp: 1}, {dp: 1, tp: two, pp: 1, max_tokens: 8}]"
    )
    with pytest.raises(ConfigError) as caught:
        load_plan(path)
    text = str(caught.value)
    for part in ("[0].dp", "[0].max_tokens", "[1].tp", str(path)):
        assert part in text


@pytest.mark.parametrize(
    "text", ["", "strategy_config: []", "[1, 2]", "{a: [", "strategy_config: 3"]
)
def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"plan\.yaml"):
        load_plan(path)


GROUPS = st.lists(
    st.tuples(st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from([1, 2, 3]), st.integers(1, 3)),
    min_size=1,
    max_size=4,
)


@given(GROUPS, st.sampled_from([4, 8]))
@examples(200, 2000)
def test_placed_groups_lie_inside_nodes_and_use_each_rank_once(
    groups: list[tuple[int, int, int]], gpus_per_node: int
) -> None:
    plan = plan_of(*groups)
    ranks = place(plan, gpus_per_node)
    every = [rank for replica in ranks for stage in replica for rank in stage]
    assert sorted(every) == list(range(plan.num_gpus))
    for replica, stages in zip(plan.replicas, ranks, strict=True):
        assert len(stages) == replica.layout.pp
        for stage in stages:
            nodes = {rank // gpus_per_node for rank in stage}
            assert len(stage) == replica.layout.tp
            assert len(nodes) == max(1, replica.layout.tp // gpus_per_node)


def test_groups_that_do_not_divide_the_node_are_packed_if_they_can_be() -> None:
    assert is_placeable(plan_of((6, 1, 2), (2, 1, 2)), 8)
    assert not is_placeable(plan_of((5, 1, 2)), 8)
    with pytest.raises(ConfigError, match="cannot be packed"):
        place(plan_of((5, 1, 2)), 8)
    with pytest.raises(ConfigError, match="larger than a node"):
        place(plan_of((12, 1, 1)), 8)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=7), st.lists(st.integers(1, 9), max_size=4))
@examples(200, 2000)
def test_packing_agrees_with_brute_force(sizes: list[int], capacities: list[int]) -> None:
    sizes = sorted(sizes, reverse=True)
    found = pack(sizes, capacities)

    def fits(index: int, room: tuple[int, ...]) -> bool:
        if index == len(sizes):
            return True
        return any(
            room[b] >= sizes[index]
            and fits(index + 1, (*room[:b], room[b] - sizes[index], *room[b + 1 :]))
            for b in range(len(room))
        )

    assert (found is not None) == fits(0, tuple(capacities))
    if found is not None:
        used = np.bincount(found, weights=sizes, minlength=len(capacities))
        assert (used <= capacities).all()
