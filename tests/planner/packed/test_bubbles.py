"""Pipelines do not take sequences whose bubbles cost more than they gain."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lobra.layout.layout import Layout
from lobra.layout.plan import Plan, ReplicaGroup, make_plan
from lobra.layout.sequences import IntArray
from lobra.planner.packed import dispatch
from lobra.planner.packed.dispatch import dispatch_packed
from lobra.planner.packed.minorant import Minorant
from lobra.planner.packed.step_work import Alike, StepWork
from tests.planner.packed.test_dispatch import law

PLAN = make_plan([ReplicaGroup(Layout(1, 8), 1, 4096), ReplicaGroup(Layout(8, 1), 1, 8192)])
COSTS = [law(6.0, 0.02, 1e-9), law(70.0, 0.03, 1e-9)]


def longest_of_pipeline(plan: Plan, lengths: IntArray) -> tuple[int, float]:
    found = dispatch_packed(lengths, plan, COSTS)
    own = np.concatenate([rows.indices for rows in found.micro_batches[0]])
    return int(lengths[own].max()), found.step_time_s


def test_a_long_sequence_goes_where_there_is_no_bubble(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    lengths = np.append(rng.integers(50, 500, 400), [4000, 7000])
    longest, step_s = longest_of_pipeline(PLAN, lengths)
    assert longest <= 500
    monkeypatch.setattr(
        dispatch,
        "without_long_bubbles",
        lambda work, step_s: (work, dispatch.prices_of(work, step_s)),
    )
    longest, other_s = longest_of_pipeline(PLAN, lengths)
    assert longest == 4000 and step_s < 0.99 * other_s


def test_what_no_other_holds_stays() -> None:
    plan = make_plan([ReplicaGroup(Layout(1, 8), 1, 4096), ReplicaGroup(Layout(8, 1), 1, 2048)])
    rng = np.random.default_rng(0)
    longest, _ = longest_of_pipeline(plan, np.append(rng.integers(50, 500, 400), [4000]))
    assert longest == 4000


@given(
    st.floats(0.0, 50.0),
    st.floats(0.0, 0.1),
    st.one_of(st.just(math.inf), st.floats(100.0, 5000.0)),
    st.integers(1, 20),
    st.floats(0.01, 20.0),
    st.integers(1, 300),
)
def test_a_pipeline_holds_the_most_of_any_number_of_micro_batches(
    start_ms: float, token_ms: float, spread: float, bubbles: int, step_s: float, most: int
) -> None:
    alike = Alike(np.arange(1), 4096, Minorant(start_ms, token_ms, 0.0, spread), bubbles, 1.0)
    number = np.arange(1, most + 1)
    work_s = step_s / (1.0 + bubbles / number)
    share = max(alike.minorant.marginal_share, 1e-9)
    expected_s = np.minimum(work_s, (work_s - start_ms / 1000.0 * number) / share)
    held_s, each_s = alike.held_s(step_s, most)
    assert held_s == pytest.approx(max(0.0, expected_s.max()), abs=1e-12)
    if held_s > 1e-9:
        own = round(step_s / each_s) - bubbles
        assert expected_s[own - 1] == pytest.approx(expected_s.max())


def test_whole_starts_where_long_sequences_crowd() -> None:
    minorant = Minorant(10.0, 0.01, 0.0, 1000.0)
    alike = tuple(Alike(np.array([kind]), 1000, minorant, 0, 1.0) for kind in range(2))
    lengths = np.array([100, 600])
    parts_s = np.stack([minorant.part_ms(lengths) / 1000.0] * 2)
    prices = np.array([1.0, 2.0])

    def begun(counts: list[int]) -> np.ndarray:
        work = StepWork(lengths, np.array(counts), alike, parts_s, parts_s + 0.01)
        return work.begun(prices).parts_s

    crowded, few = begun([3, 5]), begun([60, 5])
    assert crowded[0].tolist() == pytest.approx([parts_s[0, 0], 0.016])
    assert few.tolist() == parts_s.tolist() and crowded[1].tolist() == parts_s[1].tolist()
