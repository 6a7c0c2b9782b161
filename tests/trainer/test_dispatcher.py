"""What the solver assigns is what the order says, and nothing is lost on the way."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lobra.layout.sequences import Sequence, StepOrder
from lobra.planner.dispatch import dispatch
from lobra.trainer.dispatcher import make_order
from tests.trainer.support import make_plan, plain_cost_model

COST = plain_cost_model(4)
PLAN = make_plan([(1, 1), (2, 1), (1, 2)], max_tokens=256)
FACTORS = (1.0, 1.5, 0.75)


def sequences_of(lengths: list[int]) -> list[Sequence]:
    """Sequences of two tasks, ordered by task."""
    nothing = np.empty(0, dtype=np.int32)
    half = len(lengths) // 2
    return [
        Sequence(int(number >= half), number, np.full(length, number, dtype=np.int32), nothing)
        for number, length in enumerate(lengths)
    ]


@given(st.lists(st.integers(1, 512), min_size=1, max_size=60))
@settings(deadline=None, max_examples=60)
def test_an_order_is_the_assignment(lengths: list[int]) -> None:
    sequences = sequences_of(lengths)
    assignment = dispatch(lengths, PLAN, COST, num_buckets=6)
    order = StepOrder.decode(make_order(7, sequences, assignment, FACTORS, 0.25).encode())
    assert (order.step, order.solve_time_s, order.speed_factors) == (7, 0.25, FACTORS)
    assert order.predicted_step_time_s == pytest.approx(assignment.step_time_s)
    assert order.replica_time_s == tuple(assignment.replica_time_s)
    assert order.padded_tokens == assignment.padded_tokens
    assert sorted(s.index for s in order.sequences) == list(range(len(lengths)))
    for mine, theirs in zip(order.replicas, assignment.micro_batches, strict=True):
        for ours, given_batch in zip(mine, theirs, strict=True):
            assert ours.padded_length == given_batch.padded_length
            assert [s.index for s in ours.sequences] == sorted(given_batch.indices)
            assert [s.task for s in ours.sequences] == sorted(s.task for s in ours.sequences)
            assert all(s == sequences[s.index] for s in ours.sequences)
    for replica, batches in zip(PLAN.replicas, order.replicas, strict=True):
        assert all(batch.padded_tokens <= replica.max_tokens for batch in batches)
        assert all(len(s.tokens) <= b.padded_length for b in batches for s in b.sequences)


def test_a_lost_or_doubled_sequence_is_noticed() -> None:
    sequences = sequences_of([10, 20, 30])
    whole = dispatch([10, 20, 30], PLAN, COST)
    first = next(batch for replica in whole.micro_batches for batch in replica)
    for micro_batches in ((), (*whole.micro_batches, (first,))):
        with pytest.raises(RuntimeError, match="of 3 sequences"):
            make_order(0, sequences, replace(whole, micro_batches=micro_batches), FACTORS, 0.0)
