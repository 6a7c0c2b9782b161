from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lobra.common.errors import ConfigError
from lobra.planner.bucketed.buckets import plan_buckets
from lobra.planner.bucketed.expected_batch import expected_batch, largest_remainder


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9), st.integers(0, 300))
def test_largest_remainder_keeps_the_total_and_rounds_to_a_neighbour(
    values: list[int], total: int
) -> None:
    counts = np.array([*values, 1])
    rounded = largest_remainder(counts, total)
    exact = counts * total / counts.sum()
    assert rounded.sum() == total
    assert (np.abs(rounded - exact) < 1).all()


def test_the_expected_batch_has_every_task_whole_and_the_longest_bucket() -> None:
    rng = np.random.default_rng(0)
    lengths = {
        "short": rng.integers(10, 200, 1000),
        "long": np.append(rng.integers(10, 300, 999), 4000),
    }
    sizes = {"short": 7, "long": 5}
    buckets = plan_buckets(lengths, sizes, 4)
    counts = expected_batch(lengths, sizes, buckets)
    assert buckets[-1] == 4000
    assert counts[-1] == 1
    assert counts.sum() in (12, 13)
    with pytest.raises(ConfigError, match="no sequence"):
        expected_batch({"none": np.array([], dtype=int)}, {"none": 3}, buckets)
