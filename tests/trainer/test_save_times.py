"""When checkpoints are due: by steps, at the end, or by the clock within a share of the time."""

from __future__ import annotations

import pytest

from lobra.trainer import save_times
from lobra.trainer.save_times import PERIOD_S, SHARE, SaveTimes


def test_by_steps_and_at_the_end() -> None:
    every = SaveTimes(3, None)
    assert [step for step in range(1, 10) if every.is_due(step, is_end=False)] == [3, 6, 9]
    never = SaveTimes(0, None)
    assert not any(never.is_due(step, is_end=False) for step in range(1, 100))
    assert never.is_due(7, is_end=True)
    never.saved(7, 1.0)
    assert not never.is_due(7, is_end=True), "there is one already"
    assert not SaveTimes(3, 6).is_due(6, is_end=True), "the run goes on from it"


def test_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(save_times.time, "monotonic", lambda: now[0])
    times = SaveTimes(None, None)
    now[0] = PERIOD_S - 1
    assert not times.is_due(1, is_end=False)
    now[0] = PERIOD_S
    assert times.is_due(2, is_end=False)
    slow_s = PERIOD_S  # a checkpoint that takes as long as the period
    times.saved(2, slow_s)
    now[0] += slow_s / SHARE - 1
    assert not times.is_due(50, is_end=False)
    now[0] += 1
    assert times.is_due(50, is_end=False)


def test_one_that_failed_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [PERIOD_S]
    monkeypatch.setattr(save_times.time, "monotonic", lambda: now[0])
    times, every = SaveTimes(None, None), SaveTimes(2, None)
    now[0] += PERIOD_S
    assert times.is_due(2, is_end=False)
    times.failed()
    every.failed()
    assert not times.is_due(3, is_end=False), "not at every step"
    now[0] += PERIOD_S
    assert times.is_due(4, is_end=False)
    assert every.is_due(4, is_end=False)
    assert times.is_due(3, is_end=True), "at the end in any case"
