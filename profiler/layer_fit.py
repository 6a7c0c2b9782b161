"""The fit of one tensor-parallel size: milliseconds as a function of micro-batch shape.

Three things make up a layer's time on a device: what it costs to start at all, what grows with the
tokens of the micro-batch (matrix products: flat while the device fills up, in steps where it is
full, see the knots), and attention, which grows with b s^2. Every term is non-negative and never
decreases in b or s, so neither does their sum, inside the rows it was fitted to and beyond.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from lobra.common.errors import ConfigError
from lobra.profiler.fit_terms import (
    NUM_PLAIN,
    place_knots,
    robust_nnls,
    roughness_rows,
    terms_of,
)

Array = np.ndarray
Kind = Literal["fitted", "lobra6"]
KINDS: tuple[Kind, ...] = ("fitted", "lobra6")

# The published fit can go below zero far from its data; a time is never less than this.
SMALLEST_TIME_MS = 1e-3
# How much a slope's change counts against a relative error: of few rows what predicts rows left
# out best, with many the least.
ROUGHNESS = (0.01, 0.03, 0.1, 0.3, 1.0)
MANY_ROWS = 25
FEW_ROWS = 10  # too few to tell the smaller terms apart


@dataclass(frozen=True, eq=False)
class LayerFit:
    """One tensor-parallel size's fitted time of a layer.

    Attributes
    ----------
    kind
        ``lobra6``: ``(c1 b + c2) s^2 + (c3 b + c4) s + (c5 b + c6)`` (LobRA, section 4.2);
        ``fitted``: ``c0 + c1 b + c2 s + c3 b s^2 + g(b s)`` with g piecewise linear and rising.
    coefficients
        float64 [terms], in ms: six, or the four above.
    knots, heights_ms
        float64 [k]: g at these tokens, straight between them and beyond the last.
    """

    kind: Kind
    coefficients: Array
    knots: Array = field(default_factory=lambda: np.empty(0))
    heights_ms: Array = field(default_factory=lambda: np.empty(0))

    def time_ms(self, b: Array, s: Array) -> Array:
        """Return ms for micro-batches of ``b`` sequences of ``s`` tokens (arrays broadcast)."""
        b, s = np.asarray(b, dtype=np.float64), np.asarray(s, dtype=np.float64)
        tokens = b * s
        if self.kind == "lobra6":
            c1, c2, c3, c4, c5, c6 = self.coefficients
            time_ms = (c1 * b + c2) * s * s + (c3 * b + c4) * s + (c5 * b + c6)
            return np.maximum(time_ms, SMALLEST_TIME_MS)
        constant, per_sequence, per_position, quadratic = self.coefficients
        time_ms = constant + quadratic * (tokens * s)
        if per_sequence:
            time_ms = time_ms + per_sequence * b
        if per_position:
            time_ms = time_ms + per_position * s
        time_ms = time_ms + np.interp(tokens, self.knots, self.heights_ms)
        width = self.knots[-1] - self.knots[-2]
        slope = (self.heights_ms[-1] - self.heights_ms[-2]) / width
        time_ms = time_ms + slope * np.maximum(tokens - self.knots[-1], 0.0)
        return np.maximum(time_ms, SMALLEST_TIME_MS)


def fit_layer(b: Array, s: Array, time_ms: Array, kind: Kind) -> LayerFit:
    """Fit one tensor-parallel size's rows: ``b``, ``s``, ``time_ms`` are float64 [rows].

    ``lobra6`` is ordinary least squares, as published. ``fitted`` minimises relative errors
    (robustly: rows that stick out do not bend it) plus a small penalty on changes of slope, whose
    weight, of few rows, is the one that predicts rows left out best.

    Raises
    ------
    ConfigError
        If the rows do not determine the six coefficients of ``lobra6``.
    """
    if kind == "lobra6":
        return _fit_lobra6(b, s, time_ms)
    return _fit_rows(b, s, time_ms, _best_roughness(b, s, time_ms))


def _fit_lobra6(b: Array, s: Array, time_ms: Array) -> LayerFit:
    terms = np.stack([b * s * s, s * s, b * s, s, b, np.ones_like(b)], axis=1)
    scale = np.abs(terms).max(axis=0)
    rank = int(np.linalg.matrix_rank(terms / scale))
    if rank < 6:
        raise ConfigError(
            f"{len(b)} rows determine {rank} of the six coefficients of the lobra6 fit; "
            f"measure at least 3 lengths x 2 batch sizes, or use the fitted cost model"
        )
    return LayerFit("lobra6", np.linalg.lstsq(terms / scale, time_ms, rcond=None)[0] / scale)


def _best_roughness(b: Array, s: Array, time_ms: Array) -> float:
    if len(b) >= MANY_ROWS:
        return ROUGHNESS[0]
    everything = np.arange(len(b))
    held_out_error = [
        sum(_held_out_error(b, s, time_ms, everything != row, roughness) for row in everything)
        for roughness in ROUGHNESS
    ]
    return ROUGHNESS[int(np.argmin(held_out_error))]


def _held_out_error(b: Array, s: Array, time_ms: Array, kept: Array, roughness: float) -> float:
    if not kept.any():
        return 0.0
    fit = _fit_rows(b[kept], s[kept], time_ms[kept], roughness)
    return float(np.abs(fit.time_ms(b[~kept], s[~kept]) / time_ms[~kept] - 1.0).sum())


def _fit_rows(b: Array, s: Array, time_ms: Array, roughness: float) -> LayerFit:
    tokens = b * s
    knots = place_knots(tokens)
    terms = terms_of(b, s, knots)
    if len(b) < FEW_ROWS:
        terms[:, 1:3] = 0.0
    penalty = roughness_rows(tokens, time_ms, knots, roughness * np.sqrt(len(b)))
    matrix = np.zeros((len(b) + len(penalty), terms.shape[1]))
    matrix[: len(b)] = terms / time_ms[:, None]
    matrix[len(b) :, NUM_PLAIN:] = penalty
    target = np.concatenate([np.ones(len(b)), np.zeros(len(penalty))])
    solution = robust_nnls(matrix, target, len(b))
    slopes = solution[NUM_PLAIN:]
    edges = np.concatenate([[0.0], knots])
    heights_ms = np.concatenate([[0.0], np.cumsum(slopes * np.diff(edges, append=edges[-1]))[:-1]])
    # One more knot carries the slope beyond the last.
    edges = np.append(edges, 2.0 * edges[-1])
    heights_ms = np.append(heights_ms, heights_ms[-1] + slopes[-1] * knots[-1])
    return LayerFit("fitted", solution[:NUM_PLAIN], edges, heights_ms)
