"""A cost model by formula, and the optima of small planning problems by brute force."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from itertools import product

import numpy as np

from lobra.layout.layout import Layout
from lobra.layout.plan import Plan, ReplicaGroup, make_plan
from lobra.planner.bucketed.identical import replica_cost_s
from lobra.planner.bucketed.partitions import maximal
from lobra.planner.bucketed.problem import Problem
from lobra.planner.bucketed.time_table import TimeTable, time_table
from lobra.planner.candidates import Candidate
from lobra.planner.workload import Workload
from lobra.profiler.cost_model import CostModel, MicroBatchTime, equal_rows

BEND_TOKENS = 700.0
MIXED_PLAN = make_plan([ReplicaGroup(Layout(1, 1), 2, 1024), ReplicaGroup(Layout(1, 2), 1, 4096)])
RECOMPUTING = 1.4  # times as long is a layer that is computed again


@dataclass(frozen=True, eq=False)
class LawCostModel:
    """A cost model by formula; ``laws[tp]`` are constant, per sequence, per token, quadratic, bend.

    ``bend`` adds to the per-token time from ``BEND_TOKENS`` on; 0 makes micro-batch times affine in
    b.
    """

    num_layers: int
    laws: dict[int, tuple[float, float, float, float, float]]
    kind: str = "fitted"
    meta: dict[str, str] = field(default_factory=dict)
    adapter_elements: float = 0.0

    def has(self, layout: Layout) -> bool:
        return layout.tp in self.laws

    def micro_batch_time(
        self,
        layout: Layout,
        tokens: np.ndarray,
        squares: np.ndarray,
        labels: np.ndarray | None = None,
    ) -> MicroBatchTime:
        constant, per_sequence, per_token, quadratic, bend = self.laws[layout.tp]
        b, _ = equal_rows(tokens, squares)
        time_ms = constant + per_sequence * b + per_token * tokens + quadratic * squares
        time_ms = time_ms + bend * np.maximum(0.0, tokens - BEND_TOKENS)
        time_ms = time_ms * (RECOMPUTING if layout.memory == "full" else 1.0)
        nothing = np.zeros(())
        return MicroBatchTime(time_ms * -(-self.num_layers // layout.pp), nothing, nothing)

    def sync_time_ms(self, num_ranks: int, layers_share: float = 1.0) -> float:
        return 0.0


def plain_cost_model() -> LawCostModel:
    """One cost model for examples, of 8 layers: tp 2 divides the work of a token by 1.7."""
    per_token, quadratic, bend = 0.005, 2e-7, 0.002
    laws = {}
    for tp in (1, 2, 4):
        speed = tp**0.8
        laws[tp] = (2.0, 0.05, per_token / speed, quadratic / speed, bend / speed)
    return LawCostModel(8, laws)


def small_problem() -> Problem:
    candidates = (Candidate(Layout(1, 1), 512), Candidate(Layout(2, 1), 1600))
    counts, buckets = np.array([2, 0, 1]), np.array([192, 448, 1280])
    return Problem(counts, buckets, candidates, 4, plain_cost_model(), 4)


def two_tasks() -> Workload:
    """A workload of a task with short sequences and one with sequences up to ten times as long."""
    rng = np.random.default_rng(0)
    lengths = {"short": rng.integers(10, 300, 500), "long": rng.integers(10, 3000, 500)}
    return Workload(lengths, {"short": 20, "long": 10}, {"short": 0, "long": 0})


def step_time_s(plan: Plan, batches: list[list[tuple[int, int]]], cost_model: CostModel) -> float:
    """The slowest replica's time; per replica its micro-batches, (sequences, padded length)."""
    return max(
        replica_time_s(replica.layout, own, cost_model)
        for replica, own in zip(plan.replicas, batches, strict=True)
    )


def replica_time_s(layout: Layout, batches: list[tuple[int, int]], cost_model: CostModel) -> float:
    """1F1B: the sum of the micro-batches' times, and pp - 1 times the longest."""
    times_ms = [
        float(cost_model.micro_batch_time(layout, b * s, b * s * s).total_ms) for b, s in batches
    ]
    return (sum(times_ms) + (layout.pp - 1) * max(times_ms, default=0.0)) / 1000


