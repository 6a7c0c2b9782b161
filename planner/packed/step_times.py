"""What sampled steps take on plans, dispatched by several processes where there is much to do."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from lobra.layout.plan import Plan
from lobra.planner.clock import Clock
from lobra.planner.packed.problem import PackedProblem

MUCH = 20_000  # sequences of all steps: from there on processes pay
MOST_PROCESSES = 8
PARTS = 4  # of the steps, for each process: they do not take equally long

StepTimes = Callable[[Plan, Sequence[int]], np.ndarray]

_problem: PackedProblem | None = None  # of a process forked for it


@contextmanager
def step_times(problem: PackedProblem, clock: Clock) -> Iterator[StepTimes]:
    """Provide `PackedProblem.step_s`, by as many processes as there are processors.

    What they spend counts on the clock as if they were one: the mean of theirs.
    """
    processes = min(len(os.sched_getaffinity(0)), MOST_PROCESSES) if _can_fork() else 1
    if processes < 2 or sum(map(len, problem.steps)) < MUCH:
        yield problem.step_s
        return
    fork = multiprocessing.get_context("fork")  # what is inherited need not be sent
    with fork.Pool(processes, _begin, (problem,)) as pool:

        def step_s(plan: Plan, steps: Sequence[int]) -> np.ndarray:
            each = -(-len(steps) // (PARTS * processes))
            parts = [steps[start : start + each] for start in range(0, len(steps), each)]
            found = pool.starmap(_step_s, [(plan, part) for part in parts], chunksize=1)
            clock.spend(sum(seconds for _, seconds in found) / min(processes, len(parts)))
            return np.concatenate([step_s for step_s, _ in found])

        yield step_s


def _can_fork() -> bool:
    return sys.platform == "linux" and not multiprocessing.current_process().daemon


def _begin(problem: PackedProblem) -> None:
    global _problem
    _problem = problem
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that began the search ends them


def _step_s(plan: Plan, steps: Sequence[int]) -> tuple[np.ndarray, float]:
    """Return float64 [steps], the seconds that steps take, and processor seconds to find them."""
    assert _problem is not None
    start_s = time.process_time()
    step_s = _problem.step_s(plan, steps)
    return step_s, time.process_time() - start_s
