"""What the solver assigns is what the order says, and nothing is lost on the way."""

from __future__ import annotations

import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lobra.layout.sequences import Sequence, StepOrder
from lobra.planner.dispatch import dispatch
from lobra.trainer.dispatcher import AheadDispatcher, make_order
from lobra.trainer.feedback import SpeedFeedback
from lobra.trainer.worker import Worker
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


def test_the_solver_works_on_what_was_so_when_it_was_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Speed factors that change while a step is solved are for the step after it."""
    monkeypatch.setattr("lobra.trainer.dispatcher.dist.get_rank", lambda: 0)
    monkeypatch.setattr("lobra.trainer.dispatcher.broadcast_array", lambda flat, group: flat)
    go = threading.Event()
    factors = [1.0, 1.0]

    class Told(Worker):
        """A worker without ranks, whose solver waits for a word."""

        def __init__(self) -> None:
            self.run = SimpleNamespace(feedback=True)  # type: ignore[assignment]
            self.feedback = SpeedFeedback(factors)

        def _solve(self, step: int, running: object, slowdown: tuple[float, ...]) -> Any:
            go.wait(10)
            return StepOrder(
                step,
                replicas=((),) * len(slowdown),
                replica_time_s=slowdown,
                speed_factors=slowdown,
            ).encode()

    def running(step: int) -> tuple[bool, ...]:
        return (step < 3,)

    worker = Told()
    dispatcher = AheadDispatcher(worker._solver, running, None)  # type: ignore[arg-type]
    dispatcher._start(0, (True,))

    def told(step: int) -> tuple[float, ...]:
        order = dispatcher.get(step, (True,))
        assert order.step == step
        return order.speed_factors

    factors[0] = 7.0
    go.set()
    assert told(0) == (1.0, 1.0)
    factors[1] = 5.0  # step 1 has been started with what was known before
    assert told(1) == (7.0, 1.0)
    assert told(2) == (7.0, 5.0)
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
