"""The least times of packed micro-batches, for functions that are to be below all of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lobra.layout.sequences import PACKED_MULTIPLE, IntArray

MEAN_LENGTHS = 24  # of the sequences of a micro-batch, weighted by tokens, that are looked at


def least_times(
    cost: Callable[[np.ndarray, np.ndarray], np.ndarray],
    tokens: IntArray,
    shortest: int,
    longest: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tokens, squares and times, float64 [n] each, of micro-batches of several sequences.

    What is linear and below all of these is below every micro-batch of as many ``tokens`` (int64
    [k], ascending multiples of 16, padding included) of sequences of ``shortest`` to ``longest``
    tokens. For the same tokens the cost is convex in the squares: between neighbouring ones that
    are computed it lies above the lines through the two before and through the two behind.
    """
    size = tokens.astype(np.float64)[:, None]
    lowest = shortest * (size - PACKED_MULTIPLE + 1) / size  # the mean length, padding included
    highest = np.maximum(np.minimum(longest, size), lowest)
    squares = size * lowest * (highest / lowest) ** np.linspace(0.0, 1.0, MEAN_LENGTHS)
    times = cost(np.broadcast_to(size, squares.shape), squares)
    rise = np.diff(squares)
    slope = np.divide(np.diff(times), rise, out=np.zeros_like(rise), where=rise > 0)
    before, behind = slope[:, :-2], slope[:, 2:]
    start, end = squares[:, 1:-2], squares[:, 2:-1]
    above = times[:, 2:-1] - times[:, 1:-2] - before * (end - start)
    bend = behind - before
    back = np.divide(above, bend, out=np.zeros_like(bend), where=bend > 0)
    crossing = np.clip(end - back, start, end)
    at_crossing = times[:, 1:-2] + before * (crossing - start)
    at_first = times[:, 1] - slope[:, 1] * (squares[:, 1] - squares[:, 0])
    at_last = times[:, -2] + slope[:, -2] * (squares[:, -1] - squares[:, -2])
    squares = np.column_stack([squares[:, 0], crossing, squares[:, -1]])
    times = np.column_stack(
        [np.minimum(at_first, times[:, 0]), at_crossing, np.minimum(at_last, times[:, -1])]
    )
    return np.broadcast_to(size, squares.shape).ravel(), squares.ravel(), times.ravel()
