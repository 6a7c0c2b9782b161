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
the linear programs of plans that were looked at; any give a valid bound. The longer a step takes at
least, the better are its rates: they are taken anew when prices have shown more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lobra.planner.clock import Clock
from lobra.planner.fleet import Fleet
from lobra.planner.longest_few import LongestFew
from lobra.planner.prices import best_prices, class_starts, worth
from lobra.planner.replacement import replacement
from lobra.planner.sequence_rates import SequenceRates

LOOKED_AT = 12  # steps of which a plan's prices are computed
LEVELS = 1.03  # ratio of step times that rates are told apart for
TINY = 1e-300
SLACK = 1e-6  # relative: given away for the solver's tolerance
MIP_GAP = 2e-4
EXACT = 5e-4  # relative: what the program's value of a plan may be below that plan's bound
MIP_LIMIT_S = 5.0
INFEASIBLE = 2  # scipy's word for it
LEAST_S = 0.5  # for the integer program, however late it is


@dataclass(frozen=True)
class Part:
    """The plans with so many GPUs in pipelines."""

    fewest: int
    most: int

    def around(self, gpus: int) -> list[Part]:
        """Return those with fewer, with just so many, and with more; nothing if these are all."""
        parts = Part(self.fewest, gpus - 1), Part(gpus, gpus), Part(gpus + 1, self.most)
        return [] if self in parts else [one for one in parts if one.fewest <= one.most]


