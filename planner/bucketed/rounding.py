"""From fractional mixtures of patterns to a plan with a real dispatch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lobra.planner.bucketed.columns import Budget, Columns, Generated
from lobra.planner.bucketed.loads import Loads, micro_batches_of
from lobra.planner.bucketed.local_search import improve
from lobra.planner.bucketed.patterns import Pattern, PatternPricer
from lobra.planner.bucketed.resplit import shake
from lobra.planner.bucketed.time_table import TimeTable
from lobra.planner.clock import Clock

SPARE_COUNT = 256  # how far a replica's sequences of a bucket may grow in the search
MIP_LIMIT_S = 0.4
DIVERSITY = 0.2  # standard deviation of the disturbance, in the logarithm
DIVERSITY_ROUNDS = 30
DIVERSITY_LIMIT_S = 0.6
TICKS, SHAKES = 2048, 40


def diversify(
    found: Generated,
    tables: Sequence[TimeTable],
    counts: np.ndarray,
    step_time_s: float,
    ticks: int,
    seed: int,
    clock: Clock,
) -> None:
    """Add real patterns that are best at prices disturbed at random (deterministic in ``seed``)."""
    rng = np.random.default_rng(seed)
    pricers = [PatternPricer(table, counts, step_time_s, ticks, "up") for table in tables]
    limit = Clock(min(DIVERSITY_LIMIT_S, 0.2 * max(0.0, clock.left_s)))
    for _ in range(DIVERSITY_ROUNDS):
        prices = found.prices * np.exp(DIVERSITY * rng.standard_normal(len(found.prices)))
        for layout, pricer in enumerate(pricers):
            pattern = pricer.price(prices)[1]
            if pattern is not None:
                found.columns.add(layout, pattern)
        if limit.left_s <= 0:
            return


def choose(
    columns: Columns, budget: Budget, counts: np.ndarray, prices: np.ndarray, clock: Clock
) -> list[tuple[int, Pattern]] | None:
    """Return whole replicas (layout, pattern) within the budget that leave the least value undone.

    An integer program over the columns; None if the solver found nothing in time.
    """
    from scipy.optimize import LinearConstraint, milp  # slow to import, and few need it

    matrix = columns.matrix()
    used = np.flatnonzero(counts > 0)
    number = len(matrix)
    # a long sequence left over needs a large hole: weigh it more than its price
    undone = prices[used] * (1 + 4 * prices[used] / prices.max()) + 1e-6 * prices.max()
    result = milp(
        np.concatenate([np.zeros(number), undone]),
        constraints=[
            LinearConstraint(
                np.hstack([matrix[:, used].T.astype(float), np.eye(len(used))]),
                counts[used],
                np.inf,
            ),
            LinearConstraint(
                np.hstack(
                    [budget.rows[:, columns.owner], np.zeros((len(budget.limits), len(used)))]
                ),
                -np.inf,
                budget.limits,
            ),
        ],
        integrality=np.ones(number + len(used)),
        bounds=(0, np.inf),
        options={
            "time_limit": float(min(MIP_LIMIT_S, max(0.1, 0.4 * clock.left_s))),
            "mip_rel_gap": 1e-2,
        },
    )
    if result.x is None:
        return None
    times = np.rint(result.x[:number]).astype(int)
    return [
        (columns.owner[k], columns.patterns[k])
        for k in np.flatnonzero(times).tolist()
        for _ in range(times[k])
    ]


def realise(
    tables: Sequence[TimeTable],
    counts: np.ndarray,
    chosen: Sequence[tuple[int, Pattern]],
    target_s: float,
    max_rounds: int,
) -> float:
    """Return the seconds of a real dispatch near the chosen patterns, improved by local search.

    Sequences the patterns do twice are dropped from the busiest replicas, those they leave undone
    are put, longest first, where the step grows least.
    """
    chosen = sorted(chosen, key=lambda item: item[0])
    capped: dict[tuple[int, float], int] = {}
    limited: list[TimeTable] = []
    kinds = []
    for layout, pattern in chosen:
        cap_s = pattern.longest_s if tables[layout].bubbles else np.inf
        if (layout, cap_s) not in capped:
            capped[layout, cap_s] = len(limited)
            # a replica without work yet may take any micro-batch
            free = not tables[layout].bubbles or cap_s == 0.0
            limited.append(tables[layout] if free else tables[layout].capped(cap_s))
        kinds.append(capped[layout, cap_s])
    wanted = np.stack([pattern.counts for _, pattern in chosen])
    most = int(min(counts.max(initial=0), wanted.max(initial=0) + SPARE_COUNT))
    loads = Loads.of(limited, np.array(kinds), np.minimum(wanted, most), most)
    _drop_surplus(loads, counts)
    _place_missing(loads, counts)
    improve(loads, target_s, max_rounds, max_exchanges=max_rounds)
    shake(loads, target_s, TICKS, SHAKES, np.random.default_rng(0))
    return max(micro_batches_of(loads, limited)[1])


def _drop_surplus(loads: Loads, counts: np.ndarray) -> None:
    surplus = loads.counts.sum(axis=0) - counts
    for bucket in np.flatnonzero(surplus > 0).tolist():
        left = int(surplus[bucket])
        while left > 0:
            holders = np.flatnonzero(loads.counts[:, bucket])
            replica = int(holders[np.argmax(loads.time_s[holders])])
            # whole micro-batches at a time where there is much to drop
            number = min(left, max(1, int(loads.counts[replica, bucket]) // 8))
            loads.change(replica, bucket, -number)
            left -= number


def _place_missing(loads: Loads, counts: np.ndarray) -> None:
    missing = counts - loads.counts.sum(axis=0)
    most = loads.work_s.shape[2] - 1
    everyone = np.arange(len(loads.counts))
    for bucket in np.flatnonzero(missing > 0).tolist()[::-1]:
        left = int(missing[bucket])
        while left > 0:
            number = max(1, left // (2 * len(everyone)))
            after = np.minimum(loads.counts[:, bucket] + number, most)
            grown = loads.work_s[loads.group, bucket, after] - loads.parts_s[:, bucket]
            grown[loads.counts[:, bucket] + number > most] = np.inf
            grown += loads.start_s(everyone)
            replica = int(np.argmin(loads.time_s + grown))
            if not np.isfinite(grown[replica]):
                raise RuntimeError(f"no replica can take a sequence of bucket {bucket}")
            loads.change(replica, bucket, number)
            left -= number
