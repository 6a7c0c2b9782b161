"""Deployment of packed steps: the plan best on average over sampled ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lobra.layout.plan import Plan
from lobra.layout.sequences import IntArray
from lobra.planner.candidates import all_candidates, propose
from lobra.planner.clock import Clock
from lobra.planner.deployment import Deployment, Options
from lobra.planner.fleet import Fleet
from lobra.planner.outcome import SAME, SIMPLER, Outcome, Progress, SampledMean, silent
from lobra.planner.packed import exact
from lobra.planner.packed.problem import PackedProblem
from lobra.planner.packed.roles import roles
from lobra.planner.packed.step_times import step_times
from lobra.planner.roles import saturation
from lobra.planner.sampling import Sampled
from lobra.planner.step_time import sync_time_s
from lobra.planner.workload import Workload
from lobra.profiler.cost_model import CostModel
from lobra.profiler.profiles import MemoryProfile

SEQUENCES = 160_000  # of all sampled steps: large steps differ little
FEWEST_STEPS, MOST_STEPS = 6, 100
EXPLAINED_STEPS = 8
MANY = 0.25  # of the steps that wait for one sequence: from there on it is said
FRESH = 0.01  # relative: what further steps may differ by without a note


def deploy_packed(
    workload: Workload,
    memory: MemoryProfile,
    cost_model: CostModel,
    num_gpus: int,
    options: Options,
    progress: Progress = silent,
    refused: Callable[[int, int], str | None] | None = None,
) -> Deployment:
    """Return the plan for the steps that training will draw; see ``planner.deploy.deploy``.

    A plan of one layout is taken if no mixture is more than 1 % faster.
    """
    candidates = all_candidates(
        memory, cost_model, num_gpus, workload.longest, options.gpus_per_node, refused
    )
    if options.proposal:
        candidates = propose(candidates, cost_model)
    fleet = Fleet(candidates.chosen, num_gpus, options.gpus_per_node)
    steps = sampled_steps(workload)
    problem = PackedProblem(steps, workload.longest, fleet, cost_model)
    limit_s = options.time_limit_s
    clock = None if limit_s is None else Clock(limit_s, options.limits_processor)
    found = exact.solve(problem, clock, progress)
    mean_s = {plan: float(step_s.mean()) for plan, step_s in found.step_s.items()}
    plan = min(mean_s, key=lambda each: mean_s[each])
    notes = []
    if not found.complete:
        notes.append(f"stopped after {found.seconds:.1f} s; --time-limit gives it more")
    same, mean_s = found.homogeneous, {found.homogeneous: found.homogeneous_s} | mean_s
    if plan != same and mean_s[same] * (1 - SIMPLER) <= mean_s[plan]:
        gain = 1.0 - mean_s[plan] / mean_s[same]
        notes.append(
            f"one layout alone: the best mixture, {plan}, is {gain:.1%} faster on average, which "
            f"does not pay for it"
        )
        plan = same
    notes += _waiting(found.step_s.get(plan), sync_time_s(plan, cost_model), problem)
    notes += _fresh_steps(plan, mean_s[plan], problem, workload)
    own_roles, padding = roles(problem, plan, range(min(EXPLAINED_STEPS, len(steps))))

    def outcome_of(each: Plan, name: str) -> Outcome:
        own_s = mean_s[each] - sync_time_s(each, cost_model)
        bound_s = min(found.lower_bound_s, own_s)
        proven = bound_s >= own_s * (1 - exact.TARGET_GAP)
        return Outcome(
            each, own_s, bound_s, name, found.seconds, proven=proven, complete=found.complete
        )

    outcome = outcome_of(plan, "EXACT")
    return Deployment(
        outcome=outcome.noted(*notes),
        homogeneous=outcome_of(same, "HOMOGENEOUS"),
        sampled=SampledMean(
            len(steps), mean_s[plan], mean_s[plan] * plan.num_gpus, found.lower_bound_s
        ),
        compared=tuple(Sampled(each, step_s) for each, step_s in found.step_s.items()),
        roles=tuple(own_roles),
        padding_ratio=padding,
        candidates=candidates,
        problem=problem,
        batching="packed",
    )


def sampled_steps(workload: Workload) -> tuple[IntArray, ...]:
    """Return the lengths of the first steps of a run, int64 [n] each; the fewer, the larger."""
    number = SEQUENCES // sum(workload.batch_sizes.values())
    return tuple(workload.steps(min(max(number, FEWEST_STEPS), MOST_STEPS)))


def _waiting(step_s: np.ndarray | None, sync_s: float, problem: PackedProblem) -> list[str]:
    """Return a note if steps take as long as one of their sequences alone, on average or many."""
    if step_s is None:  # of a plan that was only estimated
        return []
    of_lengths_s = np.stack([rates.alone_s for rates in problem.rates]).min(axis=0)
    alone_s = problem.longest_alone_s(of_lengths_s)
    own_s = step_s - sync_s
    longest = int(problem.lengths[-1])
    if note := saturation(float(own_s.mean()), longest, float(alone_s.mean())):
        return [note]
    share = float((own_s <= alone_s * (1.0 + SAME)).mean())
    if share < MANY:
        return []
    return [
        f"{share:.0%} of the steps take as long as one of their sequences alone: these gain "
        f"nothing by more GPUs"
    ]


def _fresh_steps(
    plan: Plan, mean_s: float, problem: PackedProblem, workload: Workload
) -> list[str]:
    """Return a note if further steps take longer or shorter on average."""
    number = len(problem.steps)
    fresh = tuple(workload.steps(-(-number // 2), first=number))
    if not fresh:  # the run ends before
        return []
    further = PackedProblem(fresh, problem.longest, problem.fleet, problem.cost_model)
    with step_times(further, Clock()) as step_s:
        fresh_s = float(np.mean(step_s(plan, range(len(fresh)))))
    if abs(fresh_s / mean_s - 1.0) <= FRESH:
        return []
    return [
        f"on {len(fresh)} further steps {fresh_s:.4g} s on average, "
        f"{fresh_s / mean_s - 1.0:+.1%}: steps differ"
    ]
