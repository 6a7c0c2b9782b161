"""The terms a layer's time is fitted with, and their robust non-negative solution."""

from __future__ import annotations

import numpy as np

Array = np.ndarray

NUM_PLAIN = 4  # terms before the knots': constant, b, s, b s^2
MAX_KNOTS = 40
# Errors beyond this many standard deviations pull no harder than one at it (Huber, 1964).
HUBER = 1.5
IRLS_STEPS = 8
SMALLEST_DEVIATION = 1e-3


def place_knots(tokens: Array) -> Array:
    """Return the tokens at which the slope may change: spread evenly in the logarithm."""
    distinct = len(np.unique(tokens))
    if distinct < 3:
        return np.array([tokens.max()])
    count = min(MAX_KNOTS, 2 * distinct)
    return np.exp(np.linspace(np.log(tokens.min()), np.log(tokens.max()), count))


def terms_of(b: Array, s: Array, knots: Array) -> Array:
    """Return the terms [rows, 4 + knots + 1]; those of g are the tokens within each interval."""
    tokens = b * s
    edges = np.concatenate([[0.0], knots, [np.inf]])
    within = np.clip(tokens[:, None], edges[:-1], edges[1:]) - edges[:-1]
    return np.concatenate([np.stack([np.ones_like(b), b, s, tokens * s], axis=1), within], axis=1)


def roughness_rows(tokens: Array, time_ms: Array, knots: Array, weight: float) -> Array:
    """Return rows [knots, knots + 1] that penalise a change of slope, relative to the time there.

    A slope that doubles at a knot counts like the relative error it makes at twice the knot.
    """
    order = np.argsort(tokens, kind="stable")
    at_knot = np.exp(np.interp(np.log(knots), np.log(tokens[order]), np.log(time_ms[order])))
    size = weight * knots / at_knot
    rows = np.zeros((len(knots), len(knots) + 1))
    index = np.arange(len(knots))
    rows[index, index] = -size
    rows[index, index + 1] = size
    return rows


def robust_nnls(matrix: Array, target: Array, num_rows: int) -> Array:
    """Solve non-negative least squares, the first rows' errors weighed after Huber (IRLS)."""
    from scipy.optimize import nnls  # slow to import, and few need it

    scale = np.abs(matrix).max(axis=0)
    scale[scale == 0.0] = 1.0
    scaled, weights = matrix / scale, np.ones(len(target))
    for _ in range(IRLS_STEPS):
        found = nnls(scaled * weights[:, None], target * weights, maxiter=100 * matrix.shape[1])[0]
        error = np.abs(scaled[:num_rows] @ found - target[:num_rows])
        deviation = 1.4826 * float(np.median(error)) + SMALLEST_DEVIATION  # of a normal's median
        weights[:num_rows] = np.sqrt(1.0 / np.maximum(1.0, error / (HUBER * deviation)))
    return found / scale
