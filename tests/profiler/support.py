"""What several of the profilers' tests measure of a fit."""

from __future__ import annotations

import numpy as np

from lobra.profiler.layer_fit import LayerFit
from lobra.profiler.profiles import TimeProfile


def error_of_seen(fit: LayerFit, profile: TimeProfile, tp: int) -> np.ndarray:
    """Return the relative error on each row of ``tp``, which the fit was made from."""
    rows = profile.tp == tp
    return np.abs(fit.time_ms(profile.mbs[rows], profile.seq_len[rows]) / profile.time_ms[rows] - 1)


def num_decreasing(fit: LayerFit, longest: int, largest: int) -> int:
    """Return how many neighbours on a dense grid (b to ``largest``, s to ``longest``) decrease."""
    b = np.arange(1, largest + 1)[:, None]
    s = np.arange(16, longest + 1, 16)[None, :]
    time_ms = fit.time_ms(b, s)
    slack = 1e-9 * time_ms
    in_b = np.diff(time_ms, axis=0) < -slack[1:]
    in_s = np.diff(time_ms, axis=1) < -slack[:, 1:]
    return int(in_b.sum() + in_s.sum())
