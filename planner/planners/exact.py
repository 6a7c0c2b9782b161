"""EXACT: a plan, a lower bound no plan can beat, and the gap between them."""

from __future__ import annotations

import numpy as np

from planner.planners import homogeneous
from planner.planners.base import Clock, Outcome, Problem, Progress, silent
from planner.planners.relaxation import FluidPlanner


def solve(
    problem: Problem, time_limit_s: float | None = None, progress: Progress = silent
) -> Outcome:
    """Return the best plan found and a certified lower bound."""
    clock = Clock(time_limit_s)
    start = homogeneous.solve(problem)
    relaxation = FluidPlanner(problem)
    skeleton = relaxation.minimum(start.step_time_s)
    progress(f"fluid bound {skeleton.step_time_s:.3f} s")
    best_plan, best_s = start.plan, start.step_time_s
    seen = set()
    for slack in (0.0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08):
        found = relaxation.gpus(skeleton.step_time_s * (1.0002 + slack))
        if found is None or clock.left_s <= 0:
            continue
        replicas = _filled(problem, found[1])
        if tuple(replicas) in seen:
            continue
        seen.add(tuple(replicas))
        plan = problem.plan(replicas)
        if not problem.can_place(plan):
            continue
        time_s = problem.evaluate(plan).step_time_s
        if time_s < best_s:
            best_plan, best_s = plan, time_s
            progress(f"{plan}: {time_s:.3f} s")
    return Outcome(best_plan, best_s, skeleton.step_time_s, "EXACT", clock.elapsed_s)


def _filled(problem: Problem, replicas: np.ndarray) -> np.ndarray:
    """Use idle GPUs for more replicas of the layouts already there, the largest first."""
    replicas = replicas.copy()
    left = problem.num_gpus - int(replicas @ problem.sizes)
    for index in np.argsort(-problem.sizes, kind="stable"):
        while replicas[index] and problem.sizes[index] <= left:
            replicas[index] += 1
            left -= int(problem.sizes[index])
    return replicas
