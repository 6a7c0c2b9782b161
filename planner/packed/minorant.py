"""What a packed micro-batch takes at least, as a linear function of its work.

What sequences add to a linear function does not depend on what they are packed with. So bounds are
sums over sequences, and replicas can be balanced before their micro-batches are made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lobra.layout.sequences import PACKED_MULTIPLE, IntArray, packed_tokens
from lobra.planner.packed.least_times import Cost, highest, least_times, line_below

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

    def line(square_ms: float) -> tuple[float, float]:
        return line_below(looked_at, least_ms - square_ms * squares, near)

    def value_ms(square_ms: float) -> float:
        start_ms, token_ms = line(square_ms)
        return start_ms + token_ms * near + square_ms * near_squares

    square_ms = highest(
        lambda slopes: np.array([value_ms(slope) for slope in slopes]),
        float((least_ms / squares).min()),
    )
    start_ms, token_ms = line(square_ms)
    looked_at, squares, least_ms = _least_times(cost, np.arange(1, max_tokens + 1))
    found_ms = start_ms + token_ms * looked_at + square_ms * squares
    ratio = min(1.0, float((least_ms / np.maximum(found_ms, 1e-300)).min()))
    spread = float(max_tokens) if tokens >= HALF_FULL * max_tokens else math.inf
    return Minorant(ratio * start_ms, ratio * token_ms, ratio * square_ms, spread)


def _least_times(cost: Cost, lengths: IntArray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return them of single sequences of these lengths, ascending, and of several of as many."""
    return least_times(cost, lengths, lengths[lengths % PACKED_MULTIPLE == 0])
