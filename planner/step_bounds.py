"""Step bounds: what prices of the candidates' time say that every step takes at least.

Of every sequence is known what it costs on each candidate at least (`SequenceRates`), and of every
candidate what a step loses to its bubble. With n replicas of the candidates and divisible work a
step takes, for any prices of the candidates' time, at least ``(value + (prices * bubble) . n) /
(prices . n)``, the value being what its sequences are worth, each where it is cheapest. Nor is a
step shorter than its longest sequence alone takes on the fastest candidate that a plan has. Prices
come from the linear programs of plans that were looked at; any give a valid bound. The longer a
step takes at least, the better are its rates: they are taken anew when prices have shown more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lobra.planner.fleet import Fleet
from lobra.planner.prices import StepCosts, class_starts, worth
from lobra.planner.replacement import replacement
from lobra.planner.sequence_rates import SequenceRates

LOOKED_AT = 12  # steps of which a plan's prices are computed
LEVELS = 1.02  # ratio of step times that rates are told apart for


@dataclass(frozen=True, eq=False)
class TightPrices:
    """Of each of K steps the prices that bound it best on some plan, as a bound on every plan.

    With n replicas a step takes at least ``(value + bubble . n) / (price . n)`` seconds. What is
    worth something is so in seconds times a price.

    Attributes
    ----------
    value
        float64 [K]: what the step's sequences are worth.
    price, bubble
        float64 [K, C]: of one replica's time, and what its bubble is worth.
    """

    value: np.ndarray
    price: np.ndarray
    bubble: np.ndarray


class StepBounds:
    """Lower bounds on K steps of sequences of D lengths, on plans of C candidates.

    Plans are replicas, int64 [C]. Rates and bubbles are those of steps at least as long as each is
    known to be, by level. A candidate's time has L limits: one of rates, the others of what is
    begun (see `SequenceRates`); P times prices are known, [L, C] each.

    Parameters
    ----------
    fleet
        What plans are made of.
    holds
        bool [C]: the candidates of which every plan has at least one replica.
    counts
        int64 [K, D]: how many sequences of each length a step has.
    rates
        Of every candidate.

    Attributes
    ----------
    least_s
        float64 [K]: what each step takes at least on any plan, by all that was looked at.
    longest_s
        float64 [C, K]: what each step's longest sequence takes alone.
    is_kept
        bool [C]: the candidates that no others replace.
    shares
        float64 [C]: how many replicas there would be for each GPU if they could be divided, in the
        plan best for typical steps.
    """

    def __init__(
        self, fleet: Fleet, holds: np.ndarray, counts: np.ndarray, rates: Sequence[SequenceRates]
    ) -> None:
        self._fleet, self._holds, self._rates = fleet, holds, tuple(rates)
        self._counts = counts.astype(np.float64)
        least_s = np.stack([one.least_s for one in rates])  # [C, D]
        alone_s = np.stack([one.alone_s for one in rates])
        self._begun_s = np.stack([one.begun_s for one in rates], axis=1)  # [L - 1, C, D]
        longest = counts.shape[1] - 1 - np.argmax(counts[:, ::-1] > 0, axis=1)  # of each step
        self.longest_s = alone_s[:, longest]
        self._starts = class_starts(np.isfinite(least_s))
        price = fleet.sizes / fleet.num_gpus
        self.least_s = np.maximum(  # on the plan best for each step alone
            np.where(counts > 0, alone_s.min(axis=0), 0.0).max(axis=1),
            self._counts @ worth(price[None, None], least_s[None])[0],
        )
        self._prices = np.empty((0, 1 + len(self._begun_s), len(price)))  # [P, L, C]
        self._after: dict[int, list[tuple[np.ndarray, float]]] = {}  # rates by level
        self._set_levels()
        self._add_prices(self._prices_of_gpus(price))
        rare = self._values[:, -1] / self._values[:, 0]  # of few candidates' GPUs, over all
        order = np.argsort(rare, kind="stable")
        places = np.linspace(0, len(order) - 1, min(LOOKED_AT, len(order)))
        self._typical = order[np.rint(places).astype(np.int64)].tolist()
        kept = np.flatnonzero(self.is_kept)
        sizes = fleet.sizes[kept].astype(np.float64)
        of_shares = [self._costs_of(step).prices_of_shares(kept, sizes) for step in self._typical]
        self.shares = np.mean([shares for _, shares in of_shares], axis=0)
        self._add_prices(np.stack([prices for prices, _ in of_shares]))

    def reduced(self, plans: np.ndarray) -> np.ndarray:
        """Return plans, int64 [..., C], of kept candidates alone, in place of those replaced."""
        return plans @ self._replacement

    def look_at(self, replicas: np.ndarray, steps: Sequence[int] | None = None) -> None:
        """Add the prices of a plan.

        They are computed for the ``steps``, or for some with much and some with little of what few
        candidates hold.
        """
        steps = self._typical if steps is None else steps
        if steps:
            replicas = self.reduced(replicas)
            self._add_prices(np.stack([self._costs_of(step).prices_of(replicas) for step in steps]))

    def steps_s(self, replicas: np.ndarray) -> np.ndarray:
        """Return float64 [K]: what each step takes at least on a plan."""
        replicas = self.reduced(replicas)
        by_price_s = self._by_price_s(replicas).max(axis=1)
        return np.max([by_price_s, self.least_s, self.longest_alone_s(replicas)], axis=0)

    def longest_alone_s(self, replicas: np.ndarray) -> np.ndarray:
        """Return float64 [K]: of each step's longest sequence alone, where a plan is fastest."""
        return self.longest_s[replicas > 0].min(axis=0, initial=np.inf)

    def tight_prices(self, replicas: np.ndarray) -> TightPrices:
        """Return the prices at which the bound on each step is highest on a plan, a reduced one."""
        best = self._by_price_s(replicas).argmax(axis=1)
        prices = self._prices[best]
        return TightPrices(
            self._values[np.arange(len(best)), best],
            prices.sum(axis=1),
            prices[:, 0] * self._bubble_s[self._level_of],
        )

    def _by_price_s(self, replicas: np.ndarray) -> np.ndarray:
        """Return float64 [K, P]: the steps' bounds on a plan by every vector of prices."""
        price = self._prices.sum(axis=1) @ replicas
        lost_s = self._bubble_s @ (self._prices[:, 0] * replicas).T  # [levels, P]
        with np.errstate(divide="ignore", invalid="ignore"):
            bound_s = (self._values + lost_s[self._level_of]) / price
            return np.where(self._values > 0, bound_s, 0.0)

    def _set_levels(self) -> None:
        """Take the rates of steps that take as long as each is known to take at least."""
        level = np.floor(np.log(self.least_s) / np.log(LEVELS)).astype(np.int64)
        levels, self._level_of = np.unique(level, return_inverse=True)
        self._level_s = LEVELS ** levels.astype(np.float64)
        for exponent, step_s in zip(levels.tolist(), self._level_s.tolist(), strict=True):
            if exponent not in self._after:
                self._after[exponent] = [one.after(step_s) for one in self._rates]
        after = [self._after[exponent] for exponent in levels.tolist()]
        self._rate_s = np.array([[rate_s for rate_s, _ in own] for own in after])  # [levels, C, D]
        self._bubble_s = np.array([[bubble_s for _, bubble_s in own] for own in after])
        left_s = self._level_s[:, None] - self._bubble_s
        self._replacement = replacement(
            self._fleet, self._rate_s, left_s, self._begun_s, self.longest_s
        )
        self.is_kept = self._replacement.any(axis=0)
        self._values = self._values_at(self._prices)  # [K, P]

    def _add_prices(self, prices: np.ndarray) -> None:
        """Add prices, [P, L, C], and raise what steps take at least by what they say."""
        values = self._values_at(prices)
        self._prices = np.concatenate([self._prices, prices])
        self._values = np.concatenate([self._values, values], axis=1)
        price = prices.sum(axis=1)
        least_s = (values / self._most_worth_of(price)).max(axis=1)
        self.least_s = np.maximum(self.least_s, least_s)
        # the same with bubbles, of divisible replicas
        share = self._fleet.sizes / self._fleet.num_gpus
        limits = (price > 0) & self.is_kept
        for level, bubble_s in enumerate(self._bubble_s):
            steps = self._level_of == level
            each_s = values[steps][:, :, None] * share + prices[:, 0] * bubble_s
            each_s = np.where(limits, each_s / np.where(limits, price, 1.0), np.inf)
            self.least_s[steps] = np.maximum(self.least_s[steps], each_s.min(axis=2).max(axis=1))
        if np.mean(self.least_s / self._level_s[self._level_of]) > LEVELS**2:
            self._set_levels()

    def _most_worth_of(self, price: np.ndarray) -> np.ndarray:
        """Return float64 [P]: the highest price of all replicas of any plan.

        ``price`` is float64 [P, C], of one replica of each candidate.
        """
        sizes, num_gpus = self._fleet.sizes[self.is_kept], self._fleet.num_gpus
        price = price[:, self.is_kept]
        best = np.zeros((len(price), num_gpus + 1))
        for gpus in range(1, num_gpus + 1):
            fits = sizes <= gpus
            with_one = best[:, gpus - sizes[fits]] + price[:, fits]
            best[:, gpus] = np.maximum(best[:, gpus - 1], with_one.max(axis=1, initial=0.0))
        holders = self._holds[self.is_kept] & (sizes <= num_gpus)
        return (best[:, num_gpus - sizes[holders]] + price[:, holders]).max(axis=1)

    def _values_at(self, prices: np.ndarray) -> np.ndarray:
        """Return float64 [K, P]: what the steps' sequences are worth at prices, [P, L, C]."""
        values = np.empty((len(self._counts), len(prices)))
        kept = np.flatnonzero(self.is_kept)
        for level in range(len(self._level_s)):
            steps = np.flatnonzero(self._level_of == level)
            there = np.flatnonzero(self._counts[steps].any(axis=0))
            each = worth(prices[:, :, kept], self._work_s(level)[:, kept][:, :, there])
            values[steps] = self._counts[np.ix_(steps, there)] @ each.T
        return values

    def _work_s(self, level: int) -> np.ndarray:
        """Return float64 [L, C, D]: a sequence's seconds by limit; infinite if it does not fit."""
        return np.concatenate([self._rate_s[level][None], self._begun_s])

    def _costs_of(self, step: int) -> StepCosts:
        """Return what a step's sequences cost on every candidate."""
        level = self._level_of[step]
        return StepCosts(
            self._counts[step],
            self._starts,
            self._work_s(level),
            self._bubble_s[level],
            float(self._level_s[level]),
        )

    def _prices_of_gpus(self, price: np.ndarray) -> np.ndarray:
        """Return prices, [P, L, C], of every GPU and of some alone.

        Of those that hold more than some others, and of each candidate that holds the longest.
        ``price`` is that of the GPUs of one replica, float64 [C].
        """
        max_tokens = self._fleet.max_tokens
        holding = max_tokens > np.unique([0, *max_tokens])[:-1, None]
        prices = np.zeros((len(holding), *self._prices.shape[1:]))
        prices[:, 0] = np.where(holding, price, 0.0)
        costs = self._costs_of(int(np.argsort(self.least_s)[len(self.least_s) // 2]))
        of_rates = np.eye(1, prices.shape[1]).T  # [L, 1]: of this limit alone
        holders = np.flatnonzero(self._holds & self.is_kept)[:, None]
        own = [costs.for_all(one, of_rates * price[one]) for one in holders]
        return np.concatenate([prices, own])
