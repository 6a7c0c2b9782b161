"""The certificate: no plan of a fleet takes less on average over these steps.

Of every sequence is known what it costs on each candidate at least (`SequenceRates`), and of every
candidate what a step loses to its bubble. With n replicas of the candidates and divisible work a
step takes, for any prices of the candidates' time, at least ``(value + (prices * bubble) . n) /
(prices . n)``, the value being what its sequences are worth, each where it is cheapest. The root of
the numerator is concave in n, and almost linear: with a line a(n) below it, a(n)^2 / (prices . n)
is convex. For any r > 0 it is at least ``2 r a(n) - r^2 (prices . n)``. Nor is a step shorter than
its longest sequence alone takes on the fastest candidate that a plan has. So for each plan that was
looked at there is a plane below the mean step, made of what is best there for each step; the least
mean over all plans comes from an integer program in n (Kelley's cutting planes). Prices come from
the linear programs of plans that were looked at; any give a valid bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lobra.planner.clock import Clock
from lobra.planner.fleet import Fleet
from lobra.planner.longest_few import LongestFew
from lobra.planner.sequence_rates import SequenceRates

LOOKED_AT = 6  # steps of which a plan's prices are computed
CLASSES = 64  # of lengths, in the linear programs that give prices
LEVELS = 1.03  # ratio of step times that rates are told apart for
TINY = 1e-300
SLACK = 1e-6  # relative: given away for the solver's tolerance
MIP_GAP = 2e-4
EXACT = 5e-4  # relative: what the program's value of a plan may be below that plan's bound
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
            self._counts @ _cheapest(price, least_s, np.zeros(len(price)), least_s),
        )
        level = np.floor(np.log(self._least_step_s) / np.log(LEVELS)).astype(np.int64)
        levels, self._level_of = np.unique(level, return_inverse=True)
        after = [[one.after(LEVELS**exponent) for one in rates] for exponent in levels.tolist()]
        rate_s = np.array([[rate_s for rate_s, _ in own] for own in after])  # [levels, C, D]
        bubble_s = np.array([[bubble_s for _, bubble_s in own] for own in after])
        longest_one = counts.shape[1] - 1 - np.argmax(counts[:, ::-1] > 0, axis=1)  # of each step
        longest_s = np.stack([one.alone_s[longest_one] for one in rates])  # [C, K]
        self._kept, self._as_kept = _undominated(fleet, rate_s, bubble_s, longest_s)
        self._longest_s = longest_s[self._kept]
        self._longest_few = LongestFew.of(rates, counts)
        self._rate_s, self._bubble_s = rate_s[:, self._kept], bubble_s[:, self._kept]
        self._unshared_s = np.stack([rates[index].unshared_s for index in self._kept])  # [C, D]
        self._fleet = replace(fleet, candidates=tuple(fleet.candidates[i] for i in self._kept))
        self._holds = self._fleet.max_tokens >= longest
        self._starts = _class_starts(np.isfinite(least_s[self._kept]))
        # of every GPU, of those alone that hold more than some others, and of each layout alone
        max_tokens = self._fleet.max_tokens
        holds = max_tokens > np.unique([0, *max_tokens])[:-1, None]
        own = np.eye(len(max_tokens))[self._holds]
        alone = [
            self._with_unused(one > 0, one, 0.0 * one, self._rate_s[len(levels) // 2])
            for one in own
        ]
        own_worth = (own @ (fleet.num_gpus // self._fleet.sizes))[:, None]
        self._prices = np.concatenate(  # [P, C]
            [np.where(holds, price[self._kept], 0.0), np.array(alone) / own_worth]
        )
        self._unshared = np.zeros_like(self._prices)  # [P, C]: the part that unshared ones cost
        self._most_worth = np.array([self._most_worth_at(price) for price in self._prices])  # [P]
        self._looked_at: list[np.ndarray] = []
        self._cut_at: list[np.ndarray] = []
        self._set_values(self._values_at(self._prices, self._unshared))
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
        self._cut_at.append(replicas)
        if not steps:
            return
        found = np.array([self._prices_of(replicas, step) for step in steps])
        prices, unshared = found[:, 0], found[:, 1]
        self._prices = np.concatenate([self._prices, prices])
        self._unshared = np.concatenate([self._unshared, unshared])
        most = [self._most_worth_at(price) for price in prices]
        self._most_worth = np.concatenate([self._most_worth, most])
        values = self._values_at(prices, unshared)
        self._set_values(np.concatenate([self._values, values], axis=1))

    def steps_s(self, plans: np.ndarray) -> np.ndarray:
        """Return float64 [plans, K]: what each step takes at least; plans is int64 [plans, C]."""
        kept = plans @ self._as_kept
        found_s = np.stack([self._bounds_s(plan) for plan in kept])
        crowded_s = np.stack([self._longest_few.steps_s(plan) for plan in plans])
        return np.maximum(found_s, crowded_s)

    def minimum(self, limit_s: float = MIP_LIMIT_S) -> tuple[float, np.ndarray | None]:
        """Return what the mean step of any plan takes at least, and the plan that may take it."""
        clock = Clock(limit_s)
        bound_s, kept = float(self._least_step_s.mean()), None
        while clock.left_s > 0:
            found_s, found = self._solve(clock.left_s)
            if found is None:
                break
            bound_s, kept = max(bound_s, found_s), found
            if self._known_s(found) <= bound_s * (1 + EXACT):
                break
            if any((found == other).all() for other in self._cut_at):
                break
            self._cut_at.append(found)
        replicas = None
        if kept is not None:
            replicas = np.zeros(len(self._as_kept), dtype=np.int64)
            replicas[self._kept] = kept
        return bound_s * (1 - SLACK), replicas

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

    def _solve(self, limit_s: float) -> tuple[float, np.ndarray | None]:
        """Return what the mean step takes at least by all the planes, and the plan; bare if late.

        Columns are the replicas and the mean step.
        """
        from scipy.optimize import LinearConstraint, milp  # slow to import, and few need it

        sizes, num_gpus = self._fleet.sizes, self._fleet.num_gpus
        planes = [self._plane(replicas) for replicas in self._cut_at]
        rows = np.array([[*(-slope), 1.0] for _, slope in planes]).reshape(-1, len(sizes) + 1)
        plan = np.array([[*self._holds, 0.0], [*sizes, 0.0]])
        found = milp(
            np.eye(1, len(sizes) + 1, len(sizes))[0],
            constraints=[
                LinearConstraint(rows, [least_s for least_s, _ in planes], np.inf),
                LinearConstraint(plan, 1, [np.inf, num_gpus]),
            ],
            bounds=(0, [*(num_gpus // sizes), np.inf]),
            integrality=[1] * len(sizes) + [0],
            options={"time_limit": limit_s, "mip_rel_gap": MIP_GAP},
        )
        if found.x is None:  # stopped before it knew anything
            return 0.0, None
        bound_s = min(float(found.mip_dual_bound), float(found.fun))
        known_s = min((self._known_s(replicas) for replicas in self._cut_at), default=np.inf)
        if bound_s > known_s * (1 + SLACK):  # numerical trouble of the solver
            bound_s = 0.0
        return bound_s, np.rint(found.x[: len(sizes)]).astype(np.int64)

    def _plane(self, replicas: np.ndarray) -> tuple[float, np.ndarray]:
        """Return a constant and float64 [C]: what n replicas' mean step is above, near at these."""
        by_price = self._by_price(replicas)
        best, steps = by_price.argmax(axis=1), np.arange(len(by_price))
        value, price = self._values[steps, best], self._prices[best]
        shared = price - self._unshared[best]
        lost_s = shared * self._bubble_s[self._level_of]  # [K, C]: of each replica
        most_s = (lost_s / self._fleet.sizes).max(axis=1) * self._fleet.num_gpus
        low, high = np.sqrt(value), np.sqrt(value + most_s)
        rise = (high - low) / np.maximum(most_s, TINY)
        ratio = (low + rise * (lost_s @ replicas)) / (price @ replicas)
        slope = 2.0 * (ratio * rise)[:, None] * lost_s - ratio[:, None] ** 2 * price
        least_s = 2.0 * ratio * low
        floor_s = self._least_step_s
        below = least_s + slope @ replicas <= floor_s
        least_s[below], slope[below] = floor_s[below], 0.0
        # a step that waits for its longest sequence does so without any faster candidate
        longest_s = self._own_longest_s(replicas)
        waits = longest_s > least_s + slope @ replicas
        faster = longest_s[:, None] > self._longest_s.T
        least_s[waits] = longest_s[waits]
        slope[waits] = np.where(faster, (floor_s - longest_s)[:, None], 0.0)[waits]
        return float(least_s.mean()), slope.mean(axis=0)

    def _known_s(self, plan: np.ndarray) -> float:
        """Return what the mean step of a plan takes at least."""
        return float(self._bounds_s(plan).mean())

    def _bounds_s(self, plan: np.ndarray) -> np.ndarray:
        """Return float64 [K]: what each step takes at least on a plan of the kept candidates."""
        by_price = self._by_price(plan).max(axis=1)
        return np.max([by_price, self._least_step_s, self._own_longest_s(plan)], axis=0)

    def _own_longest_s(self, plan: np.ndarray) -> np.ndarray:
        """Return float64 [K]: of each step's longest sequence alone, where the plan is fastest."""
        return self._longest_s[plan > 0].min(axis=0, initial=np.inf)

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
        bubble_s = (self._bubble_s @ ((self._prices - self._unshared) * replicas).T)[
            self._level_of
        ]  # [K, P]
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self._values > 0, (self._values + bubble_s) / worth, 0.0)

    def _values_at(self, prices: np.ndarray, unshared: np.ndarray) -> np.ndarray:
        """Return float64 [K, prices]: what the steps' sequences are worth at the least."""
        values = np.empty((len(self._counts), len(prices)))
        for level, rate_s in enumerate(self._rate_s):
            steps = self._level_of == level
            worth = [
                _cheapest(price - part, rate_s, part, self._unshared_s)
                for price, part in zip(prices, unshared, strict=True)
            ]
            values[steps] = self._counts[steps] @ np.array(worth).T
        return values

    def _with_unused(
        self, used: np.ndarray, shared: np.ndarray, unshared: np.ndarray, rate_s: np.ndarray
    ) -> np.ndarray:
        """Return the prices for shared sequences, with the least at which others are not used."""
        worth = _cheapest(shared[used], rate_s[used], unshared[used], self._unshared_s[used])
        worth = np.where(np.isfinite(worth), worth, 0.0)
        return np.where(used, shared, (worth / rate_s).max(axis=1))

    def _prices_of(self, replicas: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return prices at which a plan's bound on a step is highest, float64 [C], in two parts.

        The first are whole, the second what of them is for sequences that share with no other. All
        the plan's replicas together have the price 1. Candidates that the plan has none of are as
        cheap as they can be without being used.
        """
        from scipy.optimize import linprog

        used = np.flatnonzero(replicas)
        level, number = self._level_of[step], len(used)
        rate_s, bubble_s = self._rate_s[level], self._bubble_s[level, used]
        held = np.isfinite(rate_s[:, self._starts])[used]
        there = (np.add.reduceat(self._counts[step], self._starts) > 0) & held.any(axis=0)
        held = held[:, there]
        candidate, length = np.nonzero(held)
        columns = len(candidate) + 1
        busy = np.zeros((2 * number, columns))
        for row, each_s in ((0, rate_s[used]), (number, self._unshared_s[used])):
            work_s = np.where(np.isfinite(each_s), each_s, 0.0) * self._counts[step]
            work_s = np.add.reduceat(work_s, self._starts, axis=1)[:, there]
            busy[row + candidate, np.arange(columns - 1)] = work_s[candidate, length]
        busy[:, -1] = -np.tile(replicas[used], 2)
        whole = np.zeros((held.shape[1], columns))
        whole[length, np.arange(columns - 1)] = 1.0
        found = linprog(
            np.arange(columns) == columns - 1,
            A_ub=busy,
            b_ub=np.concatenate([-replicas[used] * bubble_s, np.zeros(number)]),
            A_eq=whole,
            b_eq=np.ones(len(whole)),
        )
        shared, unshared = np.zeros(len(replicas)), np.zeros(len(replicas))
        dual = np.maximum(-found.ineqlin.marginals, 0.0)
        shared[used], unshared[used] = dual[:number], dual[number:]
        shared = self._with_unused(replicas > 0, shared, unshared, rate_s)
        prices = shared + unshared
        return prices / (prices @ replicas), unshared / (prices @ replicas)


def _cheapest(
    shared: np.ndarray, rate_s: np.ndarray, unshared: np.ndarray, unshared_s: np.ndarray
) -> np.ndarray:
    """Return float64 [D]: what sequences are worth on the candidates cheapest for each.

    A replica's time limits both the sum of its sequences' rates and that of the unshared ones, so
    each may have a part of its price.
    """
    with np.errstate(invalid="ignore"):  # a price of 0 for what does not fit
        cost = shared[:, None] * rate_s + unshared[:, None] * unshared_s
    return np.where(np.isfinite(rate_s), cost, np.inf).min(axis=0)


def _undominated(
    fleet: Fleet, rate_s: np.ndarray, bubble_s: np.ndarray, longest_s: np.ndarray
) -> tuple[list[int], np.ndarray]:
    """Return the candidates that no others replace, and plans of all as plans of these.

    As many replicas of another on the same GPUs replace one if by rates [levels, C, D] and bubbles
    [levels, C] they do no less of any length, and the longest sequences alone [C, K] take no
    longer. The plans are int64 [C, kept], to be multiplied with.
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
                and (longest_s[other] <= longest_s[index]).all()
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
