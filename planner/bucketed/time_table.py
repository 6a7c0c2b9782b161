"""What micro-batches of every bucket take on one layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lobra.layout.layout import Layout
from lobra.layout.plan import Plan
from lobra.planner.step_time import pipeline_time
from lobra.profiler.cost_model import CostModel, padded_work

CountedBatches = tuple[tuple[int, int], ...]  # micro-batches: pairs (bucket, sequences)


@dataclass(frozen=True, eq=False)
class TimeTable:
    """Micro-batch times of one layout over all buckets. R buckets, B the largest micro-batch.

    Attributes
    ----------
    layout, max_tokens
        The layout and the tokens of its largest micro-batch.
    limit
        int64 [R]: most sequences in one micro-batch, ``max_tokens // s_j``, at most the number
        wanted.
    time_s
        float64 [R, B + 1]: seconds of a micro-batch of b sequences; 0 for b = 0, inf beyond
        ``limit``.
    """

    layout: Layout
    max_tokens: int
    limit: np.ndarray
    time_s: np.ndarray

    @property
    def bubbles(self) -> int:
        """How often the longest micro-batch is paid in the pipeline's bubble: pp - 1."""
        return self.layout.pp - 1

    def full_time_s(self) -> np.ndarray:
        """Return float64 [R]: seconds of each bucket's largest micro-batch; inf where none fits."""
        full = self.time_s[np.arange(len(self.limit)), self.limit]
        return np.where(self.limit > 0, full, np.inf)

    def rate_s(self) -> np.ndarray:
        """Return float64 [R]: the least seconds per sequence over all sizes; inf if none fits."""
        sizes = np.arange(1, self.time_s.shape[1])
        return (self.time_s[:, 1:] / sizes).min(axis=1)

    def least_s(self) -> np.ndarray:
        """Return float64 [R]: the least seconds, bubble included, of a replica with any of it."""
        return self.time_s[:, 1:].min(axis=1) * (1 + self.bubbles)

    def bubble_s(self) -> float:
        """Return the seconds of bubble that the longest micro-batch of the table causes."""
        finite = np.where(np.isfinite(self.time_s), self.time_s, 0.0)
        return self.bubbles * float(finite.max())

    def replica_time_s(self, batches: CountedBatches) -> float:
        """Return the seconds of a replica for its micro-batches."""
        times_s = [float(self.time_s[bucket, size]) for bucket, size in batches]
        return pipeline_time(times_s, self.layout.pp)

    def slowed(self, factor: float) -> TimeTable:
        """Return the table of a replica that takes ``factor`` times as long."""
        return TimeTable(self.layout, self.max_tokens, self.limit, self.time_s * factor)

    def capped(self, longest_s: float) -> TimeTable:
        """Return the table of micro-batches up to the largest that takes at most ``longest_s``."""
        allowed = self.time_s <= longest_s
        limit = np.where(allowed, np.arange(self.time_s.shape[1]), 0).max(axis=1)
        return self.limited(limit)

    def limited(self, limit: np.ndarray) -> TimeTable:
        """Return the table with at most ``limit`` [R] sequences in a micro-batch."""
        sizes = np.arange(self.time_s.shape[1])
        time_s = np.where(sizes[None, :] <= limit[:, None], self.time_s, np.inf)
        return TimeTable(self.layout, self.max_tokens, limit, time_s)

    def work_s(self, most: int) -> np.ndarray:
        """Return float64 [R, most + 1]: seconds n sequences of a bucket take, without bubble.

        The better of full micro-batches with one remainder and of the same number of even
        micro-batches.
        """
        n = np.arange(most + 1)[None, :]
        size = np.maximum(self.limit, 1)[:, None]
        rows = np.arange(len(self.limit))[:, None]
        finite = np.where(np.isfinite(self.time_s), self.time_s, 0.0)
        whole, rest = np.divmod(n, size)
        full = whole * finite[rows, size] + finite[rows, rest]
        number = np.maximum(-(-n // size), 1)
        small, larger = np.divmod(n, number)
        upper = np.minimum(small + 1, self.time_s.shape[1] - 1)
        even = finite[rows, small] * (number - larger) + finite[rows, upper] * larger
        work = np.minimum(full, even)
        work[self.limit == 0, 1:] = np.inf
        return work

    def least_work_s(self, most: int) -> np.ndarray:
        """Return float64 [R, most + 1]: the least seconds n sequences take in any micro-batches."""
        work = np.full((len(self.limit), most + 1), np.inf)
        work[:, 0] = 0.0
        largest = self.time_s.shape[1] - 1
        for n in range(1, most + 1):
            size = min(n, largest)
            before = work[:, n - size : n][:, ::-1]
            work[:, n] = (self.time_s[:, 1 : size + 1] + before).min(axis=1)
        return work

    def split(self, bucket: int, n: int) -> list[int]:
        """Return the micro-batch sizes, largest first, that ``work_s`` counts for n sequences."""
        if n == 0:
            return []
        size = int(self.limit[bucket])
        whole, rest = divmod(n, size)
        full = [size] * whole + ([rest] if rest else [])
        small, larger = divmod(n, len(full))
        smaller = len(full) - larger
        times = self.time_s[bucket]
        even_s = times[small] * smaller + (times[small + 1] * larger if larger else 0.0)
        if even_s < times[size] * whole + times[rest]:
            return [small + 1] * larger + [small] * smaller
        return full


def longest_sequence_s(tables: Sequence[TimeTable], counts: np.ndarray) -> float:
    """Return a lower bound on every step: no bucket of the batch ends sooner on any table."""
    least = np.stack([table.least_s() for table in tables]).min(axis=0)
    return float(least[counts > 0].max(initial=0.0))


def time_table(
    layout: Layout,
    max_tokens: int,
    buckets: np.ndarray,
    cost_model: CostModel,
    counts: np.ndarray | None = None,
) -> TimeTable:
    """Return the times of the buckets on a layout; ``counts`` [R] limits the micro-batches."""
    buckets = np.asarray(buckets, dtype=np.int64)
    limit = max_tokens // buckets
    if counts is not None:
        limit = np.minimum(limit, counts)
    sizes = np.arange(1, max(1, int(limit.max(initial=0))) + 1)
    work = padded_work(sizes[None, :], buckets[:, None])
    time_s = np.zeros((len(buckets), len(sizes) + 1))
    time_s[:, 1:] = cost_model.micro_batch_time(layout, *work).total_ms / 1000.0
    time_s[:, 1:][sizes[None, :] > limit[:, None]] = np.inf
    return TimeTable(layout, max_tokens, limit, time_s)


def plan_tables(
    plan: Plan, buckets: np.ndarray, cost_model: CostModel, counts: np.ndarray | None = None
) -> list[TimeTable]:
    """Return one time table per replica group of a plan."""
    return [
        time_table(group.layout, group.max_tokens, buckets, cost_model, counts)
        for group in plan.groups
    ]


def by_length(tables: Sequence[TimeTable]) -> list[TimeTable]:
    """Return a plan's tables with every bucket only on the layouts of least sufficient capacity."""
    capacity = np.array([table.max_tokens for table in tables])
    fits = np.stack([table.limit > 0 for table in tables])
    least = np.where(fits, capacity[:, None], np.iinfo(np.int64).max).min(axis=0)
    return [table.limited(np.where(table.max_tokens == least, table.limit, 0)) for table in tables]
