"""The certificate of padded steps is below brute force over plans and dispatches."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lobra.planner.bucketed.partitions import maximal
from lobra.planner.bucketed.problem import Problem
from lobra.planner.bucketed.rates import certified
from lobra.planner.bucketed.time_table import time_table
from lobra.planner.clock import Clock
from lobra.planner.sampling import Sampled
from tests.planner.strategies import problems
from tests.planner.support import best_dispatch_s
from tests.tiers import examples


@given(problems(("fitted",), max_count=2), st.data())
@examples(20, 300)
def test_no_plans_mean_is_below_the_certificate(problem: Problem, data: st.DataObject) -> None:
    longest = problem.longest
    some = st.sampled_from(problem.buckets.tolist())
    steps = [np.repeat(problem.buckets, problem.counts)]
    steps += [
        np.array(step) for step in data.draw(st.lists(st.lists(some, min_size=1, max_size=3)))
    ]
    tables = [
        time_table(c.layout, c.max_tokens, problem.buckets, problem.cost_model)
        for c in problem.candidates
    ]
    counts = [
        np.array([int((step == bucket).sum()) for bucket in problem.buckets]) for step in steps
    ]
    plans = [
        plan
        for plan in maximal(problem.sizes, problem.num_gpus).astype(np.int64)
        if (problem.fleet.max_tokens[plan > 0] >= longest).any()
    ]
    means_s = [
        np.mean(
            [
                best_dispatch_s([tables[i] for i in np.repeat(np.arange(len(plan)), plan)], each)
                for each in counts
            ]
        )
        for plan in plans
    ]
    best = plans[int(np.argmin(means_s))]
    sampled = Sampled(problem.plan(best), np.full(len(steps), np.inf))
    bound_s = certified(steps, problem, sampled, Clock())
    assert bound_s <= min(means_s) * (1 + 1e-6)
