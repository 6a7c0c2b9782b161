"""The loads of a plan's replicas: which takes how many sequences of each bucket, and its time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lobra.planner.bucketed.time_table import CountedBatches, TimeTable


@dataclass(eq=False)
class Loads:
    """Which replica takes how many sequences of each bucket, and what that costs it.

    Q replicas, R buckets, G groups of equal replicas.

    Attributes
    ----------
    work_s
        float64 [G, R, most + 1]: seconds n sequences of a bucket take on a replica of a group.
    group
        int64 [Q]: the group of each replica.
    bubble_s
        float64 [Q]: seconds a replica loses to its pipeline's bubble if it has any work.
    counts
        int64 [Q, R]: how many each takes.
    limit
        int64 [G, R]: most sequences of a bucket in one micro-batch.
    """

    work_s: np.ndarray
    group: np.ndarray
    bubble_s: np.ndarray
    counts: np.ndarray
    limit: np.ndarray

    @classmethod
    def of(
        cls, tables: Sequence[TimeTable], group: np.ndarray, counts: np.ndarray, most: int
    ) -> Loads:
        """Return the loads of replicas with a table per group, none with over ``most`` of a bucket.

        ``group`` int64 [Q], ``counts`` int64 [Q, R].
        """
        return cls(
            np.stack([table.work_s(most) for table in tables]),
            group,
            np.array([table.bubble_s() for table in tables])[group],
            counts,
            np.stack([table.limit for table in tables]),
        )

    def __post_init__(self) -> None:
        self.every_bucket = np.arange(self.counts.shape[1])
        self.parts_s = self.work_s[self.group[:, None], self.every_bucket[None, :], self.counts]
        busy = self.counts.any(axis=1)
        self.time_s = self.parts_s.sum(axis=1) + np.where(busy, self.bubble_s, 0.0)

    def transfer(self, source: int, target: int, bucket: int, count: int) -> None:
        """Move ``count`` sequences of a bucket from one replica to another."""
        self.change(source, bucket, -count)
        self.change(target, bucket, count)

    def change(self, replica: int, bucket: int, count: int) -> None:
        """Give a replica ``count`` more (or fewer) sequences of a bucket."""
        self.counts[replica, bucket] += count
        number = self.counts[replica, bucket]
        self.parts_s[replica, bucket] = self.work_s[self.group[replica], bucket, number]
        self.time_s[replica] = self._time_s(replica, self.parts_s[replica])

    def time_of(self, replica: int, counts: np.ndarray) -> float:
        """Return the seconds a replica would need for ``counts`` [R]."""
        return self._time_s(replica, self.work_s[self.group[replica], self.every_bucket, counts])

    def set(self, replica: int, counts: np.ndarray) -> None:
        """Give a replica ``counts`` [R] instead of what it has."""
        self.counts[replica] = counts
        self.parts_s[replica] = self.work_s[self.group[replica], self.every_bucket, counts]
        self.time_s[replica] = self._time_s(replica, self.parts_s[replica])

    def restore(self, counts: np.ndarray) -> None:
        """Return to earlier counts [Q, R]."""
        for replica in np.flatnonzero((self.counts != counts).any(axis=1)).tolist():
            self.set(replica, counts[replica])

    def start_s(self, replicas: np.ndarray) -> np.ndarray:
        """Return float64 [replicas]: the bubble of those that have no work yet, else 0."""
        return np.where(self.counts[replicas].any(axis=1), 0.0, self.bubble_s[replicas])

    def _time_s(self, replica: int, parts_s: np.ndarray) -> float:
        work_s = float(parts_s.sum())
        return work_s + float(self.bubble_s[replica]) if work_s > 0.0 else 0.0


def micro_batches_of(
    loads: Loads, tables: Sequence[TimeTable]
) -> tuple[tuple[CountedBatches, ...], list[float]]:
    """Return every replica's micro-batches and its seconds, exactly; ``tables`` one per group."""
    batches = tuple(
        tuple(
            (bucket, size)
            for bucket in np.flatnonzero(row).tolist()
            for size in tables[group].split(bucket, int(row[bucket]))
        )
        for group, row in zip(loads.group.tolist(), loads.counts, strict=True)
    )
    times_s = [
        tables[group].replica_time_s(own)
        for group, own in zip(loads.group.tolist(), batches, strict=True)
    ]
    return batches, times_s
