from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lobra.common.errors import ConfigError
from lobra.layout.layout import Layout
from lobra.planner.bucketed import exact, homogeneous
from lobra.planner.bucketed.problem import Problem
from lobra.planner.candidates import Candidate
from tests.planner.support import best_dispatch_s, plain_cost_model


def problem_of(layouts: list[tuple[int, int]], num_gpus: int, per_node: int) -> Problem:
    candidates = tuple(Candidate(Layout(tp, pp), 1024 * tp) for tp, pp in layouts)
    cost_model = plain_cost_model()
    counts, buckets = np.array([3, 2]), np.array([512, 2048])
    return Problem(counts, buckets, candidates, num_gpus, cost_model, per_node)


def test_homogeneous_takes_as_many_replicas_as_can_be_placed() -> None:
    # ranks 0 to 7 of two replicas would be six on the first node and two on the second
    found = homogeneous.find(problem_of([(4, 1)], 12, 6))
    assert found is not None
    assert str(found.plan) == "<4,1>x1"


@pytest.mark.parametrize(("num_gpus", "per_node"), [(6, 3), (6, 5), (12, 6), (9, 3)])
def test_exact_returns_plans_that_can_be_placed(num_gpus: int, per_node: int) -> None:
    problem = problem_of([(2, 1), (1, 1)], num_gpus, per_node)
    found = exact.solve(problem, 1.0)
    assert problem.fleet.can_place(found.plan)
    assert found.lower_bound_s <= found.step_time_s
    only_two = replace(problem, candidates=problem.candidates[:1])
    found = exact.solve(only_two, 1.0)
    assert problem.fleet.can_place(found.plan)
    number = found.plan.num_gpus // 2
    tables = [only_two.tables[0]] * number
    assert found.step_time_s == pytest.approx(best_dispatch_s(tables, problem.counts), rel=5e-3)


def test_nothing_to_place_is_said_before_the_search() -> None:
    problem = problem_of([(4, 1)], 6, 3)
    with pytest.raises(ConfigError, match="can be placed on 6 GPUs in nodes of 3"):
        exact.solve(problem, 1.0)
