"""The best homogeneous plan: replicas of one layout only (LobRA's Task-Fused baseline)."""

from __future__ import annotations

import numpy as np

from planner.planners.base import Clock, Outcome, Problem
from tasks.errors import ConfigError


def solve(problem: Problem) -> Outcome:
    """Return the fastest plan of one layout, with as many replicas of it as there are GPUs for.

    Raises
    ------
    ConfigError
        If no layout that holds the longest bucket can be placed.
    """
    clock = Clock()
    longest = int(problem.buckets[problem.counts > 0].max())
    best: Outcome | None = None
    for index, candidate in enumerate(problem.candidates):
        number = problem.num_gpus // candidate.layout.num_gpus
        if candidate.max_tokens < longest or number == 0:
            continue
        replicas = np.zeros(len(problem.candidates), dtype=np.int64)
        replicas[index] = number
        plan = problem.plan(replicas)
        if not problem.can_place(plan):
            continue
        time_s = problem.evaluate(plan).step_time_s
        if best is None or time_s < best.step_time_s:
            best = Outcome(plan, time_s, 0.0, "HOMOGENEOUS", clock.elapsed_s, proven=True)
    if best is None:
        raise ConfigError(
            f"no single layout holds the longest bucket of {longest} tokens on "
            f"{problem.num_gpus} GPUs"
        )
    return best
