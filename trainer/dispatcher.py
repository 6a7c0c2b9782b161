"""Dispatch solved ahead: rank 0 computes the next step's assignment while this step trains.

The assignment travels as one flat integer array over a CPU group, never pickled.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from planner.dispatch import Assignment
from trainer.batches import GlobalBatch, IntArray


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
    """One step's assignment as every rank knows it."""

    replicas: tuple[tuple[DispatchedMicroBatch, ...], ...]
    predicted_step_time_s: float
    solve_time_s: float
    wait_time_s: float

    @property
    def padded_tokens(self) -> int:
        """Return the tokens computed in the step, padding included."""
        return sum(batch.padded_tokens for replica in self.replicas for batch in replica)


def encode(assignment: Assignment, solve_time_s: float) -> IntArray:
    """Return the assignment as one int64 array: times in microseconds, then the micro-batches."""
    flat = [round(assignment.step_time_s * 1e6), round(solve_time_s * 1e6)]
    flat.append(len(assignment.micro_batches))
    for replica in assignment.micro_batches:
        flat.append(len(replica))
        for batch in replica:
            flat += [int(batch.padded_length), len(batch.indices), *map(int, batch.indices)]
    return np.asarray(flat, dtype=np.int64)


def decode(flat: IntArray, wait_time_s: float = 0.0) -> StepDispatch:
    """Return what `encode` was given."""
    values = iter(flat.tolist())
    predicted_s, solved_s = next(values) / 1e6, next(values) / 1e6
    replicas = []
    for _ in range(next(values)):
        batches = []
        for _ in range(next(values)):
            padded, size = next(values), next(values)
            rows = np.asarray([next(values) for _ in range(size)], dtype=np.int64)
            batches.append(DispatchedMicroBatch(padded, rows))
        replicas.append(tuple(batches))
    return StepDispatch(tuple(replicas), predicted_s, solved_s, wait_time_s)


class AheadDispatcher:
    """Gives every rank the assignment of each step, in order; rank 0 solves one step ahead."""

    def __init__(
        self, solve: Callable[[int], Assignment], group: dist.ProcessGroup, last_step: int
    ) -> None:
        self.solve = solve
        self.group = group
        self.last_step = last_step
        self.is_solver = dist.get_rank() == 0
        self.pool = ThreadPoolExecutor(max_workers=1) if self.is_solver else None
        self.ahead: tuple[int, Future[IntArray]] | None = None

    def _start(self, step: int) -> None:
        if self.pool is not None and step < self.last_step:
            self.ahead = (step, self.pool.submit(self._solve, step))

    def _solve(self, step: int) -> IntArray:
        start = time.perf_counter()
        assignment = self.solve(step)
        return encode(assignment, time.perf_counter() - start)

    def get(self, step: int) -> StepDispatch:
        """Return the assignment of `step`. Collective over the group."""
        start = time.perf_counter()
        size = torch.zeros(1, dtype=torch.int64)
        flat = torch.empty(0, dtype=torch.int64)
        if self.is_solver:
            if self.ahead is None or self.ahead[0] != step:
                self._start(step)
            assert self.ahead is not None
            flat = torch.from_numpy(self.ahead[1].result())
            size[0] = len(flat)
        wait_s = time.perf_counter() - start
        dist.broadcast(size, src=0, group=self.group)
        if not self.is_solver:
            flat = torch.empty(int(size), dtype=torch.int64)
        dist.broadcast(flat, src=0, group=self.group)
        self._start(step + 1)
        return decode(flat.numpy(), wait_s)

    def close(self) -> None:
        """End the solver thread."""
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)


def check_complete(dispatch: StepDispatch, batch: GlobalBatch) -> None:
    """Check that the assignment places every sequence of the global batch exactly once.

    Raises:
        RuntimeError: a sequence is missing or placed twice (a bug of the dispatcher).
    """
    placed = [b.rows for replica in dispatch.replicas for b in replica]
    rows = np.sort(np.concatenate(placed)) if placed else np.empty(0, dtype=np.int64)
    if not np.array_equal(rows, np.arange(len(batch))):
        raise RuntimeError(f"the dispatcher placed {len(rows)} of {len(batch)} sequences")
