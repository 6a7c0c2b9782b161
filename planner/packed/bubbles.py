"""Which sequences are too long for pipelines that others take as well.

A pipeline pays its longest micro-batch once more for every bubble, and that is at least its longest
sequence. A few long sequences may so cost it more than they would cost others.
"""

from __future__ import annotations

import numpy as np

from lobra.planner.packed.bound import prices_of
from lobra.planner.packed.step_work import StepWork

TRIED = 4  # longest lengths of a kind
HALVINGS = 10  # of the interval in which a step's time is searched
MOST_LONGER = 1.5  # times what a step takes at least: its upper end


def without_long_bubbles(work: StepWork, step_time_s: float) -> tuple[StepWork, np.ndarray]:
    """Return the work without what is too long for pipelines, and prices for it, float64 [G].

    ``step_time_s`` is what the step takes at least. Of a few lengths that micro-batches would
    otherwise be shorter than that one is the longest of a kind with which the step is estimated to
    take least.
    """
    for kind, alike in enumerate(work.alike):
        if not alike.bubbles:
            continue
        _, each_s = alike.held_s(step_time_s, int(work.counts.sum()))
        fits = np.isfinite(work.parts_s)
        number = int(fits[kind].sum())
        needed = np.flatnonzero(fits[kind] & (fits.sum(axis=0) == 1))  # by this kind alone
        least = int(np.searchsorted(work.alone_s[kind, :number], each_s))
        least = max(1, least, int(needed[-1]) + 1 if len(needed) else 0)
        tried = np.unique(np.linspace(least, number, TRIED).astype(np.int64)).tolist()
        if len(tried) > 1:
            works = [work.up_to(kind, each) for each in tried]
            times_s = [_estimate_s(each, kind, step_time_s, each_s) for each in works]
            work = works[int(np.argmin(times_s))]
    return work, prices_of(work, step_time_s)


def _estimate_s(work: StepWork, kind: int, step_time_s: float, each_s: float) -> float:
    """Return about what the step takes if pipelines' longest sequences make their bubbles longer.

    ``each_s`` is what their micro-batches take without.
    """
    prices = prices_of(work, step_time_s)
    value = float(work.counts @ (prices[:, None] * work.parts_s).min(axis=0))
    longest_s = work.alone_s[kind, np.isfinite(work.parts_s[kind])][-1]
    lost_s = work.alike[kind].bubbles * max(0.0, float(longest_s) - each_s)
    low, high = step_time_s, MOST_LONGER * step_time_s
    for _ in range(HALVINGS):
        middle = 0.5 * (low + high)
        held_s = work.held_s(middle)
        held_s[kind] *= 1.0 - lost_s / middle
        if prices @ held_s < value:
            low = middle
        else:
            high = middle
    return high
