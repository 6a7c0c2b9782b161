"""What the solver hands out is what every rank reads, and nothing is lost on the way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lobra.planner.dispatch import dispatch
from lobra.trainer.batches import GlobalBatch
from lobra.trainer.dispatcher import StepDispatch, check_complete, decode, encode
from tests.trainer.support import make_plan, plain_cost_model

COST = plain_cost_model(4)
PLAN = make_plan([(1, 1), (2, 1), (1, 2)], max_tokens=256)


def global_batch(lengths: list[int]) -> GlobalBatch:
    zeros = np.zeros(len(lengths), dtype=np.int64)
    return GlobalBatch(zeros, np.arange(len(lengths)), np.asarray(lengths, dtype=np.int64))


@given(st.lists(st.integers(1, 512), min_size=1, max_size=60))
@settings(deadline=None, max_examples=60)
def test_encoding_keeps_the_assignment(lengths: list[int]) -> None:
    batch = global_batch(lengths)
    assignment = dispatch(batch.lengths, PLAN, COST, num_buckets=6)
    decoded = decode(encode(assignment, (1.0, 1.5, 0.75), 0.25), wait_time_s=0.5)
    check_complete(decoded, batch)
    assert decoded.predicted_step_time_s == pytest.approx(assignment.step_time_s, abs=1e-6)
    assert (decoded.solve_time_s, decoded.wait_time_s) == (0.25, 0.5)
    assert decoded.slowdown == (1.0, 1.5, 0.75)
    np.testing.assert_allclose(decoded.replica_time_s, assignment.replica_time_s, atol=1e-9)
    for mine, theirs in zip(decoded.replicas, assignment.micro_batches, strict=True):
        assert [b.padded_length for b in mine] == [b.padded_length for b in theirs]
        for ours, given_batch in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(ours.rows, given_batch.indices)
    limits = [replica.max_tokens for replica in PLAN.replicas]
    for replica, limit in zip(decoded.replicas, limits, strict=True):
        assert all(b.padded_tokens <= limit for b in replica)
        assert all(max(batch.lengths[b.rows]) <= b.padded_length for b in replica)


def test_a_lost_or_doubled_sequence_is_noticed() -> None:
    batch = global_batch([10, 20, 30])
    whole = decode(encode(dispatch(batch.lengths, PLAN, COST), (1.0,) * 3, 0.0))
    first = next(b for replica in whole.replicas for b in replica)
    with pytest.raises(RuntimeError, match="of 3 sequences"):
        check_complete(StepDispatch((), (), (), 0.0), batch)
    with pytest.raises(RuntimeError, match="of 3 sequences"):
        check_complete(StepDispatch((*whole.replicas, (first,)), (), (), 0.0), batch)
