"""Rates: the least seconds that a sequence adds to a replica, whatever it is packed with.

A micro-batch of T tokens whose lengths' squares add up to Q takes f(T, Q). Where
``token_s T + square_s Q <= f(T, Q)`` for every micro-batch that a candidate holds, a sequence of
s tokens costs at least ``token_s s + square_s s^2``: its part of the fixed cost is that of the
fullest micro-batch. A pipeline pays its longest micro-batch z another pp - 1 times. A step of t
seconds leaves t - (pp - 1) z for work, done in micro-batches of at most z, whose ``token_s`` is
the higher the smaller z is. With the best z for it, a replica does A(t) of sequences of one length;
A is convex and never rises faster than one for each ``token_s s + square_s s^2`` of the largest z.
So a line of that slope through A at the least time that the step takes is above A from there on.
Without a pipeline A(t) is what whole micro-batches can do in t seconds: worth at most t at those
rates, and just that only where some number of the best ones takes t.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lobra.layout.sequences import PACKED_MULTIPLE, IntArray, packed_tokens
from lobra.planner.candidates import Candidate
from lobra.planner.packed.least_times import highest, least_times, line_below
from lobra.planner.sequence_rates import MOST_BUBBLE, affine
from lobra.profiler.cost_model import CostModel

NARROWINGS = 7  # of what the seconds for a squared token may be
LEVELS = 192  # of the longest micro-batch's time
NEAR = 1.1  # times the least step, about what plans take: there lines are to be near
SHORTEST_S = 1e-6  # no fit says less of a micro-batch; what is reckoned between some may
STEEPNESS = np.linspace(1.0, 1.5, 41)


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
    full_s, full_worth_s
        float64 [V]: a micro-batch of so many seconds (ascending) is worth at most so many by
        `least_s`, and in between what lies between: a concave function.
    start_s, more_token_s
        A micro-batch costs at least so much to begin, and so much for each token besides
        ``square_s``.
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
    full_s: np.ndarray
    full_worth_s: np.ndarray
    start_s: float
    more_token_s: float

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

    @property
    def begun_s(self) -> np.ndarray:
        """float64 [1, D]: seconds of each sequence if it is begun only for those of more than half.

        Infinite if it does not fit.
        """
        alone = 2 * self.lengths > self.max_tokens
        fits = np.isfinite(self.micro_batch_s)
        if not (alone & fits).any():
            return np.where(fits, 0.0, np.inf)[None]
        more_s = self.more_token_s * self.lengths + self.square_s * self.lengths**2
        return np.where(fits, more_s + self.start_s * alone, np.inf)[None]

    def after(self, step_s: float) -> tuple[np.ndarray, float]:
        """Return rates, float64 [D], and seconds of bubble, of steps of ``step_s`` or more.

        In t such seconds a replica has at most t less the bubble for sequences at these rates.
        """
        rate_s = self.least_s
        fits = np.isfinite(rate_s)
        if not fits.any():
            return rate_s, 0.0
        if not self.bubbles:
            faster, lost_s = self._in_whole_ones(step_s)
            return rate_s / faster, lost_s / faster
        longest_s, number = self._by_longest
        from_s = np.maximum(step_s, self.alone_s[fits])  # when the sequence is possible at all
        most = (from_s * number - longest_s).max(axis=0)
        own, bubble_s = affine(rate_s[fits], from_s, most, step_s, self.weight[fits])
        rate_s[fits] = own
        return rate_s, bubble_s

    @cached_property
    def _by_longest(self) -> tuple[np.ndarray, np.ndarray]:
        """Float64 [L, fitting] twice: in t seconds, with so long a micro-batch, t b - a sequences.

        Of every length alone, (a, b).
        """
        fits = np.isfinite(self.micro_batch_s)
        lengths, own_s = self.lengths[fits], self.micro_batch_s[fits]
        longest_s = np.maximum(self.longest_s[:, None], own_s)
        longest_s[:-1][own_s >= self.longest_s[1:, None]] = np.inf
        each_s = self.token_s[:, None] * lengths + self.square_s * lengths**2
        return self.bubbles * longest_s / each_s, 1.0 / each_s

    def _in_whole_ones(self, step_s: float) -> tuple[float, float]:
        """Return (p, l): steps of t seconds, ``step_s`` or more, are worth at most p t - l.

        By `least_s`, without a pipeline. Of m whole micro-batches none can be worth more than those
        that divide t equally; what each is worth is concave.
        """
        best = int((self.full_worth_s / self.full_s).argmax())
        least_ratio = float(self.full_worth_s[best] / self.full_s[best])
        most = max(1, math.ceil(step_s / self.full_s[best]))
        number = np.arange(max(1, int(step_s / self.full_s[-1])), most + 1)
        each = np.interp(step_s / number, self.full_s, self.full_worth_s, left=0.0)
        time_s = (number[:, None] * self.full_s).ravel()
        worth_s = (number[:, None] * self.full_worth_s).ravel()
        end_s = most * self.full_s[best]  # from there on the best ratio says all
        between = (time_s > step_s) & (time_s <= end_s)
        time_s = np.concatenate([[step_s], time_s[between]])
        worth_s = np.concatenate([[(number * each).max()], worth_s[between]])
        slopes = least_ratio * STEEPNESS
        lost_s = (slopes[:, None] * time_s - worth_s).min(axis=1)
        at = int((slopes * NEAR * step_s - lost_s).argmin())
        return float(slopes[at]), min(float(lost_s[at]), MOST_BUBBLE * step_s * slopes[at])


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
        one = np.ones(1)
        return Rates(lengths, weight, 0.0, one, 0.0 * one, own_s, bubbles, most, one, one, 0.0, 0.0)
    own_s[fits] = seconds(held, held**2)
    tokens = np.arange(PACKED_MULTIPLE, packed_tokens(fullest(held, most)) + 1, PACKED_MULTIPLE)
    tokens, squares, time_s = least_times(seconds, held, tokens[tokens >= held[0]])
    time_s = np.maximum(time_s, SHORTEST_S)
    all_tokens, all_squares = float(weight[fits] @ held), float(weight[fits] @ held**2)
    each_s, mean_length = time_s / tokens, squares / tokens
    square_s = highest(
        lambda slopes: (
            (each_s - slopes[:, None] * mean_length).min(axis=1) * all_tokens + slopes * all_squares
        ),
        float((time_s / squares).min()),
        NARROWINGS,
    )
    large = 2 * held > most
    typical = np.average(held[large], weights=weight[fits][large]) if large.any() else most
    begun = line_below(tokens, time_s - square_s * squares, float(typical))
    order = np.argsort(time_s, kind="stable")
    tokens, squares, time_s = tokens[order], squares[order], time_s[order]
    token_s = np.minimum.accumulate((time_s - square_s * squares) / tokens)
    longest_s = np.geomspace(time_s[0], time_s[-1], LEVELS if bubbles else 1)
    last = np.searchsorted(time_s, longest_s[1:], side="left") - 1  # below the next level
    token_s = np.maximum(token_s[np.append(last, -1)], 0.0)
    full = _upper_hull(time_s, token_s[-1] * tokens + square_s * squares)
    return Rates(lengths, weight, square_s, longest_s, token_s, own_s, bubbles, most, *full, *begun)


def _upper_hull(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the vertices of the least concave rising function above points; x is ascending."""
    record = np.flatnonzero(np.diff(np.maximum.accumulate(y), prepend=-np.inf) > 0)
    record = record[np.append(np.diff(x[record]) > 0, True)]  # of equal ones the highest
    x, y = x[record], y[record]
    while True:
        is_vertex = np.ones(len(x), dtype=bool)
        across, up = np.diff(x), np.diff(y)  # not below the line between its neighbours
        is_vertex[1:-1] = up[:-1] * across[1:] > up[1:] * across[:-1]
        if is_vertex.all():
            return x, y
        x, y = x[is_vertex], y[is_vertex]


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
