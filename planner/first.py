"""First assignments of a batch to a plan's replicas, for local search to begin from."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lobra.planner.chunks import ChunkTable, longest_sequence_s
from lobra.planner.fluid import Fluid, solve_fluid, solve_rates
from lobra.planner.search import Loads


@dataclass(frozen=True, eq=False)
class Start:
    """A first assignment to search from.

    ``loads`` has one group per table; of pipelined ``tables`` the longest chunks may be left out,
    where a shorter bubble gains more. No dispatch is faster than ``bound_s``.
    """

    loads: Loads
    tables: list[ChunkTable]
    bound_s: float


def start_loads(tables: list[ChunkTable], replicas: np.ndarray, counts: np.ndarray) -> Start:
    """Return the fluid relaxation's shares in whole chunks, dealt longest first.

    ``replicas`` is int64 [groups], one group per table; ``counts`` int64 [R].
    """
    fluid = solve_fluid(tables, replicas, counts)
    bound_s = max(fluid.step_time_s, longest_sequence_s(tables, counts))
    tables, share = _limit_chunks(tables, replicas, counts, fluid)
    group = np.repeat(np.arange(len(tables)), replicas)
    assigned = _first_assignment(tables, replicas, counts, share)
    return Start(Loads.of(tables, group, assigned, int(counts.max(initial=0))), tables, bound_s)


def greedy_start(start: Start, tables: list[ChunkTable], counts: np.ndarray) -> Start:
    """Return the greedy assignment of the same batch, all chunks of the ``tables`` allowed."""
    group = start.loads.group
    taken, _ = greedy(tables, group, counts)
    loads = Loads.of(tables, group, taken, int(counts.max(initial=0)))
    return Start(loads, tables, start.bound_s)


def greedy(
    tables: Sequence[ChunkTable], group: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return int64 [replicas, R] and float64 [replicas]: greedy dispatch (LPT), and its seconds.

    The free baseline; ``group`` int64 [replicas] is each replica's table. Buckets from the longest;
    the next chunk, as large as the replica holds, goes where it ends first, the pipeline's bubble
    included. Every bucket must fit a replica.
    """
    limit = np.stack([table.limit for table in tables])
    bubbles = np.array([table.bubble_chunks for table in tables])[group]
    work, longest = np.zeros(len(group)), np.zeros(len(group))
    taken = np.zeros((len(group), len(counts)), dtype=np.int64)
    for bucket in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[bucket])
        size, chunk = limit[:, bucket], np.zeros(0)
        while left:
            if not len(chunk) or size.max() > left:
                size = np.minimum(limit[:, bucket], left)
                times = [t.time_s[bucket, n] for t, n in zip(tables, size.tolist(), strict=True)]
                chunk = np.where(size > 0, times, np.inf)[group]
            with np.errstate(invalid="ignore"):  # inf for those that cannot, times no bubble
                end = work + chunk + np.where(bubbles, bubbles * np.maximum(longest, chunk), 0.0)
            chosen = int(np.argmin(end))
            work[chosen] += chunk[chosen]
            longest[chosen] = max(longest[chosen], chunk[chosen])
            taken[chosen, bucket] += size[group[chosen]]
            left -= int(size[group[chosen]])
    return taken, work + bubbles * longest


def chunks_of(
    loads: Loads, tables: Sequence[ChunkTable]
) -> tuple[tuple[tuple[tuple[int, int], ...], ...], list[float]]:
    """Return every replica's chunks, pairs (bucket, sequences), and its seconds, exactly."""
    chunks = tuple(
        tuple(
            (bucket, size)
            for bucket in np.flatnonzero(row).tolist()
            for size in tables[group].split(bucket, int(row[bucket]))
        )
        for group, row in zip(loads.group.tolist(), loads.counts, strict=True)
    )
    times = [
        chunks_time_s(tables[group], pairs)
        for group, pairs in zip(loads.group.tolist(), chunks, strict=True)
    ]
    return chunks, times


