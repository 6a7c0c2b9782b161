"""Prices of candidates' time: what sequences are worth at them, and at which it is most.

A replica's time limits several sums over its sequences: of their rates, and of what they begin (see
`SequenceRates`). Each limit has its own part of the price. C candidates, L limits, D lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CLASSES = 64  # of lengths, in the linear programs that give prices


def worth(prices: np.ndarray, work_s: np.ndarray) -> np.ndarray:
    """Return float64 [P, D]: what sequences are worth on the candidates cheapest for each.

    Parameters
    ----------
    prices
        Float64 [P, L, C]: of a second of each limit.
    work_s
        Float64 [L, C, D]: seconds of a sequence of each length; infinite where it does not fit.
    """
    found = np.full((len(prices), work_s.shape[2]), np.inf)
    for own, own_s in zip(np.moveaxis(prices, 2, 0), np.moveaxis(work_s, 1, 0), strict=True):
        fits = np.isfinite(own_s[0])
        found[:, fits] = np.minimum(found[:, fits], own @ own_s[:, fits])
    return found


def class_starts(held: np.ndarray) -> np.ndarray:
    """Return where classes of lengths start: those of one are held (bool [C, D]) by the same."""
    number = held.shape[1]
    equal = np.linspace(0, number, min(CLASSES, number), endpoint=False).astype(np.int64)
    changes = np.flatnonzero((held[:, 1:] != held[:, :-1]).any(axis=0)) + 1
    return np.unique(np.concatenate([equal, changes]))


@dataclass(frozen=True, eq=False)
class StepCosts:
    """What a step's sequences cost on each candidate at least.

    Attributes
    ----------
    counts
        Float64 [D]: the sequences of each length.
    starts
        Where classes of lengths start, int64 [J].
    work_s
        Float64 [L, C, D]: seconds of a sequence of each length; infinite where it does not fit.
        The first limit is that of rates.
    bubble_s
        Float64 [C]: what the bubble of one replica takes of that limit.
    step_s
        Rates and bubbles are those of steps of so many seconds or more.
    """

    counts: np.ndarray
    starts: np.ndarray
    work_s: np.ndarray
    bubble_s: np.ndarray
    step_s: float

    def prices_of(self, replicas: np.ndarray) -> np.ndarray:
        """Return prices at which the bound on the step is highest on a plan, float64 [L, C].

        All the plan's replicas, int64 [C], together have the price 1. Candidates that it has none
        of are as cheap as they can be without being used.
        """
        used = np.flatnonzero(replicas)
        number = replicas[used].astype(np.float64)
        lost_s = np.zeros((len(self.work_s), len(used)))
        lost_s[0] = number * self.bubble_s[used]
        time_s = np.broadcast_to(number, lost_s.shape)[:, :, None]
        found, _ = _best_prices(self._of_classes(used), time_s, lost_s, np.ones(1))
        prices = self.for_all(used, found)
        return prices / (prices.sum(axis=0) @ replicas)

    def prices_of_shares(
        self, used: np.ndarray, sizes: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the same for the plan of divisible replicas that is best for the step alone.

        It has the candidates ``used``, int64 [U]; ``sizes`` are the GPUs of one replica of each,
        float64 [U]. And how many replicas of each it has for each GPU, float64 [C].
        """
        time_s = np.tile(np.eye(len(used)), (len(self.work_s), 1, 1))  # of replicas for a second
        time_s[0] *= 1.0 - self.bubble_s[used] / self.step_s
        no_loss_s = np.zeros(time_s.shape[:2])
        found, replicas = _best_prices(self._of_classes(used), time_s, no_loss_s, sizes)
        prices = self.for_all(used, found)
        shares = np.zeros(prices.shape[1])
        shares[used] = replicas / (replicas @ sizes)
        return prices / prices.sum(axis=0).max(), shares

    def for_all(self, used: np.ndarray, own: np.ndarray) -> np.ndarray:
        """Return prices of used candidates, int64 [U], with the least at which no others are.

        Float64 [L, C]; ``own`` are those of the used ones, float64 [L, U].
        """
        each = worth(own[None], self.work_s[:, used])[0]
        prices = np.zeros(self.work_s.shape[:2])
        prices[0] = (np.where(np.isfinite(each), each, 0.0) / self.work_s[0]).max(axis=1)
        prices[:, used] = own
        return prices

    def _of_classes(self, used: np.ndarray) -> np.ndarray:
        """Return seconds of all sequences of each class that is there, float64 [L, U, J]."""
        there = np.add.reduceat(self.counts, self.starts) > 0
        with np.errstate(invalid="ignore"):  # none of what does not fit
            work_s = self.work_s[:, used] * self.counts
        work_s = np.add.reduceat(np.where(self.counts > 0, work_s, 0.0), self.starts, axis=2)
        return work_s[:, :, there & np.isfinite(work_s[0]).any(axis=0)]


def _best_prices(
    work_s: np.ndarray, time_s: np.ndarray, lost_s: np.ndarray, cost: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return float64 [L, C]: prices of the candidates' time that bound a cost.

    By linear programming: the cost is the least for which the candidates take all the work. And the
    variables with that cost, float64 [V].

    Parameters
    ----------
    work_s
        Float64 [L, C, J]: seconds of all sequences of each class; infinite where they do not fit.
    time_s, lost_s
        Float64 [L, C, V] and [L, C]: the seconds that a unit of each of V variables gives the
        candidates, and those lost whatever these are.
    cost
        Float64 [V]: of a unit of each variable.
    """
    from scipy.optimize import linprog

    candidate, of_class = np.nonzero(np.isfinite(work_s[0]))
    shares = np.arange(len(candidate))
    busy_s = np.zeros((*lost_s.shape, len(shares)))
    busy_s[:, candidate, shares] = work_s[:, candidate, of_class]
    whole = np.zeros((work_s.shape[2], len(shares) + len(cost)))
    whole[of_class, shares] = 1.0
    limits = np.concatenate([busy_s, -time_s], axis=2)
    found = linprog(
        np.concatenate([np.zeros(len(shares)), cost]),
        A_ub=limits.reshape(lost_s.size, -1),
        b_ub=-lost_s.ravel(),
        A_eq=whole,
        b_eq=np.ones(len(whole)),
    )
    prices = np.maximum(-found.ineqlin.marginals, 0.0).reshape(lost_s.shape)
    return prices, np.maximum(found.x[len(shares) :], 0.0)
