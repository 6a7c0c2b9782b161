"""Column generation: patterns of replicas, mixed so that they take the whole batch.

For a step time T the master linear program scales a budget of replicas as little as it can:
``min theta: sum_a lambda_ia <= p_i theta, sum a_j lambda_ia >= d_j`` for a plan p, or
``sum_i n_i sum_a lambda_ia <= N theta`` for any plan on N GPUs. Its prices ask every layout for a
better pattern. If theta cannot come down to 1, T is impossible; that is proven by the prices alone:
``theta >= sum_j d_j price_j / most``, with ``most`` the value that the budget's replicas can reach
when no pattern of layout i exceeds V_i (Lagrange; Farley's bound).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from ortools.linear_solver import pywraplp

from lobra.planner.bucketed.fluid import amounts
from lobra.planner.bucketed.patterns import (
    EXCLUSIVE_FEW_REPLICAS,
    EXCLUSIVE_MOST,
    Pattern,
    PatternPricer,
    Rounding,
)
from lobra.planner.bucketed.time_table import TimeTable
from lobra.planner.clock import Clock


@dataclass(frozen=True, eq=False)
class Budget:
    """What replicas there may be: ``rows @ (replicas of each layout) <= limits``.

    ``rows`` float64 [budgets, layouts], ``limits`` float64 [budgets].
    """

    rows: np.ndarray
    limits: np.ndarray

    @classmethod
    def of_plan(cls, replicas: np.ndarray) -> Budget:
        """Return the budget of one plan: so many replicas of each layout."""
        return cls(np.eye(len(replicas)), np.asarray(replicas, dtype=np.float64))

    @classmethod
    def of_gpus(cls, sizes: np.ndarray, num_gpus: int) -> Budget:
        """Return the budget of any plan on so many GPUs; ``sizes`` are a replica's GPUs."""
        return cls(np.asarray(sizes, dtype=np.float64)[None, :], np.array([float(num_gpus)]))

    def most_value(self, values: np.ndarray) -> float:
        """Return the most value within the limits if a replica of layout i has ``values[i]``."""
        if len(self.limits) > 1:
            return float(self.limits @ values)
        return float(self.limits[0] * (values / self.rows[0]).max())


MOST_ROUNDS = 80
FEW_REPLICAS = 4
SETTLED = 2e-4  # relative distance of the master's value and its bound at which to stop


@dataclass(eq=False)
class Columns:
    """Patterns found so far: ``patterns[k]`` is one of layout ``owner[k]``."""

    owner: list[int] = field(default_factory=list)
    patterns: list[Pattern] = field(default_factory=list)
    _seen: set[tuple[int, bytes]] = field(default_factory=set)

    def add(self, owner: int, pattern: Pattern) -> bool:
        """Add a pattern; return False if it is there already or empty."""
        key = (owner, pattern.counts.tobytes())
        if key in self._seen or not pattern.counts.any():
            return False
        self._seen.add(key)
        self.owner.append(owner)
        self.patterns.append(pattern)
        return True

    def matrix(self) -> np.ndarray:
        """Return int64 [columns, R]."""
        return np.stack([pattern.counts for pattern in self.patterns])


@dataclass(frozen=True, eq=False)
class Generated:
    """Where column generation ended.

    Attributes
    ----------
    theta
        The master's value: the share of the budget that its columns need.
    bound
        A proven lower bound on theta over all patterns (with weights rounded down).
    prices
        float64 [R]: the prices of the best bound.
    values
        float64 [layouts]: at those prices, what no pattern of a layout exceeds.
    weights
        float64 [columns]: how often each column is used.
    columns
        The columns.
    """

    theta: float
    bound: float
    prices: np.ndarray
    values: np.ndarray
    weights: np.ndarray
    columns: Columns


class Pool:
    """Patterns that were useful once, by layout, to start later searches from."""

    def __init__(self, num_layouts: int) -> None:
        self._patterns: list[dict[bytes, Pattern]] = [{} for _ in range(num_layouts)]

    def keep(self, layouts: Sequence[int], found: Generated) -> None:
        """Remember the patterns that the last master program used, of the given layouts."""
        for k in np.flatnonzero(found.weights > 1e-9).tolist():
            pattern = found.columns.patterns[k]
            self._patterns[layouts[found.columns.owner[k]]][pattern.counts.tobytes()] = pattern

    def columns(self, layouts: Sequence[int], step_time_s: float) -> Columns:
        """Return the known patterns of the given layouts that are real within a step time."""
        columns = Columns()
        for owner, layout in enumerate(layouts):
            for pattern in self._patterns[layout].values():
                if pattern.time_s <= step_time_s:
                    columns.add(owner, pattern)
        return columns


