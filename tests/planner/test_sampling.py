from __future__ import annotations

import numpy as np

from lobra.layout.layout import Layout
from lobra.planner.bucketed import exact
from lobra.planner.bucketed.buckets import bucket_index
from lobra.planner.bucketed.expected_batch import expect
from lobra.planner.bucketed.problem import Problem
from lobra.planner.candidates import Candidate
from lobra.planner.clock import Clock
from lobra.planner.outcome import silent
from lobra.planner.sampling import HEAVY_MARGIN, Sampler, compare, heavier_batches
from lobra.planner.simulate import simulate
from lobra.planner.workload import Workload
from tests.planner.support import LawCostModel


def rare_long_sequences() -> tuple[Workload, Problem]:
    """Twelve GPUs; a step has one long sequence on average, often none, often two or three."""
    rng = np.random.default_rng(0)
    short, long = rng.integers(50, 500, size=3000), rng.integers(3600, 4000, size=60)
    lengths = rng.permutation(np.concatenate([short, long]))
    workload = Workload({"one": lengths}, {"one": 60}, {"one": 0})
    batch = expect(workload, 6)
    laws = {
        1: (4.0, 0.0, 0.01, 4e-6, 0.0),
        2: (4.0, 0.0, 0.0065, 3e-6, 0.0),
        4: (4.0, 0.0, 0.0045, 2e-6, 0.0),
    }
    candidates = tuple(Candidate(Layout(tp, 1), 1024 * tp) for tp in (1, 2, 4))
    return workload, Problem(batch.counts, batch.buckets, candidates, 12, LawCostModel(8, laws))


def test_heavier_batches_have_what_most_steps_do_not_exceed() -> None:
    workload, problem = rare_long_sequences()
    batches = heavier_batches(problem, workload)
    assert batches
    for counts in batches:
        assert (counts >= problem.counts).all()
        assert counts[-1] > problem.counts[-1]
        assert (counts == problem.counts)[problem.counts > 16].all()
    drawn = [
        int((bucket_index(lengths, problem.buckets) == len(problem.buckets) - 1).sum())
        for lengths in workload.steps(200)
    ]
    within = np.mean(np.array(drawn) <= batches[0][-1])
    assert within >= 0.8


def test_the_plan_taken_is_the_best_on_sampled_steps_but_for_a_margin() -> None:
    workload, problem = rare_long_sequences()
    outcome = exact.solve(problem, 2.0)
    sampler = Sampler(workload, problem, 6, False, silent)
    chosen, sampled = compare(outcome, sampler, True, Clock())
    plain, without = compare(outcome, sampler, False, Clock())
    assert chosen.plan == sampled[0].plan
    assert len(sampled) > len(without), "no plan for heavier steps was looked at"
    assert sampled[0].mean_s <= min(entry.mean_s for entry in sampled) * (1 + 2 * HEAVY_MARGIN)
    assert chosen.lower_bound_s == outcome.lower_bound_s
    assert chosen.step_time_s >= outcome.step_time_s * (1 - 1e-9)
    fresh = [
        simulate(
            plan, workload, problem.cost_model, 40, first_step=500, num_buckets=6
        ).step_time_s.mean()
        for plan in (chosen.plan, plain.plan)
    ]
    assert fresh[0] <= fresh[1] * (1 + HEAVY_MARGIN)
    if chosen.plan != outcome.plan:
        assert any("best for the batch" in note for note in chosen.notes)
