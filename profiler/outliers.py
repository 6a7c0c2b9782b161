"""Rows of a running time sweep that are measured again before anyone believes them."""

from __future__ import annotations

from typing import Any

import numpy as np

from lobra.profiler.effort import THOROUGH
from lobra.profiler.layer_fit import fit_layer
from lobra.profiler.sweep_rows import SweepFile

FEWEST_ROWS = 6
# A row sticks out if it differs from what the others say by this share, and by this many of their
# own standard deviations.
STICKS_OUT, DEVIATIONS = 0.08, 4.0
UNSTEADY = 0.25  # a spread of its repeats (interquartile range / median) beyond this
DECREASE = 0.05  # a larger micro-batch that takes less by this share


def doubtful_shapes(file: SweepFile, tp: int) -> set[tuple[int, int]]:
    """Return the (b, s) of ``tp`` in need of another attempt, the worst half at most.

    A row is doubtful if its repeats differ widely, if the fit to all other rows misses it, or if a
    larger micro-batch takes less time (both of the pair); and it has had fewer than three attempts.
    """
    keys = [key for key in file.done if key[0] == tp]
    if len(keys) < FEWEST_ROWS:
        return set()
    s, b = (np.array([key[column] for key in keys], dtype=np.float64) for column in (1, 2))
    time_ms = np.array([float(file.done[key][-1]) for key in keys])
    details = [file.details(key) for key in keys]
    error = _left_out_error(b, s, time_ms)
    deviation = 1.4826 * float(np.median(error))
    doubt = np.where(error > max(STICKS_OUT, DEVIATIONS * deviation), error, 0.0)
    spread = np.array([float(row.get("spread", 0.0)) for row in details])
    doubt = np.maximum(doubt, np.where(spread > UNSTEADY, spread, 0.0))
    larger = (b[:, None] <= b) & (s[:, None] <= s)
    less = np.where(larger, 1.0 - time_ms / time_ms[:, None], 0.0)
    less[less < DECREASE] = 0.0
    doubt = np.maximum(doubt, np.maximum(less.max(axis=0), less.max(axis=1)))
    attempts = np.array([len(row.get("attempts", (0,))) for row in details])
    doubt[attempts >= THOROUGH.attempts] = 0.0
    worst = np.argsort(-doubt)[: len(keys) // 2]
    return {(int(b[row]), int(s[row])) for row in worst if doubt[row] > 0}


def record_attempt(
    file: SweepFile,
    key: tuple[int, int, int],
    before_time: tuple[float, ...],
    time_ms: float,
    details: dict[str, Any],
) -> None:
    """Append a row, or make one measured before the median of all its attempts.

    The time is the last column; ``before_time`` are those between it and the key.
    """
    attempts = [round(time_ms, 6)]
    if key not in file.done:
        file.add((*key, *before_time, attempts[0]), details)
        return
    before = file.details(key)
    attempts = [*before.get("attempts", [float(file.done[key][-1])]), *attempts]
    median = float(np.median(attempts))
    # What the attempts differ by is as much a doubt as what the repeats of the best one do.
    apart = float(np.median(np.abs(np.array(attempts) - median))) / median
    spread = max(apart, min(before.get("spread", details["spread"]), details["spread"]))
    revised = before | details | {"attempts": attempts, "spread": round(spread, 4)}
    file.revise((*key, *before_time, round(median, 6)), revised)


def _left_out_error(b: np.ndarray, s: np.ndarray, time_ms: np.ndarray) -> np.ndarray:
    """Return each row's relative error under the fit to all the others."""
    error = np.empty(len(b))
    for row in range(len(b)):
        others = np.arange(len(b)) != row
        fit = fit_layer(b[others], s[others], time_ms[others], "fitted")
        predicted = fit.time_ms(b[row], s[row])
        error[row] = abs(float(predicted) / time_ms[row] - 1.0)
    return error
