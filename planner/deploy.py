"""Deployment: from profiles, a workload and a number of GPUs to a plan with what is known of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from planner.candidates import Candidates, all_candidates, propose
from planner.evaluate import sync_time_s
from planner.placement import place
from planner.plan import Plan
from planner.planners import exact, homogeneous, lobra
from planner.planners.base import Outcome, Problem, Progress, silent
from planner.planners.relaxation import FluidPlanner
from planner.simulate import simulate
from planner.workload import ExpectedBatch, Workload, expect
from profiler.cost_model import CostModel
from profiler.profiles import MemoryProfile
from tasks.errors import ConfigError
from tasks.version import installed_version

SAMPLED_PLANS, SAMPLED_STEPS = 4, 20
SAMPLED_GAP, SAMPLED_MARGIN = 0.01, 0.002
Solver = Callable[[Problem, float | None, Progress], Outcome]
PATTERNS: dict[str, Solver] = {
    "EXACT": exact.solve,
    "BALANCE": lobra.balance,
    "GROUP": lobra.group,
    "PRUNE": lobra.prune,
}


@dataclass(frozen=True)
class Options:
    """How to plan: the pattern, whether layouts are proposed first, and the buckets."""

    pattern: str = "EXACT"
    proposal: bool = False
    static_buckets: bool = False
    num_buckets: int = 16
    gpus_per_node: int = 8
    time_limit_s: float | None = None


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
class Deployment:
    """A plan, the batch it was made for, the candidates and the best homogeneous plan."""

    outcome: Outcome
    batch: ExpectedBatch
    candidates: Candidates
    homogeneous: Outcome | None
    problem: Problem
    sampled: tuple[Sampled, ...] = ()

    @property
    def plan(self) -> Plan:
        """The plan to deploy."""
        return self.outcome.plan

    @property
    def sync_time_s(self) -> float:
        """What synchronising the adapters adds to each step; 0 where it was not profiled."""
        return sync_time_s(self.plan, self.problem.cost_model)


def deploy(
    workload: Workload,
    memory: MemoryProfile,
    cost_model: CostModel,
    num_gpus: int,
    options: Options,
    progress: Progress = silent,
    refused: Callable[[int, int], str | None] | None = None,
) -> Deployment:
    """Return the plan of the chosen pattern for the workload's expected batch.

    ``refused`` says, for (tp, pp), why the model cannot run on a layout, or None.

    Raises
    ------
    ConfigError
        If the inputs do not allow a plan, see ``all_candidates``, or the pattern is unknown.
    """
    if options.pattern not in PATTERNS:
        known = ", ".join(PATTERNS)
        raise ConfigError(f"pattern {options.pattern!r}: known are {known}")
    if options.time_limit_s is not None and not options.time_limit_s > 0:
        raise ConfigError(f"--time-limit: {options.time_limit_s}; a positive number of seconds")
    batch = expect(workload, options.num_buckets, options.static_buckets)
    longest = int(batch.buckets[batch.counts > 0].max())
    candidates = all_candidates(
        memory, cost_model, num_gpus, longest, options.gpus_per_node, refused
    )
    problem = Problem(
        batch.counts,
        batch.buckets,
        candidates.chosen,
        num_gpus,
        cost_model,
        options.gpus_per_node,
    )
    everything = problem
    same = homogeneous.find(problem)
    if options.proposal:
        candidates = propose(candidates, cost_model)
        problem = replace(problem, candidates=candidates.chosen)
    outcome = PATTERNS[options.pattern](problem, options.time_limit_s, progress)
    if outcome.lower_bound_s == 0.0:  # the pattern proves nothing about other plans' exact time
        bound = FluidPlanner(everything).minimum(outcome.step_time_s)
        outcome = replace(outcome, lower_bound_s=min(bound.step_time_s, outcome.step_time_s))
    outcome, sampled = _compare_sampled(outcome, workload, options, problem, progress)
    return Deployment(outcome, batch, candidates, same, problem, sampled)


def _compare_sampled(
    outcome: Outcome, workload: Workload, options: Options, problem: Problem, progress: Progress
) -> tuple[Outcome, tuple[Sampled, ...]]:
    """Simulate the plan and those as good for the expected batch; return the best on average.

    As good are those whose own gap to the bound is within 1 %, or within 0.1 % of the plan's time.
    """
    within_s = max(outcome.lower_bound_s / (1 - SAMPLED_GAP), outcome.step_time_s * 1.001)
    rivals = [
        (plan, time_s)
        for plan, time_s in outcome.alternatives
        if time_s <= within_s and plan != outcome.plan
    ]
    plans = [(outcome.plan, outcome.step_time_s), *rivals][:SAMPLED_PLANS]
    steps = SAMPLED_STEPS if problem.num_gpus <= 256 else SAMPLED_STEPS // 4
    sampled = []
    for plan, _ in plans:
        progress(f"sampled steps of {plan}")
        run = simulate(
            plan,
            workload,
            problem.cost_model,
            steps,
            num_buckets=options.num_buckets,
            static=options.static_buckets,
        )
        sampled.append(Sampled(plan, run.step_time_s))
    best = int(np.argmin([entry.mean_s for entry in sampled]))
    # the expected batch decides unless the samples say otherwise clearly
    if sampled[best].mean_s < sampled[0].mean_s * (1 - SAMPLED_MARGIN):
        first = f"on {steps} sampled steps {sampled[best].mean_s:.4g} s on average, "
        note = first + f"against {sampled[0].mean_s:.4g} s of {plans[0][0]}, best for the batch"
        outcome = replace(
            outcome,
            plan=plans[best][0],
            step_time_s=plans[best][1],
            notes=(*outcome.notes, note),
            proven=False,
        )
        sampled.insert(0, sampled.pop(best))
    return outcome, tuple(sampled)


def plan_entries(plan: Plan) -> list[dict[str, int]]:
    """Return the plan as the contract's JSON lists it."""
    return [
        {
            "tp": group.layout.tp,
            "pp": group.layout.pp,
            "replicas": group.replicas,
            "max_tokens": group.max_tokens,
        }
        for group in plan.groups
    ]


