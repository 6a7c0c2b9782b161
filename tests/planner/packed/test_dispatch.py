"""Packed dispatch places every sequence once, keeps capacities, and is near the optimum."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import cache
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lobra.common.errors import ConfigError
from lobra.layout.layout import Layout
from lobra.layout.plan import Plan, ReplicaGroup, make_plan
from lobra.layout.sequences import PACKED_MULTIPLE, IntArray, packed_tokens
from lobra.planner.packed.dispatch import dispatch_packed, packed_costs
from lobra.planner.packed.least_times import Cost
from lobra.planner.step_time import pipeline_time
from tests.planner.strategies import cost_models, plans
from tests.planner.support import LawCostModel


def law(start_ms: float, token_ms: float, square_ms: float) -> Cost:
    """Return a linear cost."""

    def cost(tokens: IntArray, squares: IntArray) -> np.ndarray:
        return start_ms + token_ms * tokens + square_ms * squares

    return cost


positive = st.floats(1e-3, 10.0)
costs = st.builds(law, st.floats(0.0, 50.0), positive, st.floats(0.0, 1e-3))


@given(st.data(), plans())
def test_every_sequence_once_no_micro_batch_too_large_slowest_first(
    data: st.DataObject, plan: Plan
) -> None:
    lengths = np.array(data.draw(st.lists(st.integers(1, plan.max_tokens), min_size=1)))
    prices = data.draw(st.lists(costs, min_size=len(plan.groups), max_size=len(plan.groups)))
    slowdown = data.draw(
        st.lists(
            st.sampled_from([0.9, 1.0, 1.5]),
            min_size=len(plan.replicas),
            max_size=len(plan.replicas),
        )
    )
    found = dispatch_packed(lengths, plan, prices, slowdown=slowdown)
    again = dispatch_packed(lengths, plan, prices, slowdown=slowdown)
    placed = [batch.indices for batches in found.micro_batches for batch in batches]
    assert sorted(np.concatenate(placed).tolist()) == list(range(len(lengths)))
    for one, other in zip(found.micro_batches, again.micro_batches, strict=True):
        assert [b.indices.tolist() for b in one] == [b.indices.tolist() for b in other]
    price_of = [
        price for g, price in zip(plan.groups, prices, strict=True) for _ in range(g.replicas)
    ]
    for replica, batches, price in zip(plan.replicas, found.micro_batches, price_of, strict=True):
        times_s = []
        for batch in batches:
            tokens = int(lengths[batch.indices].sum())
            assert batch.padded_tokens <= replica.max_tokens
            assert 0 <= batch.padded_tokens - tokens < PACKED_MULTIPLE
            squares = np.array([(lengths[batch.indices] ** 2).sum()])
            times_s.append(float(price(np.array([batch.padded_tokens]), squares)[0]) / 1000)
        assert times_s == sorted(times_s, reverse=True)
        busy_s = sum(times_s) + (replica.layout.pp - 1) * max(times_s, default=0.0)
        expected_s = busy_s * slowdown[replica.index]
        assert found.replica_time_s[replica.index] == pytest.approx(expected_s)
    assert found.step_time_s == max(found.replica_time_s)
    assert found.lower_bound_s <= found.step_time_s


@given(
    st.lists(st.integers(1, 12).map(lambda n: n * PACKED_MULTIPLE), min_size=1, max_size=7),
    st.integers(1, 3),
    positive,
    st.floats(0.0, 0.1),
)
def test_as_near_the_optimum_as_longest_processing_time_is(
    lengths: list[int], num_replicas: int, token_ms: float, square_ms: float
) -> None:
    """At most 4/3 - 1/(3m) times the best of all assignments to m equal replicas (Graham, 1969)."""
    plan = make_plan([ReplicaGroup(Layout(1, 1), num_replicas, max(lengths))])
    found = dispatch_packed(lengths, plan, [law(0.0, token_ms, square_ms)])
    own_s = [(token_ms * length + square_ms * length**2) / 1000 for length in lengths]
    optimum_s = min(
        max(np.bincount(choice, own_s, num_replicas))
        for choice in product(range(num_replicas), repeat=len(lengths))
    )
    assert found.lower_bound_s <= optimum_s * (1 + 1e-9)
    assert found.step_time_s <= optimum_s * (4 / 3 - 1 / (3 * num_replicas)) * (1 + 1e-9)


@given(st.data(), cost_models(), plans(most_replicas=2, most_tokens=1024))
def test_bound_is_at_most_the_optimum_of_all_dispatches(
    data: st.DataObject, cost_model: LawCostModel, plan: Plan
) -> None:
    """Every assignment to replicas, and every way to divide a replica's into micro-batches."""
    lengths = np.array(data.draw(st.lists(st.integers(1, plan.max_tokens), min_size=1, max_size=4)))
    found = dispatch_packed(lengths, plan, packed_costs(plan, cost_model))
    every = range(len(lengths))

    @cache
    def replica_time_s(group: ReplicaGroup, own: tuple[int, ...]) -> float:
        best_s = np.inf if own else 0.0
        for batches in set_partitions(own):
            times_ms = []
            for batch in batches:
                tokens = int(lengths[list(batch)].sum())
                tokens = packed_tokens(tokens) if len(batch) > 1 else tokens
                squares = int((lengths[list(batch)] ** 2).sum())
                cost = cost_model.micro_batch_time(group.layout, tokens, squares)
                times_ms.append(float(cost.total_ms) if tokens <= group.max_tokens else np.inf)
            best_s = min(best_s, pipeline_time(times_ms, group.layout.pp) / 1000)
        return best_s

    group_of = [group for group in plan.groups for _ in range(group.replicas)]
    optimum_s = min(
        max(
            replica_time_s(group, tuple(index for index in every if choice[index] == replica))
            for replica, group in enumerate(group_of)
        )
        for choice in product(range(len(group_of)), repeat=len(lengths))
    )
    assert found.lower_bound_s <= optimum_s * (1 + 1e-9)
    assert optimum_s <= found.step_time_s * (1 + 1e-9)


