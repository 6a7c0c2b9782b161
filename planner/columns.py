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
from scipy.optimize import linprog

from planner.chunks import ChunkTable
from planner.clock import Clock
from planner.fluid import amounts
from planner.patterns import (
    EXCLUSIVE_FEW_REPLICAS,
    EXCLUSIVE_MOST,
    Pattern,
    PatternPricer,
    Rounding,
)


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
    tables: Sequence[ChunkTable],
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
            size = 1 + int(np.argmin(table.time_s[bucket, 1:]))  # times need not grow with it
            chunk_s = float(table.time_s[bucket, size])
            if chunk_s * (1 + table.bubble_chunks) <= step_time_s:
                one = np.zeros(len(counts), dtype=np.int64)
                one[bucket] = size
                columns.add(group, Pattern(one, chunk_s, chunk_s * (1 + table.bubble_chunks)))
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
    for _ in range(MOST_ROUNDS):
        theta, prices, worth, weights = _master(columns, budget, counts, used)
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


def _master(
    columns: Columns, budget: Budget, counts: np.ndarray, used: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
    """Return theta, prices [R], a replica's worth [layouts] and the columns' weights."""
    matrix = columns.matrix()[:, used].T
    number, rows = matrix.shape[1], len(budget.limits)
    upper = np.zeros((rows + len(used), number + 1))
    upper[:rows, :number] = budget.rows[:, columns.owner]
    upper[:rows, -1] = -budget.limits
    upper[rows:, :number] = -matrix
    right = np.concatenate([np.zeros(rows), -counts[used].astype(float)])
    objective = np.zeros(number + 1)
    objective[-1] = 1.0
    result = linprog(objective, A_ub=upper, b_ub=right, bounds=(0, None), method="highs-ds")
    if result.status != 0:
        raise RuntimeError(f"the master program was not solved: {result.message}")
    duals = -result.ineqlin.marginals
    prices = np.zeros(len(counts))
    prices[used] = np.maximum(duals[rows:], 0.0)
    worth = np.maximum(duals[:rows], 0.0) @ budget.rows
    return float(result.fun), prices, worth, result.x[:-1]
