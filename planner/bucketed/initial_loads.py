"""The loads that local search begins from: the fluid relaxation's, or greedy dispatch's."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from lobra.planner.bucketed.fluid import Fluid, solve_fluid, solve_rates
from lobra.planner.bucketed.greedy import greedy
from lobra.planner.bucketed.loads import Loads
from lobra.planner.bucketed.time_table import TimeTable, longest_sequence_s


@dataclass(frozen=True, eq=False)
class InitialLoads:
    """An assignment to search from.

    ``loads`` has one group per table; of pipelined ``tables`` the longest micro-batches may be left
    out, where a shorter bubble gains more. No dispatch is faster than ``bound_s``.
    """

    loads: Loads
    tables: list[TimeTable]
    bound_s: float


def fluid_loads(tables: list[TimeTable], replicas: np.ndarray, counts: np.ndarray) -> InitialLoads:
    """Return the fluid relaxation's shares in whole micro-batches, dealt longest first.

    ``replicas`` is int64 [groups], one group per table; ``counts`` int64 [R].
    """
    fluid = solve_fluid(tables, replicas, counts)
    bound_s = max(fluid.step_time_s, longest_sequence_s(tables, counts))
    tables, share = _with_shorter_bubbles(tables, replicas, counts, fluid)
    group = np.repeat(np.arange(len(tables)), replicas)
    assigned = _dealt(tables, replicas, counts, share)
    return InitialLoads(
        Loads.of(tables, group, assigned, int(counts.max(initial=0))), tables, bound_s
    )


def greedy_loads(tables: list[TimeTable], group: np.ndarray, counts: np.ndarray) -> Loads:
    """Return greedy dispatch; ``group`` int64 [replicas] is each replica's table."""
    return Loads.of(tables, group, greedy(tables, group, counts)[0], int(counts.max(initial=0)))


def _with_shorter_bubbles(
    tables: list[TimeTable], replicas: np.ndarray, counts: np.ndarray, fluid: Fluid
) -> tuple[list[TimeTable], np.ndarray]:
    """Limit the micro-batches of pipelined groups where a shorter bubble gains more than it costs.

    Returns the tables with their micro-batches limited, and float64 [groups, R]: the sequences that
    each group takes when its replicas lose the bubble of their limit.
    """
    if not any(table.bubbles for table in tables):
        return tables, fluid.share
    chosen = [
        table.capped(_best_cap_s(table, fluid.share[group] / replicas[group]))
        if table.bubbles and fluid.share[group].any()
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


def _best_cap_s(table: TimeTable, share: np.ndarray) -> float:
    """Return the longest micro-batch's seconds that make ``share`` [R] and the bubble shortest."""
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
    return float(caps[np.argmin(work + table.bubbles * caps)])


def _dealt(
    tables: list[TimeTable], replicas: np.ndarray, counts: np.ndarray, share: np.ndarray
) -> np.ndarray:
    """Return int64 [Q, R]: shares rounded to whole sequences, micro-batches longest first."""
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
    start = 0
    for group, table in enumerate(tables):
        batches = [
            (-float(table.time_s[bucket, size]), bucket, size)
            for bucket in np.flatnonzero(whole[group]).tolist()
            for size in table.split(bucket, int(whole[group, bucket]))
        ]
        heap = [(0.0, replica) for replica in range(start, start + int(replicas[group]))]
        for negative, bucket, size in sorted(batches):
            busy, replica = heap[0]
            assigned[replica, bucket] += size
            heapq.heapreplace(heap, (busy - negative, replica))
        start += int(replicas[group])
    return assigned
