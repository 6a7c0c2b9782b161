from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from time import process_time

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lobra.common.errors import ConfigError
from lobra.layout.layout import Layout
from lobra.layout.plan import load_plan, save_plan
from lobra.planner.bucketed import exact, homogeneous, lobra
from lobra.planner.bucketed.branch import PlanBounds
from lobra.planner.bucketed.identical import IdenticalModel
from lobra.planner.bucketed.partitions import count_maximal, maximal
from lobra.planner.bucketed.problem import Problem
from lobra.planner.bucketed.time_table import TimeTable, time_table
from lobra.planner.candidates import Candidate, all_candidates
from lobra.planner.deployment import plan_entries
from lobra.planner.outcome import Outcome
from lobra.profiler.profiles import MemoryProfile, MemoryRow
from tests.planner.strategies import problems
from tests.planner.support import (
    LawCostModel,
    best_by_length_s,
    best_identical_s,
    best_plan_s,
    plain_cost_model,
    small_problem,
)
from tests.tiers import examples

# Length-based dispatch deploys less here than balanced dispatch, and takes longer.
MANY_SHORT = Problem(
    np.array([60, 1]),
    np.array([256, 2048]),
    (Candidate(Layout(1, 1), 512), Candidate(Layout(4, 1), 2048)),
    5,
    plain_cost_model(),
    5,
)


def memory_tables(problem: Problem) -> list[TimeTable]:
    return [
        time_table(c.layout, c.max_tokens, problem.buckets, problem.cost_model)
        for c in problem.candidates
    ]


def optimum_identical_s(problem: Problem, tables: list[TimeTable], plans: np.ndarray) -> float:
    return min(best_identical_s(tables, problem.counts, plan) for plan in plans)


@given(problems(max_count=3))
@examples(50, 1000)
def test_balance_group_and_prune_agree_with_brute_force(problem: Problem) -> None:
    plans = maximal(problem.sizes, problem.num_gpus)
    assert len(plans) == count_maximal(problem.sizes, problem.num_gpus)
    tables = memory_tables(problem)
    balance = lobra.balance(problem)
    assert balance.proven
    assert balance.objective_s == pytest.approx(optimum_identical_s(problem, tables, plans))

    group = lobra.group(problem)
    assert group.proven
    assert group.objective_s == pytest.approx(best_by_length_s(problem))

    estimate = lobra.length_based_estimate_s(tables, problem.counts, plans, problem.sizes)
    kept = plans[estimate <= 1.15 * estimate.min()]
    best_kept = optimum_identical_s(problem, tables, kept)
    assert lobra.prune(problem).objective_s == pytest.approx(best_kept)


@given(problems(max_count=3))
@examples(50, 1000)
def test_exact_is_certified_and_never_worse(problem: Problem) -> None:
    optimum = best_plan_s(problem)
    found = exact.solve(problem, 1.0)
    assert found.lower_bound_s <= optimum * (1 + 1e-9)
    assert found.step_time_s >= optimum * (1 - 1e-9)
    assert found.plan.num_gpus <= problem.num_gpus
    same = homogeneous.find(problem)
    others = [lobra.balance(problem), lobra.group(problem), lobra.prune(problem)]
    others += [same] if same else []
    for other in others:
        assert found.step_time_s <= other.step_time_s * (1 + 1e-9)
    if found.proven:
        assert found.step_time_s <= optimum * (1 + 2e-3)


def test_group_leaves_out_layouts_that_would_only_slow_it_down() -> None:
    # one 4-GPU layout holds all; deploying another for short sequences would leave no room for it
    candidates = (Candidate(Layout(1, 1), 512), Candidate(Layout(4, 1), 2048))
    cost_model = plain_cost_model()
    counts, buckets = np.array([4, 2]), np.array([256, 2048])
    problem = Problem(counts, buckets, candidates, 4, cost_model, 4)
    assert str(lobra.group(problem).plan) == "<4,1>x1"
    # with GPUs to spare a slow small layout still takes every short sequence, so none is deployed
    assert str(lobra.group(MANY_SHORT).plan) == "<4,1>x1"
    assert str(lobra.balance(MANY_SHORT).plan) == "<1,1>x1 <4,1>x1"


@example(lobra.group, MANY_SHORT)
@given(st.sampled_from([lobra.balance, lobra.group]), problems(("lobra6",), max_count=2))
@examples(30, 300)
def test_too_many_plans_to_list_are_solved_as_one_model(
    solve: Callable[..., Outcome], problem: Problem
) -> None:
    listed = solve(problem)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lobra, "MOST_PLANS", 0)
        found = solve(problem, 20.0)
        assert "bilinear" in found.notes[0]
        assert found.objective_s == pytest.approx(listed.objective_s)
        with pytest.raises(ConfigError, match=r"choose EXACT or BALANCE"):
            lobra.prune(problem)


