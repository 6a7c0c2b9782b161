"""The expected batch: how many sequences of each bucket a plan is made for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lobra.common.errors import ConfigError
from lobra.planner.bucketed.buckets import (
    bucket_index,
    checked_lengths,
    plan_buckets,
    static_buckets,
)
from lobra.planner.workload import Workload


@dataclass(frozen=True, eq=False)
class ExpectedBatch:
    """The batch a plan is made for: ``counts`` sequences of each of the ``buckets``, int64 [R]."""

    counts: np.ndarray
    buckets: np.ndarray
    padding_ratio: float


def expect(workload: Workload, num_buckets: int, static: bool = False) -> ExpectedBatch:
    """Return the expected batch over dynamic or static buckets."""
    if num_buckets < 1:
        raise ConfigError(f"--num-buckets: {num_buckets}; at least one bucket is needed")
    if static:
        buckets = static_buckets(num_buckets, workload.longest)
    else:
        buckets = plan_buckets(
            workload.lengths, workload.batch_sizes, num_buckets, workload.longest
        )
    counts = expected_batch(workload.lengths, workload.batch_sizes, buckets, workload.longest)
    real = padded = 0.0
    for task, values in workload.lengths.items():
        share = workload.batch_sizes[task] / len(values)
        real += share * float(values.sum())
        padded += share * float(buckets[bucket_index(values, buckets)].sum())
    return ExpectedBatch(counts, buckets, 1.0 - real / padded)


def expected_batch(
    lengths: Mapping[str, np.ndarray],
    batch_sizes: Mapping[str, int],
    buckets: np.ndarray,
    longest: int = 1,
) -> np.ndarray:
    """Return int64 [num buckets]: how many sequences of each bucket a typical step holds.

    Per task its histogram over the buckets, rounded to its global batch size by largest remainder
    (ties go to the longer bucket); then at least one sequence of the longest occupied bucket, or
    of that of ``longest`` tokens, which a plan must hold too.

    Raises
    ------
    ConfigError
        If a task has no sequence.
    """
    total = np.zeros(len(buckets), dtype=np.int64)
    last = int(bucket_index(np.array([longest]), buckets)[0])
    for task, values in lengths.items():
        index = bucket_index(checked_lengths(values, task), buckets)
        counts = np.bincount(index, minlength=len(buckets))
        total += largest_remainder(counts, batch_sizes[task])
        last = max(last, int(index.max()))
    total[last] = max(1, total[last])
    return total


def largest_remainder(counts: np.ndarray, total: int) -> np.ndarray:
    """Return int64 of the shape of ``counts`` that sums to ``total``, in its proportions."""
    whole = int(counts.sum())
    floors, rests = np.divmod(np.asarray(counts, dtype=np.int64) * total, whole)
    missing = total - int(floors.sum())
    order = np.lexsort((-np.arange(len(counts)), -rests))
    floors[order[:missing]] += 1
    return floors
