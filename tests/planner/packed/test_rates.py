"""Rates of sequences are below what any micro-batch, and any replica with a pipeline, takes."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lobra.layout.sequences import packed_tokens
from lobra.planner.candidates import Candidate
from lobra.planner.packed.rates import fullest, rates_of
from lobra.planner.step_time import pipeline_time
from tests.planner.strategies import LAYOUTS, cost_models, lengths
from tests.planner.support import LawCostModel


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
    assert rates.begun_s @ counts <= sum(times_s) * (1 + 1e-9)
    for share in data.draw(st.lists(st.floats(0.05, 1.0), min_size=1, max_size=3)):
        rate_s, bubble_s = rates.after(share * step_s)
        assert 0 <= bubble_s < share * step_s
        assert rate_s @ counts <= (step_s - bubble_s) * (1 + 1e-9)
