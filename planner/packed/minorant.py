"""What a packed micro-batch takes at least, as a linear function of its work.

What sequences add to a linear function does not depend on what they are packed with. So bounds are
sums over sequences, and replicas can be balanced before their micro-batches are made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lobra.layout.sequences import PACKED_MULTIPLE, IntArray, packed_tokens
from lobra.planner.packed.least_times import least_times

#: Milliseconds of micro-batches, float64 [k], from their tokens and squares of lengths, int64 [k]
#: each. One sequence more never takes less. For the same tokens they are convex in the squares.
Cost = Callable[[IntArray, IntArray], np.ndarray]

SLOPES = 8  # tried at once; the best lies between neighbours of the best of them
NARROWINGS = 4
NEARLY_FULL = 0.97  # of the most tokens: what a line must be near so as not to be any steep one
HALF_FULL = 0.8  # of the most tokens: below, their number does not limit micro-batches
LOOKED_AT = 64  # numbers of tokens that the line is chosen by; it is lowered where others need it
KEPT = 512


@dataclass(frozen=True)
class Minorant:
    """A linear function of a micro-batch's work that its time is never below.

    Attributes
    ----------
    start_ms, token_ms, square_ms
        Its coefficients, none negative: of 1, of the tokens, of the squares of lengths.
    spread_tokens
        The start is counted as part of so many tokens, of which a micro-batch has no more;
        infinite: it is not, since micro-batches are smaller.
    """

    start_ms: float
    token_ms: float
    square_ms: float
    spread_tokens: float

    def marginal_ms(self, lengths: np.ndarray) -> np.ndarray:
        """Return what sequences add to a micro-batch that there is anyway, in ms."""
        return (self.token_ms + self.square_ms * lengths) * lengths

    def part_ms(self, lengths: np.ndarray) -> np.ndarray:
        """Return the sequences' parts in ms: their sum is at most the time of a micro-batch."""
        return self.marginal_ms(lengths) + self.start_ms / self.spread_tokens * lengths

    @property
    def marginal_share(self) -> float:
        """What share of a sequence's part is marginal, at least."""
        whole = self.token_ms + self.start_ms / self.spread_tokens
        return self.token_ms / whole if whole > 0.0 else 1.0


@lru_cache(maxsize=KEPT)
def minorant_of(cost: Cost, max_tokens: int, tokens: int, mean_length: int) -> Minorant:
    """Return the minorant of a cost that is nearest to it for micro-batches of so many tokens.

    Parameters
    ----------
    cost
        Of micro-batches on one layout.
    max_tokens
        Most tokens of a micro-batch; the minorant is below the cost up to these.
    tokens, mean_length
        Of the micro-batches where it is to be near: their tokens, and the length of the sequence
        that a token is from, on average.
    """
    near = min(float(tokens), NEARLY_FULL * max_tokens)
    near_squares = near * min(mean_length, near)
    few = np.unique(packed_tokens(np.linspace(1, max_tokens, LOOKED_AT).astype(np.int64)))
    few = few[few <= max_tokens] if max_tokens >= PACKED_MULTIPLE else np.array([max_tokens])
    looked_at, squares, least_ms = _least_times(cost, few)
    each, begin = np.unique(looked_at, return_index=True)

    def line(square_ms: float) -> tuple[float, float, float]:
        """Return the value where the line is to be near, its start and its ms of a token."""
        left_ms = np.minimum.reduceat(least_ms - square_ms * squares, begin)
        # at the least time per token the line begins at no time
        high = float((left_ms / each).min())
        token_ms = _best(
            lambda slopes: (left_ms - slopes[:, None] * each).min(axis=1) + slopes * near, high
        )
        start_ms = max(0.0, float((left_ms - token_ms * each).min()))
        return start_ms + token_ms * near + square_ms * near_squares, start_ms, token_ms

    most = float((least_ms / squares).min())
    square_ms = _best(lambda slopes: np.array([line(slope)[0] for slope in slopes]), most)
    _, start_ms, token_ms = line(square_ms)
    looked_at, squares, least_ms = _least_times(cost, np.arange(1, max_tokens + 1))
    found_ms = start_ms + token_ms * looked_at + square_ms * squares
    ratio = min(1.0, float((least_ms / np.maximum(found_ms, 1e-300)).min()))
    spread = float(max_tokens) if tokens >= HALF_FULL * max_tokens else math.inf
    return Minorant(ratio * start_ms, ratio * token_ms, ratio * square_ms, spread)


def _best(values: Callable[[np.ndarray], np.ndarray], high: float) -> float:
    """Return where in [0, high] a concave function is about the largest."""
    low = 0.0
    for _ in range(NARROWINGS):
        tried = np.linspace(low, high, SLOPES)
        best = int(values(tried).argmax())
        low, high = float(tried[max(0, best - 1)]), float(tried[min(SLOPES - 1, best + 1)])
    return float(tried[best])


def _least_times(cost: Cost, alone: IntArray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tokens (ascending), squares and ms that what is linear must be below.

    Of single sequences of these numbers of tokens, ascending, and several of so many.
    """
    several = least_times(cost, alone[alone % PACKED_MULTIPLE == 0], 1, int(alone[-1]))
    single = alone, alone**2, cost(alone, alone**2)
    tokens, squares, times_ms = (np.concatenate(p) for p in zip(several, single, strict=True))
    order = np.argsort(tokens, kind="stable")
    return tokens[order], squares[order], times_ms[order]
