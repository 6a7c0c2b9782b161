"""Synthetic sequence lengths with a published mean, skewness and kurtosis.

A mixture of two log-normal distributions, cut at the task's context length: four shapes and a scale
fitted to the three moments, then taken at evenly spaced quantiles and shuffled. Data sets with the
same three moments may differ in spread and in their longest sequence, which are not published.
LobRA's context lengths are powers of two that its homogeneous deployments hold, so the longest is
asked to lie in the upper half of the task's context. The fits to LobRA's twelve data sets are in
`tasks.published_lengths`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import ndtri

from experiments.published import LengthMoments
from lobra.tasks.published_lengths import NUM_SEQUENCES, Mixture, scaled

SPREAD, SPREAD_WEIGHT = 0.6, 1e-3  # standard deviation over mean, where nothing else decides it
REACH, REACH_WEIGHT = 0.52, 1e-2  # longest sequence over the context length, at least
GOOD_ENOUGH = 1e-4  # squared error below which the sample is as good as the fit
GRID = 2000  # quantiles of each component that the fit looks at


@dataclass(frozen=True, eq=False)
class Synthetic:
    """Lengths, int64 [n], with what was wanted and what was reached."""

    lengths: np.ndarray
    wanted: LengthMoments
    reached: LengthMoments

    @property
    def mean_error(self) -> float:
        """Relative error of the mean."""
        return self.reached.mean / self.wanted.mean - 1.0


def moments(lengths: np.ndarray, weights: np.ndarray | None = None) -> LengthMoments:
    """Return mean, skewness and excess kurtosis of lengths [n], each with its weight [n]."""
    values = np.asarray(lengths, dtype=np.float64)
    share = np.full(len(values), 1.0) if weights is None else weights
    share = share / share.sum()
    mean = float(share @ values)
    apart = values - mean
    square = apart * apart
    variance = max(float(share @ square), 1e-12)
    skewness = float(share @ (square * apart)) / variance**1.5
    return LengthMoments(mean, skewness, float(share @ (square * square)) / variance**2 - 3.0)


def synthesize(
    wanted: LengthMoments, longest: int, seed: int, num_sequences: int = NUM_SEQUENCES
) -> Synthetic:
    """Return lengths of at most ``longest`` tokens with the wanted moments, as near as they get."""
    grid = ndtri((np.arange(GRID) + 0.5) / GRID)
    # the tail's last quantiles carry the kurtosis: the grid must reach as far as the sample does
    grid = np.concatenate([grid, ndtri(1.0 - np.geomspace(1e-4, 1e-6, 20))])
    mass = np.diff(np.concatenate([[0.0], _middles(grid), [1.0]]))

    def loss(shape: np.ndarray) -> float:
        values, weights = _mixture(shape, wanted.mean, longest, grid, mass)
        return _distance(moments(values, weights), wanted) + _prior(values, longest, weights)

    starts = [
        np.array([share, body, tail, apart])
        for share in (-7.0, -3.0, 0.0)
        for body, tail in ((-0.7, -0.7), (-1.2, -1.6))
        for apart in (0.5, 2.0, 3.5)
    ]
    starts = sorted(starts, key=loss)[:4]
    best = min(
        (minimize(loss, start, method="Nelder-Mead", options=_FIT) for start in starts),
        key=lambda result: float(result.fun),
    )
    number = round(_parts(best.x)[0] * num_sequences)
    samples = []
    for count in (number, max(0, number - 1), min(num_sequences, number + 1)):
        samples.append(_polished(best.x[1:], count, wanted, longest, num_sequences))
        if _distance(moments(samples[-1]), wanted) + _reach(samples[-1], longest) < GOOD_ENOUGH:
            break
    lengths = min(samples, key=lambda s: _distance(moments(s), wanted) + _reach(s, longest))
    shuffled = np.random.default_rng(seed).permutation(lengths)
    return Synthetic(shuffled, wanted, moments(shuffled))


def _polished(
    shape: np.ndarray, in_tail: int, wanted: LengthMoments, longest: int, number: int
) -> np.ndarray:
    """Return the sample with ``in_tail`` lengths of the tail, its shape fitted once more.

    The grid knows fractions of a sequence, the sample does not: a data set's kurtosis may hang on
    one sequence.
    """

    def sample(x: np.ndarray) -> np.ndarray:
        body, tail, apart = map(float, x)
        return Mixture(wanted.mean, longest, in_tail, body, tail, apart).lengths(number)

    def loss(x: np.ndarray) -> float:
        values = sample(x)
        return _distance(moments(values), wanted) + _reach(values, longest)

    best = shape
    if loss(shape) > GOOD_ENOUGH:
        best = minimize(loss, shape, method="Nelder-Mead", options={"maxiter": 250}).x
    return np.rint(sample(best)).astype(np.int64)


_FIT = {"maxiter": 900, "xatol": 1e-4, "fatol": 1e-9}


def _prior(values: np.ndarray, longest: int, weights: np.ndarray) -> float:
    """Prefer a long enough longest sequence; where a choice is left, a usual spread."""
    share = weights / weights.sum()
    mean = float(share @ values)
    spread = max(float(share @ values**2) - mean**2, 1e-9) ** 0.5 / mean
    seen = values[share > 0.2 / NUM_SEQUENCES]  # rarer ones will not be in the sample
    return SPREAD_WEIGHT * float(np.log(spread / SPREAD)) ** 2 + _reach(seen, longest)


def _reach(values: np.ndarray, longest: int) -> float:
    """Return what it costs that the longest of the values is short of the context length."""
    short = REACH * longest / float(values.max(initial=1.0))
    return REACH_WEIGHT * max(0.0, float(np.log(short))) ** 2


def _distance(found: LengthMoments, wanted: LengthMoments) -> float:
    mean = np.log(max(found.mean, 1e-9) / wanted.mean)
    skewness = (found.skewness - wanted.skewness) / (1.0 + abs(wanted.skewness))
    kurtosis = (found.kurtosis - wanted.kurtosis) / (1.0 + abs(wanted.kurtosis))
    return float(10.0 * mean**2 + skewness**2 + kurtosis**2)


def _middles(grid: np.ndarray) -> np.ndarray:
    from scipy.special import ndtr

    return ndtr((grid[1:] + grid[:-1]) / 2.0)


def _parts(shape: np.ndarray) -> tuple[float, float, float, float]:
    """Return (share of the tail, sigma of the body, sigma of the tail, log distance)."""
    share = 1.0 / (1.0 + np.exp(-np.clip(shape[0], -12.0, 3.0)))
    sigma = np.exp(np.clip(shape[1:3], -4.0, 0.7))
    return float(share), float(sigma[0]), float(sigma[1]), float(shape[3])


def _mixture(
    shape: np.ndarray, mean: float, longest: int, grid: np.ndarray, mass: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    share, body, tail, apart = _parts(shape)
    values = np.concatenate([np.exp(body * grid), np.exp(np.clip(apart + tail * grid, -20, 20))])
    weights = np.concatenate([(1.0 - share) * mass, share * mass])
    return scaled(values, weights, mean, longest), weights
