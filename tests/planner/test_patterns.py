from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.clock import Clock
from planner.columns import Budget, generate
from planner.fluid import amounts, solve_fluid
from planner.patterns import PatternPricer
from tests.planner.support import (
    best_dispatch_s,
    best_plan_s,
    least_time_s,
    random_problem,
)


@given(st.integers(0, 10**6))
@settings(max_examples=120, deadline=None)
def test_pricing_bounds_every_pattern_and_rounded_up_finds_real_ones(seed: int) -> None:
    rng = np.random.default_rng(seed)
    problem = random_problem(rng, "lobra6" if seed % 2 else "fitted", max_count=5)
    prices = rng.uniform(0, 1, size=len(problem.counts)) * problem.buckets
    for table in problem.tables:
        step_s = float(rng.uniform(0.5, 3.0) * problem.counts.sum() * np.median(table.time_s[:, 1]))
        if not np.isfinite(step_s):
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


@given(st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_no_step_time_is_proven_impossible_that_is_possible(seed: int) -> None:
    rng = np.random.default_rng(seed)
    problem = random_problem(rng, "lobra6" if seed % 2 else "fitted")
    optimum = best_plan_s(problem)
    step_s = optimum * (1 + 1e-9) * rng.uniform(1.0, 1.05)
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


@given(st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_the_fluid_bound_of_a_plan_is_below_its_optimum(seed: int) -> None:
    rng = np.random.default_rng(seed)
    problem = random_problem(rng, "lobra6" if seed % 2 else "fitted", max_gpus=3)
    index = int(np.argmax([c.max_tokens for c in problem.candidates]))
    number = problem.num_gpus // int(problem.sizes[index])
    table = problem.tables[index]
    fluid = solve_fluid([table], np.array([number]), problem.counts)
    assert fluid.step_time_s <= best_dispatch_s([table] * number, problem.counts) * (1 + 1e-9)
