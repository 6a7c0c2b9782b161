"""What the solver assigns is what the order says, and nothing is lost on the way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lobra.layout.order import StepOrder, Update
from lobra.layout.sequences import Sequence
from lobra.planner.assignment import Assignment
from lobra.planner.dispatch import dispatch
from lobra.planner.packed.dispatch import dispatch_packed, packed_costs
from lobra.trainer.coordinator import Coordinator
from lobra.trainer.feedback import SpeedFeedback
from lobra.trainer.live_run import LiveRun
from lobra.trainer.orders import Attendance, DispatchedStep, OrdersAhead, order_of
from lobra.trainer.task_changes import TaskChanges
from lobra.trainer.task_progress import TaskProgress
from lobra.trainer.turnover import Turnover
from tests.trainer.support import make_plan, plain_cost_model

COST = plain_cost_model(4)
PLAN = make_plan([(1, 1), (2, 1), (1, 2)], max_tokens=256)


def sequences_of(lengths: list[int]) -> list[Sequence]:
    """Sequences of two tasks, ordered by task."""
    nothing = np.empty(0, dtype=np.int32)
    half = len(lengths) // 2
    return [
        Sequence(int(number >= half), number, np.full(length, number, dtype=np.int32), nothing)
        for number, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("packed", [True, False])
@given(lengths=st.lists(st.integers(1, 512), min_size=1, max_size=60))
@settings(deadline=None, max_examples=60)
def test_an_order_is_the_assignment(packed: bool, lengths: list[int]) -> None:
    sequences = sequences_of(lengths)
    assignment: Assignment = (
        dispatch_packed(lengths, PLAN, packed_costs(PLAN, COST))
        if packed
        else dispatch(lengths, PLAN, COST, num_buckets=6)
    )
    updates = [Update(1, 1e-3, 0.5)]
    order = StepOrder.decode(order_of(7, sequences, updates, assignment).encoded)
    assert (order.step, order.updates) == (7, tuple(updates))
    assert order.padded_tokens == assignment.padded_tokens
    assert sorted(s.index for s in order.sequences) == list(range(len(lengths)))
    for mine, theirs in zip(order.replicas, assignment.micro_batches, strict=True):
        for ours, given_batch in zip(mine, theirs, strict=True):
            assert ours.padded_length == given_batch.padded_length
            assert ours.padded_tokens == given_batch.padded_tokens
            assert [s.index for s in ours.sequences] == sorted(given_batch.indices)
            assert [s.task for s in ours.sequences] == sorted(s.task for s in ours.sequences)
            assert all(s == sequences[s.index] for s in ours.sequences)
    for replica, batches in zip(PLAN.replicas, order.replicas, strict=True):
        assert all(batch.padded_tokens <= replica.max_tokens for batch in batches)
        if packed:
            assert all(batch.padded_length is None for batch in batches)
        else:
            assert all(len(s.tokens) <= b.padded_length for b in batches for s in b.sequences)


def test_a_lost_or_doubled_sequence_is_noticed() -> None:
    sequences = sequences_of([10, 20, 30])
    whole = dispatch([10, 20, 30], PLAN, COST)
    first = next(batch for replica in whole.micro_batches for batch in replica)
    for micro_batches in ((), (*whole.micro_batches, (first,))):
        with pytest.raises(RuntimeError, match="of 3 units"):
            order_of(0, sequences, (), replace(whole, micro_batches=micro_batches))


def test_an_order_is_made_on_what_was_so_when_it_was_begun() -> None:
    """Speed factors that change while a step is solved are for the step after it."""
    go = threading.Event()
    factors = [1.0, 1.0]

    class Told(Coordinator):
        """A coordinator without ranks, which makes orders when it is told to."""

        def __init__(self) -> None:
            self.live = SimpleNamespace(spec=SimpleNamespace(feedback=True))  # type: ignore[assignment]
            self.feedback = SpeedFeedback(factors)

        def _draw(self, attendance: Attendance, slowdown: tuple[float, ...]) -> DispatchedStep:
            go.wait(10)
            return DispatchedStep(StepOrder(attendance.step), slowdown, slowdown, 0.0, 0.0)

    told = Told()
    attendances = [Attendance(step, ((0, step),)) for step in range(4)]
    with OrdersAhead() as ahead:

        def factors_of(step: int) -> tuple[float, ...]:
            made = ahead.take(attendances[step], told._make(attendances[step]))
            assert made.order.step == step
            ahead.start(attendances[step + 1], told._make(attendances[step + 1]))
            return made.speed_factors

        ahead.start(attendances[0], told._make(attendances[0]))
        factors[0] = 7.0
        go.set()
        assert factors_of(0) == (1.0, 1.0)
        factors[1] = 5.0  # step 1 has been begun with what was known before
        assert factors_of(1) == (7.0, 1.0)
        assert factors_of(2) == (7.0, 5.0)


def test_an_order_made_ahead_for_others_is_made_anew() -> None:
    made: list[int] = []

    def make(number: int) -> Callable[[], DispatchedStep]:
        def order() -> DispatchedStep:
            made.append(number)
            return DispatchedStep(StepOrder(number), (), (), 0.0, 0.0)

        return order

    both, one = Attendance(3, ((0, 3), (1, 3))), Attendance(3, ((0, 3),))
    with OrdersAhead() as ahead:
        ahead.start(both, make(1))
        assert ahead.take(one, make(2)).order.step == 2
        ahead.start(both, make(3))
        assert ahead.take(both, make(4)).order.step == 3
    assert made == [1, 2, 3]


def test_the_thread_ends_however_the_run_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    coordinator, live = Coordinator.__new__(Coordinator), LiveRun.__new__(LiveRun)
    live.spec = SimpleNamespace(  # type: ignore[assignment]
        output_dir=tmp_path, last_step=3, max_steps=None, tasks=(), report_to=(), data_day=None,
        admission=None,
    )  # fmt: skip
    live.step, live.tasks = 0, {0: SimpleNamespace(progress=TaskProgress(3))}  # type: ignore[dict-item]
    coordinator.live, coordinator.changes = live, TaskChanges(live.spec, ())
    coordinator.turnover = Turnover(live, coordinator.changes, None, None)  # type: ignore[arg-type]
    coordinator.replanner, coordinator.stop_requested = None, False
    coordinator.engine = SimpleNamespace(told_to_stop=lambda: False)  # type: ignore[assignment]
    coordinator.ahead = OrdersAhead()

    def fail(attendance: Attendance) -> object:
        raise RuntimeError("a step failed")

    monkeypatch.setattr(coordinator, "_train_step", fail)
    with pytest.raises(RuntimeError, match="a step failed"):
        coordinator.train()
    with pytest.raises(RuntimeError, match="after shutdown"):
        coordinator.ahead.start(Attendance(0), lambda: None)  # type: ignore[arg-type, return-value]
