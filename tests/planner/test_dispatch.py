from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, example, given, target
from hypothesis import strategies as st

from lobra.common.errors import ConfigError
from lobra.layout.layout import Layout
from lobra.layout.plan import Plan, ReplicaGroup, make_plan
from lobra.planner.bucketed.dispatch import GOOD_ENOUGH, MODES, Mode
from lobra.planner.bucketed.greedy import lpt_times_s
from lobra.planner.bucketed.initial_loads import fluid_loads
from lobra.planner.bucketed.problem import Problem
from lobra.planner.bucketed.time_table import plan_tables, time_table
from lobra.planner.dispatch import dispatch
from lobra.profiler.cost_model import padded_work
from tests.planner.strategies import KINDS, cost_models, lengths, problems, replicas_of, steps
from tests.planner.support import LawCostModel, best_dispatch_s, plain_cost_model, step_time_s
from tests.tiers import examples

# The least that ``cost_models`` draws, which a failing case shrinks to.
LEAST_COSTS = LawCostModel(8, {tp: (0.5, 0.05, 0.002 / tp**0.5, 0.0, 0.0) for tp in (1, 2, 4)})


@given(steps(120), cost_models(), st.sampled_from(MODES))
@examples(50, 1500)
def test_every_sequence_once_no_micro_batch_too_large_longest_first(
    step: tuple[Plan, list[int]], cost_model: LawCostModel, mode: Mode
) -> None:
    plan, values = step[0], np.array(step[1])
    result = dispatch(values, plan, cost_model, num_buckets=6, mode=mode)
    placed = [batch.indices for batches in result.micro_batches for batch in batches]
    assert sorted(np.concatenate(placed).tolist()) == list(range(len(values)))
    for replica, batches in zip(plan.replicas, result.micro_batches, strict=True):
        for batch in batches:
            assert batch.padded_tokens <= replica.max_tokens
            assert values[batch.indices].max() <= batch.padded_length
            assert batch.padded_length in result.buckets
        work = [padded_work(batch.num_sequences, batch.padded_length) for batch in batches]
        times = [float(cost_model.micro_batch_time(replica.layout, *own).total_ms) for own in work]
        assert times == sorted(times, reverse=True)
    pairs = [
        [(batch.num_sequences, batch.padded_length) for batch in batches]
        for batches in result.micro_batches
    ]
    assert result.step_time_s == pytest.approx(step_time_s(plan, pairs, cost_model), rel=1e-12)
    assert result.step_time_s == max(result.replica_time_s)
    assert result.lower_bound_s <= result.step_time_s


@given(st.data(), problems())
@examples(50, 1000)
def test_the_bound_is_never_above_the_optimum_nor_the_result_below(
    data: st.DataObject, problem: Problem
) -> None:
    plan = problem.plan(data.draw(replicas_of(problem), label="replicas"))
    tables = [
        time_table(r.layout, r.max_tokens, problem.buckets, problem.cost_model, problem.counts)
        for r in plan.replicas
    ]
    optimum = best_dispatch_s(tables, problem.counts)
    groups = plan_tables(plan, problem.buckets, problem.cost_model, problem.counts)
    numbers = np.array([group.replicas for group in plan.groups])
    # what is returned is at most the time found, which would hide a bound beyond the optimum
    assert fluid_loads(groups, numbers, problem.counts).bound_s <= optimum * (1 + 1e-9)
    found = problem.evaluate(plan)
    assert found.lower_bound_s <= optimum * (1 + 1e-9)
    assert optimum <= found.step_time_s * (1 + 1e-9)


@given(steps(150, least=50), cost_models())
@examples(25, 250)
def test_the_same_step_is_dispatched_the_same_way(
    step: tuple[Plan, list[int]], cost_model: LawCostModel
) -> None:
    plan, values = step
    first, second = (dispatch(values, plan, cost_model) for _ in range(2))
    for left, right in zip(first.micro_batches, second.micro_batches, strict=True):
        assert [c.indices.tolist() for c in left] == [c.indices.tolist() for c in right]


@given(steps(20, most_replicas=8), cost_models())
@example((make_plan([ReplicaGroup(Layout(1, 2), 2, 272)]), [1, 17, 33, 193]), LEAST_COSTS)
@examples(50, 2000)
def test_never_slower_than_greedy(step: tuple[Plan, list[int]], cost_model: LawCostModel) -> None:
    plan, values = step[0], np.array(step[1])
    found = dispatch(values, plan, cost_model, num_buckets=8)
    greedy = lpt_times_s(values, found.buckets, plan, cost_model)
    target(found.step_time_s / greedy.max())  # look on where it is nearly as slow
    good_enough_s = found.lower_bound_s * (1 + GOOD_ENOUGH)  # where the search ends
    assert found.step_time_s <= max(greedy.max() * (1 + 1e-9), good_enough_s)


