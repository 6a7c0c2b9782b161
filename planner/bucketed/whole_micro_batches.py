"""What a batch needs when micro-batches are whole: remainders that no rate of full ones shows.

A micro-batch of time c is at least ``c / (T - (pp - 1) c)`` of a replica's step
(``planner.bucketed.fluid``), so n sequences of a bucket take at least ``U_ij(n)`` replicas of
layout i, the least over all ways to cut them into micro-batches. If a replica of layout i is worth
``V_i``, the batch is worth at least ``sum_j min { sum_i V_i U_ij(n_i) : sum_i n_i = d_j }``, and a
plan p that reaches T has ``sum_i p_i V_i`` no smaller. With V from the prices of the fluid
relaxation that is never weaker.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lobra.planner.bucketed.time_table import TimeTable

LARGEST = 1e300  # for products with what is infinite
MOST_SEQUENCES = 160  # a bucket with more is priced as divisible: remainders weigh little there


class WholeMicroBatches:
    """The least part of a replica that whole micro-batches take within one step time.

    Parameters
    ----------
    tables
        Micro-batch times of all layouts.
    counts
        int64 [R]: the batch.
    step_time_s
        The step time T.
    """

    def __init__(self, tables: Sequence[TimeTable], counts: np.ndarray, step_time_s: float) -> None:
        self._counts = counts
        self._buckets = np.flatnonzero((counts > 0) & (counts <= MOST_SEQUENCES)).tolist()
        most = int(counts[self._buckets].max(initial=0))
        self._use = [_least_use(table, step_time_s, most, self._buckets) for table in tables]

    def needed(self, values: np.ndarray, prices: np.ndarray, layouts: np.ndarray) -> float:
        """Return what the batch is worth at least to plans of some ``layouts`` (indices).

        ``values`` float64 [all layouts] is a replica's worth; ``prices`` [R] must not exceed, for
        any of the layouts, what its value buys of one bucket (``values >= prices * reach``).
        """
        worth = prices * self._counts
        for row, bucket in enumerate(self._buckets):
            number = int(self._counts[bucket])
            uses = [(values[i], self._use[i][row, : number + 1]) for i in layouts.tolist()]
            shares = [
                np.where(np.isfinite(use), value * np.minimum(use, LARGEST), np.inf)
                for value, use in uses
                if np.isfinite(use[1:]).any()
            ]
            if not shares:
                worth[bucket] = np.inf
                continue
            least = shares[0]
            for share in shares[1:-1]:
                least = _convolve(least, share)
            whole = least[-1] if len(shares) == 1 else (least + shares[-1][::-1]).min()
            worth[bucket] = max(worth[bucket], whole)
        return float(worth.sum())


def _least_use(
    table: TimeTable, step_time_s: float, most: int, buckets: Sequence[int]
) -> np.ndarray:
    """Return float64 [buckets, most + 1]: the least part of a replica for n sequences."""
    time_s = table.time_s[buckets]
    in_time = time_s * (1 + table.bubbles) <= step_time_s * (1 + 1e-12)
    left_s = step_time_s - table.bubbles * np.where(in_time, time_s, 0.0)
    use = np.where(in_time, np.where(in_time, time_s, 0.0) / left_s, np.inf)
    return TimeTable(table.layout, table.max_tokens, table.limit[buckets], use).least_work_s(most)


def _convolve(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the least sum of the two for every way to share n, float64 [n + 1]."""
    length = len(first)
    padded = np.concatenate([np.full(length - 1, np.inf), first])
    step = padded.strides[0]
    shifted = np.lib.stride_tricks.as_strided(padded[length - 1 :], (length, length), (step, -step))
    return (shifted + second).min(axis=1)
