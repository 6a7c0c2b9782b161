"""Orders made ahead: rank 0 draws and dispatches the next step while this step trains.

An order travels as one flat integer array over a CPU group, never pickled, whole to every rank: of
what others train a rank needs each task's labels, and a step's tokens are a few megabytes. The same
message tells every rank whether to stop, so that all stop before the same step.
"""

from __future__ import annotations

import time
from collections import abc
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist

from lobra.layout.sequences import IntArray, MicroBatch, Sequence, StepOrder
from lobra.planner.dispatch import Assignment
from lobra.planner.packed.dispatch import PackedAssignment

Running = tuple[bool, ...]


def make_order(
    step: int,
    sequences: abc.Sequence[Sequence],
    assignment: Assignment | PackedAssignment,
    speed_factors: tuple[float, ...],
    solve_time_s: float,
) -> StepOrder:
    """Return the order that trains sequences (ordered by task) as they were assigned.

    Raises:
        RuntimeError: a sequence is missing or placed twice (a bug of the dispatcher).
    """
    placed = [batch.indices for replica in assignment.micro_batches for batch in replica]
    rows = np.sort(np.concatenate(placed)) if placed else np.empty(0, dtype=np.int64)
    if not np.array_equal(rows, np.arange(len(sequences))):
        raise RuntimeError(f"the dispatcher placed {len(rows)} of {len(sequences)} sequences")
    return StepOrder(
        step,
        tuple(
            tuple(
                MicroBatch(  # in the order drawn, so that a task's rows are adjacent
                    tuple(sequences[row] for row in sorted(batch.indices.tolist())),
                    batch.padded_length,
                )
                for batch in replica
            )
            for replica in assignment.micro_batches
        ),
        replica_time_s=tuple(assignment.replica_time_s.tolist()),
        speed_factors=speed_factors,
        sync_time_s=assignment.sync_time_s,
        solve_time_s=solve_time_s,
    )


class AheadDispatcher:
    """Gives every rank the order of each step, one after the other; rank 0 solves one step ahead.

    `job(step, running)` is called on the caller's thread and returns what the solver's thread
    calls for the encoded order of a step in which these tasks run: it must hold a snapshot of all
    that the caller may change meanwhile. When a task ends between solving ahead and the step
    itself, the step is solved again. `wait_time_s` is what rank 0 waited for the solver when the
    last order was asked for.
    """

    def __init__(
        self,
        job: Callable[[int, Running], Callable[[], IntArray]],
        expected: Callable[[int], Running],
        group: dist.ProcessGroup,
    ) -> None:
        self.job = job
        self.expected = expected
        self.group = group
        self.pool = ThreadPoolExecutor(max_workers=1) if dist.get_rank() == 0 else None
        self.ahead: tuple[int, Running, Future[IntArray]] | None = None
        self.wait_time_s = 0.0

    def _start(self, step: int, running: Running) -> None:
        if self.pool is not None and any(running):
            self.ahead = (step, running, self.pool.submit(self.job(step, running)))

    def get(self, step: int, running: Running, stop: bool = False) -> StepOrder:
        """Return the order of `step`; it says to stop when rank 0 was told to. Collective."""
        start = time.perf_counter()
        flat = None
        if self.pool is not None and stop:
            flat = StepOrder(step, stop=True).encode()
        elif self.pool is not None:
            if self.ahead is None or self.ahead[:2] != (step, running):
                self._start(step, running)
            assert self.ahead is not None
            flat = self.ahead[2].result()
        self.wait_time_s = time.perf_counter() - start
        order = StepOrder.decode(broadcast_array(flat, self.group))
        if not order.stop:
            self._start(step + 1, self.expected(step + 1))
        return order

    def close(self) -> None:
        """End the solver thread."""
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)


def broadcast_array(flat: IntArray | None, group: dist.ProcessGroup) -> IntArray:
    """Return rank 0's array on every rank; the others give None. Collective."""
    size = torch.tensor([0 if flat is None else len(flat)])
    dist.broadcast(size, src=0, group=group)
    content = torch.empty(int(size), dtype=torch.int64) if flat is None else torch.from_numpy(flat)
    dist.broadcast(content, src=0, group=group)
    received: IntArray = content.numpy()
    return received