def _limit_chunks(
    tables: list[ChunkTable], replicas: np.ndarray, counts: np.ndarray, fluid: Fluid
) -> tuple[list[ChunkTable], np.ndarray]:
    """Limit the chunks of pipelined groups where a shorter bubble gains more than it costs.

    Returns the tables with their chunks limited, and float64 [groups, R]: the sequences that each
    group takes when its replicas lose the bubble of their limit.
    """
    if not any(table.bubble_chunks for table in tables):
        return tables, fluid.share
    chosen = [
        table.capped(_best_cap_s(table, fluid.share[group] / replicas[group]))
        if table.bubble_chunks and fluid.share[group].any()
        else table
        for group, table in enumerate(tables)
    ]
    fits = np.stack([table.limit > 0 for table in chosen]).any(axis=0)
    missing = (counts > 0) & ~fits
    if missing.any():  # lift limits that leave a bucket without any replica
        chosen = [
            table if (table.limit[missing] > 0).any() else limited
            for table, limited in zip(tables, chosen, strict=True)
        ]
    bubbles = np.array([table.bubble_s() for table in chosen])
    rates = np.stack([table.rate_s() for table in chosen])
    longest_s = max(fluid.step_time_s, float(bubbles.max()) * 1.01)
    for _ in range(2):  # the bubble's part of the step depends on the step's length
        worked = np.maximum(1.0 - bubbles / longest_s, 0.01)
        limited = solve_rates(rates / worked[:, None], replicas, counts)
        longest_s = max(limited.step_time_s, float(bubbles.max()) * 1.01)
    return chosen, limited.share


def _best_cap_s(table: ChunkTable, share: np.ndarray) -> float:
    """Return the longest chunk time that makes ``share`` [R] sequences and the bubble shortest."""
    used = np.flatnonzero(share > 1e-9)
    times = table.time_s[used, 1:]
    caps = np.unique(times[np.isfinite(times)])
    caps = caps[caps >= times[:, 0].max(initial=0.0)]
    work = np.zeros(len(caps))
    for row, bucket in zip(times, used, strict=True):
        row = row[np.isfinite(row)]
        order = np.argsort(row, kind="stable")
        best = np.minimum.accumulate((row / np.arange(1, len(row) + 1))[order])
        work += share[bucket] * best[np.searchsorted(row[order], caps, side="right") - 1]
    return float(caps[np.argmin(work + table.bubble_chunks * caps)])


def _first_assignment(
    tables: list[ChunkTable], replicas: np.ndarray, counts: np.ndarray, share: np.ndarray
) -> np.ndarray:
    """Return int64 [Q, R]: shares rounded to whole sequences, chunks longest first."""
    whole = np.floor(share + 1e-9).astype(np.int64)
    takes = np.stack([table.limit > 0 for table in tables])
    missing = counts - whole.sum(axis=0)
    for bucket in np.flatnonzero(missing > 0).tolist():
        order = np.lexsort((np.arange(len(tables)), -(share - whole)[:, bucket]))
        order = order[takes[order, bucket]]
        for number in range(int(missing[bucket])):
            whole[order[number % len(order)], bucket] += 1
    for bucket in np.flatnonzero(missing < 0).tolist():
        whole[int(np.argmax(whole[:, bucket])), bucket] += missing[bucket]
    assigned = np.zeros((int(replicas.sum()), len(counts)), dtype=np.int64)
    first = 0
    for group, table in enumerate(tables):
        chunks = [
            (-float(table.time_s[bucket, size]), bucket, size)
            for bucket in np.flatnonzero(whole[group]).tolist()
            for size in table.split(bucket, int(whole[group, bucket]))
        ]
        heap = [(0.0, replica) for replica in range(first, first + int(replicas[group]))]
        for negative, bucket, size in sorted(chunks):
            busy, replica = heap[0]
            assigned[replica, bucket] += size
            heapq.heapreplace(heap, (busy - negative, replica))
        first += int(replicas[group])
    return assigned


def chunks_time_s(table: ChunkTable, chunks: tuple[tuple[int, int], ...]) -> float:
    """Return the seconds of a replica for its chunks, pairs (bucket, sequences)."""
    if not chunks:
        return 0.0
    times = [float(table.time_s[bucket, size]) for bucket, size in chunks]
    return sum(times) + table.bubble_chunks * max(times)
