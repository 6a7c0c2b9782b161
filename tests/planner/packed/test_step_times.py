"""Steps dispatched by several processes take what they take in one."""

from __future__ import annotations

import multiprocessing
import os
import select
import time

import numpy as np
import pytest

from lobra.layout.layout import Layout
from lobra.planner.candidates import Candidate
from lobra.planner.clock import Clock
from lobra.planner.fleet import Fleet
from lobra.planner.packed import step_times
from lobra.planner.packed.problem import PackedProblem
from tests.planner.support import plain_cost_model


def problem() -> PackedProblem:
    rng = np.random.default_rng(0)
    steps = tuple(rng.integers(20, 900, 60) for _ in range(7))
    candidates = (Candidate(Layout(1, 1), 900), Candidate(Layout(1, 2), 1600))
    return PackedProblem(steps, 900, Fleet(candidates, 4), plain_cost_model())


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_find_what_one_finds(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_times, "MUCH", 100)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(processes)))
    own = problem()
    clock = Clock(100.0, processor=True)
    with step_times.step_times(own, clock) as step_s:
        assert len(multiprocessing.active_children()) == (processes if processes > 1 else 0)
        for replicas in ([4, 0], [2, 1]):
            plan = own.fleet.plan(np.array(replicas))
            assert step_s(plan, range(7)).tolist() == own.step_s(plan, range(7)).tolist()
            assert step_s(plan, [5]).tolist() == own.step_s(plan, [5]).tolist()
    assert not multiprocessing.active_children()


def test_what_processes_spend_counts_on_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_times, "MUCH", 100)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    own = problem()
    clock = Clock(100.0, processor=True)
    spent: list[float] = []
    monkeypatch.setattr(clock, "spend", spent.append)
    with step_times.step_times(own, clock) as step_s:
        step_s(own.fleet.plan(np.array([4, 0])), range(7))
    assert len(spent) == 1 and 0.0 < spent[0] < 100.0
    other = Clock(100.0, processor=True)
    other.spend(60.0)
    assert 39.0 < other.left_s < 40.0


def test_what_an_ended_process_was_asked_is_done_without_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(step_times, "MUCH", 100)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    own = problem()
    plan = own.fleet.plan(np.array([4, 0]))
    with step_times.step_times(own, Clock()) as step_s:
        multiprocessing.active_children()[0].kill()
        assert step_s(plan, range(7)).tolist() == own.step_s(plan, range(7)).tolist()
        assert step_s(plan, [5]).tolist() == own.step_s(plan, [5]).tolist()
    assert not multiprocessing.active_children()


def test_processes_end_with_the_one_that_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_times, "MUCH", 100)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    reading, writing = os.pipe()  # the end to write to is open as long as any of them is there

    def search() -> None:
        with step_times.step_times(problem(), Clock()):
            os.write(writing, bytes(len(multiprocessing.active_children())))
            time.sleep(600)

    searching = multiprocessing.get_context("fork").Process(target=search)
    searching.start()
    os.close(writing)
    assert len(os.read(reading, 9)) == 3
    assert not select.select([reading], [], [], 0)[0]
    searching.kill()
    searching.join()
    assert select.select([reading], [], [], 30)[0]
    assert os.read(reading, 9) == b""
    os.close(reading)
