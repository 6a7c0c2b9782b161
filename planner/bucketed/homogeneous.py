"""The best homogeneous plan: replicas of one layout only (LobRA's Task-Fused baseline)."""

from __future__ import annotations

from lobra.planner.bucketed.problem import Problem
from lobra.planner.clock import Clock
from lobra.planner.outcome import Outcome


def find(problem: Problem) -> Outcome | None:
    """Return the fastest plan of one layout, with as many replicas of it as can be placed.

    None if no layout that holds the longest bucket can be placed.
    """
    clock = Clock()
    plans = [problem.plan(replicas) for replicas in problem.fleet.homogeneous(problem.longest)]
    times_s = [problem.evaluate(plan).step_time_s for plan in plans]
    if not plans:
        return None
    time_s, plan = min(zip(times_s, plans, strict=True), key=lambda pair: pair[0])
    return Outcome(plan, time_s, 0.0, "HOMOGENEOUS", clock.elapsed_s, proven=True)
