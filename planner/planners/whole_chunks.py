"""What a batch needs when chunks are whole: remainders that no rate of full chunks shows.

A chunk of time c is at least ``c / (T - (pp - 1) c)`` of a replica's step (``planner.fluid``), so n
sequences of a bucket take at least ``U_ij(n)`` replicas of layout i, the least over all ways to cut
them into chunks. If a replica of layout i is worth ``V_i``, the batch is worth at least
``sum_j min { sum_i V_i U_ij(n_i) : sum_i n_i = d_j }``, and a plan p that reaches T has
``sum_i p_i V_i`` no smaller. With V from the prices of the fluid relaxation that is never weaker.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from planner.chunks import ChunkTable

MOST_SEQUENCES = 160  # a bucket with more is priced as divisible: remainders weigh little there


class WholeChunks:
    """The least part of a replica that whole chunks take within one step time.

    Parameters
    ----------
    tables
        Chunk times of all layouts.
    counts
        int64 [R]: the batch.
    step_time_s
        The step time T.
    """

    def __init__(
        self, tables: Sequence[ChunkTable], counts: np.ndarray, step_time_s: float
    ) -> None:
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
            least = np.full(number + 1, np.inf)
            least[0] = 0.0
            for layout in layouts.tolist():
                use = self._use[layout][row, : number + 1]
                if np.isfinite(use[1:]).any():
                    least = _convolve(least, values[layout] * use)
            worth[bucket] = max(worth[bucket], least[-1])
        return float(worth.sum())


def _least_use(
    table: ChunkTable, step_time_s: float, most: int, buckets: Sequence[int]
) -> np.ndarray:
    """Return float64 [buckets, most + 1]: the least part of a replica for n sequences."""
    time_s = table.time_s[buckets]
    in_time = time_s * (1 + table.bubble_chunks) <= step_time_s * (1 + 1e-12)
    left_s = step_time_s - table.bubble_chunks * np.where(in_time, time_s, 0.0)
    use = np.where(in_time, np.where(in_time, time_s, 0.0) / left_s, np.inf)
    return ChunkTable(table.layout, table.max_tokens, table.limit[buckets], use).least_work_s(most)


def _convolve(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the least sum of the two for every way to share n, float64 [n + 1]."""
    length = len(first)
    padded = np.concatenate([np.full(length - 1, np.inf), first])
    shifted = np.lib.stride_tricks.sliding_window_view(padded, length)[:, ::-1]
    return (shifted + second[None, :]).min(axis=1)
