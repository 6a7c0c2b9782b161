"""What EXACT knows while it searches: plans with their best times, and the bound."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from lobra.planner.bucketed.columns import Budget, Generated, Pool, generate
from lobra.planner.bucketed.patterns import Rounding
from lobra.planner.bucketed.problem import Problem
from lobra.planner.clock import Clock
from lobra.planner.outcome import Progress

TARGET_GAP = 1e-3
PROMISING = 0.005  # relative distance to the best plan up to which a plan is dispatched thoroughly


def key_of(replicas: np.ndarray) -> tuple[int, ...]:
    """Return what a plan's replicas of each candidate are known by."""
    return tuple(int(number) for number in replicas)


@dataclass(eq=False)
class Search:
    """A search for the best plan: what it was given, and what it knows so far.

    Plans are known by their replicas of each candidate (``key_of``).

    Attributes
    ----------
    problem, clock, progress
        What to plan for, how long, and who is told.
    bound_s, best_s
        No plan is faster than the bound; the best plan's time.
    times
        The best time of every plan tried; inf where it cannot be placed.
    bounds
        A lower bound on any dispatch over a plan.
    polishes
        How often a plan was polished.
    pool
        Patterns that were useful, to start column generation from.
    """

    problem: Problem
    clock: Clock
    progress: Progress
    bound_s: float = 0.0
    best_s: float = np.inf
    times: dict[tuple[int, ...], float] = field(default_factory=dict)
    bounds: dict[tuple[int, ...], float] = field(default_factory=dict)
    polishes: Counter[tuple[int, ...]] = field(default_factory=Counter)
    pool: Pool = field(init=False)

    def __post_init__(self) -> None:
        self.pool = Pool(len(self.problem.candidates))

    @property
    def gap(self) -> float:
        """How much faster a plan might at most be than the best, relative to it."""
        return 1.0 - self.bound_s / self.best_s

    @property
    def proven(self) -> bool:
        """Whether the gap is small enough to call the best plan proven."""
        return bool(self.gap <= TARGET_GAP * (1 + 1e-9))

    @property
    def target_s(self) -> float:
        """A step time near enough to the bound to look no further."""
        return self.bound_s * (1 + TARGET_GAP)

    def note(self, replicas: np.ndarray, time_s: float) -> None:
        """Take down that a plan was dispatched in a time."""
        key = key_of(replicas)
        if self.times.get(key) == np.inf:
            return  # it cannot be placed
        self.times[key] = min(time_s, self.times.get(key, np.inf))
        if time_s < self.best_s:
            self.best_s = time_s
            self.report()

    def prove(self, bound_s: float) -> None:
        """Take down that no plan is faster than a bound."""
        if bound_s > self.bound_s:
            self.bound_s = min(bound_s, self.best_s)
            self.report()

    def report(self) -> None:
        """Tell the best time, the bound and the gap."""
        self.progress(
            f"{self.best_s:.4f} s, bound {self.bound_s:.4f} s, gap {100 * self.gap:.2f} %"
        )

    def done(self) -> bool:
        """Return whether to stop: proven, or out of time."""
        return self.proven or self.clock.left_s <= 0

    def try_plan(self, replicas: np.ndarray) -> float:
        """Dispatch the batch over a plan not tried yet; return its best time."""
        key = key_of(replicas)
        if key not in self.times:
            placed = self.problem.fleet.placed(replicas, self.problem.longest)
            if placed is None:
                self.times[key] = np.inf
            elif placed is not replicas:
                self.times[key] = np.inf
                return self.try_plan(placed)
            else:
                plan = self.problem.plan(replicas)
                quick = self.problem.evaluate(plan, thorough=False)
                time_s, self.bounds[key] = quick.step_time_s, quick.lower_bound_s
                if time_s < self.best_s * (1 + PROMISING):
                    time_s = min(time_s, self.problem.evaluate(plan).step_time_s)
                self.note(replicas, time_s)
        return self.times[key]

    def generate(
        self,
        layouts: list[int],
        budget: Budget,
        step_s: float,
        *,
        rounding: Rounding,
        ticks: int,
        clock: Clock | None = None,
        stop_at_proof: bool = False,
    ) -> Generated:
        """Generate columns of some layouts (indices), from and into the pool of useful ones."""
        found = generate(
            [self.problem.tables[index] for index in layouts],
            budget,
            self.problem.counts,
            step_s,
            rounding=rounding,
            ticks=ticks,
            clock=self.clock if clock is None else clock,
            columns=self.pool.columns(layouts, step_s),
            stop_at_proof=stop_at_proof,
        )
        self.pool.keep(layouts, found)
        return found

    def best_plans(self, number: int) -> list[np.ndarray]:
        """Return the replicas of the best plans known, at most so many, the fastest first."""
        order = sorted(self.times, key=lambda key: (self.times[key], key))
        return [np.array(key, dtype=np.int64) for key in order[:number] if self.times[key] < np.inf]
