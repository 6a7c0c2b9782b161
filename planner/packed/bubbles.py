"""Which sequences are too long for pipelines that others take as well.

A pipeline pays its longest micro-batch once more for every bubble, and that is at least its longest
sequence. A few long sequences may so cost it more than they would cost others.
"""

from __future__ import annotations

import numpy as np

from lobra.planner.packed.bound import prices_of
from lobra.planner.packed.step_work import StepWork

TRIED = 4  # lengths up to which a kind of pipelines takes sequences
HALVINGS = 10  # of the interval in which a step's time is searched
MOST_LONGER = 1.5  # times what a step takes at least: its upper end


def without_long_bubbles(work: StepWork, step_time_s: float) -> tuple[StepWork, np.ndarray]:
    """Return the work without what is too long for pipelines, and prices for it, float64 [G].

    ``step_time_s`` are the seconds that the step takes at least.
    """
    for place, kind in enumerate(work.kinds):
        if kind.bubbles:
            work = _without_long_bubbles_of(place, work, step_time_s)
    return work, prices_of(work, step_time_s)


def _without_long_bubbles_of(place: int, work: StepWork, step_time_s: float) -> StepWork:
    """Return the work of which a kind of pipelines takes the lengths up to the best of a few.

    So that the step is estimated to take least. It takes all that no other kind holds, and all that
    are shorter than its micro-batches anyway.
    """
    _, each_s = work.kinds[place].held_s(step_time_s, int(work.counts.sum()))
    fits = np.isfinite(work.parts_s)
    most = int(fits[place].sum())
    shorter = int(np.searchsorted(work.alone_s[place, :most], each_s))
    needed = np.flatnonzero(fits[place] & (fits.sum(axis=0) == 1))
    least = max(1, shorter, int(needed.max(initial=-1)) + 1)
    tried = np.unique(np.linspace(least, most, TRIED).astype(np.int64)).tolist()
    if len(tried) == 1:
        return work
    works = [work.up_to(place, number) for number in tried]
    times_s = [_estimate_s(each, place, step_time_s, each_s) for each in works]
    return works[int(np.argmin(times_s))]


def _estimate_s(work: StepWork, place: int, step_time_s: float, each_s: float) -> float:
    """Return about what the step takes if its longest sequence makes a kind's bubbles longer.

    ``each_s`` are the seconds that the kind's micro-batches take without.
    """
    prices = prices_of(work, step_time_s)
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
