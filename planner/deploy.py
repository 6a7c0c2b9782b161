"""Deployment: from profiles, a workload and a number of GPUs to a plan with what is known of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lobra.common.errors import ConfigError
from lobra.common.version import installed_version
from lobra.layout.placement import place
from lobra.layout.plan import Plan
from lobra.planner.bucketed import exact, homogeneous, lobra
from lobra.planner.bucketed.expected_batch import ExpectedBatch, expect
from lobra.planner.bucketed.fluid_planner import FluidPlanner
from lobra.planner.bucketed.problem import Problem
from lobra.planner.candidates import Candidates, all_candidates, propose
from lobra.planner.clock import Clock
from lobra.planner.outcome import Outcome, Progress, silent
from lobra.planner.sampling import Sampled, Sampler, compare
from lobra.planner.step_time import sync_time_s
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
    clock, limit_s = Clock(options.time_limit_s), options.time_limit_s
    exactly = options.pattern == "EXACT"
    if limit_s is not None and exactly:
        limit_s *= SEARCH_SHARE
    outcome = PATTERNS[options.pattern](problem, limit_s, progress)
    if outcome.lower_bound_s == 0.0:  # the pattern proves nothing about other plans' exact time
        bound = FluidPlanner(everything).minimum(outcome.step_time_s)
        outcome = replace(outcome, lower_bound_s=min(bound.step_time_s, outcome.step_time_s))
    sampler = Sampler(workload, problem, options.num_buckets, options.static_buckets, progress)
    outcome, sampled = compare(outcome, sampler, exactly, clock)
    return Deployment(outcome, batch, candidates, same, problem, sampled)


def plan_entries(plan: Plan) -> list[dict[str, Any]]:
    """Return the plan as `lobra plan --json` lists it; memory only where it is not keep."""
    return [
        {
            "tp": group.layout.tp,
            "pp": group.layout.pp,
            "replicas": group.replicas,
            "max_tokens": group.max_tokens,
            **({"memory": group.layout.memory} if group.layout.memory != "keep" else {}),
        }
        for group in plan.groups
    ]


def as_json(deployment: Deployment) -> dict[str, Any]:
    """Return the object that `lobra plan --json` prints."""
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
    """Return the best homogeneous plan and its step time for `as_json`, None if there is none."""
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
        "ranks": place(outcome.plan, gpus_per_node).as_lists(),
        "version": installed_version(),
    }
    return replace(outcome.plan, meta=meta)


def _profile_meta(meta: Any) -> dict[str, str]:
    return {"file": str(meta.get("path", "")), "digest": str(meta.get("digest", ""))}
