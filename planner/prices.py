"""Prices of candidates' time: what sequences are worth at them, and at which it is most.

A replica's time limits several sums over its sequences: of their rates, and of what they begin (see
`SequenceRates`). Each limit has its own part of the price. C candidates, L limits, D lengths.
"""

from __future__ import annotations

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


def best_prices(
    work_s: np.ndarray, time_s: np.ndarray, lost_s: np.ndarray, cost: np.ndarray
) -> np.ndarray:
    """Return float64 [L, C]: prices of the candidates' time that bound a cost.

    By linear programming: the cost is the least for which the candidates take all the work.

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
    return np.maximum(-found.ineqlin.marginals, 0.0).reshape(lost_s.shape)
