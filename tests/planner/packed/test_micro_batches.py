"""Sizes of micro-batches take least of all that add up to as much; sequences go in whole."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lobra.layout.layout import Layout
from lobra.layout.sequences import IntArray
from lobra.planner.packed.micro_batches import into_sizes, near, room_for, sizes_of
from tests.planner.strategies import cost_models
from tests.planner.support import LawCostModel
from tests.tiers import examples


@given(cost_models(), st.integers(16, 200), st.integers(1, 200), st.integers(1, 500))
@examples(25, 200)
def test_no_other_sizes_take_less(
    cost_model: LawCostModel, max_tokens: int, mean: int, tokens: int
) -> None:
    def cost(tokens: IntArray, squares: IntArray) -> np.ndarray:
        return cost_model.micro_batch_time(Layout(1, 1), tokens, squares).total_ms

    every = np.arange(16, max_tokens + 1, 16)
    each_ms = cost(every, every * np.minimum(every, mean)).tolist()

    @cache
    def least_ms(left: int) -> float:
        if left <= 0:
            return 0.0
        return min(
            ms + least_ms(left - size) for size, ms in zip(every.tolist(), each_ms, strict=True)
        )

    found = sizes_of(cost, max_tokens, mean).of(tokens)
    assert sum(found) >= tokens
    assert max(found) <= max_tokens
    found_ms = sum(each_ms[size // 16 - 1] for size in found)
    assert found_ms == pytest.approx(least_ms(tokens), rel=1e-9)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=30), st.lists(st.integers(1, 6)))
def test_sequences_go_into_micro_batches_that_hold_them(own: list[int], sizes: list[int]) -> None:
    lengths = sorted(own, reverse=True)
    batches = into_sizes(lengths, [16 * size for size in sizes], 100)
    assert len(batches) == len(lengths)
    sums = np.bincount(batches, lengths)
    alone = np.bincount(batches) == 1
    assert (sums[~alone] <= room_for(100)).all()


def test_means_are_few_and_near() -> None:
    means = {near(mean) for mean in range(1, 4000)}
    assert len(means) <= 22
    assert all(1 / 1.3 < near(mean) / mean < 1.3 for mean in range(8, 4000))
