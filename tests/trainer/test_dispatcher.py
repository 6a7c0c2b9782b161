"""What the solver hands out is what every rank reads, and nothing is lost on the way."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lobra.planner.dispatch import dispatch
from lobra.trainer.batches import GlobalBatch
from lobra.trainer.dispatcher import (
    AheadDispatcher,
    StepDispatch,
    check_complete,
    decode,
    encode,
)
from lobra.trainer.feedback import SpeedFeedback
from lobra.trainer.worker import Worker
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


def test_the_solver_works_on_what_was_so_when_it_was_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Speed factors that change while a step is solved are for the step after it."""
    monkeypatch.setattr("lobra.trainer.dispatcher.dist.get_rank", lambda: 0)
    monkeypatch.setattr("lobra.trainer.dispatcher.broadcast_array", lambda flat, group: flat)
    monkeypatch.setattr("lobra.trainer.dispatcher.decode", lambda flat, wait_s: flat)
    go = threading.Event()
    factors = [1.0, 1.0]

    class Told(Worker):
        """A worker without ranks, whose solver waits for a word."""

        def __init__(self) -> None:
            self.run = SimpleNamespace(feedback=True)  # type: ignore[assignment]
            self.feedback = SpeedFeedback(factors)

        def _draw(self, step: int, running: object) -> object:  # type: ignore[override]
            go.wait(10)
            return step

        def _assign(self, batch: object, slowdown: tuple[float, ...]) -> object:  # type: ignore
            return batch, slowdown

    def running(step: int) -> tuple[bool, ...]:
        return (step < 3,)

    worker = Told()
    dispatcher = AheadDispatcher(worker._solver, running, None)  # type: ignore[arg-type]
    dispatcher._start(0, (True,))
    factors[0] = 7.0
    go.set()
    assert dispatcher.get(0, (True,)) == (0, (1.0, 1.0))
    factors[1] = 5.0  # step 1 has been started with what was known before
    assert dispatcher.get(1, (True,)) == (1, (7.0, 1.0))
    assert dispatcher.get(2, (True,)) == (2, (7.0, 5.0))
    dispatcher.close()


def test_the_solver_s_thread_ends_however_the_run_does() -> None:
    closed = []
    worker = Worker.__new__(Worker)
    worker.run = SimpleNamespace(resume_step=None)  # type: ignore[assignment]
    worker.rank, worker.first_step, worker.stop_requested = 1, 0, False
    worker.dispatcher = SimpleNamespace(close=lambda: closed.append(1))  # type: ignore[assignment]
    worker._running = lambda step: (True,)  # type: ignore[method-assign, assignment]

    def fail(step: int, stop: bool) -> object:
        raise RuntimeError("a step failed")

    worker._step = fail  # type: ignore[method-assign, assignment]
    with pytest.raises(RuntimeError, match="a step failed"):
        worker.train(SimpleNamespace(received=None))  # type: ignore[arg-type]
    assert closed == [1]
