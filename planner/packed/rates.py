"""Rates: the least seconds that a sequence adds to a replica, whatever it is packed with.

A micro-batch of T tokens whose lengths' squares add up to Q takes f(T, Q). Where
``token_s T + square_s Q <= f(T, Q)`` for every micro-batch that a candidate holds, a sequence of
s tokens costs at least ``token_s s + square_s s^2``: its part of the fixed cost is that of the
fullest micro-batch. A pipeline pays its longest micro-batch z another pp - 1 times. A step of t
seconds leaves t - (pp - 1) z for work, done in micro-batches of at most z, whose ``token_s`` is
the higher the smaller z is. With the best z for it, a replica does A(t) of sequences of one length;
A is convex and never rises faster than one for each ``token_s s + square_s s^2`` of the largest z.
So a line of that slope through A at the least time that the step takes is above A from there on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lobra.layout.sequences import PACKED_MULTIPLE, IntArray, packed_tokens
from lobra.planner.candidates import Candidate
from lobra.planner.packed.least_times import least_times
from lobra.planner.sequence_rates import affine
from lobra.profiler.cost_model import CostModel

SLOPES = 33  # values of square_s that are tried, twice
LEVELS = 48  # of the longest micro-batch's time


@dataclass(frozen=True, eq=False)
class Rates:
    """What sequences cost on one candidate at least.

    Attributes
    ----------
    lengths
        int64 [D]: the sequences' tokens.
    weight
        float64 [D]: how much there is of each, for what is best for a mixture but valid for any.
    square_s
        Seconds for each squared token.
    longest_s, token_s
        float64 [L]: micro-batches of at least ``longest_s`` seconds (ascending), but less than the
        next one's, cost at least ``token_s`` for each token (descending).
    micro_batch_s
        float64 [D]: of each sequence alone; infinite if it does not fit.
    bubbles
        How often the longest micro-batch is paid more than once: pp - 1.
    max_tokens
        The most of a micro-batch.
    """

    lengths: IntArray
    weight: np.ndarray
    square_s: float
    longest_s: np.ndarray
    token_s: np.ndarray
    micro_batch_s: np.ndarray
    bubbles: int
    max_tokens: int

    @property
    def least_s(self) -> np.ndarray:
        """float64 [D]: seconds of each sequence without any bubble; infinite if it does not fit."""
        least_s = self.token_s[-1] * self.lengths + self.square_s * self.lengths**2
        return np.where(np.isfinite(self.micro_batch_s), least_s, np.inf)

    @property
    def alone_s(self) -> np.ndarray:
        """float64 [D]: seconds of a replica with nothing else; infinite if it does not fit."""
        return self.micro_batch_s * (1 + self.bubbles)

    @property
    def unshared_s(self) -> np.ndarray:
        """float64 [D]: seconds of each sequence that two of do not fit a micro-batch; 0 of others.

        Infinite if it does not fit.
        """
        return np.where(2 * self.lengths > self.max_tokens, self.micro_batch_s, 0.0)

    def after(self, step_s: float) -> tuple[np.ndarray, float]:
        """Return rates, float64 [D], and seconds of bubble, of steps of ``step_s`` or more.

        In t such seconds a replica has at most t less the bubble for sequences at these rates.
        """
        rate_s = self.least_s
        fits = np.isfinite(rate_s)
        if not self.bubbles or not fits.any():
            return rate_s, 0.0
        lengths, own_s = self.lengths[fits], self.micro_batch_s[fits]
        longest_s = np.maximum(self.longest_s[:, None], own_s)  # [L, D]
        longest_s[:-1][own_s >= self.longest_s[1:, None]] = np.inf
        work_s = self.token_s[:, None] * lengths + self.square_s * lengths**2
        from_s = np.maximum(step_s, self.alone_s[fits])  # when the sequence is possible at all
        number = ((from_s - self.bubbles * longest_s) / work_s).max(axis=0)
        own, bubble_s = affine(rate_s[fits], from_s, number, step_s, self.weight[fits])
        rate_s[fits] = own
        return rate_s, bubble_s


def rates_of(
    candidate: Candidate, cost_model: CostModel, lengths: IntArray, weight: np.ndarray
) -> Rates:
    """Return the rates of a candidate for sequences of the lengths, int64 [D], ascending."""

    def seconds(tokens: np.ndarray, squares: np.ndarray) -> np.ndarray:
        return cost_model.micro_batch_time(candidate.layout, tokens, squares).total_ms / 1000.0

    bubbles, most = candidate.layout.pp - 1, candidate.max_tokens
    fits = lengths <= most
    held = lengths[fits]
    own_s = np.full(len(lengths), np.inf)
    if not len(held):
        return Rates(lengths, weight, 0.0, np.ones(1), np.zeros(1), own_s, bubbles, most)
    own_s[fits] = seconds(held, held**2)
    tokens = np.arange(PACKED_MULTIPLE, packed_tokens(fullest(held, most)) + 1, PACKED_MULTIPLE)
    several = least_times(seconds, tokens[tokens >= held[0]], int(held[0]), int(held[-1]))
    alone = held, held**2, own_s[fits]
    tokens, squares, time_s = (np.concatenate(pair) for pair in zip(several, alone, strict=True))
    mixture = float(weight[fits] @ held), float(weight[fits] @ held**2)
    square_s = _best_slope(tokens, squares, time_s, *mixture)
    order = np.argsort(time_s, kind="stable")
    time_s = time_s[order]
    token_s = np.minimum.accumulate((time_s - square_s * squares[order]) / tokens[order])
    longest_s = np.geomspace(time_s[0], time_s[-1], LEVELS if bubbles else 1)
    last = np.searchsorted(time_s, longest_s[1:], side="left") - 1  # below the next level
    token_s = np.maximum(token_s[np.append(last, -1)], 0.0)
    return Rates(lengths, weight, square_s, longest_s, token_s, own_s, bubbles, most)


def fullest(lengths: IntArray, max_tokens: int) -> int:
    """Return the most tokens, at most ``max_tokens``, that sequences of these lengths add up to."""
    limit = (1 << (max_tokens + 1)) - 1
    sums = 1  # bit n: n tokens are possible
    for length in lengths.tolist():
        step, before = length, 0
        while step <= max_tokens and sums != before:  # 1, 2, 4, ... more of the length
            before = sums
            sums |= (sums << step) & limit
            step *= 2
        if sums == limit:
            break
    return sums.bit_length() - 1


def _best_slope(
    tokens: np.ndarray,
    squares: np.ndarray,
    time_s: np.ndarray,
    all_tokens: float,
    all_squares: float,
) -> float:
    """Return the seconds for a squared token that give a mixture's total the highest bound."""
    low, high = 0.0, float((time_s / squares).min())
    best = 0.0
    for _ in range(2):
        slopes = np.linspace(low, high, SLOPES)
        token_s = [((time_s - slope * squares) / tokens).min() for slope in slopes.tolist()]
        at = int(np.argmax(np.array(token_s) * all_tokens + slopes * all_squares))
        best = float(slopes[at])
        low, high = slopes[max(at - 1, 0)], slopes[min(at + 1, SLOPES - 1)]
    return best
