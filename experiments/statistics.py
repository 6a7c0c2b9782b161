"""Means and reductions with their 95 % intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lobra.report.intervals import LEVEL, reach_of_mean

RESAMPLES = 4000


@dataclass(frozen=True)
class Interval:
    """A value and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def mean_interval(values: np.ndarray) -> Interval:
    """Return the mean of values [n] with Student's interval; all the same if n is 1."""
    values = np.asarray(values, dtype=np.float64)
    mean = float(values.mean())
    reach = reach_of_mean(values.tolist())
    return Interval(mean, mean - reach, mean + reach)


def reduction_interval(values: np.ndarray, baseline: np.ndarray) -> Interval:
    """Return 1 - mean(values) / mean(baseline), with the interval of a paired bootstrap.

    Both are [n]: the same n sampled steps. Steps are resampled in pairs, so what makes a step long
    for both does not widen the interval.

    Raises
    ------
    ValueError
        If the two differ in length.
    """
    values, baseline = np.asarray(values, float), np.asarray(baseline, float)
    if values.shape != baseline.shape:
        raise ValueError(f"{len(values)} steps against {len(baseline)}: not the same steps")
    rng = np.random.default_rng(0)
    chosen = rng.integers(0, len(values), size=(RESAMPLES, len(values)))
    ratios = 1.0 - values[chosen].mean(axis=1) / baseline[chosen].mean(axis=1)
    low, high = np.percentile(ratios, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Interval(1.0 - float(values.mean() / baseline.mean()), float(low), float(high))
