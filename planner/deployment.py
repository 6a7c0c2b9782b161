"""A deployment: a plan with what is known of it, as JSON and as the ``meta`` of the plan's file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lobra.common.version import installed_version
from lobra.layout.placement import place
from lobra.layout.plan import Plan
from lobra.layout.sequences import Batching
from lobra.planner.bucketed.problem import Problem
from lobra.planner.candidates import Candidates
from lobra.planner.outcome import Outcome, SampledMean
from lobra.planner.packed.problem import PackedProblem
from lobra.planner.roles import Role
from lobra.planner.sampling import Sampled
from lobra.planner.step_time import sync_time_s
from lobra.profiler.profiles import MemoryProfile


@dataclass(frozen=True)
class Options:
    """How to plan: batching, the pattern, whether layouts are proposed first, and the buckets.

    With ``limits_processor`` the limit is, for packed steps, of processor time (see `Clock`).
    """

    pattern: str = "EXACT"
    batching: Batching = "bucketed"
    proposal: bool = False
    static_buckets: bool = False
    num_buckets: int = 16
    gpus_per_node: int = 8
    time_limit_s: float | None = None
    limits_processor: bool = False


@dataclass(frozen=True, eq=False)
class Deployment:
    """A plan and what is known of it.

    Attributes
    ----------
    outcome
        The plan. Bucketed, its times are of the expected batch; packed, means of sampled steps.
    homogeneous
        The best plan of one layout, likewise; None if there is none.
    sampled
        What the plan takes on average over sampled steps, and what no plan takes less than.
    compared
        The plans that were simulated on all of them, the chosen one among them.
    roles
        What each layout is for.
    padding_ratio
        The part of the tokens computed that are padding.
    candidates, problem, batching
        What was planned for.
    """

    outcome: Outcome
    homogeneous: Outcome | None
    sampled: SampledMean
    compared: tuple[Sampled, ...]
    roles: tuple[Role, ...]
    padding_ratio: float
    candidates: Candidates
    problem: Problem | PackedProblem
    batching: Batching

    @property
    def plan(self) -> Plan:
        """The plan to deploy."""
        return self.outcome.plan

    @property
    def sync_time_s(self) -> float:
        """What synchronising the adapters adds to each step; 0 where it was not profiled."""
        return sync_time_s(self.plan, self.problem.cost_model)

    def with_sync(self, outcome: Outcome) -> Outcome:
        """Return an outcome of these inputs with the adapters' synchronisation in its step time."""
        sync_s = sync_time_s(outcome.plan, self.problem.cost_model)
        return replace(outcome, step_time_s=outcome.step_time_s + sync_s)

    @property
    def buckets(self) -> list[int]:
        """Tokens that sequences of the expected batch are padded to; none where they are packed."""
        return [] if isinstance(self.problem, PackedProblem) else self.problem.buckets.tolist()

    @property
    def expected_batch(self) -> list[int]:
        """Sequences of the expected batch by bucket; none where they are packed."""
        return [] if isinstance(self.problem, PackedProblem) else self.problem.counts.tolist()


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
        "batching": deployment.batching,
        "step_time_s": outcome.step_time_s,
        "sync_time_s": deployment.sync_time_s,
        "gpu_seconds": outcome.gpu_seconds,
        "lower_bound_s": outcome.lower_bound_s,
        "gap": outcome.gap,
        "buckets": deployment.buckets,
        "padding_ratio": deployment.padding_ratio,
        "planner": outcome.planner,
        "planner_time_s": outcome.planner_time_s,
        "objective_s": outcome.objective_s,
        "proven": outcome.proven,
        "complete": outcome.complete,
        "homogeneous": homogeneous_entry(deployment),
        "sampled": deployment.sampled.as_json(),
        "compared": [
            {
                "plan": str(entry.plan),
                "mean_s": entry.mean_s,
                "p50_s": entry.percentile_s(50),
                "p99_s": entry.percentile_s(99),
            }
            for entry in deployment.compared
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
    kept = memory.meta.get("settings", {}).get("base_precision")
    meta = {
        "model": model,
        **({} if kept is None else {"base_precision": kept}),
        "num_gpus": outcome.plan.num_gpus,
        "gpus_per_node": gpus_per_node,
        "batching": deployment.batching,
        "buckets": deployment.buckets,
        "expected_batch": deployment.expected_batch,
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
