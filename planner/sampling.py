"""Plans compared on sampled steps: what they take on average, not for the expected batch alone.

Sampled steps are those that `lobra train` draws with the workload's seed, from the first one on.
The expected batch has one sequence where steps have none or three. Plans that are as good for it
are compared on the same sampled steps; so are plans made for batches with as many long sequences
as come once in a few steps, which may keep more room for those.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from lobra.layout.plan import Plan
from lobra.planner.bucketed import exact
from lobra.planner.bucketed.buckets import bucket_index
from lobra.planner.bucketed.problem import Problem
from lobra.planner.clock import Clock
from lobra.planner.outcome import Outcome, Progress
from lobra.planner.simulate import buckets_of_step, simulate
from lobra.planner.workload import Workload

PLANS, STEPS = 4, 20
STEPS_TO_CONFIRM = 40
GAP, MARGIN = 0.01, 0.002  # within which plans are as good for the batch; a clear difference
HEAVY_MARGIN = 0.01  # what a plan beyond that gap must gain on average
HEAVY_SHARES = (0.8, 0.95)  # of the steps, that have no more long sequences than planned for
HEAVY_STEPS, HEAVY_PLANS = 200, 2
RARE = 16  # a bucket with more sequences varies too little to plan for
HEAVY_EFFORT = 0.25  # of what EXACT takes for the expected batch
MOST_GPUS = 256  # beyond, steps are so large that they differ little


@dataclass(frozen=True, eq=False)
class Sampled:
    """Sampled steps of one plan: float64 [steps] seconds. All plans are given the same steps."""

    plan: Plan
    step_time_s: np.ndarray

    @property
    def mean_s(self) -> float:
        """Mean step time."""
        return float(self.step_time_s.mean())

    def percentile_s(self, share: float) -> float:
        """Return the step time that ``share`` % of the steps do not exceed."""
        return float(np.percentile(self.step_time_s, share))


@dataclass(frozen=True, eq=False)
class Sampler:
    """Simulates plans on the steps of the run; buckets as in ``planner.simulate.simulate``."""

    workload: Workload
    problem: Problem
    num_buckets: int
    static: bool
    progress: Progress

    def run(self, plan: Plan, steps: int, first_step: int = 0) -> Sampled:
        """Return the step times of a plan."""
        self.progress(f"{steps} sampled steps of {plan}")
        run = simulate(
            plan,
            self.workload,
            self.problem.cost_model,
            steps,
            first_step=first_step,
            num_buckets=self.num_buckets,
            static=self.static,
        )
        return Sampled(plan, run.step_time_s)

    def step_buckets(self, steps: int) -> list[np.ndarray]:
        """Return, step by step, int64 [n]: the buckets that its sequences are padded to."""
        padded = []
        for lengths in self.workload.steps(steps):
            buckets = buckets_of_step(lengths, self.num_buckets, self.static, self.workload.longest)
            padded.append(buckets[bucket_index(lengths, buckets)])
        return padded


def compare(
    outcome: Outcome, sampler: Sampler, heavy: bool, clock: Clock
) -> tuple[Outcome, tuple[Sampled, ...]]:
    """Return the outcome with the plan that is best on average, and every plan's sampled steps.

    Rivals are the plans whose own gap to the bound is within 1 %, or within 0.1 % of the plan's
    time, and, if ``heavy``, those made for heavier batches; one of these is taken only if it gains
    1 % on average, on further steps too. The plan taken comes first.
    """
    problem = sampler.problem
    within_s = max(outcome.lower_bound_s / (1 - GAP), outcome.step_time_s * 1.001)
    rivals = [plan for plan, time_s in outcome.alternatives if time_s <= within_s]
    plans = list(dict.fromkeys([outcome.plan, *rivals]))[:PLANS]
    steps = STEPS if problem.num_gpus <= MOST_GPUS else STEPS // 4
    sampled = [sampler.run(plan, steps) for plan in plans]
    best = int(np.argmin([entry.mean_s for entry in sampled]))
    # the expected batch decides unless the samples say otherwise clearly
    if sampled[best].mean_s < sampled[0].mean_s * (1 - MARGIN):
        sampled.insert(0, sampled.pop(best))
    if heavy and problem.num_gpus <= MOST_GPUS:
        for plan in _plans_for_heavier(sampler, plans, clock):
            sampled.append(sampler.run(plan, steps))
        best = int(np.argmin([entry.mean_s for entry in sampled]))
        if sampled[best].mean_s < sampled[0].mean_s * (1 - HEAVY_MARGIN) and clock.left_s > 0:
            # without further steps these were all there are
            was_all = not sampler.workload.draw(steps)
            if was_all or _confirmed(sampler, sampled[0].plan, sampled[best].plan, steps):
                sampled.insert(0, sampled.pop(best))
    if sampled[0].plan == outcome.plan:
        return outcome, tuple(sampled)
    planned = next(entry for entry in sampled if entry.plan == outcome.plan)
    note = (
        f"on {len(planned.step_time_s)} sampled steps {sampled[0].mean_s:.4g} s on average, "
        f"against {planned.mean_s:.4g} s of {outcome.plan}, best for the batch"
    )
    known = dict(outcome.alternatives)
    plan = sampled[0].plan
    step_time_s = known.get(plan) or problem.evaluate(plan).step_time_s
    changed = replace(
        outcome, plan=plan, step_time_s=step_time_s, notes=(*outcome.notes, note), proven=False
    )
    return changed, tuple(sampled)


def _confirmed(sampler: Sampler, plan: Plan, other: Plan, first_step: int) -> bool:
    """Return whether the other plan is clearly better on further steps too."""
    one, two = (sampler.run(each, STEPS_TO_CONFIRM, first_step) for each in (plan, other))
    return two.mean_s < one.mean_s * (1 - HEAVY_MARGIN)


def _plans_for_heavier(sampler: Sampler, known: list[Plan], clock: Clock) -> list[Plan]:
    """Return plans, not yet known, that EXACT makes for batches with more long sequences."""
    problem, found = sampler.problem, []
    limit_s = HEAVY_EFFORT * exact.default_limit_s(problem.num_gpus)
    for counts in heavier_batches(problem, sampler.workload):
        if clock.left_s <= limit_s:
            break
        sampler.progress("plans for steps with more long sequences")
        outcome = exact.solve(replace(problem, counts=counts), effort=HEAVY_EFFORT)
        plans = [outcome.plan, *(plan for plan, _ in outcome.alternatives)]
        found += [plan for plan in dict.fromkeys(plans) if plan not in known][:HEAVY_PLANS]
    return list(dict.fromkeys(found))


def heavier_batches(problem: Problem, workload: Workload) -> list[np.ndarray]:
    """Return int64 [R] each: the expected batch with its rare buckets as in heavier steps.

    A bucket with at most 16 sequences gets as many as 80 % (95 %) of the steps do not exceed.
    """
    drawn = np.stack(
        [
            np.bincount(bucket_index(lengths, problem.buckets), minlength=len(problem.buckets))
            for lengths in workload.steps(HEAVY_STEPS)
        ]
    )
    rare = problem.counts <= RARE
    batches: list[np.ndarray] = []
    for share in HEAVY_SHARES:
        heavy = np.ceil(np.quantile(drawn, share, axis=0)).astype(np.int64)
        counts = np.where(rare, np.maximum(problem.counts, heavy), problem.counts)
        if not any((counts == known).all() for known in [problem.counts, *batches]):
            batches.append(counts)
    return batches
