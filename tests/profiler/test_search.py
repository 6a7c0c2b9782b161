"""The search finds the largest size that fits, whatever it can see of memory, in few trials."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lobra.profiler.search import Trial, largest_fitting


def linear(base: int, per_token: float, budget: int, seen: bool = True):
    def trial(size: int) -> Trial:
        peak = int(base + per_token * size)
        return Trial(size, peak <= budget, peak if seen else None)

    return trial


@given(
    st.integers(0, 10_000),
    st.floats(0.01, 50),
    st.integers(1, 500_000),
    st.sampled_from([1, 64, 256]),
    st.integers(256, 20_000),
    st.booleans(),
)
def test_it_is_the_largest_multiple_that_fits(base, per_token, budget, step, largest, seen) -> None:
    trial = linear(base, per_token, budget, seen)
    size, trials = largest_fitting(trial, step, largest, budget)
    assert size % step == 0
    assert size == 0 or trial(size).fits
    next_size = size + step
    assert next_size > largest or not trial(next_size).fits
    assert len({t.size for t in trials}) == len(trials), "no size is tried twice"


@given(st.integers(0, 1000), st.sampled_from([1, 2, 3]), st.booleans())
def test_the_number_of_trials_is_bounded(threshold: int, power: int, lie: bool) -> None:
    """However peaks mislead the guesses, at most about twice the trials of bisection are made."""

    def trial(size: int) -> Trial:
        peak = (1000 - size) ** power if lie else size**power
        return Trial(size, size <= threshold, peak)

    size, trials = largest_fitting(trial, 1, 1000, threshold**power)
    assert size == threshold
    assert len(trials) <= 4 * (math.log2(1000) + 2)


def test_memory_linear_in_tokens_needs_few_trials() -> None:
    budget = 1_000_000
    size, trials = largest_fitting(linear(50_000, 57.3, budget), 256, 65_536, budget)
    assert size == 16_384 + 256 - 256 * (1 - (950_000 / 57.3 >= 16_640))
    assert len(trials) <= 5


def test_everything_fits_takes_one_trial() -> None:
    size, trials = largest_fitting(linear(0, 1, 10**9), 256, 2048, 10**9)
    assert (size, len(trials)) == (2048, 1)


def test_a_largest_below_the_step_is_refused() -> None:
    with pytest.raises(ValueError, match="no multiple of 256 up to 100"):
        largest_fitting(linear(0, 1, 1), 256, 100)
