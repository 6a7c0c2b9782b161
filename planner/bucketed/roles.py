"""A bucketed plan explained: what each layout does in the expected batch, and why it is there."""

from __future__ import annotations

import numpy as np

from lobra.layout.plan import Plan
from lobra.planner.bucketed.problem import Problem
from lobra.planner.bucketed.time_table import plan_tables
from lobra.planner.roles import Role, explained


def roles(problem: Problem, plan: Plan) -> list[Role]:
    """Return every group's role, in the plan's order."""
    result = problem.evaluate(plan)
    taken = np.zeros((len(plan.groups), len(problem.buckets)), dtype=np.int64)
    of_replica = np.repeat(np.arange(len(plan.groups)), [g.replicas for g in plan.groups])
    for replica, batches in enumerate(result.micro_batches):
        for bucket, size in batches:
            taken[of_replica[replica], bucket] += size
    tables = plan_tables(plan, problem.buckets, problem.cost_model, problem.counts)
    rate_s = np.stack([table.rate_s() for table in tables])
    return explained(plan.groups, problem.buckets, taken, rate_s)


def longest_alone(problem: Problem) -> tuple[int, float]:
    """Return the bucket of which one sequence alone takes longest on its best layout, and that."""
    alone_s = np.stack([table.least_s() for table in problem.tables]).min(axis=0)
    bucket = int(np.argmax(np.where(problem.counts > 0, alone_s, 0.0)))
    return int(problem.buckets[bucket]), float(alone_s[bucket])
