"""The measured shapes: within the limits, spread over both directions, few."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lobra.profiler.grid import time_grid


@given(st.integers(1, 40_000), st.integers(1, 200_000))
def test_shapes_are_distinct_and_within_the_limits(length: int, tokens: int) -> None:
    shapes = time_grid(length, tokens)
    assert len(set(shapes)) == len(shapes)
    assert all(b >= 1 and 1 <= s <= length for b, s in shapes)
    assert all(b * s <= tokens or b == 1 for b, s in shapes)
    assert (1, length) in shapes


def test_the_default_of_a_cpu_suffices_for_the_fit_and_is_small() -> None:
    shapes = time_grid(2048)
    assert 12 <= len(shapes) <= 20
    assert len({s for _, s in shapes}) >= 5
    assert len({b * s for b, s in shapes}) >= 5


def test_published_size_needs_far_fewer_rows_than_a_grid() -> None:
    assert set(time_grid(2048, quick=True)) <= set(time_grid(2048))
    assert len(time_grid(2048, quick=True)) == 6
    assert len(time_grid(16_384)) <= 250 / 4 / 2


def test_no_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 0 tokens"):
        time_grid(128, 0)
