"""Orders of steps: made from what the dispatcher assigned, on a thread, one step ahead."""

from __future__ import annotations

import time
from collections import abc
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np

from lobra.layout.order import StepOrder, Update
from lobra.layout.sequences import MicroBatch, Sequence, packed_tokens
from lobra.planner.assignment import Assignment
from lobra.planner.dispatch import dispatch
from lobra.planner.packed.dispatch import dispatch_packed, packed_costs
from lobra.planner.step_time import sync_time_s
from lobra.tasks.objectives import SEQUENCES_OF_EXAMPLE
from lobra.trainer.run_spec import RunSpec


@dataclass(frozen=True)
class Attendance:
    """Who takes part in a step.

    Attributes
    ----------
    step
        The step of the run, counted from 0.
    own_steps
        Of every task that attends its number and its own step, counted from 0; numbers ascend.
    """

    step: int
    own_steps: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class DispatchedStep:
    """An order, and what is expected of it.

    Attributes
    ----------
    order
        What the ranks are told.
    replica_time_s
        Of every replica the predicted seconds, its speed factor included.
    speed_factors
        Of every replica its measured time over the cost model's, as they were known then.
    sync_time_s
        What synchronising the adapters is predicted to take after the slowest replica.
    solve_time_s
        What dispatching the step took.
    """

    order: StepOrder
    replica_time_s: tuple[float, ...]
    speed_factors: tuple[float, ...]
    sync_time_s: float
    solve_time_s: float

    @property
    def predicted_step_time_s(self) -> float:
        """The slowest replica's predicted time and the synchronisation's."""
        return max(self.replica_time_s) + self.sync_time_s


def dispatch_units(sequences: abc.Sequence[Sequence]) -> list[tuple[Sequence, ...]]:
    """Return what is never divided among micro-batches: sequences, and examples of several."""
    rest = iter(sequences)
    return [(one, *islice(rest, SEQUENCES_OF_EXAMPLE - 1 if one.num_answer else 0)) for one in rest]


def _unit_length(unit: abc.Sequence[Sequence]) -> int:
    """Return the tokens a unit takes of a micro-batch; of several sequences they are packed."""
    tokens = sum(len(sequence.tokens) for sequence in unit)
    return packed_tokens(tokens) if len(unit) > 1 else tokens


def order_of(
    step: int,
    sequences: abc.Sequence[Sequence],
    updates: abc.Sequence[Update],
    assignment: Assignment,
) -> StepOrder:
    """Return the order that computes sequences (ordered by task) as their units were assigned.

    Raises
    ------
    RuntimeError
        If a unit is missing or placed twice (a bug of the dispatcher).
    """
    placed = [batch.indices for replica in assignment.micro_batches for batch in replica]
    rows = np.sort(np.concatenate(placed)) if placed else np.empty(0, dtype=np.int64)
    units = dispatch_units(sequences)
    if not np.array_equal(rows, np.arange(len(units))):
        raise RuntimeError(f"the dispatcher placed {len(rows)} of {len(units)} units")
    return StepOrder(
        step,
        tuple(
            tuple(
                MicroBatch(  # in the order drawn, so that a task's rows are adjacent
                    tuple(one for row in sorted(batch.indices.tolist()) for one in units[row]),
                    batch.padded_length,
                )
                for batch in replica
            )
            for replica in assignment.micro_batches
        ),
        tuple(updates),
    )


def dispatch_step(
    run: RunSpec,
    step: int,
    sequences: abc.Sequence[Sequence],
    updates: abc.Sequence[Update],
    speed_factors: tuple[float, ...],
) -> DispatchedStep:
    """Return the order that computes sequences (ordered by task) on the run's replicas."""
    start = time.perf_counter()
    lengths = [_unit_length(unit) for unit in dispatch_units(sequences)]
    assignment = _assignment(run, lengths, speed_factors)
    solve_time_s = time.perf_counter() - start
    return DispatchedStep(
        order_of(step, sequences, updates, assignment),
        tuple(assignment.replica_time_s.tolist()),
        speed_factors,
        assignment.sync_time_s,
        solve_time_s,
    )


def _assignment(
    run: RunSpec, lengths: abc.Sequence[int], speed_factors: abc.Sequence[float]
) -> Assignment:
    """Return which replica computes which sequences, and in which micro-batches."""
    if run.batching == "packed":
        return dispatch_packed(
            lengths,
            run.plan,
            packed_costs(run.plan, run.cost_model),
            slowdown=speed_factors,
            sync_time_s=sync_time_s(run.plan, run.cost_model),
        )
    return dispatch(
        lengths,
        run.plan,
        run.cost_model,
        buckets=None if run.dynamic_buckets else np.asarray(run.buckets, dtype=np.int64),
        num_buckets=run.num_buckets,
        mode=run.dispatch_mode,
        slowdown=speed_factors,
    )


class OrdersAhead:
    """A thread that makes the order of the next step while this step trains.

    What it is given to do must hold a snapshot of all that the caller may change meanwhile.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._started: tuple[Attendance, Future[DispatchedStep]] | None = None

    def start(self, attendance: Attendance, make: Callable[[], DispatchedStep]) -> None:
        """Begin to make the order of a step that these tasks are expected to attend."""
        self._started = (attendance, self._thread.submit(make))

    def forget(self) -> None:
        """Have the next order made anew, since what it follows from has changed."""
        self._started = None

    def take(self, attendance: Attendance, make: Callable[[], DispatchedStep]) -> DispatchedStep:
        """Return the order made ahead; where that was for others, the one that `make` makes."""
        if self._started is None or self._started[0] != attendance:
            self.start(attendance, make)
        assert self._started is not None
        return self._started[1].result()

    def __enter__(self) -> OrdersAhead:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)
