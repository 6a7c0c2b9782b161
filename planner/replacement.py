"""Which candidates others replace: plans without them are no worse."""

from __future__ import annotations

import numpy as np

from lobra.planner.fleet import Fleet

FAR = 1e30  # seconds of what does not fit


def replacement(
    fleet: Fleet,
    rate_s: np.ndarray,
    left_s: np.ndarray,
    begun_s: np.ndarray,
    longest_s: np.ndarray,
) -> np.ndarray:
    """Return plans of single candidates as plans of those that no others replace, int64 [C, C].

    As many replicas of another on the same GPUs replace one if they do no less of any length in
    steps of any time from a least one on, and hold what it holds.

    Parameters
    ----------
    fleet
        The C candidates.
    rate_s, left_s
        Float64 [levels, C, D] and [levels, C]: for several least times of a step the seconds of
        every sequence, and what of that time bubbles leave.
    begun_s
        Float64 [limits, C, D]: see `SequenceRates`.
    longest_s
        Float64 [C, K]: seconds of the steps' longest sequences alone.
    """
    kept: list[int] = []
    found = np.zeros((len(fleet.sizes), len(fleet.sizes)), dtype=np.int64)
    rate_s, begun_s = (np.where(np.isfinite(each), each, FAR) for each in (rate_s, begun_s))
    done = left_s[:, :, None] / rate_s
    for index in np.lexsort((rate_s.sum(axis=(0, 2)), fleet.sizes)).tolist():
        for other in kept:
            number, left = divmod(int(fleet.sizes[index]), int(fleet.sizes[other]))
            if (
                not left
                and fleet.max_tokens[other] >= fleet.max_tokens[index]
                and (longest_s[other] <= longest_s[index]).all()
                and (rate_s[:, other] <= rate_s[:, index] * number).all()
                and (done[:, other] * number >= done[:, index]).all()
                and (begun_s[:, other] <= begun_s[:, index] * number).all()
            ):
                found[index, other] = number
                break
        else:
            kept.append(index)
            found[index, index] = 1
    return found
