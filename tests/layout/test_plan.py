from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lobra.common.errors import ConfigError
from lobra.layout.layout import Layout
from lobra.layout.placement import is_placeable, pack, place, placed
from lobra.layout.plan import Plan, ReplicaGroup, load_plan, make_plan, save_plan
from tests.tiers import examples


def plan_of(*groups: tuple[int, int, int]) -> Plan:
    return make_plan([ReplicaGroup(Layout(tp, pp), dp, 2048 * tp) for tp, pp, dp in groups])


def test_a_layout_is_positive_and_built() -> None:
    assert Layout(1, 8) < Layout(2, 1)
    for wrong in ((0, 1), (1, True), (1, 1, 0), (1, 1, 1, "all"), (1, 1, 1, None), (1, 1, 1, [])):
        with pytest.raises(ConfigError):
            Layout(*wrong)  # type: ignore[arg-type]


policies = st.sampled_from(["keep", "full"])
replica_groups = st.builds(
    ReplicaGroup,
    st.builds(Layout, st.integers(1, 9), st.integers(1, 9), st.just(1), policies),
    st.integers(1, 9),
    st.integers(1, 9),
)


@given(st.lists(replica_groups, min_size=1), st.booleans())
@examples(50, 500)
def test_any_plan_survives_its_file(
    tmp_path_factory: pytest.TempPathFactory, groups: list[ReplicaGroup], canonical: bool
) -> None:
    plan = make_plan(groups) if canonical else Plan(tuple(groups))
    assert load_plan(save_plan(plan, tmp_path_factory.mktemp("plan") / "plan.yaml")) == plan


@given(st.lists(replica_groups, min_size=1), st.randoms(use_true_random=False))
def test_a_canonical_plan_does_not_depend_on_the_order(
    groups: list[ReplicaGroup], random: Random
) -> None:
    shuffled = random.sample(groups, len(groups))
    assert make_plan(shuffled) == make_plan(groups)


def test_cp_and_memory_are_written_only_where_they_say_more(tmp_path: Path) -> None:
    plan = plan_of((1, 1, 6), (2, 1, 1))
    assert plan.entries() == [
        {"dp": 6, "tp": 1, "pp": 1, "max_tokens": 2048},
        {"dp": 1, "tp": 2, "pp": 1, "max_tokens": 4096},
    ]
    saving = plan.with_memory("full")
    assert [entry["memory"] for entry in saving.entries()] == ["full", "full"]
    assert str(saving) == "<1,1>x6 full <2,1>x1 full"
    assert saving.with_memory("keep") == plan
    path = tmp_path / "plan.yaml"
    path.write_text(
        "strategy_config: [{dp: 6, tp: 1, pp: 1, cp: 1, memory: keep, max_tokens: 2048}]"
    )
    assert load_plan(path) == plan_of((1, 1, 6))


@pytest.mark.parametrize(
    ("field", "sentence"),
    [
        ("cp: 2", "cp: 2: context parallelism is not built yet; want 1"),
        ("cp: two", 'cp = "two": want a positive integer'),
        (
            "memory: ful",
            "memory = \"ful\": want one of keep, lean, full (did you mean 'full'?)",
        ),
    ],
)
def test_what_is_not_built_is_refused_in_a_sentence(
    tmp_path: Path, field: str, sentence: str
) -> None:
    path = tmp_path / "plan.yaml"
    entries = [
        "{dp: 1, tp: 1, pp: 1, max_tokens: 8}",
        f"{{dp: 1, tp: 2, pp: 1, {field}, max_tokens: 8}}",
    ]
    path.write_text(f"strategy_config: [{', '.join(entries)}]")
    with pytest.raises(ConfigError) as caught:
        load_plan(path)
    assert str(caught.value) == f"{path}: strategy_config[1].{sentence}"


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
    world = place(plan, gpus_per_node)  # whose ranks are checked when it is made
    assert world.num_ranks == plan.num_gpus
    assert world.layouts == tuple(replica.layout for replica in plan.replicas)
    assert world.spread_groups(gpus_per_node) == []
    for layout, replica in zip(world.layouts, world.replicas, strict=True):
        for stage in replica:
            nodes = {rank // gpus_per_node for rank in stage}
            assert len(nodes) == max(1, layout.tp // gpus_per_node)
    assert placed(replace(plan, meta={"ranks": world.as_lists()})) == world
    assert placed(plan) is None


@pytest.mark.parametrize(
    "ranks",
    [
        [],
        3,
        [3],
        [[3]],
        [[[0]]],
        [[[0]], [[1], [2]]],
        [[[0]], [[1, 1]]],
        [[["0"]], [["1", "2"]]],
        "ranks",
    ],
)
def test_a_rank_map_that_does_not_fit_is_refused(ranks: object) -> None:
    plan = replace(plan_of((1, 1, 1), (2, 1, 1)), meta={"ranks": ranks})
    with pytest.raises(ConfigError, match=r"meta\.ranks does not fit the plan <1,1>x1 <2,1>x1"):
        placed(plan)


def test_groups_that_do_not_divide_the_node_are_packed_if_they_can_be() -> None:
    assert is_placeable(plan_of((6, 1, 2), (2, 1, 2)), 8)
    assert not is_placeable(plan_of((5, 1, 2)), 8)
    with pytest.raises(ConfigError, match="cannot be packed"):
        place(plan_of((5, 1, 2)), 8)
    with pytest.raises(ConfigError, match="larger than a node"):
        place(plan_of((12, 1, 1)), 8)


def can_pack(sizes: list[int], capacities: list[int]) -> bool:
    """Return whether some assignment of all sizes to bins fits."""
    if not sizes:
        return True
    first, *rest = sizes
    return any(
        room >= first and can_pack(rest, [*capacities[:b], room - first, *capacities[b + 1 :]])
        for b, room in enumerate(capacities)
    )


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 2)), min_size=1, max_size=5), st.data())
@examples(200, 2000)
def test_groups_lie_inside_nodes_that_are_not_alike(
    layouts: list[tuple[int, int]], data: st.DataObject
) -> None:
    """Brute force says whether they fit; ranks are numbered node by node."""
    plan = plan_of(*((tp, pp, 1) for tp, pp in layouts))
    nodes = []
    while sum(nodes) < plan.num_gpus:
        nodes.append(data.draw(st.integers(4, 6), label="GPUs of a node"))
    groups = [tp for tp, pp in layouts for _ in range(pp)]
    filled = [*nodes[:-1], plan.num_gpus - sum(nodes[:-1])]
    if max(filled) < max(groups) or not can_pack(sorted(groups, reverse=True), filled):
        with pytest.raises(ConfigError):
            place(plan, nodes)
        return
    world = place(plan, nodes)
    assert world.spread_groups(nodes) == []
    node_of = [node for node, size in enumerate(nodes) for _ in range(size)]
    for replica in world.replicas:
        assert all(len({node_of[rank] for rank in stage}) == 1 for stage in replica)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=7), st.lists(st.integers(1, 9), max_size=4))
@examples(200, 2000)
def test_packing_agrees_with_brute_force(sizes: list[int], capacities: list[int]) -> None:
    sizes = sorted(sizes, reverse=True)
    found = pack(sizes, capacities)
    assert (found is not None) == can_pack(sizes, capacities)
    if found is not None:
        used = np.bincount(found, weights=sizes, minlength=len(capacities))
        assert (used <= capacities).all()