def generate(
    tables: Sequence[TimeTable],
    budget: Budget,
    counts: np.ndarray,
    step_time_s: float,
    *,
    rounding: Rounding,
    ticks: int,
    clock: Clock,
    columns: Columns | None = None,
    stop_at_proof: bool = False,
) -> Generated:
    """Generate columns for a budget and a step time until the bound settles.

    ``columns`` (of the same layouts, real at this step time) are a start. ``stop_at_proof``: end as
    soon as the step time is proven impossible, or the columns show that it cannot be.
    """
    columns = Columns() if columns is None else columns
    used = np.flatnonzero(counts > 0)
    for group, table in enumerate(tables):
        for bucket in used:
            pattern = _filled(table, int(bucket), int(counts[bucket]), step_time_s)
            if pattern is not None:
                columns.add(group, pattern)
    none = np.zeros(len(counts))
    if not columns.patterns or not (columns.matrix().sum(axis=0)[used] > 0).all():
        empty = np.zeros(len(tables))
        return Generated(np.inf, np.inf, none, empty, np.zeros(0), columns)
    few = len(budget.limits) == len(tables) and budget.limits.sum() <= FEW_REPLICAS
    exclusive = EXCLUSIVE_FEW_REPLICAS if few else EXCLUSIVE_MOST
    pricers = [
        PatternPricer(table, counts, step_time_s, ticks, rounding, exclusive) for table in tables
    ]
    reach = np.stack([amounts(table, step_time_s) for table in tables])
    best = Generated(np.inf, 0.0, none, np.zeros(len(tables)), np.zeros(0), columns)
    master = _Master(columns, budget, counts)
    for _ in range(MOST_ROUNDS):
        theta, prices, worth, weights = master.solve()
        fluid = (prices[None, :] * reach).max(axis=1)
        values = np.zeros(len(tables))
        grew = False
        for group, pricer in enumerate(pricers):
            if fluid[group] <= worth[group] * (1 + 1e-9):
                values[group] = fluid[group]  # no pattern can be worth more: no need to search
                continue
            value, pattern = pricer.price(prices)
            values[group] = min(value, fluid[group])
            if pattern is not None and value > worth[group] * (1 + 2 * SETTLED / 4) + 1e-12:
                grew |= columns.add(group, pattern)
        bound = float(prices @ counts) / max(budget.most_value(values), 1e-300)
        if bound > best.bound:
            best = Generated(theta, bound, prices, values, weights, columns)
        else:
            best = Generated(theta, best.bound, best.prices, best.values, weights, columns)
        if not grew or theta <= best.bound * (1 + SETTLED) or clock.left_s <= 0:
            break
        if stop_at_proof and (best.bound > 1 + 1e-6 or theta <= 1.0):
            break
    return best


def _filled(table: TimeTable, bucket: int, count: int, step_time_s: float) -> Pattern | None:
    """Return as many sequences of one bucket as a replica does in equal parts, None if none."""
    time_s = table.time_s[bucket, 1:]
    with np.errstate(invalid="ignore"):
        numbers = np.floor(step_time_s / time_s * (1 - 1e-9) - table.bubbles)
    done = np.maximum(numbers, 0.0) * np.arange(1, len(time_s) + 1)
    size = 1 + int(np.argmax(np.where(np.isfinite(time_s), done, 0.0)))
    number = min(int(numbers[size - 1]), count // size)
    if number < 1:
        return None
    counts = np.zeros(len(table.limit), dtype=np.int64)
    counts[bucket] = number * size
    micro_batch_s = float(time_s[size - 1])
    return Pattern(counts, micro_batch_s, (number + table.bubbles) * micro_batch_s)


class _Master:
    """The linear program over the columns known so far; grows by the columns that are new."""

    def __init__(self, columns: Columns, budget: Budget, counts: np.ndarray) -> None:
        self._columns, self._budget = columns, budget
        self._used = np.flatnonzero(counts > 0).tolist()
        self._solver = pywraplp.Solver.CreateSolver("GLOP")
        infinity = self._solver.infinity()
        self._theta = self._solver.NumVar(0.0, infinity, "")
        self._within = [self._solver.RowConstraint(-infinity, 0.0, "") for _ in budget.limits]
        for row, limit in zip(self._within, budget.limits.tolist(), strict=True):
            row.SetCoefficient(self._theta, -float(limit))
        self._taken = [
            self._solver.RowConstraint(float(counts[bucket]), infinity, "") for bucket in self._used
        ]
        self._solver.Objective().SetCoefficient(self._theta, 1.0)
        self._solver.Objective().SetMinimization()
        self._weights: list[pywraplp.Variable] = []

    def solve(self) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
        """Return theta, prices [R], a replica's worth [layouts] and the columns' weights."""
        budget, columns, solver = self._budget, self._columns, self._solver
        for k in range(len(self._weights), len(columns.patterns)):
            weight = solver.NumVar(0.0, solver.infinity(), "")
            self._weights.append(weight)
            needs = budget.rows[:, columns.owner[k]].tolist()
            for row, needed in zip(self._within, needs, strict=True):
                if needed:
                    row.SetCoefficient(weight, float(needed))
            does = columns.patterns[k].counts
            for row, bucket in zip(self._taken, self._used, strict=True):
                if does[bucket]:
                    row.SetCoefficient(weight, float(does[bucket]))
        status = solver.Solve()
        if status != pywraplp.Solver.OPTIMAL:
            raise RuntimeError(f"the master program was not solved: GLOP's status {status}")
        prices = np.zeros(len(columns.patterns[0].counts))
        prices[self._used] = [max(0.0, row.dual_value()) for row in self._taken]
        worth = np.maximum([-row.dual_value() for row in self._within], 0.0) @ budget.rows
        weights = np.array([weight.solution_value() for weight in self._weights])
        return float(self._theta.solution_value()), prices, worth, weights
