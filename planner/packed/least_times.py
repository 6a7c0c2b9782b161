"""The least times of packed micro-batches, and what is linear and below all of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lobra.layout.sequences import PACKED_MULTIPLE, IntArray

#: Times of micro-batches, float64 [k], from their tokens and squares of lengths, int64 [k] each: ms
#: or seconds. One sequence more never takes less. For the same tokens they are convex in the
#: squares.
Cost = Callable[[np.ndarray, np.ndarray], np.ndarray]

MEAN_LENGTHS = 24  # of the sequences of a micro-batch, weighted by tokens, that are looked at
SLOPES = 8  # tried at once; the best lies between neighbours of the best of them
NARROWINGS = 4


def least_times(
    cost: Cost, lengths: IntArray, tokens: IntArray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tokens (ascending), squares and times, float64 [n] each, of micro-batches.

    What is linear and below all of these is below every micro-batch of one sequence of ``lengths``,
    or of several sequences, no shorter and no longer than these, that are padded to one of
    ``tokens``; int64 [j] and [k], ascending, the latter multiples of 16.
    """
    several = _several(cost, tokens, int(lengths[0]), int(lengths[-1]))
    alone = lengths, lengths**2, cost(lengths, lengths**2)
    found = [np.concatenate(pair) for pair in zip(several, alone, strict=True)]
    order = np.argsort(found[0], kind="stable")
    all_tokens, squares, times = (each[order] for each in found)
    return all_tokens, squares, times


def highest(
    values: Callable[[np.ndarray], np.ndarray], high: float, narrowings: int = NARROWINGS
) -> float:
    """Return where in [0, high] a concave function is about the largest."""
    low = 0.0
    for _ in range(narrowings):
        tried = np.linspace(low, high, SLOPES)
        best = int(values(tried).argmax())
        low, high = float(tried[max(0, best - 1)]), float(tried[min(SLOPES - 1, best + 1)])
    return float(tried[best])


def line_below(tokens: np.ndarray, times: np.ndarray, near: float) -> tuple[float, float]:
    """Return the start and the slope, none negative, of the line highest at ``near`` tokens.

    It is nowhere above the times, float64 [n], which are not negative; tokens ascend.
    """
    each, begin = np.unique(tokens, return_index=True)
    least = np.minimum.reduceat(times, begin)
    slope = highest(
        lambda slopes: (least - slopes[:, None] * each).min(axis=1) + slopes * near,
        float((least / each).min()),  # of the line that begins at no time
    )
    return max(0.0, float((least - slope * each).min())), slope


def _several(
    cost: Cost, tokens: IntArray, shortest: int, longest: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tokens, squares and times of micro-batches of several sequences; see `least_times`.

    For the same tokens the cost is convex in the squares: between neighbouring ones that are
    computed it lies above the lines through the two before and through the two behind.
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
