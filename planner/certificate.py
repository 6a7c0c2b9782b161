"""The certificate: no plan of a fleet takes less on average over these steps.

Of every sequence is known what it costs on each candidate at least (`SequenceRates`), and of every
candidate what a step loses to its bubble. With n replicas of the candidates and divisible work a
step takes, for any prices of the candidates' time, at least ``(value + (prices * bubble) . n) /
(prices . n)``, the value being what its sequences are worth, each where it is cheapest. Without
bubbles that is convex in n. So the least mean over all plans comes from an integer program in
n. Of every vector of prices it holds tangents of ``1 / (prices . n)``, of every plan that was
looked at which prices are best for which step. The bubble's part is divided by the most that
prices . n can be. Prices come from the linear programs of plans that were looked at; any give a
valid bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lobra.planner.clock import Clock
from lobra.planner.fleet import Fleet
from lobra.planner.sequence_rates import SequenceRates

LOOKED_AT = 6  # steps of which a plan's prices are computed
CLASSES = 64  # of lengths, in the linear programs that give prices
LEVELS = 1.03  # ratio of step times that rates are told apart for
# Of prices . n, 1 for the plan of the prices: where plans are near, close together.
TANGENTS = (0.1, 0.2, 0.4, 0.6, 0.75, 0.85, 0.92, 0.96, 1.0, 1.04, 1.08, 1.15, 1.3, 1.7)
SLACK = 1e-6  # relative: given away for the solver's tolerance
MIP_GAP = 1e-3
MIP_LIMIT_S = 5.0
LEAST_S = 0.5  # for the integer program, however late it is


class Certificate:
    """Lower bounds on the steps of plans, and on the mean step of any plan.

    K steps, D lengths, C candidates, P vectors of prices. Plans are replicas, int64 [C]. Inside, C
    are the candidates that no others replace.

    Parameters
    ----------
    fleet
        What plans are made of.
    longest
        The tokens that some replica of every plan must hold.
    counts
        int64 [K, D]: how many sequences of each length a step has.
    rates
        Of every candidate.
    """

    def __init__(
        self, fleet: Fleet, longest: int, counts: np.ndarray, rates: Sequence[SequenceRates]
    ) -> None:
        self._counts = counts.astype(np.float64)
        least_s = np.stack([one.least_s for one in rates])  # [C, D]
        alone_s = np.stack([one.alone_s for one in rates]).min(axis=0)
        price = fleet.sizes / fleet.num_gpus
        self._least_step_s = np.maximum(  # [K]: on the plan best for each step alone
            np.where(counts > 0, alone_s, 0.0).max(axis=1),
            self._counts @ _cheapest(price, least_s),
        )
        level = np.floor(np.log(self._least_step_s) / np.log(LEVELS)).astype(np.int64)
        levels, self._level_of = np.unique(level, return_inverse=True)
        after = [[one.after(LEVELS**exponent) for one in rates] for exponent in levels.tolist()]
        rate_s = np.array([[rate_s for rate_s, _ in own] for own in after])  # [levels, C, D]
        bubble_s = np.array([[bubble_s for _, bubble_s in own] for own in after])
        self._kept, self._as_kept = _undominated(fleet, rate_s, bubble_s)
        self._rate_s, self._bubble_s = rate_s[:, self._kept], bubble_s[:, self._kept]
        self._fleet = replace(fleet, candidates=tuple(fleet.candidates[i] for i in self._kept))
        self._holds = self._fleet.max_tokens >= longest
        self._starts = _class_starts(np.isfinite(least_s[self._kept]))
        # of every GPU, then of those alone that hold more than some others
        max_tokens = self._fleet.max_tokens
        holds = max_tokens > np.unique([0, *max_tokens])[:-1, None]
        self._prices = np.where(holds, price[self._kept], 0.0)  # [P, C]
        self._most_worth = np.array([self._most_worth_at(price) for price in self._prices])  # [P]
        self._looked_at: list[np.ndarray] = []
        self._set_values(self._values_at(self._prices))
        self._rare = self._values[:, -1] / self._values[:, 0]  # [K]

    def look_at(self, replicas: np.ndarray, steps: Sequence[int] | None = None) -> None:
        """Add the prices of a plan, and have the integer program see what it takes at least.

        They are computed for the ``steps``, or for some with much and some with little of what few
        candidates hold.
        """
        if steps is None:
            order = np.argsort(self._rare, kind="stable")
            places = np.linspace(0, len(order) - 1, min(LOOKED_AT, len(order)))
            steps = order[np.rint(places).astype(np.int64)].tolist()
        replicas = replicas @ self._as_kept
        self._looked_at.append(replicas)
        if not steps:
            return
        prices = np.array([self._prices_of(replicas, step) for step in steps])
        self._prices = np.concatenate([self._prices, prices])
        most = [self._most_worth_at(price) for price in prices]
        self._most_worth = np.concatenate([self._most_worth, most])
        self._set_values(np.concatenate([self._values, self._values_at(prices)], axis=1))

    def steps_s(self, plans: np.ndarray) -> np.ndarray:
        """Return float64 [plans, K]: what each step takes at least; plans is int64 [plans, C]."""
        kept = plans @ self._as_kept
        by_price = np.stack([self._by_price(plan).max(axis=1) for plan in kept])
        return np.maximum(by_price, self._least_step_s)

    def minimum(self, limit_s: float = MIP_LIMIT_S) -> tuple[float, np.ndarray | None]:
        """Return what the mean step of any plan takes at least, and the plan that may take it."""
        bound_s, kept = self._solve(None, np.inf, limit_s)
        known_s = [self._known_s(plan) for plan in self._looked_at]
        if bound_s > min(known_s, default=np.inf) * (1 + SLACK):
            bound_s = (
                0.0  # numerical trouble of the solver: a plan that is known is below its bound
            )
        replicas = None
        if kept is not None:
            replicas = np.zeros(len(self._as_kept), dtype=np.int64)
            replicas[self._kept] = kept
        return max(bound_s, float(self._least_step_s.mean())) * (1 - SLACK), replicas

    def mean_s(self, replicas: np.ndarray, clock: Clock) -> float:
        """Return what the mean step of any plan takes at least, starting from a good plan."""
        named: set[tuple[int, ...]] = set()
        least_s, next_one = 0.0, replicas
        while (key := tuple(next_one.tolist())) not in named:
            named.add(key)
            self.look_at(next_one)
            bound_s, found = self.minimum(max(clock.left_s, LEAST_S))
            least_s = max(least_s, bound_s)
            if found is None or clock.left_s <= 0:
                break
            next_one = found
        return least_s

    def tighten(self, at_most_s: float, replicas: np.ndarray, clock: Clock) -> None:
        """Leave plans out of consideration whose mean step takes more than ``at_most_s``.

        Of the prices best for a plan it is looked how much the other plans can be worth.
        """
        by_price = self._by_price(replicas @ self._as_kept)
        best, number = np.unique(by_price.argmax(axis=1), return_counts=True)
        for index in best[np.argsort(-number, kind="stable")].tolist():
            if clock.left_s <= 0:
                break
            price = self._prices[index]
            worth, _ = self._solve(-price, at_most_s, clock.left_s)
            known = [price @ plan for plan in self._looked_at if self._known_s(plan) <= at_most_s]
            most = max([-worth * (1 + SLACK), *known])
            self._most_worth[index] = min(self._most_worth[index], most)
        self._set_values(self._values)

    def _solve(
        self, costs: np.ndarray | None, at_most_s: float, limit_s: float
    ) -> tuple[float, np.ndarray | None]:
        """Return a bound on the least cost of a plan, and the plan.

        ``costs`` are of a replica, float64 [C]; None: the mean step, which is at most
        ``at_most_s``, is the cost. Columns are the replicas, 1 / (prices . n) of the prices that
        are best somewhere, and the mean step.
        """
        from scipy.optimize import LinearConstraint, milp  # slow to import, and few need it

        sizes = self._fleet.sizes
        best = [self._by_price(replicas).argmax(axis=1) for replicas in self._looked_at]
        used = np.unique(np.concatenate([np.zeros(1, dtype=np.int64), *best]))
        columns = len(sizes) + len(used) + 1
        tangents, tangents_from = self._tangents(used)
        means, means_from = self._means(used, best)
        plan = np.zeros((2, columns))
        plan[0, : len(sizes)], plan[1, : len(sizes)] = self._holds, sizes
        most = np.full(columns, np.inf)
        most[: len(sizes)], most[-1] = self._fleet.num_gpus // sizes, at_most_s
        cost = (np.arange(columns) == columns - 1).astype(np.float64)
        if costs is not None:
            cost = np.concatenate([costs, np.zeros(columns - len(costs))])
        found = milp(
            cost,
            constraints=[
                LinearConstraint(tangents, tangents_from, np.inf),
                LinearConstraint(means, means_from, np.inf),
                LinearConstraint(plan, 1, [np.inf, self._fleet.num_gpus]),
            ],
            bounds=(0, most),
            integrality=np.arange(columns) < len(sizes),
            options={"time_limit": limit_s, "mip_rel_gap": MIP_GAP},
        )
        if found.x is None:  # stopped before it knew anything
            return -np.inf, None
        bound = min(float(found.mip_dual_bound), float(found.fun))
        return bound, np.rint(found.x[: len(sizes)]).astype(np.int64)

    def _tangents(self, used: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return rows that hold 1 / (prices . n) above tangents, and their least values."""
        rows, least = [], []
        num_candidates = self._prices.shape[1]
        for column, price in enumerate(self._prices[used], start=num_candidates):
            worth = [float(price @ replicas) for replicas in self._looked_at]
            for at in {*TANGENTS, *(round(one, 6) for one in worth if one > TANGENTS[0])}:
                row = np.zeros(num_candidates + len(used) + 1)
                row[:num_candidates], row[column] = price / at**2, 1.0
                rows.append(row)
                least.append(2.0 / at)
        return np.array(rows), np.array(least)

    def _means(self, used: np.ndarray, best: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Return rows that hold the mean step above what it is at each plan's best prices."""
        num_steps, num_candidates = len(self._values), self._prices.shape[1]
        rows = np.zeros((len(best) + 1, num_candidates + len(used) + 1))
        rows[:, -1] = 1.0
        least = [float(self._least_step_s.mean())]
        for row, replicas, own in zip(rows[1:], self._looked_at, best, strict=True):
            above = self._by_price(replicas).max(axis=1) > self._least_step_s
            column = num_candidates + np.searchsorted(used, own)
            worth = self._values[np.arange(num_steps), own] / num_steps
            np.subtract.at(row, column[above], worth[above])
            bubble_s = self._bubble_s[self._level_of] * self._prices[own]  # [K, C]
            share = bubble_s / self._most_worth[own, None] / num_steps
            row[:num_candidates] -= share[above].sum(axis=0)
            least.append(float(self._least_step_s[~above].sum() / num_steps))
        return rows, np.array(least)

    def _known_s(self, plan: np.ndarray) -> float:
        """Return what the mean step of a plan takes at least."""
        by_price = self._by_price(plan).max(axis=1)
        return float(np.maximum(by_price, self._least_step_s).mean())

    def _set_values(self, values: np.ndarray) -> None:
        """Take the steps' values, [K, P], and with them what each takes on the plan best for it."""
        self._values = values
        least_s = (values / self._most_worth).max(axis=1)
        self._least_step_s = np.maximum(self._least_step_s, least_s)

    def _most_worth_at(self, price: np.ndarray) -> float:
        """Return the greatest ``price . n`` of all plans that hold the longest sequence."""
        sizes, num_gpus = self._fleet.sizes, self._fleet.num_gpus
        best = np.zeros(num_gpus + 1)
        for gpus in range(1, num_gpus + 1):
            fits = sizes <= gpus
            best[gpus] = (best[gpus - sizes[fits]] + price[fits]).max(initial=best[gpus - 1])
        holders = self._holds & (sizes <= num_gpus)
        return float((best[num_gpus - sizes[holders]] + price[holders]).max())

    def _by_price(self, replicas: np.ndarray) -> np.ndarray:
        """Return float64 [K, P]: the steps' bounds on a plan by every vector of prices."""
        worth = self._prices @ replicas
        bubble_s = (self._bubble_s @ (self._prices * replicas).T)[self._level_of]  # [K, P]
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self._values > 0, (self._values + bubble_s) / worth, 0.0)

    def _values_at(self, prices: np.ndarray) -> np.ndarray:
        """Return float64 [K, prices]: what the steps' sequences are worth at the least."""
        values = np.empty((len(self._counts), len(prices)))
        for level, rate_s in enumerate(self._rate_s):
            steps = self._level_of == level
            worth = np.stack([_cheapest(price, rate_s) for price in prices])
            values[steps] = self._counts[steps] @ worth.T
        return values

    def _prices_of(self, replicas: np.ndarray, step: int) -> np.ndarray:
        """Return prices at which a plan's bound on a step is highest, float64 [C].

        All the plan's replicas together have the price 1. Candidates that the plan has none of are
        as cheap as they can be without being used.
        """
        from scipy.optimize import linprog

        used = np.flatnonzero(replicas)
        level = self._level_of[step]
        rate_s, bubble_s = self._rate_s[level], self._bubble_s[level, used]
        work_s = np.where(np.isfinite(rate_s), rate_s, 0.0) * self._counts[step]
        work_s = np.add.reduceat(work_s, self._starts, axis=1)[used]  # [used, classes]
        there = np.add.reduceat(self._counts[step], self._starts) > 0
        held = np.isfinite(rate_s[:, self._starts])[used]
        there &= held.any(axis=0)
        work_s, held = work_s[:, there], held[:, there]
        candidate, length = np.nonzero(held)
        columns = len(candidate) + 1
        busy = np.zeros((len(used), columns))
        busy[candidate, np.arange(columns - 1)] = work_s[candidate, length]
        busy[:, -1] = -replicas[used]
        whole = np.zeros((held.shape[1], columns))
        whole[length, np.arange(columns - 1)] = 1.0
        found = linprog(
            np.arange(columns) == columns - 1,
            A_ub=busy,
            b_ub=-replicas[used] * bubble_s,
            A_eq=whole,
            b_eq=np.ones(len(whole)),
        )
        prices = np.zeros(len(replicas))
        prices[used] = np.maximum(-found.ineqlin.marginals, 0.0)
        worth = _cheapest(prices[used], rate_s[used])
        worth = np.where(np.isfinite(worth), worth, 0.0)
        unused = replicas == 0
        prices[unused] = (worth / rate_s[unused]).max(axis=1)
        return prices / (prices @ replicas)


