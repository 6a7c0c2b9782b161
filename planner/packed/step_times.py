"""What sampled steps take on plans, dispatched by several processes where there is much to do."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait

import numpy as np

from lobra.layout.plan import Plan
from lobra.planner.clock import Clock
from lobra.planner.packed.problem import PackedProblem

MUCH = 20_000  # sequences of all steps: from there on processes pay
MOST_PROCESSES = 8
PARTS = 4  # of the steps, for each process: they do not take equally long

StepTimes = Callable[[Plan, Sequence[int]], np.ndarray]
Question = tuple[Plan, Sequence[int]]
Answer = tuple[np.ndarray, float]  # the steps' times, and the processor seconds that took


@contextmanager
def step_times(problem: PackedProblem, clock: Clock) -> Iterator[StepTimes]:
    """Provide `PackedProblem.step_s`, by as many processes as there are processors.

    What they spend counts on the clock as if they were one: the mean of theirs. If one is ended
    from outside, as where memory is short, this one goes on alone.
    """
    processes = min(len(os.sched_getaffinity(0)), MOST_PROCESSES) if _can_fork() else 1
    if processes < 2 or sum(map(len, problem.steps)) < MUCH:
        yield problem.step_s
        return
    with _forked(problem, processes) as connections:

        def step_s(plan: Plan, steps: Sequence[int]) -> np.ndarray:
            each = -(-len(steps) // (PARTS * processes))
            parts = [steps[first : first + each] for first in range(0, len(steps), each)]
            try:
                found = _answers(connections, [(plan, part) for part in parts])
            except (EOFError, OSError):
                connections.clear()
            if not connections:
                return problem.step_s(plan, steps)
            clock.spend(sum(seconds for _, seconds in found) / min(processes, len(parts)))
            return np.concatenate([step_s for step_s, _ in found])

        yield step_s


def _can_fork() -> bool:
    return sys.platform == "linux" and not multiprocessing.current_process().daemon


@contextmanager
def _forked(problem: PackedProblem, number: int) -> Iterator[list[Connection]]:
    """Provide connections to so many processes that answer questions about a problem."""
    fork = multiprocessing.get_context("fork")  # what is inherited need not be sent
    connections: list[Connection] = []
    processes = []
    try:
        for _ in range(number):
            own, other = fork.Pipe()
            connections.append(own)
            process = fork.Process(
                target=_answer, args=(problem, other, tuple(connections)), daemon=True
            )
            process.start()
            processes.append(process)
            other.close()
        yield connections
    finally:
        for process in processes:
            process.kill()
            process.join()


def _answers(connections: Sequence[Connection], questions: Sequence[Question]) -> list[Answer]:
    """Return the answer to each question, by whoever is idle; nothing if nobody is there.

    Raises
    ------
    EOFError, OSError
        If a process has ended.
    """
    found: dict[int, Answer] = {}
    idle, asked = list(connections), dict[Connection, int]()
    while idle and len(found) < len(questions):
        for place in range(len(found) + len(asked), len(questions)):
            if not idle:
                break
            asked[connection := idle.pop()] = place
            connection.send(questions[place])
        ready = wait(list(asked))
        for connection in [one for one in asked if one in ready]:
            found[asked.pop(connection)] = connection.recv()
            idle.append(connection)
    return [found[place] for place in sorted(found)]


def _answer(
    problem: PackedProblem, connection: Connection, inherited: Sequence[Connection]
) -> None:
    """Answer questions until the process that asks them ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # that process ends this one
    for other in inherited:
        other.close()  # or nobody would see when it has
    try:
        while True:
            plan, steps = connection.recv()
            start_s = time.process_time()
            step_s = problem.step_s(plan, steps)
            connection.send((step_s, time.process_time() - start_s))
    except (EOFError, OSError):
        return
