"""Patterns: what one replica can do within a step, and the most valuable of them at given prices.

A pattern is a number of sequences per bucket together with its micro-batches. Given a price per
sequence the best pattern is a knapsack over micro-batches, solved by a dynamic program over time
cut into equal ticks, one vectorised pass per micro-batch. Weights rounded down make its value an
upper bound on every real pattern's (what certificates need); rounded up, every pattern found is
real.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from lobra.planner.bucketed.time_table import TimeTable

Rounding = Literal["down", "up"]
EXCLUSIVE_MOST = 40  # buckets with at most so many sequences are priced by their exact number
MOST_EXACT = 256  # beyond, the least work of a number of sequences is not tabulated
EXCLUSIVE_FEW_REPLICAS = 256  # the same where few replicas share the batch, so that it matters
VALUE_SLACK = 1e-5  # covers single precision in the sums of up to some hundred terms
WEIGHT_SLACK = 1e-12


@dataclass(frozen=True, eq=False)
class Pattern:
    """What a replica does in a step.

    ``counts`` int64 [R]: sequences of each bucket; ``longest_s``: its longest micro-batch's time
    (of pipelined layouts); ``time_s``: the step's time, bubble included.
    """

    counts: np.ndarray
    longest_s: float
    time_s: float


@dataclass(frozen=True)
class _Item:
    """Micro-batches that enter the knapsack together: ``size`` sequences for ``ticks`` of time."""

    bucket: int
    size: int
    ticks: int
    seconds: float
    micro_batch_s: float
    capacity: int  # ticks left beside the bubble of this micro-batch; -1: not to be read


class PatternPricer:
    """Finds the most valuable pattern of one layout within a step time.

    Parameters
    ----------
    table
        Micro-batch times; ``limit`` must not exceed the counts.
    counts
        int64 [R]: how many sequences there are; a pattern takes no more than that where there
        are at most ``exclusive_most`` (a relaxation where there are more).
    step_time_s
        The step time T.
    ticks
        Into how many equal parts T is cut.
    rounding
        ``down`` for upper bounds, ``up`` for real patterns.
    exclusive_most
        See ``counts``; each costs a pass of the dynamic program.
    """

    def __init__(
        self,
        table: TimeTable,
        counts: np.ndarray,
        step_time_s: float,
        ticks: int,
        rounding: Rounding,
        exclusive_most: int = EXCLUSIVE_MOST,
    ) -> None:
        self._table, self._counts = table, counts
        self._step_s, self._ticks = step_time_s, ticks
        self._tick_s = step_time_s / ticks
        self._rounding = rounding
        self._exclusive_most = exclusive_most
        # a list of groups: of an exclusive group at most one item is taken
        self._groups: list[tuple[bool, list[_Item]]] = (
            [(False, self._pipelined())] if table.bubbles else self._plain()
        )

    def price(self, prices: np.ndarray, with_pattern: bool = True) -> tuple[float, Pattern | None]:
        """Return the value of the best pattern at ``prices`` [R], and the pattern.

        With weights rounded down the value is not below any real pattern's.
        """
        value = np.zeros(self._ticks + 1, dtype=np.float32)
        buffer = np.empty_like(value)
        taken: list[tuple[_Item, np.ndarray | None, bool]] = []
        best, best_at, best_step = 0.0, self._ticks, 0
        for exclusive, items in self._groups:
            base = value.copy() if exclusive else value
            for item in items:
                worth = np.float32(prices[item.bucket] * item.size)
                mask = None
                if worth > 0 and item.ticks <= self._ticks:
                    room = self._ticks + 1 - item.ticks
                    with_item = np.add(base[:room], worth, out=buffer[:room])
                    if with_pattern:
                        mask = with_item > value[item.ticks :]
                    np.maximum(value[item.ticks :], with_item, out=value[item.ticks :])
                taken.append((item, mask, exclusive))
                if item.capacity >= 0 and value[item.capacity] > best:
                    best, best_at = float(value[item.capacity]), item.capacity
                    best_step = len(taken)
        if not self._table.bubbles:
            best, best_at, best_step = float(value[-1]), self._ticks, len(taken)
        pattern = self._trace(taken[:best_step], best_at) if with_pattern else None
        return best * (1 + VALUE_SLACK), pattern

    def _trace(self, taken: list[tuple[_Item, np.ndarray | None, bool]], at: int) -> Pattern:
        counts = np.zeros(len(self._counts), dtype=np.int64)
        longest = seconds = 0.0
        closed = -1  # the exclusive bucket already decided
        for item, mask, exclusive in reversed(taken):
            if exclusive and item.bucket == closed:
                continue
            if mask is not None and at >= item.ticks and mask[at - item.ticks]:
                counts[item.bucket] += item.size
                longest = max(longest, item.micro_batch_s)
                seconds += item.seconds
                at -= item.ticks
                if exclusive:
                    closed = item.bucket
        return Pattern(counts, longest, seconds + self._table.bubbles * longest)

    def _weight(self, seconds: float) -> int:
        exact = seconds / self._tick_s
        if self._rounding == "down":
            return int(np.floor(exact * (1 - WEIGHT_SLACK)))
        return int(np.ceil(exact * (1 + WEIGHT_SLACK)))

    def _plain(self) -> list[tuple[bool, list[_Item]]]:
        """Return the groups of a layout without pipeline: no bubble, buckets one by one."""
        table, groups = self._table, []
        exact = table.least_work_s if self._rounding == "down" else table.work_s
        work = exact(int(min(MOST_EXACT, self._counts.max(initial=0))))
        for bucket in np.flatnonzero((self._counts > 0) & (table.limit > 0)).tolist():
            count, most = int(self._counts[bucket]), int(table.limit[bucket])
            times = table.time_s[bucket]
            items = []
            for size in range(most, 0, -1):
                copies = int(min(self._step_s / times[size], -(-count // size)))
                if size < most and self._merges(times, size, most):
                    copies = min(copies, 1)
                items += self._copies(bucket, size, float(times[size]), copies, -1)
            # the exact number of sequences where that is as cheap, or few replicas share the batch
            if count <= max(self._exclusive_most, min(len(items), MOST_EXACT)):
                items = [
                    _Item(bucket, n, self._weight(seconds), seconds, 0.0, -1)
                    for n, seconds in enumerate(work[bucket, : count + 1].tolist())
                    if n > 0 and seconds <= self._step_s
                ]
                groups.append((True, items))
            else:
                groups.append((False, items))
        return groups

    def _pipelined(self) -> list[_Item]:
        """Return the items of a pipelined layout in the order of their micro-batch's time.

        After the items up to a micro-batch time z the value holds all patterns whose longest
        micro-batch is at most z; it is read where T minus the bubble of z is left.
        """
        table, bubbles = self._table, self._table.bubbles
        micro_batches = [
            (float(table.time_s[bucket, size]), bucket, size)
            for bucket in np.flatnonzero((self._counts > 0) & (table.limit > 0)).tolist()
            for size in range(1, int(table.limit[bucket]) + 1)
            if table.time_s[bucket, size] * (1 + bubbles) <= self._step_s
        ]
        items = []
        for micro_batch_s, bucket, size in sorted(micro_batches):
            left = self._step_s - bubbles * micro_batch_s
            copies = int(min(left / micro_batch_s + 1e-9, -(-int(self._counts[bucket]) // size)))
            items += self._copies(
                bucket,
                size,
                micro_batch_s,
                max(1, copies),
                int(left / self._tick_s * (1 + WEIGHT_SLACK)),
            )
        return items

    def _copies(
        self, bucket: int, size: int, micro_batch_s: float, copies: int, capacity: int
    ) -> list[_Item]:
        """Return items of 1, 2, 4, ... of them that together make any number up to ``copies``."""
        items, bundle = [], 1
        while copies > 0:
            number = min(bundle, copies)
            copies -= number
            bundle *= 2
            read = min(capacity, self._ticks) if copies == 0 else -1
            seconds = number * micro_batch_s
            ticks = self._weight(seconds)
            items.append(_Item(bucket, number * size, ticks, seconds, micro_batch_s, read))
        return items

    @staticmethod
    def _merges(times: np.ndarray, size: int, most: int) -> bool:
        """Return whether two of ``size`` are never better than one larger (and a rest)."""
        larger = min(2 * size, most)
        return bool(times[larger] + times[2 * size - larger] <= 2 * times[size] * (1 + 1e-12))
