from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lobra.planner.bucketed.columns import Budget, generate
from lobra.planner.bucketed.fluid import amounts, solve_fluid
from lobra.planner.bucketed.patterns import PatternPricer
from lobra.planner.bucketed.problem import Problem
from lobra.planner.clock import Clock
from tests.planner.strategies import problems
from tests.planner.support import best_dispatch_s, best_plan_s, least_time_s
from tests.tiers import examples


@given(st.data(), problems(max_count=5))
@examples(50, 1200)
def test_pricing_bounds_every_pattern_and_rounded_up_finds_real_ones(
    data: st.DataObject, problem: Problem
) -> None:
    number = len(problem.counts)
    hundredths = st.lists(st.integers(0, 100), min_size=number, max_size=number)
    prices = np.array(data.draw(hundredths, label="price of a token, in %")) / 100 * problem.buckets
    for table in problem.tables:
        taken = tuple(data.draw(st.integers(0, count)) for count in problem.counts.tolist())
        more = data.draw(st.just(0) | st.integers(0, 100), label="time beyond a pattern's, in %")
        step_s = least_time_s(table, taken) * (1 + 1e-9) * (1 + more / 100)
        if not 0 < step_s < np.inf:
            continue
        best = max(
            float(prices @ np.array(taken))
            for taken in product(*(range(int(count) + 1) for count in problem.counts))
            if least_time_s(table, taken) <= step_s
        )
        down, _ = PatternPricer(table, problem.counts, step_s, 500, "down").price(prices)
        assert down >= best * (1 - 1e-9)
        up, pattern = PatternPricer(table, problem.counts, step_s, 500, "up").price(prices)
        assert pattern is not None
        assert pattern.time_s <= step_s * (1 + 1e-9)
        kept = np.minimum(pattern.counts, problem.counts)
        assert least_time_s(table, tuple(kept.tolist())) <= step_s * (1 + 1e-9)
        assert float(prices @ pattern.counts) == pytest.approx(up, rel=1e-4, abs=1e-6)
        reach = amounts(table, step_s)
        fluid = max((prices[reach > 0] * reach[reach > 0]).max(initial=0.0), 0.0)
        assert fluid >= best * (1 - 1e-9)


@given(problems(), st.integers(0, 50))
@examples(60, 600)
def test_no_step_time_is_proven_impossible_that_is_possible(
    problem: Problem, thousandths_more: int
) -> None:
    step_s = best_plan_s(problem) * (1 + 1e-9) * (1 + thousandths_more / 1000)
    found = generate(
        problem.tables,
        Budget.of_gpus(problem.sizes, problem.num_gpus),
        problem.counts,
        step_s,
        rounding="down",
        ticks=300,
        clock=Clock(),
    )
    assert found.bound <= 1 + 1e-6


@given(problems(max_gpus=3))
@examples(60, 600)
def test_the_fluid_bound_of_a_plan_is_below_its_optimum(problem: Problem) -> None:
    index = int(np.argmax([c.max_tokens for c in problem.candidates]))
    number = problem.num_gpus // int(problem.sizes[index])
    table = problem.tables[index]
    fluid = solve_fluid([table], np.array([number]), problem.counts)
    assert fluid.step_time_s <= best_dispatch_s([table] * number, problem.counts) * (1 + 1e-9)
