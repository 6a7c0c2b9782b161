"""Deployment of padded steps: a pattern's plan for the expected batch, and sampled steps of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lobra.planner.bucketed import exact, homogeneous, lobra
from lobra.planner.bucketed.expected_batch import expect
from lobra.planner.bucketed.fluid_planner import FluidPlanner
from lobra.planner.bucketed.problem import Problem
from lobra.planner.bucketed.rates import certified
from lobra.planner.bucketed.roles import longest_alone, roles
from lobra.planner.candidates import all_candidates, propose
from lobra.planner.clock import Clock
from lobra.planner.deployment import Deployment, Options
from lobra.planner.outcome import SIMPLER, Outcome, Progress, SampledMean, silent
from lobra.planner.roles import saturation
from lobra.planner.sampling import Sampled, Sampler, compare
from lobra.planner.workload import Workload
from lobra.profiler.cost_model import CostModel
from lobra.profiler.profiles import MemoryProfile

SEARCH_SHARE = 0.6  # of a given time limit; the rest is for sampled steps
Solver = Callable[[Problem, float | None, Progress], Outcome]
PATTERNS: dict[str, Solver] = {
    "EXACT": exact.solve,
    "BALANCE": lobra.balance,
    "GROUP": lobra.group,
    "PRUNE": lobra.prune,
}


def deploy_bucketed(
    workload: Workload,
    memory: MemoryProfile,
    cost_model: CostModel,
    num_gpus: int,
    options: Options,
    progress: Progress = silent,
    refused: Callable[[int, int], str | None] | None = None,
) -> Deployment:
    """Return the plan of the chosen pattern; see ``planner.deploy.deploy``.

    EXACT takes a plan of one layout if its mixture is not 1 % faster on sampled steps.
    """
    batch = expect(workload, options.num_buckets, options.static_buckets)
    longest = int(batch.buckets[batch.counts > 0].max())
    candidates = all_candidates(
        memory, cost_model, num_gpus, longest, options.gpus_per_node, refused
    )
    everything = problem = Problem(
        batch.counts,
        batch.buckets,
        candidates.chosen,
        num_gpus,
        cost_model,
        options.gpus_per_node,
    )
    same = homogeneous.find(problem)
    if options.proposal:
        candidates = propose(candidates, cost_model)
        problem = replace(problem, candidates=candidates.chosen)
    clock, limit_s = Clock(options.time_limit_s), options.time_limit_s
    exactly = options.pattern == "EXACT"
    if limit_s is not None and exactly:
        limit_s *= SEARCH_SHARE
    outcome = PATTERNS[options.pattern](problem, limit_s, progress)
    if outcome.lower_bound_s == 0.0:  # the pattern proves nothing about other plans' exact time
        bound = FluidPlanner(everything).minimum(outcome.step_time_s)
        outcome = replace(outcome, lower_bound_s=min(bound.step_time_s, outcome.step_time_s))
    sampler = Sampler(workload, problem, options.num_buckets, options.static_buckets, progress)
    outcome, compared = compare(outcome, sampler, exactly, clock)
    if exactly and same is not None:
        outcome, compared = _simpler(outcome, compared, same, sampler)
    sampled = next(entry for entry in compared if entry.plan == outcome.plan)
    progress("a bound on the sampled steps of any plan")
    bound_s = certified(sampler.step_buckets(len(sampled.step_time_s)), everything, sampled, clock)
    outcome = outcome.noted(saturation(outcome.step_time_s, *longest_alone(problem)))
    return Deployment(
        outcome=outcome,
        homogeneous=same,
        sampled=SampledMean(
            len(sampled.step_time_s),
            sampled.mean_s,
            sampled.mean_s * outcome.plan.num_gpus,
            bound_s,
        ),
        compared=compared,
        roles=tuple(roles(problem, outcome.plan)),
        padding_ratio=batch.padding_ratio,
        candidates=candidates,
        problem=problem,
        batching="bucketed",
    )


def _simpler(
    outcome: Outcome, compared: tuple[Sampled, ...], same: Outcome, sampler: Sampler
) -> tuple[Outcome, tuple[Sampled, ...]]:
    """Return the homogeneous plan where the plan is not worth a mixture of layouts."""
    mean_s = compared[0].mean_s
    within_s = outcome.step_time_s / (1 - 2 * SIMPLER)
    if outcome.plan == same.plan or same.step_time_s > within_s:
        return outcome, compared
    other = sampler.run(same.plan, len(compared[0].step_time_s))
    if other.mean_s * (1 - SIMPLER) > mean_s:
        return outcome, (*compared, other)
    note = (
        f"one layout alone: the best mixture, {outcome.plan}, is {1 - mean_s / other.mean_s:.1%} "
        f"faster on average, which does not pay for it"
    )
    plain = replace(outcome, plan=same.plan, step_time_s=same.step_time_s).noted(note)
    return plain, (other, *compared)
