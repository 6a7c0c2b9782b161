"""Which sequences are too long for pipelines that others take as well.

A pipeline pays its longest micro-batch once more for every bubble, and that is at least its longest
sequence. A few long sequences may so cost it more than they would cost others.
"""

from __future__ import annotations

import numpy as np

from lobra.planner.packed.bound import prices_of, prices_of_each
from lobra.planner.packed.step_work import StepWork

TRIED = 4  # lengths up to which a kind of pipelines takes sequences
HALVINGS = 10  # of the interval in which a step's time is searched
MOST_LONGER = 1.5  # times what a step takes at least: its upper end


def without_long_bubbles(work: StepWork, step_time_s: float) -> tuple[StepWork, np.ndarray]:
    """Return the work without what is too long for pipelines, and prices for it, float64 [G].

    ``step_time_s`` are the seconds that the step takes at least.
    """
    prices: np.ndarray | None = None
    for place, kind in enumerate(work.kinds):
        if kind.bubbles and len(numbers := _numbers_tried(place, work, step_time_s)) > 1:
            works = [work.up_to(place, number) for number in numbers]
            of_each = prices_of_each(works, step_time_s)
            times_s = [
                _estimate_s(each, own, place, step_time_s)
                for each, own in zip(works, of_each, strict=True)
            ]
            best = int(np.argmin(times_s))
            work, prices = works[best], of_each[best]
    return work, prices_of(work, step_time_s) if prices is None else prices


def _numbers_tried(place: int, work: StepWork, step_time_s: float) -> list[int]:
    """Return how many of the lengths, the shortest, a kind of pipelines may take.

    It takes all that no other kind holds, and all that are shorter than its micro-batches anyway.
    """
    _, each_s = work.kinds[place].held_s(step_time_s, int(work.counts.sum()))
    fits = np.isfinite(work.parts_s)
    most = int(fits[place].sum())
    shorter = int(np.searchsorted(work.alone_s[place, :most], each_s))
    needed = np.flatnonzero(fits[place] & (fits.sum(axis=0) == 1))
    least = max(1, shorter, int(needed.max(initial=-1)) + 1)
    numbers: list[int] = np.unique(np.linspace(least, most, TRIED).astype(np.int64)).tolist()
    return numbers


def _estimate_s(work: StepWork, prices: np.ndarray, place: int, step_time_s: float) -> float:
    """Return about what the step takes if its longest sequence makes a kind's bubbles longer.

    Than its micro-batches are without; in seconds.
    """
    _, each_s = work.kinds[place].held_s(step_time_s, int(work.counts.sum()))
    value = work.worth(prices)
    longest_s = work.alone_s[place, np.isfinite(work.parts_s[place])][-1]
    lost_s = work.kinds[place].bubbles * max(0.0, float(longest_s) - each_s)
    low, high = step_time_s, MOST_LONGER * step_time_s
    for _ in range(HALVINGS):
        middle = 0.5 * (low + high)
        held_s = work.held_s(middle)
        held_s[place] *= 1.0 - lost_s / middle
        if prices @ held_s < value:
            low = middle
        else:
            high = middle
    return high