@pytest.mark.parametrize("solve", [lobra.balance, lobra.group, lobra.prune])
def test_a_search_that_is_stopped_gives_its_best_plan_so_far(
    solve: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    layouts = (Layout(1, 1), 512), (Layout(2, 1), 1024), (Layout(4, 2), 4096)
    candidates = tuple(Candidate(*entry) for entry in layouts)
    counts, buckets = np.array([61, 17, 3]), np.array([256, 768, 3072])
    problem = Problem(counts, buckets, candidates, 14, plain_cost_model(), 14)
    best = solve(problem)
    assert best.proven
    stopped = solve(problem, 1e-9)
    assert not stopped.proven
    assert stopped.plan.num_gpus <= problem.num_gpus
    assert stopped.objective_s is not None and best.objective_s is not None
    assert best.objective_s * (1 - 1e-9) <= stopped.objective_s <= 2 * best.objective_s
    assert any("best plan so far, --time-limit" in note for note in stopped.notes)
    monkeypatch.setattr(lobra, "DEFAULT_LIMIT_S", 1e-9)
    assert not solve(problem).proven, "there is a limit if none is given"


@given(problems(max_count=3))
def test_a_rounded_relaxation_takes_every_sequence(problem: Problem) -> None:
    tables = memory_tables(problem)
    plans = maximal(problem.sizes, problem.num_gpus)
    bounds = PlanBounds(tables, problem.counts, plans)
    for index in np.flatnonzero(np.isfinite(bounds.bound_s))[:5].tolist():
        rounded_s = bounds.tighten(index)
        assert best_identical_s(tables, problem.counts, plans[index]) <= rounded_s * (1 + 1e-9)
        assert bounds.bound_s[index] <= rounded_s


def test_time_limits_beyond_what_the_solver_takes() -> None:
    for solve in (lobra.balance, lobra.group, lobra.prune):
        assert solve(small_problem(), 1e300).proven


@example(MANY_SHORT)
@given(problems(("lobra6",), max_count=2))
@examples(60, 600)
def test_the_bilinear_model_finds_the_same_optimum(problem: Problem) -> None:
    tables = memory_tables(problem)
    model = IdenticalModel(tables, problem.counts, num_gpus=problem.num_gpus)
    found = model.solve(20.0)
    plans = maximal(problem.sizes, problem.num_gpus)
    assert found.objective_s == pytest.approx(optimum_identical_s(problem, tables, plans))
    by_length = IdenticalModel(tables, problem.counts, num_gpus=problem.num_gpus, length_based=True)
    assert by_length.solve(20.0).objective_s == pytest.approx(best_by_length_s(problem))


@given(problems())
@examples(5, 50)
def test_a_time_limit_is_kept(problem: Problem) -> None:
    begin = process_time()
    found = exact.solve(problem, 0.05)
    assert process_time() - begin < 2.0
    assert found.lower_bound_s <= found.step_time_s


@dataclass(frozen=True)
class PartlyTimed(LawCostModel):
    """A cost model whose profile has rows of recomputed layers for tp 1 only."""

    def has(self, layout: Layout) -> bool:
        return super().has(layout) and (layout.memory == "keep" or layout.tp == 1)


def test_a_plan_mixes_memory_policies_and_its_file_says_so(tmp_path: Path) -> None:
    """Short sequences on replicas that keep all; the long ones fit where layers are recomputed."""
    rows = ((1, 1, 1, 1024, "keep"), (1, 1, 1, 8192, "full"), (2, 1, 1, 8192, "full"))
    memory = MemoryProfile(tuple(MemoryRow(*row) for row in rows))
    cost_model = PartlyTimed(8, plain_cost_model().laws)
    found = all_candidates(memory, cost_model, 4, 4096, 8)
    assert [str(c.layout) for c in found.chosen] == ["<1,1> full", "<1,1>"]
    assert [reason.partition("has ")[2] for reason in found.dropped] == [
        "no rows for tp 2 with memory full"
    ]
    counts, buckets = np.array([120, 3]), np.array([512, 4096])
    problem = Problem(counts, buckets, found.chosen, 4, cost_model)
    plan = exact.solve(problem, 2.0).plan
    assert {group.layout.memory for group in plan.groups} == {"keep", "full"}
    path = save_plan(plan, tmp_path / "plan.yaml")
    assert "memory: full" in path.read_text()
    assert load_plan(path) == plan
    assert {entry.get("memory") for entry in plan_entries(plan)} == {None, "full"}
    kept = replace(problem, candidates=found.chosen[1:], counts=np.array([120, 0]))
    again = replace(problem, candidates=found.chosen[:1], counts=np.array([120, 0]))
    times = [exact.solve(one, 1.0).step_time_s for one in (kept, again)]
    assert times[0] < times[1], "the same micro-batches take longer when computed again"