class Certificate:
    """Lower bounds on the steps of plans, and on the mean step of any plan.

    K steps, D lengths, C candidates. Plans are replicas, int64 [C]. Rates and bubbles are those of
    steps at least as long as each is known to be, by level. A candidate's time has L limits: one of
    rates, the others of what is begun (see `SequenceRates`); P times prices are known, [L, C] each.

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
        self._fleet, self._rates = fleet, tuple(rates)
        self._counts = counts.astype(np.float64)
        self._holds = fleet.max_tokens >= longest
        self._pipelines = np.where([c.layout.pp > 1 for c in fleet.candidates], fleet.sizes, 0)
        least_s = np.stack([one.least_s for one in rates])  # [C, D]
        alone_s = np.stack([one.alone_s for one in rates])
        self._begun_s = np.stack([one.begun_s for one in rates], axis=1)  # [L - 1, C, D]
        self._longest_few = LongestFew.of(rates, counts)
        longest_one = counts.shape[1] - 1 - np.argmax(counts[:, ::-1] > 0, axis=1)  # of each step
        self._longest_s = alone_s[:, longest_one]  # [C, K]
        self._starts = class_starts(np.isfinite(least_s))
        price = fleet.sizes / fleet.num_gpus
        self._least_step_s = np.maximum(  # [K]: on the plan best for each step alone
            np.where(counts > 0, alone_s.min(axis=0), 0.0).max(axis=1),
            self._counts @ worth(price[None, None], least_s[None])[0],
        )
        self._prices = np.empty((0, 1 + len(self._begun_s), len(price)))  # [P, L, C]
        self._cut_at: list[np.ndarray] = []
        self._after: dict[int, list[tuple[np.ndarray, float]]] = {}  # rates by level
        self._set_levels()
        # of every GPU, of those alone that hold more than some others, and of each layout alone
        max_tokens = fleet.max_tokens
        holds = max_tokens > np.unique([0, *max_tokens])[:-1, None]
        holders = self._holds & self._is_kept
        middle = int(np.argsort(self._least_step_s)[len(counts) // 2])
        prices = np.zeros((len(holds) + sum(holders), *self._prices.shape[1:]))
        prices[: len(holds), 0] = np.where(holds, price, 0.0)
        for place, one in enumerate(np.flatnonzero(holders).tolist(), len(holds)):
            own = np.eye(1, len(self._begun_s) + 1).T * price[one]
            prices[place] = self._for_all(np.array([one]), middle, own)
        self._add_prices(prices)
        rare = self._values[:, -1] / self._values[:, 0]  # [K]
        order = np.argsort(rare, kind="stable")
        places = np.linspace(0, len(order) - 1, min(LOOKED_AT, len(order)))
        self._typical = order[np.rint(places).astype(np.int64)].tolist()
        self._add_prices(np.stack([self._prices_of_shares(step) for step in self._typical]))

    def _set_levels(self) -> None:
        """Take the rates of steps that take as long as each is known to take at least."""
        level = np.floor(np.log(self._least_step_s) / np.log(LEVELS)).astype(np.int64)
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
            self._fleet, self._rate_s, left_s, self._begun_s, self._longest_s
        )
        self._is_kept = self._replacement.any(axis=0)
        self._cut_at = [plan @ self._replacement for plan in self._cut_at]
        self._values = self._values_at(self._prices)

    def _add_prices(self, prices: np.ndarray) -> None:
        """Add prices, [P, L, C]."""
        values = self._values_at(prices)
        self._prices = np.concatenate([self._prices, prices])
        self._values = np.concatenate([self._values, values], axis=1)
        shared, prices = prices[:, 0], prices.sum(axis=1)
        least_s = (values / self._most_worth_of(prices)).max(axis=1)
        self._least_step_s = np.maximum(self._least_step_s, least_s)
        # the same with bubbles, of divisible replicas
        num_gpus, sizes = self._fleet.num_gpus, self._fleet.sizes
        limits = (prices > 0) & self._is_kept
        for level, bubble_s in enumerate(self._bubble_s):
            steps = self._level_of == level
            each_s = values[steps][:, :, None] * (sizes / num_gpus) + shared * bubble_s
            each_s = np.where(limits, each_s / np.where(limits, prices, 1.0), np.inf)
            least_s = each_s.min(axis=2).max(axis=1)
            self._least_step_s[steps] = np.maximum(self._least_step_s[steps], least_s)
        if np.mean(self._least_step_s / self._level_s[self._level_of]) > LEVELS**2:
            self._set_levels()

    def look_at(self, replicas: np.ndarray, steps: Sequence[int] | None = None) -> None:
        """Add the prices of a plan, and have the integer program see what it takes at least.

        They are computed for the ``steps``, or for some with much and some with little of what few
        candidates hold.
        """
        replicas = replicas @ self._replacement
        self._cut_at.append(replicas)
        steps = self._typical if steps is None else steps
        if steps:
            self._add_prices(np.stack([self._prices_of(replicas, step) for step in steps]))

    def steps_s(self, plans: np.ndarray) -> np.ndarray:
        """Return float64 [plans, K]: what each step takes at least; plans is int64 [plans, C]."""
        found_s = np.stack([self._bounds_s(plan) for plan in plans @ self._replacement])
        crowded_s = np.stack([self._longest_few.steps_s(plan) for plan in plans])
        return np.maximum(found_s, crowded_s)

    def minimum(self, limit_s: float = MIP_LIMIT_S) -> tuple[float, np.ndarray | None]:
        """Return what the mean step of any plan takes at least, and the plan that may take it.

        Plans are told apart by the GPUs of their pipelines where planes are not near enough.
        """
        clock = Clock(limit_s)
        part, parts = Part(0, self._fleet.num_gpus), [Part(0, self._fleet.num_gpus)]
        found: dict[Part, tuple[float, np.ndarray | None]] = {}
        least_s, best = float(self._least_step_s.mean()), None
        while parts:
            for one in parts:
                bound_s, plan = self._solve(one, max(clock.left_s, TINY))
                found[one] = max(bound_s, least_s), plan
            part = min(found, key=lambda one: found[one][0])
            least_s, plan = found[part]
            best = plan if plan is not None else best
            if plan is None or self._known_s(plan) <= least_s * (1 + EXACT) or clock.left_s <= 0:
                break
            parts = [part]
            if any((plan == other).all() for other in self._cut_at):
                parts = part.around(int(plan @ self._pipelines))
            else:
                self._cut_at.append(plan)
            if parts:
                del found[part]
        return least_s * (1 - SLACK), best

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

    def _solve(self, part: Part, limit_s: float) -> tuple[float, np.ndarray | None]:
        """Return what the mean step takes at least by all the planes, and the plan; bare if late.

        Of the plans of a part; infinite if there are none. Columns are the replicas and the mean
        step.
        """
        from scipy.optimize import LinearConstraint, milp  # slow to import, and few need it

        sizes, num_gpus = self._fleet.sizes, self._fleet.num_gpus
        planes = [self._plane(replicas, part) for replicas in self._cut_at]
        rows = np.array([[*(-slope), 1.0] for _, slope in planes]).reshape(-1, len(sizes) + 1)
        plan = np.array([[*self._holds, 0.0], [*sizes, 0.0], [*self._pipelines, 0.0]])
        found = milp(
            np.eye(1, len(sizes) + 1, len(sizes))[0],
            constraints=[
                LinearConstraint(rows, [least_s for least_s, _ in planes], np.inf),
                LinearConstraint(plan, [1, 1, part.fewest], [np.inf, num_gpus, part.most]),
            ],
            bounds=(0, [*np.where(self._is_kept, num_gpus // sizes, 0), np.inf]),
            integrality=[1] * len(sizes) + [0],
            options={"time_limit": limit_s, "mip_rel_gap": MIP_GAP},
        )
        if found.x is None:  # there is no plan, or it stopped before it knew anything
            return (np.inf if found.status == INFEASIBLE else 0.0), None
        bound_s = min(float(found.mip_dual_bound), float(found.fun))
        own = [one for one in self._cut_at if part.fewest <= one @ self._pipelines <= part.most]
        if bound_s > min(map(self._known_s, own), default=np.inf) * (1 + SLACK):
            bound_s = 0.0  # numerical trouble of the solver
        return bound_s, np.rint(found.x[: len(sizes)]).astype(np.int64)

    def _plane(self, replicas: np.ndarray, part: Part) -> tuple[float, np.ndarray]:
        """Return a constant and float64 [C]: what n replicas' mean step is above, near at these.

        For all n of the part.
        """
        by_price = self._by_price(replicas)
        best, steps = by_price.argmax(axis=1), np.arange(len(by_price))
        value, price = self._values[steps, best], self._prices[best].sum(axis=1)
        lost_s = self._prices[best, 0] * self._bubble_s[self._level_of]  # [K, C]: of each replica
        fewest_s, most_s = self._lost_in(part, lost_s)
        low, high = np.sqrt(value + fewest_s), np.sqrt(value + most_s)
        rise = (high - low) / np.maximum(most_s - fewest_s, TINY)
        low -= rise * fewest_s
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

    def _lost_in(self, part: Part, lost_s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return float64 [K] twice: the least and the most that plans of a part lose to bubbles.

        ``lost_s`` is what one replica does, float64 [K, C].
        """
        each_s = lost_s / self._fleet.sizes
        is_pipeline = self._pipelines > 0
        pipelines_s = each_s[:, self._is_kept & is_pipeline]
        others_s = each_s[:, self._is_kept & ~is_pipeline].max(axis=1, initial=0.0)
        fewest_s = part.fewest * pipelines_s.min(axis=1, initial=np.inf if part.fewest else 0.0)
        most_s = [
            gpus * pipelines_s.max(axis=1, initial=0.0) + (self._fleet.num_gpus - gpus) * others_s
            for gpus in (part.fewest, part.most)
        ]
        return np.where(np.isfinite(fewest_s), fewest_s, 0.0), np.maximum(*most_s)

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

    def _most_worth_of(self, prices: np.ndarray) -> np.ndarray:
        """Return float64 [P]: the greatest ``price . n`` of plans that hold the longest."""
        sizes, num_gpus = self._fleet.sizes[self._is_kept], self._fleet.num_gpus
        price = prices[:, self._is_kept]
        best = np.zeros((len(price), num_gpus + 1))
        for gpus in range(1, num_gpus + 1):
            fits = sizes <= gpus
            with_one = best[:, gpus - sizes[fits]] + price[:, fits]
            best[:, gpus] = np.maximum(best[:, gpus - 1], with_one.max(axis=1, initial=0.0))
        holders = self._holds[self._is_kept] & (sizes <= num_gpus)
        return (best[:, num_gpus - sizes[holders]] + price[:, holders]).max(axis=1)

    def _by_price(self, replicas: np.ndarray) -> np.ndarray:
        """Return float64 [K, P]: the steps' bounds on a plan by every vector of prices."""
        price = self._prices.sum(axis=1) @ replicas
        lost_s = self._bubble_s @ (self._prices[:, 0] * replicas).T  # [levels, P]
        with np.errstate(divide="ignore", invalid="ignore"):
            bound_s = (self._values + lost_s[self._level_of]) / price
            return np.where(self._values > 0, bound_s, 0.0)

    def _values_at(self, prices: np.ndarray) -> np.ndarray:
        """Return float64 [K, P]: what the steps' sequences are worth at prices, [P, L, C]."""
        values = np.empty((len(self._counts), len(prices)))
        kept = np.flatnonzero(self._is_kept)
        for level in range(len(self._level_s)):
            steps = np.flatnonzero(self._level_of == level)
            there = np.flatnonzero(self._counts[steps].any(axis=0))
            each = worth(prices[:, :, kept], self._work_s(level, kept)[:, :, there])
            values[steps] = self._counts[np.ix_(steps, there)] @ each.T
        return values

    def _work_s(self, level: int, candidates: np.ndarray) -> np.ndarray:
        """Return float64 [L, candidates, D]: a sequence's seconds on candidates, by limit."""
        rate_s = self._rate_s[level, candidates][None]
        return np.concatenate([rate_s, self._begun_s[:, candidates]])

    def _prices_of(self, replicas: np.ndarray, step: int) -> np.ndarray:
        """Return prices at which a plan's bound on a step is highest, float64 [L, C].

        All the plan's replicas together have the price 1. Candidates that the plan has none of are
        as cheap as they can be without being used.
        """
        used = np.flatnonzero(replicas)
        number = replicas[used].astype(np.float64)
        lost_s = np.zeros((len(self._begun_s) + 1, len(used)))
        lost_s[0] = number * self._bubble_s[self._level_of[step], used]
        time_s = np.broadcast_to(number, lost_s.shape)[:, :, None]
        found = best_prices(self._work_of_classes(used, step), time_s, lost_s, np.ones(1))
        prices = self._for_all(used, step, found)
        return prices / (prices.sum(axis=0) @ replicas)

    def _prices_of_shares(self, step: int) -> np.ndarray:
        """Return the same for the plan of divisible replicas that is best for the step alone."""
        used = np.flatnonzero(self._is_kept)
        level = self._level_of[step]
        time_s = np.broadcast_to(np.eye(len(used)), (len(self._begun_s) + 1, len(used), len(used)))
        time_s = time_s.copy()  # of replicas for a second
        time_s[0] *= 1.0 - self._bubble_s[level, used] / self._level_s[level]
        sizes = self._fleet.sizes[used].astype(np.float64)
        found = best_prices(
            self._work_of_classes(used, step), time_s, np.zeros(time_s.shape[:2]), sizes
        )
        prices = self._for_all(used, step, found)
        return prices / prices.sum(axis=0).max()

    def _work_of_classes(self, used: np.ndarray, step: int) -> np.ndarray:
        """Return a step's work on candidates, by classes of lengths, for `best_prices`."""
        counts = self._counts[step]
        there = np.add.reduceat(counts, self._starts) > 0
        with np.errstate(invalid="ignore"):  # none of what does not fit
            work_s = self._work_s(self._level_of[step], used) * counts
        work_s = np.add.reduceat(np.where(counts > 0, work_s, 0.0), self._starts, axis=2)
        return work_s[:, :, there & np.isfinite(work_s[0]).any(axis=0)]

    def _for_all(self, used: np.ndarray, step: int, own: np.ndarray) -> np.ndarray:
        """Return prices of used candidates with the least at which others are not used."""
        level = self._level_of[step]
        each = worth(own[None], self._work_s(level, used))[0]
        prices = np.zeros((len(own), len(self._rate_s[level])))
        prices[0] = (np.where(np.isfinite(each), each, 0.0) / self._rate_s[level]).max(axis=1)
        prices[:, used] = own
        return prices
