"""The certificate: no plan of a fleet takes less on average over these steps.

With n replicas of the candidates a step takes at least ``(value + bubble . n) / (price . n)``, by
the prices that bound it best on any one plan (`TightPrices`). The root of the numerator is concave
in n, and almost linear: with a line a(n) below it, a(n)^2 / (price . n) is convex. For any r > 0 it
is at least ``2 r a(n) - r^2 (price . n)``. So for each plan that was looked at there is a plane
below the mean step, made of what is best there for each step; the least mean over all plans comes
from an integer program in n (Kelley's cutting planes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lobra.planner.clock import Clock
from lobra.planner.fleet import Fleet
from lobra.planner.longest_few import LongestFew
from lobra.planner.sequence_rates import SequenceRates
from lobra.planner.step_bounds import StepBounds

TINY = 1e-300
SLACK = 1e-6  # relative: given away for the solver's tolerance
MIP_GAP = 2e-4  # relative: so near its own bound the solver stops
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

    K steps, D lengths, C candidates. Plans are replicas, int64 [C].

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
        self._fleet = fleet
        self._holds = fleet.max_tokens >= longest
        self._pipelines = np.where([c.layout.pp > 1 for c in fleet.candidates], fleet.sizes, 0)
        self._longest_few = LongestFew.of(rates, counts)
        self._bounds = StepBounds(fleet, self._holds, counts, rates)
        self._cut_at: list[np.ndarray] = []

    @property
    def shares(self) -> np.ndarray:
        """float64 [C]: replicas for each GPU, see `StepBounds`."""
        return self._bounds.shares

    def look_at(self, replicas: np.ndarray, steps: Sequence[int] | None = None) -> None:
        """Add the prices of a plan, and have the integer program see what it takes at least.

        They are computed for the ``steps``, or for some with much and some with little of what few
        candidates hold.

        Raises
        ------
        ValueError
            If no replica holds the longest sequence: what such a plan takes bounds no other.
        """
        if (replicas < 0).any() or not replicas[self._holds].any():
            raise ValueError(f"replicas {replicas.tolist()}: no plan that holds every sequence")
        self._cut_at.append(self._bounds.reduced(replicas))
        self._bounds.look_at(replicas, steps)  # which may know of other candidates to replace
        self._cut_at = [self._bounds.reduced(one) for one in self._cut_at]

    def steps_s(self, plans: np.ndarray) -> np.ndarray:
        """Return float64 [plans, K]: what each step takes at least; plans is int64 [plans, C]."""
        each_s = [(self._bounds.steps_s(one), self._longest_few.steps_s(one)) for one in plans]
        return np.array(each_s).max(axis=1)

    def minimum(self, limit_s: float = MIP_LIMIT_S) -> tuple[float, np.ndarray | None]:
        """Return what the mean step of any plan takes at least, and the plan that may take it.

        Plans are told apart by the GPUs of their pipelines where planes are not near enough.
        """
        clock = Clock(limit_s)
        parts = [Part(0, self._fleet.num_gpus)]
        found: dict[Part, tuple[float, np.ndarray | None]] = {}
        least_s, best = float(self._bounds.least_s.mean()), None
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
            bounds=(0, [*np.where(self._bounds.is_kept, num_gpus // sizes, 0), np.inf]),
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
        bounds = self._bounds
        tight = bounds.tight_prices(replicas)
        fewest, most = self._bubbles_of(part, tight.bubble)
        low, high = np.sqrt(tight.value + fewest), np.sqrt(tight.value + most)
        rise = (high - low) / np.maximum(most - fewest, TINY)  # a(n) = low + rise (bubble . n)
        low -= rise * fewest
        ratio = (low + rise * (tight.bubble @ replicas)) / (tight.price @ replicas)
        slope = 2.0 * (ratio * rise)[:, None] * tight.bubble - ratio[:, None] ** 2 * tight.price
        least_s = 2.0 * ratio * low
        below = least_s + slope @ replicas <= bounds.least_s
        least_s[below], slope[below] = bounds.least_s[below], 0.0
        # a step that waits for its longest sequence does so without any faster candidate
        longest_s = bounds.longest_alone_s(replicas)
        waits = longest_s > least_s + slope @ replicas
        faster = longest_s[:, None] > bounds.longest_s.T
        least_s[waits] = longest_s[waits]
        slope[waits] = np.where(faster, (bounds.least_s - longest_s)[:, None], 0.0)[waits]
        return float(least_s.mean()), slope.mean(axis=0)

    def _bubbles_of(self, part: Part, bubble: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return float64 [K] twice: what all bubbles of a part's plans are worth, least and most.

        ``bubble`` is that of one replica, float64 [K, C].
        """
        of_gpu = bubble / self._fleet.sizes
        is_pipeline = self._pipelines > 0
        pipelines = of_gpu[:, self._bounds.is_kept & is_pipeline]
        others = of_gpu[:, self._bounds.is_kept & ~is_pipeline].max(axis=1, initial=0.0)
        fewest = part.fewest * pipelines.min(axis=1, initial=np.inf if part.fewest else 0.0)
        most = [
            gpus * pipelines.max(axis=1, initial=0.0) + (self._fleet.num_gpus - gpus) * others
            for gpus in (part.fewest, part.most)
        ]
        return np.where(np.isfinite(fewest), fewest, 0.0), np.maximum(*most)

    def _known_s(self, plan: np.ndarray) -> float:
        """Return what the mean step of a plan takes at least."""
        return float(self._bounds.steps_s(plan).mean())
