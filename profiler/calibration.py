"""What a device reaches of its peaks, fitted to measured rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lobra.common.errors import ConfigError
from lobra.profiler.accelerators import Efficiency
from lobra.profiler.estimate_time import (
    Workload,
    attention_ms,
    hideable_ms,
    layer_ms,
    matmul_ms,
    moving_ms,
)
from lobra.profiler.profiles import TimeProfile

Array = np.ndarray

SMALLEST_SHARE = 0.01
ROUNDS = 10  # of telling rows of their start from rows of the device's work, far more than it takes
LARGEST_ERROR = 0.25  # that calibrating may leave, or the rows are another device's


def calibrate(
    work: Workload, efficiency: Efficiency, profile: TimeProfile, tp: int = 1
) -> Efficiency:
    """Return the efficiency with start, matmul and attention fitted to a profile's rows of ``tp``.

    Least squares of relative errors with non-negative terms, of start and device added up and of
    the longer of both; whichever misses the rows by less. The rest stays as it is.

    Raises
    ------
    ConfigError
        If the profile has fewer than four rows of that tp, or the mean error that remains on them
        is above 25 %: they were not measured on this accelerator.
    """
    rows = profile.tp == tp
    if int(rows.sum()) < 4:
        raise ConfigError(f"{profile.path}: at least 4 rows of tp {tp} are needed to calibrate")
    b, s = profile.mbs[rows].astype(float), profile.seq_len[rows].astype(float)
    time_ms = profile.time_ms[rows]

    def fitted(starts: Array, works: Array, starts_ahead: bool) -> Efficiency:
        """Fit to rows that take their start, or the device's work, or both."""
        from scipy.optimize import nnls  # slow to import, and few need it

        terms = np.stack(
            [
                work.starts * starts,
                matmul_ms(work, tp, b, s) * works,
                attention_ms(work, tp, b, s),
            ],
            axis=1,
        )
        known = moving_ms(work, efficiency, tp, b, s) * works
        target = np.maximum(time_ms - known, 0.1 * time_ms)
        start_ms, matmul, attention = nnls(terms / time_ms[:, None], target / time_ms)[0]
        return replace(
            efficiency,
            start_ms=float(start_ms),
            matmul=_share(matmul, efficiency.matmul),
            attention=_share(attention, efficiency.attention),
            starts_ahead=starts_ahead,
        )

    every = np.ones(len(b), dtype=bool)
    found = [fitted(every, every, False)]
    works = time_ms > np.median(time_ms)  # at first
    for _ in range(ROUNDS):
        found.append(fitted(~works, works, True))
        works = hideable_ms(work, found[-1], tp, b, s) > found[-1].start_ms * work.starts
    best = min(found, key=lambda one: layer_error(work, one, profile, tp))
    error = layer_error(work, best, profile, tp)
    if error > LARGEST_ERROR:
        raise ConfigError(
            f"{profile.path}: fitted to its rows of tp {tp}, {work.accelerator.name} misses them "
            f"by {100 * error:.0f} % on average (at most {100 * LARGEST_ERROR:.0f} % is accepted): "
            f"the rows and --accelerator do not belong together"
        )
    return best


def layer_error(work: Workload, efficiency: Efficiency, profile: TimeProfile, tp: int = 1) -> float:
    """Return the mean relative error of ``layer_ms`` on a profile's rows of ``tp``."""
    rows = profile.tp == tp
    b, s = profile.mbs[rows].astype(float), profile.seq_len[rows].astype(float)
    return float(np.abs(layer_ms(work, efficiency, tp, b, s) / profile.time_ms[rows] - 1.0).mean())


def _share(slowdown: float, otherwise: float) -> float:
    """Return 1 / slowdown as a share of the peak; what was assumed if the rows do not say."""
    return max(SMALLEST_SHARE, float(1.0 / slowdown)) if slowdown > 1.0 else otherwise
