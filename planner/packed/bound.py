"""What a packed step takes at least on a plan, whoever dispatches it.

A replica takes its micro-batches' times and, with pp stages, pp - 1 times the longest. With P the
sum of its sequences' parts (`planner.packed.minorant`), m micro-batches take at least P, and at
least m times the start and what of P is not start; the longest takes at least one m-th. So replicas
can hold so much in a given time, and sequences divided among groups of equal replicas, in fractions
too, need some time: by weak duality at least what any prices of the groups' time say.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lobra.planner.packed.step_work import StepWork

ROUNDS = 64  # in which prices are adapted to the loads they lead to
RATES = 0.002 ** (np.arange(ROUNDS) / (ROUNDS - 1))  # by how much, of the logarithm
SHARPNESS = 200.0  # with which the cheapest kind is preferred meanwhile
HALVINGS = 12  # of the interval in which the bound of a plan with pipelines is searched


def prices_of(work: StepWork, step_time_s: float) -> np.ndarray:
    """Return float64 [G]: prices of the kinds' time, in a step of that time, that bound it well.

    A sequence costs its part times the price; at the best prices what is cheapest for each of them
    gives all kinds as much as they can take.
    """
    return prices_of_each([work], step_time_s)[0]


def prices_of_each(works: Sequence[StepWork], step_time_s: float) -> np.ndarray:
    """Return float64 [works, G]: `prices_of` several works of the same kinds."""
    found = np.empty((len(works), len(works[0].kinds)))
    classes = np.array([work.parts_of_classes_s.shape[1] for work in works])
    for number in np.unique(classes).tolist():  # those of one shape at once
        places = np.flatnonzero(classes == number)
        own = [works[place] for place in places.tolist()]
        held_s = np.stack([work.held_s(step_time_s) for work in own])
        typical_s = np.stack([work.parts_s[:, 0] / work.lengths[0] for work in own])
        parts_s = np.stack([work.parts_of_classes_s for work in own])
        if held_s.shape[1] == 1 or not held_s.all():
            found[places] = 1.0 / typical_s
        else:
            found[places] = _balanced(parts_s / held_s[:, :, None], held_s / typical_s) / held_s
    return found


def _balanced(shares: np.ndarray, prices: np.ndarray) -> np.ndarray:
    """Return float64 [W, G]: the prices at which the cheapest is worth most, of all looked at.

    ``shares``, float64 [W, G, J], are those that classes of sequences take of kinds; ``prices`` to
    begin with are float64 [W, G].
    """
    fits = np.isfinite(shares)
    fitting = np.where(fits, shares, 0.0)
    shares = np.where(fits, shares, 1e30)
    prices = prices / prices.sum(axis=1, keepdims=True)
    values, tried = [], []
    for rate in RATES.tolist():
        cost = prices[:, :, None] * shares
        least = cost.min(axis=1, keepdims=True)
        values.append(least.sum(axis=2))
        tried.append(prices)
        taken = np.exp(np.maximum(SHARPNESS * (1.0 - cost / least), -50.0))
        taken /= taken.sum(axis=1, keepdims=True)
        loads = (taken * fitting).sum(axis=2)
        loads -= loads.sum(axis=1, keepdims=True) / loads.shape[1]
        largest = abs(loads).max(axis=1, keepdims=True)
        prices = prices * np.exp(rate / (largest + 1e-12) * loads)
        prices /= prices.sum(axis=1, keepdims=True)
    best = np.argmax(values, axis=0)[:, 0]
    return np.array(tried)[best, np.arange(len(best))]


def least_time_s(work: StepWork, prices: np.ndarray) -> float:
    """Return the time below which these prices (float64 [G], see `prices_of`) allow no step."""
    value = work.worth(prices)
    low = value / float(prices @ [len(kind.replicas) for kind in work.kinds])
    if not any(kind.bubbles for kind in work.kinds):
        return low
    high = low
    while prices @ work.held_s(high) < value:
        low, high = high, 2.0 * high
    for _ in range(HALVINGS):
        middle = 0.5 * (low + high)
        if prices @ work.held_s(middle) < value:
            low = middle
        else:
            high = middle
    return low


def crowded_s(work: StepWork) -> float:
    """Return what a step takes since its longest sequences cannot be divided, in seconds.

    Those longer than some capacity go to R replicas, the others' time left out. Of the longest
    i R + 1 of them some replica has i + 1, and one has their mean. They count with their parts; or,
    where only one fits a micro-batch, as alone in it, those shorter not at all.
    """
    replicas = np.array([len(kind.replicas) for kind in work.kinds])
    half = np.array([[kind.max_tokens / 2] for kind in work.kinds])
    whole_s = np.where(work.lengths > half, work.alone_s, 0.0)
    fits = np.isfinite(work.parts_s)
    found_s = work.whole_s
    for first in np.unique(np.where(fits.all(axis=1), 0, fits.argmin(axis=1))).tolist():
        number = int(replicas[fits[:, first]].sum())
        for time_s in (work.parts_s, whole_s):
            least_s = np.where(fits, time_s, np.inf).min(axis=0)[first:]
            own_s = np.sort(np.repeat(least_s, work.counts[first:]))[::-1]
            sums_s = np.concatenate([[0.0], np.cumsum(own_s)])
            more = np.arange(1, (len(own_s) - 1) // number + 1)
            on_one_s = sums_s[more * number + 1] - sums_s[more * (number - 1)]
            found_s = max(found_s, sums_s[-1] / number, float(on_one_s.max(initial=0.0)))
    return float(found_s)