def as_json(deployment: Deployment) -> dict[str, Any]:
    """Return the contract's JSON object."""
    outcome = deployment.outcome
    return {
        "plan": plan_entries(outcome.plan),
        "num_gpus": outcome.plan.num_gpus,
        "step_time_s": outcome.step_time_s,
        "sync_time_s": deployment.sync_time_s,
        "gpu_seconds": outcome.gpu_seconds,
        "lower_bound_s": outcome.lower_bound_s,
        "gap": outcome.gap,
        "buckets": [int(bucket) for bucket in deployment.batch.buckets],
        "padding_ratio": deployment.batch.padding_ratio,
        "planner": outcome.planner,
        "planner_time_s": outcome.planner_time_s,
        "objective_s": outcome.objective_s,
        "proven": outcome.proven,
        "homogeneous": homogeneous_entry(deployment),
        "sampled": [
            {
                "plan": str(entry.plan),
                "steps": len(entry.step_time_s),
                "mean_s": entry.mean_s,
                "p50_s": entry.percentile_s(50),
                "p99_s": entry.percentile_s(99),
            }
            for entry in deployment.sampled
        ],
        "notes": [*outcome.notes],
        "dropped_layouts": list(deployment.candidates.dropped),
    }


def homogeneous_entry(deployment: Deployment) -> dict[str, Any] | None:
    """Return the best homogeneous plan as the contract's JSON has it, None if there is none."""
    same = deployment.homogeneous
    if same is None:
        return None
    return {"plan": plan_entries(same.plan), "step_time_s": round(same.step_time_s, 6)}


def plan_with_meta(
    deployment: Deployment, model: str, memory: MemoryProfile, gpus_per_node: int
) -> Plan:
    """Return the plan with the ``meta`` map its file carries, its rank map included."""
    outcome = deployment.outcome
    cost_model = deployment.problem.cost_model
    ranks = place(outcome.plan, gpus_per_node)
    meta = {
        "model": model,
        "num_gpus": outcome.plan.num_gpus,
        "gpus_per_node": gpus_per_node,
        "buckets": [int(bucket) for bucket in deployment.batch.buckets],
        "expected_batch": [int(count) for count in deployment.batch.counts],
        "step_time_s": round(outcome.step_time_s, 6),
        "sync_time_s": round(deployment.sync_time_s, 6),
        "lower_bound_s": round(outcome.lower_bound_s, 6),
        "gap": round(outcome.gap, 6),
        "planner": outcome.planner,
        "homogeneous": homogeneous_entry(deployment),
        "cost_model": cost_model.kind,
        "time_profile": _profile_meta(cost_model.meta),
        "memory_profile": _profile_meta({"path": str(memory.path), "digest": memory.digest}),
        "ranks": [[list(stage) for stage in replica] for replica in ranks],
        "version": installed_version(),
    }
    return replace(outcome.plan, meta=meta)


def _profile_meta(meta: Any) -> dict[str, str]:
    return {"file": str(meta.get("path", "")), "sha256": str(meta.get("digest", ""))}
