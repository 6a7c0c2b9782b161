"""The plan explained: what each layout does in the expected batch, and why it is there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lobra.layout.plan import Plan, ReplicaGroup
from lobra.planner.bucketed.problem import Problem
from lobra.planner.bucketed.time_table import plan_tables
from lobra.planner.outcome import SAME, Outcome


@dataclass(frozen=True)
class Role:
    """One replica group's part in the expected batch.

    Attributes
    ----------
    group
        The replicas.
    shortest, longest
        The buckets it takes, in tokens (0 if none).
    tokens_share
        Its part of the batch's padded tokens, 0 to 1.
    reason
        Why it is there, one clause.
    """

    group: ReplicaGroup
    shortest: int
    longest: int
    tokens_share: float
    reason: str


def roles(problem: Problem, plan: Plan) -> list[Role]:
    """Return every group's role, in the plan's order."""
    result = problem.evaluate(plan)
    taken = np.zeros((len(plan.groups), len(problem.buckets)), dtype=np.int64)
    of_replica = np.repeat(np.arange(len(plan.groups)), [g.replicas for g in plan.groups])
    for replica, batches in enumerate(result.micro_batches):
        for bucket, size in batches:
            taken[of_replica[replica], bucket] += size
    tables = plan_tables(plan, problem.buckets, problem.cost_model, problem.counts)
    sizes = np.array([g.layout.num_gpus for g in plan.groups])
    gpu_seconds = np.stack([table.rate_s() for table in tables]) * sizes[:, None]
    tokens = taken * problem.buckets[None, :]
    found = []
    for index, group in enumerate(plan.groups):
        buckets = np.flatnonzero(taken[index])
        if not len(buckets):
            found.append(Role(group, 0, 0, 0.0, "spare: it takes nothing of the expected batch"))
            continue
        share = float(tokens[index].sum() / tokens.sum())
        capacity = max((g.max_tokens for g in plan.groups if g is not group), default=0)
        reason = _reason(index, buckets, tokens[index], gpu_seconds, problem.buckets, capacity)
        lengths = problem.buckets[buckets]
        found.append(Role(group, int(lengths.min()), int(lengths.max()), share, reason))
    return found


def saturation(problem: Problem, outcome: Outcome) -> str | None:
    """Return a sentence if one sequence alone takes as long as the step, else None.

    Then further replicas gain nothing: only layouts that are faster for that sequence would.
    """
    alone_s = np.stack([table.least_s() for table in problem.tables]).min(axis=0)
    alone_s = np.where(problem.counts > 0, alone_s, 0.0)
    bucket = int(np.argmax(alone_s))
    if outcome.step_time_s > alone_s[bucket] * (1 + SAME):
        return None
    return (
        f"a single sequence of {problem.buckets[bucket]} tokens takes as long as the step, "
        f"{alone_s[bucket]:.4g} s: more GPUs gain nothing with these layouts, and fewer may do"
    )


def _reason(
    index: int,
    mine: np.ndarray,
    tokens: np.ndarray,
    gpu_seconds: np.ndarray,
    buckets: np.ndarray,
    others_capacity: int,
) -> str:
    others = np.delete(gpu_seconds, index, axis=0)
    if not len(others):
        return "the only layout of the plan"
    if not np.isfinite(others[:, mine]).any(axis=0).all():
        return f"the only one that holds sequences beyond {others_capacity} tokens"
    main = int(mine[np.argmax(tokens[mine])])
    rival = float(others[:, main].min())
    gain = rival / float(gpu_seconds[index, main]) - 1.0
    if gain > 1e-6:
        return f"others take {gain:.0%} more GPU time for sequences of {buckets[main]} tokens"
    return "takes what the cheaper layouts have no room for, so that all end together"
