"""Which rows of a time profile may have been measured in another way than the others.

LobRA's published profile mixes two series. From tp 2 on most times of lengths 256, 512, 1024, ...
are averages of multiples of 1.024 microseconds (a GPU event timer); those of other lengths are not.
And at equal tokens the former are longer by a constant: 1.0 ms for tp 1 (of 3 to 120 ms), 0.5 ms
for tp 2. That is why a 256-token sequence "takes longer" there than one of 304. Profiles of this
project are one series: their sidecar says so. `docs/profiling.md` says more.
"""

from __future__ import annotations

import numpy as np

from lobra.profiler.profiles import TimeProfile

SHORTEST_POWER_OF_TWO = 256


def other_series(profile: TimeProfile) -> np.ndarray | None:
    """Return bool [rows], true where a row may be of the other series; None if there is but one.

    The reference are the lengths 256, 512, 1024, ..., which every tp of LobRA's profile has. A mere
    suspicion: the fit keeps an offset between the two only if the rows demand it.
    """
    if "settings" in profile.meta:
        return None
    s = profile.seq_len
    is_power = (s & (s - 1)) == 0
    return ~(is_power & (s >= SHORTEST_POWER_OF_TWO))
