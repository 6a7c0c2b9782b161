"""Dispatch solved ahead: rank 0 computes the next step's assignment while this step trains.

The assignment travels as one flat integer array over a CPU group, never pickled. The same message
tells every rank whether to stop, so that all stop before the same step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from lobra.planner.dispatch import Assignment
from lobra.trainer.batches import GlobalBatch, IntArray

STOP = -1
Running = tuple[bool, ...]


@dataclass(frozen=True)
class DispatchedMicroBatch:
    """Rows of the global batch padded to one length on one replica."""

    padded_length: int
    rows: IntArray

    @property
    def padded_tokens(self) -> int:
        """Return the tokens computed, padding included."""
        return self.padded_length * len(self.rows)


@dataclass(frozen=True)
class StepDispatch:
    """One step's assignment as every rank knows it.

    `replica_time_s[r]` is predicted for replica r with its speed factor `slowdown[r]`;
    `sync_time_s` for the adapters' synchronisation after the slowest.
    """

    replicas: tuple[tuple[DispatchedMicroBatch, ...], ...]
    replica_time_s: tuple[float, ...]
    slowdown: tuple[float, ...]
    solve_time_s: float
    wait_time_s: float = 0.0
    sync_time_s: float = 0.0

    @property
    def predicted_step_time_s(self) -> float:
        """Return the slowest replica's predicted time and the synchronisation's."""
        return max(self.replica_time_s) + self.sync_time_s

    @property
    def padded_tokens(self) -> int:
        """Return the tokens computed in the step, padding included."""
        return sum(batch.padded_tokens for replica in self.replicas for batch in replica)


def encode(assignment: Assignment, slowdown: tuple[float, ...], solve_time_s: float) -> IntArray:
    """Return the assignment as one int64 array: times in nanoseconds, then the micro-batches."""
    flat = [round(solve_time_s * 1e9), round(assignment.sync_time_s * 1e9)]
    flat.append(len(assignment.micro_batches))
    flat += [round(float(time_s) * 1e9) for time_s in assignment.replica_time_s]
    flat += [round(factor * 1e9) for factor in slowdown]
    for replica in assignment.micro_batches:
        flat.append(len(replica))
        for batch in replica:
            flat += [int(batch.padded_length), len(batch.indices), *map(int, batch.indices)]
    return np.asarray(flat, dtype=np.int64)


def decode(flat: IntArray, wait_time_s: float = 0.0) -> StepDispatch:
    """Return what `encode` was given."""
    values = iter(flat.tolist())
    solved_s, sync_s, num_replicas = next(values) / 1e9, next(values) / 1e9, next(values)
    times_s = tuple(next(values) / 1e9 for _ in range(num_replicas))
    slowdown = tuple(next(values) / 1e9 for _ in range(num_replicas))
    replicas = []
    for _ in range(num_replicas):
        batches = []
        for _ in range(next(values)):
            padded, size = next(values), next(values)
            rows = np.asarray([next(values) for _ in range(size)], dtype=np.int64)
            batches.append(DispatchedMicroBatch(padded, rows))
        replicas.append(tuple(batches))
    return StepDispatch(tuple(replicas), times_s, slowdown, solved_s, wait_time_s, sync_s)


class AheadDispatcher:
    """Gives every rank the assignment of each step, in order; rank 0 solves one step ahead.

    `job(step, running)` is called on the caller's thread and returns what the solver's thread
    calls for the encoded assignment of a step in which these tasks run: it must hold a snapshot of
    all that the caller may change meanwhile. When a task ends between solving ahead and the step
    itself, the step is solved again.
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

    def _start(self, step: int, running: Running) -> None:
        if self.pool is not None and any(running):
            self.ahead = (step, running, self.pool.submit(self.job(step, running)))

    def get(self, step: int, running: Running, stop: bool = False) -> StepDispatch | None:
        """Return the assignment of `step`, or None when rank 0 was told to stop. Collective."""
        start = time.perf_counter()
        flat = None
        if self.pool is not None and not stop:
            if self.ahead is None or self.ahead[:2] != (step, running):
                self._start(step, running)
            assert self.ahead is not None
            flat = self.ahead[2].result()
        wait_s = time.perf_counter() - start
        flat = broadcast_array(flat, self.group)
        if flat is None:
            return None
        self._start(step + 1, self.expected(step + 1))
        return decode(flat, wait_s)

    def close(self) -> None:
        """End the solver thread."""
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)


def broadcast_array(flat: IntArray | None, group: dist.ProcessGroup) -> IntArray | None:
    """Return rank 0's array on every rank, or None when rank 0 gives None. Collective."""
    size = torch.tensor([STOP if flat is None else len(flat)])
    dist.broadcast(size, src=0, group=group)
    if int(size) == STOP:
        return None
    content = (
        torch.from_numpy(flat)
        if dist.get_rank() == 0
        else torch.empty(int(size), dtype=torch.int64)
    )
    dist.broadcast(content, src=0, group=group)
    return content.numpy()


def check_complete(dispatch: StepDispatch, batch: GlobalBatch) -> None:
    """Check that the assignment places every sequence of the global batch exactly once.

    Raises:
        RuntimeError: a sequence is missing or placed twice (a bug of the dispatcher).
    """
    placed = [b.rows for replica in dispatch.replicas for b in replica]
    rows = np.sort(np.concatenate(placed)) if placed else np.empty(0, dtype=np.int64)
    if not np.array_equal(rows, np.arange(len(batch))):
        raise RuntimeError(f"the dispatcher placed {len(rows)} of {len(batch)} sequences")
