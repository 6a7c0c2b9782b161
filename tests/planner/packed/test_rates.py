"""Rates of sequences are below what any micro-batch, and any replica with a pipeline, takes."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lobra.layout.layout import Layout
from lobra.layout.sequences import packed_tokens
from lobra.planner.candidates import Candidate
from lobra.planner.packed.rates import fullest, rates_of
from lobra.planner.step_time import pipeline_time
from lobra.profiler.cost_model import load_cost_model
from tests.planner.strategies import LAYOUTS, cost_models, lengths
from tests.planner.support import LawCostModel, plain_cost_model


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 90))
def test_the_fullest_sum_is_found(some: list[int], most: int) -> None:
    reached = {0}
    for total in range(1, most + 1):
        if any(total - length in reached for length in some):
            reached.add(total)
    assert fullest(np.unique(some), most) == max(reached)


@given(st.data(), lengths(1000, 12), cost_models(), st.sampled_from(LAYOUTS))
def test_a_replica_takes_at_least_its_sequences_rates_and_the_bubble(
    data: st.DataObject, own: list[int], cost_model: LawCostModel, layout: object
) -> None:
    candidate = Candidate(layout, max(own) + data.draw(st.integers(0, 3000)))  # type: ignore[arg-type]
    cuts = data.draw(st.lists(st.integers(0, 5), min_size=len(own), max_size=len(own)))
    batches = [
        np.array([s for s, c in zip(own, cuts, strict=True) if c == cut]) for cut in set(cuts)
    ]
    tokens = [int(packed_tokens(b.sum())) if len(b) > 1 else int(b[0]) for b in batches]
    if max(tokens) > candidate.max_tokens:
        return
    squares = [int((batch**2).sum()) for batch in batches]
    times_s = [
        float(cost_model.micro_batch_time(candidate.layout, t, q).total_ms) / 1000
        for t, q in zip(tokens, squares, strict=True)
    ]
    distinct, counts = np.unique(own, return_counts=True)
    rates = rates_of(candidate, cost_model, distinct, counts.astype(float))  # type: ignore[arg-type]
    for batch, time_s in zip(batches, times_s, strict=True):
        least_s = rates.least_s[np.searchsorted(distinct, batch)].sum()
        assert least_s <= time_s * (1 + 1e-9)
    step_s = pipeline_time(times_s, candidate.layout.pp)
    assert (rates.alone_s <= step_s * (1 + 1e-9)).all() or len(distinct) > 1
    assert rates.unshared_s @ counts <= step_s * (1 + 1e-9)
    assert (rates.begun_s @ counts <= sum(times_s) * (1 + 1e-9)).all()
    for share in data.draw(st.lists(st.floats(0.05, 1.0), min_size=1, max_size=3)):
        rate_s, bubble_s = rates.after(share * step_s)
        assert 0 <= bubble_s < share * step_s
        assert rate_s @ counts <= (step_s - bubble_s) * (1 + 1e-9)


def test_what_a_replica_of_whole_micro_batches_loses_is_known() -> None:
    """Just after three full ones there is no time for a fourth: then nothing more can be done."""
    cost_model, tokens = plain_cost_model(), 640
    candidate = Candidate(Layout(1, 1), tokens)
    rates = rates_of(candidate, cost_model, np.array([64]), np.ones(1))  # type: ignore[arg-type]
    work = np.array([64, tokens]), np.array([64**2, 64 * tokens])
    one_s, full_s = cost_model.micro_batch_time(candidate.layout, *work).total_ms / 1000
    each_s = (full_s - one_s) / 9  # of one sequence more
    start_s = one_s - each_s
    step_s = 3 * full_s + start_s
    rate_s, bubble_s = rates.after(float(step_s))
    for later_s in (1.02 * step_s, 1.1 * step_s, 4 * full_s):
        done = (later_s - 4 * start_s) / each_s  # in four equal ones
        assert done * (1 - 1e-9) <= (later_s - bubble_s) / rate_s[0] <= 1.02 * done
    assert step_s / rates.least_s[0] > 1.09 * 30


def test_no_sequence_costs_nothing_where_a_fit_falls_below_zero() -> None:
    """LobRA's fit for tp 4 does for many sequences of few tokens."""
    cost_model, lengths = load_cost_model("7B", kind="lobra6"), np.array([1, 2, 8100])
    for layout in (Layout(4, 1), Layout(4, 2)):
        rates = rates_of(Candidate(layout, 8192), cost_model, lengths, np.array([9.0, 9.0, 1.0]))
        rate_s, bubble_s = rates.after(1.0)
        assert (rates.least_s > 0).all() and (rate_s > 0).all()
        assert 0 <= bubble_s < 1.0
