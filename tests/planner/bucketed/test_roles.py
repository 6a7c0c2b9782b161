from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lobra.layout.layout import Layout
from lobra.planner.bucketed.expected_batch import expect
from lobra.planner.bucketed.problem import Problem
from lobra.planner.bucketed.roles import longest_alone, roles
from lobra.planner.candidates import Candidate
from lobra.planner.outcome import Outcome, compared
from lobra.planner.roles import saturation
from tests.planner.support import MIXED_PLAN, plain_cost_model, two_tasks

LAYOUTS = (
    Candidate(Layout(1, 1), 512),
    Candidate(Layout(2, 1), 900),
    Candidate(Layout(4, 1), 2048),
)


def problem_of(counts: list[int], num_gpus: int = 12) -> Problem:
    cost_model = plain_cost_model()
    buckets = np.array([256, 512, 1200, 2048])
    return Problem(np.array(counts), buckets, LAYOUTS, num_gpus, cost_model)


def outcome_of(problem: Problem, replicas: list[int]) -> Outcome:
    plan = problem.plan(np.array(replicas))
    return Outcome(plan, problem.evaluate(plan).step_time_s, 0.0, "EXACT", 0.0)


def test_the_only_holder_is_named_with_what_the_others_hold() -> None:
    problem = problem_of([40, 20, 2, 1])
    reasons = [role.reason for role in roles(problem, outcome_of(problem, [2, 1, 1]).plan)]
    assert reasons[-1] == "the only one that holds sequences beyond 900 tokens"
    reasons = [role.reason for role in roles(problem, outcome_of(problem, [2, 0, 1]).plan)]
    assert reasons[-1] == "the only one that holds sequences beyond 512 tokens"
    assert "beyond" not in reasons[0]


@pytest.mark.parametrize(
    ("gpu_seconds", "words"),
    [(50.0, "this plan takes 50.0 % less"), (103.0, "takes 3.0 % more"), (100.01, "(the same)")],
)
def test_the_comparison_says_more_or_less(gpu_seconds: float, words: str) -> None:
    problem = problem_of([40, 20, 2, 1])
    same = outcome_of(problem, [0, 0, 2])
    same = replace(same, step_time_s=100.0 / same.plan.num_gpus)
    other = outcome_of(problem, [4, 0, 2])
    other = replace(other, step_time_s=gpu_seconds / other.plan.num_gpus)
    text = compared(other, same)
    assert words in text
    assert text.startswith("<4,1>x2 on 8 GPUs: 12.5 s, 100 GPU-seconds")


def test_a_step_as_long_as_its_longest_sequence_is_told() -> None:
    few = problem_of([1, 0, 0, 1])
    note = saturation(outcome_of(few, [1, 0, 1]).step_time_s, *longest_alone(few))
    assert note is not None and "a single sequence of 2048 tokens" in note
    many = problem_of([40, 20, 9, 9])
    step_time_s = outcome_of(many, [1, 0, 1]).step_time_s
    assert saturation(step_time_s, *longest_alone(many)) is None


def test_roles_add_up_to_the_batch() -> None:
    cost_model = plain_cost_model()
    batch = expect(two_tasks(), 6)
    candidates = (Candidate(Layout(1, 1), 1024), Candidate(Layout(1, 2), 4096))
    problem = Problem(batch.counts, batch.buckets, candidates, 4, cost_model)
    found = roles(problem, MIXED_PLAN)
    assert sum(role.tokens_share for role in found) == pytest.approx(1.0)
    assert "the only one that holds" in found[1].reason
