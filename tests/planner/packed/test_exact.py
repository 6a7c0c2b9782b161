"""The certificate is below brute force on every plan; what is found is as good as it says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lobra.common.errors import ConfigError
from lobra.layout.layout import Layout
from lobra.planner.candidates import Candidate
from lobra.planner.certificate import Certificate
from lobra.planner.clock import Clock
from lobra.planner.fleet import Fleet
from lobra.planner.packed import exact
from lobra.planner.packed.problem import PackedProblem
from lobra.planner.step_bounds import StepBounds
from tests.planner.packed.support import least_step_s, packed_problems, plans_of
from tests.planner.support import plain_cost_model
from tests.tiers import examples

ABOVE = 1 + 1e-6


def certificate_of(problem: PackedProblem) -> Certificate:
    return Certificate(problem.fleet, problem.longest, problem.counts, problem.rates)


@given(packed_problems(most=5), st.data())
@examples(40, 600)
def test_no_bound_is_above_brute_force(problem: PackedProblem, data: st.DataObject) -> None:
    plans = plans_of(problem)
    optima_s = np.array(
        [[least_step_s(problem, plan, step) for step in problem.steps] for plan in plans]
    )
    certificate = certificate_of(problem)
    looked_at = data.draw(st.lists(st.sampled_from(range(len(plans))), max_size=3, unique=True))
    for place in looked_at:
        certificate.look_at(plans[place])
        assert (certificate.steps_s(np.array(plans)) <= optima_s * ABOVE).all()
        assert certificate.minimum()[0] <= optima_s.mean(axis=1).min() * ABOVE


@given(packed_problems(most=5), st.data())
@examples(15, 300)
def test_the_tight_prices_of_a_plan_bound_every_plan(
    problem: PackedProblem, data: st.DataObject
) -> None:
    plans = plans_of(problem)
    holds = problem.fleet.max_tokens >= problem.longest
    bounds = StepBounds(problem.fleet, holds, problem.counts, problem.rates)
    looked_at = data.draw(st.sampled_from(range(len(plans))))
    bounds.look_at(plans[looked_at])
    tight = bounds.tight_prices(bounds.reduced(plans[looked_at]))
    for plan in plans:
        optima_s = np.array([least_step_s(problem, plan, step) for step in problem.steps])
        replicas = bounds.reduced(plan)
        bound_s = (tight.value + tight.bubble @ replicas) / (tight.price @ replicas)
        assert (bound_s <= optima_s * ABOVE).all()


@given(packed_problems())
@examples(15, 200)
def test_what_is_found_is_between_the_bound_and_no_better_than_the_optimum(
    problem: PackedProblem,
) -> None:
    found = exact.solve(problem)
    optimum_s = min(
        np.mean([least_step_s(problem, plan, step) for step in problem.steps])
        for plan in plans_of(problem)
    )
    mean_s = min(step_s.mean() for step_s in found.step_s.values())
    assert found.lower_bound_s <= optimum_s * ABOVE
    assert optimum_s <= mean_s * ABOVE
    assert mean_s <= found.homogeneous_s * ABOVE


@given(packed_problems(most=5))
@examples(30, 400)
def test_no_bound_of_one_layout_is_above_brute_force(problem: PackedProblem) -> None:
    for replicas in problem.fleet.homogeneous(problem.longest):
        optimum_s = np.mean([least_step_s(problem, replicas, step) for step in problem.steps])
        assert problem.homogeneous_bound_s(replicas) <= optimum_s * ABOVE


def test_the_best_plan_of_one_layout_is_compared_with() -> None:
    """Of ten layouts that hold everything, the best one is not among the smallest."""
    rng = np.random.default_rng(0)
    steps = tuple(rng.integers(20, 900, 60) for _ in range(3))
    sizes = (1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)
    layouts = [Layout(tp, pp, memory=memory) for tp, pp in sizes for memory in ("keep", "full")]
    capacity = {1: 400, 2: 2000, 4: 2000, 8: 2000}
    candidates = [Candidate(layout, capacity[layout.num_gpus]) for layout in layouts]
    problem = PackedProblem(steps, 900, Fleet(tuple(sorted(candidates)), 8, 8), plain_cost_model())
    found = exact.solve(problem)
    every = [problem.fleet.plan(each) for each in problem.fleet.homogeneous(900)]
    best_s = min(problem.step_s(plan, range(3)).mean() for plan in every)
    assert found.homogeneous_s == pytest.approx(best_s)


def test_near_the_plan_found_and_valid_out_of_time() -> None:
    rng = np.random.default_rng(1)
    steps = tuple(np.minimum(rng.lognormal(5.0, 1.0, 90).astype(int) + 1, 3000) for _ in range(8))
    layouts = ((1, 1, 600), (1, 2, 1000), (2, 1, 1500), (1, 4, 2000), (4, 1, 3000), (2, 2, 1800))
    candidates = tuple(sorted(Candidate(Layout(tp, pp), most) for tp, pp, most in layouts))
    problem = PackedProblem(steps, 3000, Fleet(candidates, 8), plain_cost_model())
    found = exact.solve(problem)
    plan, step_s = next(iter(found.step_s.items()))
    assert found.lower_bound_s >= 0.92 * step_s.mean()  # measured: 0.94
    certificate = certificate_of(problem)
    replicas = problem.fleet.replicas_of(plan)
    certificate.look_at(replicas)
    at_once_s, _ = certificate.minimum(1e-9)
    in_time_s, _ = certificate.minimum()
    assert at_once_s <= in_time_s <= certificate.steps_s(replicas[None]).mean() * ABOVE


def test_a_plan_that_the_certificate_names_is_tried_however_late_it_is() -> None:
    """One sequence in a hundred needs four GPUs, which are slower for all the others."""
    rng = np.random.default_rng(2)
    steps = tuple(np.append(rng.integers(50, 500, 99), 3000) for _ in range(4))
    candidates = Candidate(Layout(1, 1), 600), Candidate(Layout(4, 1), 3000)
    problem = PackedProblem(steps, 3000, Fleet(candidates, 12, 8), plain_cost_model())
    found = exact.solve(problem, Clock(1e-9))
    assert not found.complete
    assert next(iter(found.step_s.values())).mean() < 0.85 * found.homogeneous_s


def test_a_fleet_without_room_for_the_longest_is_refused() -> None:
    candidates = (Candidate(Layout(1, 1), 100), Candidate(Layout(4, 1), 400))
    steps = (np.array([50, 60]),)
    with pytest.raises(ConfigError, match="no layout that holds 400 tokens can be placed on 2"):
        exact.solve(PackedProblem(steps, 400, Fleet(candidates, 2, 8), plain_cost_model()))


def test_the_certificate_is_of_plans_that_hold_every_sequence() -> None:
    candidates = (Candidate(Layout(1, 1), 100), Candidate(Layout(1, 2), 400))
    fleet = Fleet(candidates, 4, 8)
    problem = PackedProblem((np.array([50, 300]),), 400, fleet, plain_cost_model())
    certificate = certificate_of(problem)
    for replicas in ([4, 0], [6, -1]):
        with pytest.raises(ValueError, match="no plan that holds every sequence"):
            certificate.look_at(np.array(replicas))
    certificate.look_at(np.array([2, 1]))
    assert np.isfinite(certificate.minimum()[0])
