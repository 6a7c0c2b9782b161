"""LobRA's deployment problem in SCIP: all replicas of a layout take the same number of sequences.

A replica of layout i takes n_ij sequences of bucket j: m_ij full micro-batches and one remainder of
r_ij. The step time is the slowest layout's; ``sum_i p_i n_ij >= d_j`` takes every sequence (LobRA,
section 4.2). With the replicas p fixed this is an integer linear program, else bilinear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pyscipopt import Model, quicksum

from lobra.planner.bucketed.time_table import TimeTable, by_length
from lobra.planner.step_time import pipeline_time

LONGEST_LIMIT_S = 1e20  # what SCIP takes for no limit; it refuses more


@dataclass(frozen=True, eq=False)
class IdenticalResult:
    """What SCIP found.

    Attributes
    ----------
    replicas
        int64 [layouts], or None if it found no plan.
    per_replica
        int64 [layouts, R]: sequences one replica of each layout takes.
    objective_s, bound_s
        The step time by this problem's own definition, and what SCIP proved of it.
    proven
        Whether the two met.
    """

    replicas: np.ndarray | None
    per_replica: np.ndarray
    objective_s: float
    bound_s: float
    proven: bool


def replica_cost_s(table: TimeTable, per_replica: np.ndarray) -> float:
    """Return the seconds one replica needs for ``per_replica`` [R] sequences of each bucket.

    Full micro-batches and one remainder per bucket, plus pp - 1 times the longest of them; infinite
    if a bucket does not fit.
    """
    times_s: list[float] = []
    for bucket in np.flatnonzero(per_replica).tolist():
        size = int(table.limit[bucket])
        if size == 0:
            return float("inf")
        whole, rest = divmod(int(per_replica[bucket]), size)
        full_s, rest_s = float(table.time_s[bucket, size]), float(table.time_s[bucket, rest])
        times_s += [*[full_s] * whole, rest_s]
    return pipeline_time(times_s, table.layout.pp)


class IdenticalModel:
    """The SCIP model, built once; ``solve`` runs it.

    Parameters
    ----------
    tables
        Micro-batch times, one per layout; only buckets with ``limit`` > 0 go there. ``limit`` is
        the memory's, not cut to the counts, so that a micro-batch is full only when the memory is.
    counts
        int64 [R]: sequences of each bucket.
    replicas
        int64 [layouts] to fix them; None to choose them within ``num_gpus``.
    num_gpus
        GPUs for the replicas, where they are chosen.
    length_based
        Whether a bucket goes only to the deployed layouts of least sufficient capacity.
    """

    def __init__(
        self,
        tables: Sequence[TimeTable],
        counts: np.ndarray,
        *,
        replicas: np.ndarray | None = None,
        num_gpus: int = 0,
        length_based: bool = False,
    ) -> None:
        if length_based and replicas is not None:
            deployed = np.flatnonzero(replicas).tolist()
            limited = iter(by_length([tables[i] for i in deployed]))
            tables = [next(limited) if p else t for t, p in zip(tables, replicas, strict=True)]
        self._tables = tables
        self._stopped = False
        self._counts = counts
        self.model = Model()
        self.model.hideOutput()
        self.model.setParam("misc/catchctrlc", False)  # else SCIP keeps Ctrl-C to itself
        self._time = self.model.addVar("step_time", lb=0.0)
        self._takes: dict[tuple[int, int], Any] = {}
        self._parts: list[tuple[int, int, str, Any, int]] = []
        if replicas is None:
            self._replicas: list[Any] = [
                self.model.addVar(f"p{i}", vtype="I", lb=0, ub=num_gpus // table.layout.num_gpus)
                for i, table in enumerate(tables)
            ]
            gpus = quicksum(
                table.layout.num_gpus * p for table, p in zip(tables, self._replicas, strict=True)
            )
            self.model.addCons(gpus <= num_gpus)
        else:
            self._replicas = [int(number) for number in replicas]
        for i, table in enumerate(tables):
            if replicas is None or replicas[i]:
                self._add_layout(i, table)
        for j in np.flatnonzero(counts).tolist():
            taken = quicksum(
                self._replicas[i] * variable
                for (i, bucket), variable in self._takes.items()
                if bucket == j
            )
            self.model.addCons(taken >= int(counts[j]))
        if length_based and replicas is None:
            self._restrict_to_least()
        self.model.setObjective(self._time, "minimize")

    def _restrict_to_least(self) -> None:
        """Let no layout take a bucket that a deployed layout of less capacity holds."""
        capacities = sorted({table.max_tokens for table in self._tables})
        deployed = {c: self.model.addVar(f"d{c}", vtype="B") for c in capacities}
        for table, replicas in zip(self._tables, self._replicas, strict=True):
            most = replicas.getUbOriginal()
            self.model.addCons(replicas <= most * deployed[table.max_tokens])
        holds: dict[int, set[int]] = {}
        for i, j in self._takes:
            holds.setdefault(j, set()).add(self._tables[i].max_tokens)
        for (i, j), takes in self._takes.items():
            for capacity in holds[j]:
                if capacity < self._tables[i].max_tokens:
                    count = int(self._counts[j])
                    self.model.addCons(takes <= count * (1 - deployed[capacity]))

    def _add_layout(self, i: int, table: TimeTable) -> None:
        model, costs, longest = self.model, [], None
        if table.bubbles:
            longest = model.addVar(f"longest{i}", lb=0.0)
        for j in np.flatnonzero((self._counts > 0) & (table.limit > 0)).tolist():
            size, count = int(table.limit[j]), int(self._counts[j])
            takes = model.addVar(f"n{i}_{j}", vtype="I", lb=0, ub=count)
            self._takes[i, j] = takes
            whole = model.addVar(f"m{i}_{j}", vtype="I", lb=0, ub=count // size)
            rest, rest_cost = self._add_rest(i, j, table, min(size - 1, count))
            model.addCons(takes == size * whole + rest)
            costs.append(float(table.time_s[j, size]) * whole + rest_cost)
            if longest is not None:
                any_whole = model.addVar(f"a{i}_{j}", vtype="B")
                model.addCons(whole <= (count // size) * any_whole)
                model.addCons(longest >= float(table.time_s[j, size]) * any_whole)
                model.addCons(longest >= rest_cost)
        bubble = table.bubbles * longest if longest is not None else 0.0
        model.addCons(self._time >= quicksum(costs) + bubble)

    def _add_rest(self, i: int, j: int, table: TimeTable, most: int) -> tuple[Any, Any]:
        """Add the remainder of at most ``most`` sequences; return it and its cost."""
        if most == 0:
            return 0, 0
        times = table.time_s[j, 1 : most + 1]
        sizes = np.arange(1, most + 1)
        slope = float((times[-1] - times[0]) / max(1, most - 1))
        start = float(times[0] - slope)
        if np.abs(start + slope * sizes - times).max() <= 1e-9 * times.max():
            rest = self.model.addVar(f"r{i}_{j}", vtype="I", lb=0, ub=most)
            some = self.model.addVar(f"f{i}_{j}", vtype="B")
            self.model.addCons(rest <= most * some)
            self.model.addCons(rest >= some)
            return rest, slope * rest + start * some
        chosen = [self.model.addVar(f"r{i}_{j}_{size}", vtype="B") for size in sizes]
        self.model.addCons(quicksum(chosen) <= 1)
        rest = quicksum(int(size) * var for size, var in zip(sizes, chosen, strict=True))
        return rest, quicksum(float(t) * var for t, var in zip(times, chosen, strict=True))

    def solve(
        self,
        time_limit_s: float | None = None,
        at_most_s: float | None = None,
        at_least_s: float = 0.0,
    ) -> IdenticalResult:
        """Solve to optimality, or as far as the time allows.

        ``at_most_s``: only step times below it are of interest; ``at_least_s``: a known bound.
        """
        model = self.model
        model.chgVarLb(self._time, at_least_s)
        if at_most_s is not None:
            model.chgVarUb(self._time, at_most_s)
        if time_limit_s is not None:
            model.setParam("limits/time", min(max(0.0, time_limit_s), LONGEST_LIMIT_S))
        model.setParam("lp/threads", 1)
        if self._stopped:
            model.setParam("limits/time", 0.0)
        model.optimizeNogil()
        bound_s = float(model.getDualbound())
        none = np.zeros((len(self._tables), len(self._counts)), dtype=np.int64)
        if model.getNSols() == 0:
            proven = model.getStatus() == "infeasible"
            if proven and at_most_s is not None:
                bound_s = at_most_s
            return IdenticalResult(None, none, float("inf"), bound_s, proven)
        per_replica = none
        for (i, j), variable in self._takes.items():
            per_replica[i, j] = round(model.getVal(variable))
        replicas = np.array(
            [p if isinstance(p, int) else round(model.getVal(p)) for p in self._replicas]
        )
        objective_s = max(
            replica_cost_s(table, per_replica[i])
            for i, table in enumerate(self._tables)
            if replicas[i]
        )
        return IdenticalResult(
            replicas, per_replica, objective_s, bound_s, model.getStatus() == "optimal"
        )

    def stop(self) -> None:
        """End ``solve``, from another thread, with what it has; a later one does nothing."""
        self._stopped = True
        self.model.interruptSolve()