def set_partitions(every: tuple[int, ...]) -> Iterator[list[tuple[int, ...]]]:
    """Yield every way to divide some things."""
    if not every:
        return
    first, *others = every
    for number in range(len(others) + 1):
        for beside in combinations(others, number):
            rest = tuple(one for one in others if one not in beside)
            for more in set_partitions(rest) if rest else [[]]:
                yield [(first, *beside), *more]


@pytest.mark.parametrize("layouts", [((1, 1, 6), (2, 1, 1), (8, 1, 1)), ((1, 8, 1), (8, 1, 1))])
def test_near_its_bound_and_no_slower_than_longest_processing_time(
    layouts: tuple[tuple[int, int, int], ...],
) -> None:
    capacity = {(1, 1): 2048, (2, 1): 4096, (8, 1): 16384, (1, 8): 4096}
    plan = make_plan(
        [ReplicaGroup(Layout(tp, pp), n, capacity[tp, pp]) for tp, pp, n in layouts]
    )  # fmt: skip
    prices = [
        law(80.0 / g.layout.pp, 0.16 / g.layout.tp**0.8 / g.layout.pp, 4e-6 / g.layout.num_gpus)
        for g in plan.groups
    ]
    gaps = []
    for seed in range(5):
        generator = np.random.default_rng(seed)
        lengths = np.minimum(generator.lognormal(5.7, 1.1, 832).astype(int) + 1, 16384)
        lengths[0] = 16384
        found = dispatch_packed(lengths, plan, prices)
        gaps.append(found.step_time_s / found.lower_bound_s - 1)
        assert found.step_time_s <= plain_time_s(lengths, plan, prices)
    assert np.median(gaps) <= 0.015