def least_time_s(table: TimeTable, counts: tuple[int, ...]) -> float:
    """The least time of one replica for its sequences, however they are cut."""
    if not any(counts):
        return 0.0
    needed = np.array(counts)
    if (table.limit[needed > 0] == 0).any():
        return float("inf")
    caps = np.unique(table.time_s[np.isfinite(table.time_s) & (table.time_s > 0)])
    best = float("inf")
    for cap in caps if table.bubbles else caps[-1:]:
        work = table.capped(cap).least_work_s(int(needed.max()))
        total = sum(work[bucket, number] for bucket, number in enumerate(counts) if number)
        best = min(best, float(total) + table.bubbles * float(cap))
    return best


def best_dispatch_s(tables: list[TimeTable], counts: np.ndarray) -> float:
    """The least step time of a plan's replicas (one table each), by trying every assignment."""

    @cache
    def time_of(index: int, taken: tuple[int, ...]) -> float:
        return least_time_s(tables[index], taken)

    @cache
    def best(index: int, left: tuple[int, ...]) -> float:
        if index == len(tables) - 1:
            return time_of(index, left)
        return min(
            max(
                time_of(index, taken),
                best(index + 1, tuple(a - b for a, b in zip(left, taken, strict=True))),
            )
            for taken in product(*(range(number + 1) for number in left))
        )

    return best(0, tuple(int(count) for count in counts))


def best_plan_s(problem: Problem) -> float:
    """The least step time over all plans and all dispatches."""
    tables = [
        time_table(c.layout, c.max_tokens, problem.buckets, problem.cost_model, problem.counts)
        for c in problem.candidates
    ]
    times = []
    for replicas in maximal(problem.sizes, problem.num_gpus):
        every = [tables[i] for i in np.repeat(np.arange(len(replicas)), replicas)]
        times.append(best_dispatch_s(every, problem.counts))
    return min(times)


def best_identical_s(tables: list[TimeTable], counts: np.ndarray, replicas: np.ndarray) -> float:
    """LobRA's step time of a plan: every replica of a layout takes the same, by brute force."""
    layouts = np.flatnonzero(replicas).tolist()
    options = []
    for layout in layouts:
        most = [-(-int(count) // int(replicas[layout])) for count in counts]
        takes = list(product(*(range(number + 1) for number in most)))
        options.append([(take, replica_cost_s(tables[layout], np.array(take))) for take in takes])
    best = float("inf")
    for choice in product(*options):
        taken = sum(
            int(replicas[layout]) * np.array(take)
            for layout, (take, _) in zip(layouts, choice, strict=True)
        )
        if (taken >= counts).all():
            best = min(best, max(time_s for _, time_s in choice))
    return best


def best_by_length_s(problem: Problem) -> float:
    """GROUP's step time by brute force: every plan at all, dispatched by length over its layouts.

    A bucket goes only to the layouts with the smallest ``max_tokens`` that holds it, of those the
    plan deploys; every replica of a layout takes the same.
    """
    best = float("inf")
    sizes = problem.sizes.tolist()
    for plan in product(*(range(problem.num_gpus // size + 1) for size in sizes)):
        gpus = sum(size * number for size, number in zip(sizes, plan, strict=True))
        if not any(plan) or gpus > problem.num_gpus:
            continue
        deployed = [
            c.max_tokens for c, number in zip(problem.candidates, plan, strict=True) if number
        ]
        tables = []
        for candidate in problem.candidates:
            table = time_table(
                candidate.layout, candidate.max_tokens, problem.buckets, problem.cost_model
            )
            home = [
                candidate.max_tokens == min((m for m in deployed if m >= bucket), default=0)
                for bucket in problem.buckets.tolist()
            ]
            tables.append(table.limited(np.where(home, table.limit, 0)))
        best = min(best, best_identical_s(tables, problem.counts, np.array(plan)))
    return best