def _cheapest(prices: np.ndarray, rate_s: np.ndarray) -> np.ndarray:
    """Return float64 [D]: what sequences are worth on the candidates cheapest for each."""
    with np.errstate(invalid="ignore"):  # a price of 0 for what does not fit
        return np.where(np.isfinite(rate_s), prices[:, None] * rate_s, np.inf).min(axis=0)


def _undominated(
    fleet: Fleet, rate_s: np.ndarray, bubble_s: np.ndarray
) -> tuple[list[int], np.ndarray]:
    """Return the candidates that no others replace, and plans of all as plans of these.

    As many replicas of another on the same GPUs replace one if by rates [levels, C, D] and bubbles
    [levels, C] they do no less of any length. The plans are int64 [C, kept], to be multiplied with.
    """
    kept: list[int] = []
    replacement = np.zeros((len(fleet.sizes), len(fleet.sizes)), dtype=np.int64)
    finite_s = np.where(np.isfinite(rate_s), rate_s, 1e30)
    for index in np.lexsort((finite_s.sum(axis=(0, 2)), fleet.sizes)).tolist():
        for other in kept:
            number, left = divmod(int(fleet.sizes[index]), int(fleet.sizes[other]))
            if (
                not left
                and fleet.max_tokens[other] >= fleet.max_tokens[index]
                and (bubble_s[:, other] <= bubble_s[:, index]).all()
                and (rate_s[:, other] <= rate_s[:, index] * number).all()
            ):
                replacement[index, other] = number
                break
        else:
            kept.append(index)
            replacement[index, index] = 1
    kept.sort()
    return kept, replacement[:, kept]


def _class_starts(held: np.ndarray) -> np.ndarray:
    """Return where classes of lengths start: those of one are held (bool [C, D]) by the same."""
    number = held.shape[1]
    equal = np.linspace(0, number, min(CLASSES, number), endpoint=False).astype(np.int64)
    changes = np.flatnonzero((held[:, 1:] != held[:, :-1]).any(axis=0)) + 1
    return np.unique(np.concatenate([equal, changes]))