def plain_time_s(lengths: np.ndarray, plan: Plan, prices: list[Cost]) -> float:
    """Longest processing time over replicas by tokens' time, then first fit decreasing."""
    group_of = [number for number, g in enumerate(plan.groups) for _ in range(g.replicas)]
    loads, own = [0.0] * len(group_of), [[] for _ in group_of]  # type: ignore[var-annotated]
    for length in np.sort(lengths)[::-1].tolist():
        ends = [
            load + float(prices[g](np.array([length]), np.array([length**2]))[0])
            - float(prices[g](np.array([0]), np.array([0]))[0])
            * (1 - length / plan.groups[g].max_tokens)
            if length <= plan.groups[g].max_tokens else np.inf
            for load, g in zip(loads, group_of, strict=True)
        ]  # fmt: skip
        replica = int(np.argmin(ends))
        loads[replica] = ends[replica]
        own[replica].append(length)
    times_s = []
    for g, sequences in zip(group_of, own, strict=True):
        batches: list[list[int]] = []
        for length in sequences:
            fitting = (b for b in batches if sum(b) + length <= plan.groups[g].max_tokens)
            batch = next(fitting, None)
            if batch is None:
                batches.append([length])
            else:
                batch.append(length)
        tokens = np.array([packed_tokens(sum(b)) if len(b) > 1 else b[0] for b in batches])
        squares = np.array([sum(length**2 for length in b) for b in batches])
        times_ms = prices[g](tokens, squares)
        times_s.append(pipeline_time(times_ms.tolist(), plan.groups[g].layout.pp) / 1000)
    return max(times_s)


@given(st.lists(st.integers(1, 64), min_size=1, max_size=9))
def test_as_few_micro_batches_as_first_fit_decreasing_makes(lengths: list[int]) -> None:
    """At most 11/9 of the fewest, plus 6/9 (Dosa, 2007)."""
    plan = make_plan([ReplicaGroup(Layout(1, 1), 1, 64)])
    found = dispatch_packed(lengths, plan, [law(1.0, 1.0, 0.0)])
    fewest = [0] + [len(lengths)] * (2 ** len(lengths) - 1)  # of every subset
    weight = [
        sum(length for place, length in enumerate(lengths) if some >> place & 1)
        for some in range(2 ** len(lengths))
    ]
    for some in range(1, len(fewest)):
        part = some
        while part:
            if weight[part] <= 64:
                fewest[some] = min(fewest[some], fewest[some ^ part] + 1)
            part = (part - 1) & some
    assert len(found.micro_batches[0]) <= (11 * fewest[-1] + 6) / 9


def test_what_cannot_be_placed_is_refused() -> None:
    plan = make_plan([ReplicaGroup(Layout(1, 1), 1, 60)])
    with pytest.raises(ConfigError, match="no sequence"):
        dispatch_packed([], plan, [law(0.0, 1.0, 0.0)])
    with pytest.raises(ConfigError, match="61 tokens fits no replica"):
        dispatch_packed([5, 61], plan, [law(0.0, 1.0, 0.0)])


def test_a_step_of_sixteen_replicas_takes_milliseconds() -> None:
    generator = np.random.default_rng(0)
    lengths = np.minimum(generator.lognormal(5.5, 1.2, 832).astype(int) + 1, 16384)
    plan = make_plan(
        [ReplicaGroup(Layout(1, 1), 10, 4096), ReplicaGroup(Layout(2, 1), 4, 9216),
         ReplicaGroup(Layout(4, 1), 2, 16384)]
    )  # fmt: skip
    prices = [law(5.0, 0.1 / tp**0.9, 1e-6 / tp) for tp in (1, 2, 4)]
    times_s = []
    for _ in range(7):
        start = time.process_time()
        dispatch_packed(lengths, plan, prices)
        times_s.append(time.process_time() - start)
    assert min(times_s) < 0.03  # measured: 0.003
