"""The part of a plan that fewer GPUs have room for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lobra.common.errors import ConfigError
from lobra.layout.layout import Layout
from lobra.layout.placement import is_placeable, placed, plan_within
from lobra.layout.plan import Plan, ReplicaGroup

groups = st.builds(
    ReplicaGroup,
    st.builds(Layout, st.sampled_from([1, 2, 4]), st.sampled_from([1, 2])),
    st.integers(1, 3),
    st.sampled_from([64, 128, 256]),
)
plans = st.builds(Plan, st.lists(groups, min_size=1, max_size=3).map(tuple))


@given(plans, st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_it_takes_the_longest_sequences_and_has_no_room_for_more(
    plan: Plan, nodes: list[int]
) -> None:
    def has_room(tried: Plan) -> bool:
        return tried.num_gpus <= sum(nodes) and is_placeable(tried, nodes)

    longest = [group for group in plan.groups if group.max_tokens == plan.max_tokens]
    try:
        found = plan_within(plan, nodes)
    except ConfigError:
        smallest = min(longest, key=lambda group: group.layout.num_gpus)
        assert not has_room(Plan((ReplicaGroup(smallest.layout, 1, smallest.max_tokens),)))
        return
    assert found.max_tokens == plan.max_tokens and has_room(found)
    world = placed(found)
    assert world is not None and not world.spread_groups(nodes)
    kinds = {(group.layout, group.max_tokens) for group in plan.groups}
    for kind in kinds:
        kept, there = (
            sum(g.replicas for g in one.groups if (g.layout, g.max_tokens) == kind)
            for one in (found, plan)
        )
        assert kept <= there
        if kept < there:
            assert not has_room(Plan((*found.groups, ReplicaGroup(kind[0], 1, kind[1]))))


def test_all_of_a_plan_has_room_where_it_was() -> None:
    plan = Plan((ReplicaGroup(Layout(2, 1), 2, 128), ReplicaGroup(Layout(1, 1), 3, 64)))
    assert plan_within(plan, [4, 4]) == plan
    assert str(plan_within(plan, [4])) == "<2,1>x2"
    assert str(plan_within(plan, [3])) == "<2,1>x1 <1,1>x1"
    with pytest.raises(ConfigError, match=r"<2,1>, which takes sequences of 128 .* of \[1\] GPUs"):
        plan_within(plan, [1])
