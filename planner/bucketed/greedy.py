"""Greedy dispatch: the largest micro-batches first, each where it ends first (LPT)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lobra.common.errors import ConfigError
from lobra.layout.plan import Plan
from lobra.planner.bucketed.buckets import bucket_index
from lobra.planner.bucketed.time_table import TimeTable, plan_tables
from lobra.profiler.cost_model import CostModel


def greedy(
    tables: Sequence[TimeTable], group: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return int64 [replicas, R] and float64 [replicas]: greedy dispatch (LPT), and its seconds.

    The free baseline; ``group`` int64 [replicas] is each replica's table. Buckets from the longest;
    the next micro-batch, as large as the replica holds, goes where it ends first, the pipeline's
    bubble included. Every bucket must fit a replica.
    """
    limit = np.stack([table.limit for table in tables])
    bubbles = np.array([table.bubbles for table in tables])[group]
    work, longest = np.zeros(len(group)), np.zeros(len(group))
    taken = np.zeros((len(group), len(counts)), dtype=np.int64)
    for bucket in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[bucket])
        size, time_s = limit[:, bucket], np.zeros(0)
        while left:
            if not len(time_s) or size.max() > left:
                size = np.minimum(limit[:, bucket], left)
                times = [t.time_s[bucket, n] for t, n in zip(tables, size.tolist(), strict=True)]
                time_s = np.where(size > 0, times, np.inf)[group]
            with np.errstate(invalid="ignore"):  # inf for those that cannot, times no bubble
                bubble = np.where(bubbles, bubbles * np.maximum(longest, time_s), 0.0)
                end = work + time_s + bubble
            chosen = int(np.argmin(end))
            work[chosen] += time_s[chosen]
            longest[chosen] = max(longest[chosen], time_s[chosen])
            taken[chosen, bucket] += size[group[chosen]]
            left -= int(size[group[chosen]])
    return taken, work + bubbles * longest


def lpt_times_s(
    lengths: np.ndarray, buckets: np.ndarray, plan: Plan, cost_model: CostModel
) -> np.ndarray:
    """Return float64 [replicas]: times of greedy dispatch, the free baseline.

    Buckets from the longest; the next micro-batch, as large as the replica holds, goes where it
    ends first.
    """
    counts = np.bincount(bucket_index(lengths, buckets), minlength=len(buckets))
    tables = plan_tables(plan, buckets, cost_model)
    for bucket in np.flatnonzero(counts).tolist():
        if not any(table.limit[bucket] for table in tables):
            raise ConfigError(f"a sequence of {buckets[bucket]} tokens fits no replica of {plan}")
    group = np.repeat(np.arange(len(tables)), [g.replicas for g in plan.groups])
    return greedy(tables, group, counts)[1]
