"""The best homogeneous plan: replicas of one layout only (LobRA's Task-Fused baseline)."""

from __future__ import annotations

import numpy as np

from lobra.planner.bucketed.problem import Problem
from lobra.planner.clock import Clock
from lobra.planner.outcome import Outcome


def find(problem: Problem) -> Outcome | None:
    """Return the fastest plan of one layout, with as many replicas of it as can be placed.

    None if no layout that holds the longest bucket can be placed.
    """
    clock = Clock()
    longest = int(problem.buckets[problem.counts > 0].max())
    best: Outcome | None = None
    for index, candidate in enumerate(problem.candidates):
        if candidate.max_tokens < longest:
            continue
        replicas = np.zeros(len(problem.candidates), dtype=np.int64)
        replicas[index] = problem.num_gpus // candidate.layout.num_gpus
        while replicas[index] and not problem.can_place(problem.plan(replicas)):
            replicas[index] -= 1
        if not replicas[index]:
            continue
        plan = problem.plan(replicas)
        time_s = problem.evaluate(plan).step_time_s
        if best is None or time_s < best.step_time_s:
            best = Outcome(plan, time_s, 0.0, "HOMOGENEOUS", clock.elapsed_s, proven=True)
    return best
