from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lobra.common.errors import ConfigError
from lobra.planner.bucketed.buckets import bucket_index, make_buckets, static_buckets
from tests.tiers import examples

LENGTHS = st.lists(st.integers(1, 900), min_size=1, max_size=40)


def padded(lengths: np.ndarray, buckets: np.ndarray) -> int:
    return int(buckets[bucket_index(lengths, buckets)].sum())


def brute_force(lengths: np.ndarray, num_buckets: int, align: int) -> int:
    ends = np.unique(-(-lengths // align)) * align
    inner = ends[:-1]
    number = min(num_buckets - 1, len(inner))
    return min(
        padded(lengths, np.array([*chosen, ends[-1]])) for chosen in combinations(inner, number)
    )


def recurrence(lengths: np.ndarray, num_buckets: int, align: int) -> int:
    """The O(n^2 R) dynamic program over the sorted sequences themselves."""
    sizes = np.sort(-(-lengths // align) * align).tolist()
    n = len(sizes)
    best = [0] + [10**15] * n
    answer = 10**15
    for _ in range(num_buckets):
        best = [0] + [
            min(best[i] + sizes[j - 1] * (j - i) for i in range(j)) for j in range(1, n + 1)
        ]
        answer = min(answer, best[n])
    return answer


@given(LENGTHS, st.integers(1, 5))
@examples(50, 1500)
def test_buckets_waste_no_more_than_any_others(values: list[int], num_buckets: int) -> None:
    lengths = np.array([-(-value // 90) * 90 for value in values])  # few distinct boundaries
    buckets = make_buckets(lengths, num_buckets)
    assert padded(lengths, buckets) == brute_force(lengths, num_buckets, 16)


@given(LENGTHS, st.integers(1, 8), st.sampled_from([1, 16, 50]))
@examples(50, 1500)
def test_buckets_agree_with_the_plain_recurrence(
    values: list[int], num_buckets: int, align: int
) -> None:
    lengths = np.array(values)
    buckets = make_buckets(lengths, num_buckets, align)
    assert padded(lengths, buckets) == recurrence(lengths, num_buckets, align)
    assert len(buckets) <= num_buckets
    assert (np.diff(buckets) > 0).all() and (buckets % align == 0).all()
    assert buckets[-1] - align < lengths.max() <= buckets[-1]


def test_large_counts_do_not_overflow() -> None:
    lengths = np.array([16, 32, 5000, 16384])
    weights = np.array([10**9, 10**9, 10**9, 1])
    assert make_buckets(lengths, 4, weights=weights).tolist() == [16, 32, 5008, 16384]
    assert len(make_buckets(lengths, 2, weights=weights)) == 2


def test_fewer_distinct_lengths_than_buckets_give_one_bucket_each() -> None:
    assert make_buckets(np.array([5, 17, 17, 100]), 16).tolist() == [16, 32, 112]


@pytest.mark.parametrize("lengths", [[], [0, 5], [-3], [1.5]])
def test_bad_lengths_are_refused(lengths: list[float]) -> None:
    with pytest.raises(ConfigError):
        make_buckets(np.array(lengths), 4)


def test_static_sets_end_at_the_longest_sequence() -> None:
    assert static_buckets(7, 1500).tolist() == [256, 512, 1024, 2048]
    assert len(static_buckets(16, 16384)) == 16
    with pytest.raises(ConfigError, match="7 or 16"):
        static_buckets(8, 100)
    with pytest.raises(ConfigError, match="longer than the last"):
        static_buckets(7, 16385)
