"""Prices of candidates' time: what sequences are worth at them, and at which it is most.

A replica's time limits two sums over its sequences: of their rates, and of what they begin (see
`SequenceRates`). Each has a part of its price.
"""

from __future__ import annotations

import numpy as np

CLASSES = 64  # of lengths, in the linear programs that give prices


def cheapest(
    shared: np.ndarray, begun: np.ndarray, rate_s: np.ndarray, begun_s: np.ndarray
) -> np.ndarray:
    """Return float64 [D]: what sequences are worth on the candidates cheapest for each.

    Parameters
    ----------
    shared, begun
        Float64 [C]: the price of the time for rates, and for what is begun.
    rate_s, begun_s
        Float64 [C, D]: seconds of a sequence of each length; infinite where it does not fit.
    """
    with np.errstate(invalid="ignore"):  # a price of 0 for what does not fit
        cost = shared[:, None] * rate_s + begun[:, None] * begun_s
    return np.where(np.isfinite(rate_s), cost, np.inf).min(axis=0)


def class_starts(held: np.ndarray) -> np.ndarray:
    """Return where classes of lengths start: those of one are held (bool [C, D]) by the same."""
    number = held.shape[1]
    equal = np.linspace(0, number, min(CLASSES, number), endpoint=False).astype(np.int64)
    changes = np.flatnonzero((held[:, 1:] != held[:, :-1]).any(axis=0)) + 1
    return np.unique(np.concatenate([equal, changes]))


def best_prices(
    work_s: tuple[np.ndarray, np.ndarray],
    time_s: np.ndarray,
    lost_s: np.ndarray,
    cost: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Return float64 [C] twice: prices of time for rates and for what is begun that bound a cost.

    By linear programming: the cost is the least for which the candidates take all the work.

    Parameters
    ----------
    work_s
        Float64 [C, J] twice: seconds of all sequences of each class, by rates and begun; infinite
        where they do not fit.
    time_s, lost_s
        Float64 [2 C, V] and [2 C]: the seconds that a unit of each of V variables gives the
        candidates, for rates and then for what is begun, and those lost whatever these are.
    cost
        Float64 [V]: of a unit of each variable.
    """
    from scipy.optimize import linprog

    number, classes = work_s[0].shape
    candidate, of_class = np.nonzero(np.isfinite(work_s[0]))
    shares = np.arange(len(candidate))
    busy_s = np.zeros((2 * number, len(shares)))
    for first, own_s in zip((0, number), work_s, strict=True):
        busy_s[first + candidate, shares] = own_s[candidate, of_class]
    whole = np.zeros((classes, len(shares) + len(cost)))
    whole[of_class, shares] = 1.0
    found = linprog(
        np.concatenate([np.zeros(len(shares)), cost]),
        A_ub=np.concatenate([busy_s, -time_s], axis=1),
        b_ub=-lost_s,
        A_eq=whole,
        b_eq=np.ones(classes),
    )
    prices = np.maximum(-found.ineqlin.marginals, 0.0)
    return prices[:number], prices[number:]