def test_an_idle_pipeline_does_not_end_the_search() -> None:
    cost_model = plain_cost_model()
    plan = make_plan([ReplicaGroup(Layout(1, 1), 6, 1024), ReplicaGroup(Layout(1, 4), 1, 1024)])
    found = dispatch([777] * 3, plan, cost_model)
    assert max(len(micro_batches) for micro_batches in found.micro_batches) == 1


@given(cost_models(KINDS), lengths(900, most=80))
@examples(50, 500)
def test_slower_replicas_get_less_and_the_bound_holds(
    cost_model: LawCostModel, drawn: list[int]
) -> None:
    # Where a token costs much more beyond the bend, micro-batches smaller than fit would be the
    # cheapest. The bound counts on them and the dispatcher makes none: 5.1 % was found where a
    # token costs twice as much there.
    assume(all(law[4] <= 0.5 * law[2] for law in cost_model.laws.values()))
    values = [*range(20, 900, 5), *drawn]  # of every size, so that replicas can end together
    plan = make_plan([ReplicaGroup(Layout(1, 1), 3, 1024), ReplicaGroup(Layout(2, 1), 1, 2048)])
    factors = np.array([1.0, 2.0, 1.002, 0.97])
    found = dispatch(values, plan, cost_model, slowdown=factors)
    tokens = [sum(c.padded_tokens for c in micro_batches) for micro_batches in found.micro_batches]
    assert tokens[1] < 0.75 * tokens[0]
    assert found.lower_bound_s <= found.step_time_s <= 1.05 * found.lower_bound_s
    assert found.step_time_s == max(found.replica_time_s)
    assert sorted(
        int(i) for micro_batches in found.micro_batches for c in micro_batches for i in c.indices
    ) == list(range(len(values)))


@pytest.mark.parametrize(
    ("lengths", "buckets", "message"),
    [
        ([], None, "no sequence"),
        ([5.5], None, "whole numbers"),
        ([0, 3], [16], "at least 1"),
        ([5], [512, 256], "not positive and ascending"),
        ([5], [], "not positive and ascending"),
    ],
)
def test_lengths_and_buckets_are_checked(
    lengths: list[float], buckets: list[int] | None, message: str
) -> None:
    cost_model = plain_cost_model()
    plan = make_plan([ReplicaGroup(Layout(1, 1), 1, 1024)])
    given = None if buckets is None else np.array(buckets, dtype=int)
    with pytest.raises(ConfigError, match=message):
        dispatch(lengths, plan, cost_model, buckets=given)
    with pytest.raises(ValueError, match="positive factor"):
        dispatch([5], plan, cost_model, slowdown=[np.inf])


def test_group_mode_uses_only_the_least_sufficient_capacity() -> None:
    cost_model = plain_cost_model()
    groups = [ReplicaGroup(Layout(1, 1), 2, 512), ReplicaGroup(Layout(2, 1), 1, 1024)]
    plan = make_plan(groups)
    lengths = np.array([100] * 30 + [900] * 2)
    result = dispatch(lengths, plan, cost_model, mode="group")
    assert {c.padded_length for c in result.micro_batches[2]} == {912}
    assert all(
        c.padded_length == 112 for micro_batches in result.micro_batches[:2] for c in micro_batches
    )


def test_given_buckets_are_kept() -> None:
    cost_model = plain_cost_model()
    plan = make_plan([ReplicaGroup(Layout(1, 1), 2, 2048)])
    result = dispatch([5, 300, 700], plan, cost_model, buckets=np.array([512, 1024, 4096]))
    used = {c.padded_length for micro_batches in result.micro_batches for c in micro_batches}
    assert used == {512, 1024}


@pytest.mark.parametrize(
    ("lengths", "words"), [([5000], "fits no replica"), ([], "no sequence"), ([0], "at least 1")]
)
def test_impossible_steps_are_refused(lengths: list[int], words: str) -> None:
    plan = make_plan([ReplicaGroup(Layout(1, 1), 2, 2048)])
    with pytest.raises(ConfigError, match=words):
        dispatch(lengths, plan, plain_cost_model())
