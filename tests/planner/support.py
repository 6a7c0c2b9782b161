"""Small random planning problems, and their optima by brute force."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from itertools import product

import numpy as np

from planner.candidates import Candidate
from planner.chunks import ChunkTable, chunk_table
from planner.layout import Layout
from planner.planners.base import Problem
from planner.planners.identical import replica_cost_s
from planner.planners.partitions import maximal

BEND_TOKENS = 700.0
LAYOUTS = ((1, 1), (1, 2), (2, 1), (1, 4), (2, 2), (4, 1))


@dataclass(frozen=True)
class LawCostModel:
    """A cost model by formula; ``laws[tp]`` are constant, per sequence, per token, quadratic, bend.

    ``bend`` adds to the per-token time from ``BEND_TOKENS`` on; 0 makes chunk times affine in b.
    """

    num_layers: int
    laws: dict[int, tuple[float, float, float, float, float]]
    kind: str = "fitted"
    meta: dict[str, str] = field(default_factory=dict)
    adapter_elements: float = 0.0

    @property
    def tps(self) -> tuple[int, ...]:
        return tuple(sorted(self.laws))

    def layer_time_ms(self, tp: int, b: np.ndarray, s: np.ndarray) -> np.ndarray:
        constant, per_sequence, per_token, quadratic, bend = self.laws[tp]
        tokens = np.asarray(b, dtype=float) * np.asarray(s, dtype=float)
        time_ms = constant + per_sequence * np.asarray(b) + per_token * tokens
        time_ms = time_ms + quadratic * tokens * np.asarray(s)
        return time_ms + bend * np.maximum(0.0, tokens - BEND_TOKENS)

    def chunk_time_ms(self, tp: int, pp: int, b: np.ndarray, s: np.ndarray) -> np.ndarray:
        return self.layer_time_ms(tp, b, s) * -(-self.num_layers // pp)

    def sync_time_ms(self, num_ranks: int, layers_share: float = 1.0) -> float:
        return 0.0


def random_cost_model(rng: np.random.Generator, kind: str = "fitted") -> LawCostModel:
    """Times that grow with b and s and shrink, less than proportionally, with tp."""
    laws = {}
    for tp in (1, 2, 4):
        speed = tp ** rng.uniform(0.5, 0.95)
        constant, per_token = rng.uniform(0.5, 4.0), rng.uniform(0.002, 0.008) / speed
        quadratic, bend = rng.uniform(0, 4e-7) / speed, rng.uniform(0, 0.004) / speed
        laws[tp] = (constant, 0.05, per_token, quadratic, bend if kind == "fitted" else 0.0)
    return LawCostModel(8, laws, kind)


def random_problem(
    rng: np.random.Generator, kind: str = "fitted", max_gpus: int = 4, max_count: int = 4
) -> Problem:
    """A problem of at most three buckets whose longest sequence fits some layout."""
    num_gpus = int(rng.integers(1, max_gpus + 1))
    buckets = (
        np.sort(rng.choice(np.arange(1, 30), size=int(rng.integers(1, 4)), replace=False)) * 64
    )
    counts = rng.integers(0, max_count + 1, size=len(buckets))
    counts[-1] = max(1, counts[-1])
    usable = [Layout(*sizes) for sizes in LAYOUTS if sizes[0] * sizes[1] <= num_gpus]
    chosen = [layout for layout in usable if rng.random() < 0.7] or usable[:1]
    capacity = {tp: int(rng.integers(256, 2048)) for tp in (1, 2, 4)}
    candidates = [Candidate(layout, capacity[layout.tp]) for layout in chosen]
    longest = int(buckets[-1])
    if max(candidate.max_tokens for candidate in candidates) < longest:
        candidates[-1] = Candidate(candidates[-1].layout, longest + int(rng.integers(0, 900)))
    cost_model = random_cost_model(rng, kind)
    return Problem(counts, buckets, tuple(sorted(candidates)), num_gpus, cost_model, num_gpus)


def least_time_s(table: ChunkTable, counts: tuple[int, ...]) -> float:
    """The least time of one replica for its sequences over every way to cut them into chunks."""
    if not any(counts):
        return 0.0
    needed = np.array(counts)
    if (table.limit[needed > 0] == 0).any():
        return float("inf")
    caps = np.unique(table.time_s[np.isfinite(table.time_s) & (table.time_s > 0)])
    best = float("inf")
    for cap in caps if table.bubble_chunks else caps[-1:]:
        work = table.capped(cap).least_work_s(int(needed.max()))
        total = sum(work[bucket, number] for bucket, number in enumerate(counts) if number)
        best = min(best, float(total) + table.bubble_chunks * float(cap))
    return best


def best_dispatch_s(tables: list[ChunkTable], counts: np.ndarray) -> float:
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
        chunk_table(c.layout, c.max_tokens, problem.buckets, problem.cost_model, problem.counts)
        for c in problem.candidates
    ]
    times = []
    for replicas in maximal(problem.sizes, problem.num_gpus):
        every = [tables[i] for i in np.repeat(np.arange(len(replicas)), replicas)]
        times.append(best_dispatch_s(every, problem.counts))
    return min(times)


def best_identical_s(tables: list[ChunkTable], counts: np.ndarray, replicas: np.ndarray) -> float:
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
            table = chunk_table(
                candidate.layout, candidate.max_tokens, problem.buckets, problem.cost_model
            )
            home = [
                candidate.max_tokens == min((m for m in deployed if m >= bucket), default=0)
                for bucket in problem.buckets.tolist()
            ]
            tables.append(table.limited(np.where(home, table.limit, 0)))
        best = min(best, best_identical_s(tables, problem.counts, np.array(plan)))
    return best
