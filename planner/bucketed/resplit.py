"""Local search by optimal re-splits: what two replicas hold, divided anew by dynamic programming.

The time of a replica is a sum over buckets, so the best division of two replicas' sequences is a
knapsack over buckets: for every time of the first the least time of the second. Moves and swaps of
single sets (`local_search`) cannot do what needs several buckets to change at once.
"""

from __future__ import annotations

import numpy as np

from lobra.planner.bucketed.loads import Loads

SMALLEST_GAIN = 1e-6  # relative to the slower replica
NEAR = 4  # sequences by which a bucket's division may change one by one
FULL = 4  # full micro-batches by which it may change, of either layout
MOST_OPTIONS = 32
SMALL_GROUP = 12  # larger groups are balanced well by moves alone
SETTLED = 2e-3  # relative distance to its mean at which a group is balanced
PARTNERS, PARTNERS_ELSEWHERE = 4, 2
LOOSEST = 0.15  # how far beyond its time a disturbed replica may go
DEPTH = 6
MOST_SHAKEN = 96  # replicas; of more, one disturbed changes too little for its price


def resplit(
    loads: Loads,
    first: int,
    second: int,
    limit_s: float,
    ticks: int,
    weights: tuple[float, float] | None = None,
) -> bool:
    """Divide what two replicas hold anew, both within ``limit_s``; return whether it got better.

    Better is a shorter time of the slower one or, with ``weights``, a smaller weighted sum of the
    two times. Times are cut into ``ticks`` parts; what is done is judged exactly.
    """
    room_s = limit_s - loads.bubble_s[first]
    if room_s <= 0:
        return False
    pool = loads.counts[first] + loads.counts[second]
    used = np.flatnonzero(pool).tolist()
    tick_s = room_s / ticks
    # row k: the least time of the second replica by the ticks of the first, k buckets divided;
    # the first half stays infinite, so that a window of ticks + 1 is the row shifted
    least = np.full((len(used) + 1, 2 * ticks + 1), np.inf, dtype=np.float32)
    least[0, ticks] = 0.0
    shifted = np.lib.stride_tricks.sliding_window_view(least, ticks + 1, axis=1)
    steps = []
    for row, bucket in enumerate(used):
        numbers = _options(loads, first, second, bucket, int(pool[bucket]))
        here = loads.work_s[loads.group[first], bucket, numbers]
        there = loads.work_s[loads.group[second], bucket, pool[bucket] - numbers]
        fits = (here <= room_s) & (there <= limit_s)
        if not fits.any():
            return False
        numbers, there = numbers[fits], there[fits].astype(np.float32)
        cost = np.rint(here[fits] / tick_s).astype(np.int64)
        steps.append((bucket, numbers, cost, there))
        divided = shifted[row, ticks - cost]
        divided += there[:, None]
        divided.min(axis=0, out=least[row + 1, ticks:])
    first_s = np.arange(ticks + 1) * tick_s + loads.bubble_s[first]
    first_s[0] = 0.0
    second_s = least[-1, ticks:]
    second_s = np.where(second_s > 0.0, second_s + loads.bubble_s[second], 0.0)
    if weights is None:
        score = np.maximum(first_s, second_s)
    else:
        score = weights[0] * first_s + weights[1] * second_s
        score[second_s > limit_s] = np.inf
    at = int(np.argmin(score))
    if not np.isfinite(score[at]):
        return False
    counts = _trace(steps, least, at, len(pool))
    return _accept(loads, first, second, counts, limit_s, weights)


def balance_groups(loads: Loads, target_s: float, ticks: int) -> None:
    """Even out every small group of equal replicas in itself, which wastes nothing."""
    for group in range(len(loads.work_s)):
        members = np.flatnonzero(loads.group == group)
        if not 1 < len(members) <= SMALL_GROUP:
            continue
        enough_s = max(target_s, float(loads.time_s[members].mean()) * (1 + SETTLED))
        for _ in range(4 * len(members)):
            times = loads.time_s[members]
            slowest = int(members[np.argmax(times)])
            if loads.time_s[slowest] <= enough_s:
                break
            others = members[np.argsort(times, kind="stable")][:PARTNERS]
            if not _relieve(loads, slowest, others.tolist(), ticks):
                break


def descend(loads: Loads, target_s: float, ticks: int, max_rounds: int) -> None:
    """Re-split the slowest replica with others until ``target_s`` or nothing helps."""
    for _ in range(max_rounds):
        slowest = int(np.argmax(loads.time_s))
        if loads.time_s[slowest] <= target_s:
            return
        if _relieve(loads, slowest, _partners(loads, slowest), ticks) is None:
            return


def shake(
    loads: Loads, target_s: float, ticks: int, max_rounds: int, rng: np.random.Generator
) -> None:
    """Disturb slow replicas at random and repair; keep what lowers their excess over the target.

    Ends with the state whose slowest replica is the fastest seen. Does nothing for more than 96
    replicas.
    """
    if len(loads.group) > MOST_SHAKEN:
        return

    def excess() -> np.ndarray:
        return np.maximum(0.0, loads.time_s - target_s) ** 2

    kept, kept_excess = loads.counts.copy(), float(excess().sum())
    best, best_s = kept, float(loads.time_s.max())
    for _ in range(max_rounds):
        share = excess()
        if share.sum() <= 0.0:
            break
        slow = int(rng.choice(len(share), p=share / share.sum()))
        touched = _disturb(loads, slow, ticks, rng)
        for _ in range(DEPTH):
            slow = max(touched, key=lambda replica: (loads.time_s[replica], -replica))
            if loads.time_s[slow] <= target_s:
                break
            other = _relieve(loads, slow, _partners(loads, slow), ticks)
            if other is None:
                break
            touched.add(other)
        now = float(excess().sum())
        if loads.time_s.max() < best_s:
            best, best_s = loads.counts.copy(), float(loads.time_s.max())
        if now < kept_excess * (1 - 1e-9):
            kept, kept_excess = loads.counts.copy(), now
        else:
            loads.restore(kept)
    loads.restore(best)


def _disturb(loads: Loads, slow: int, ticks: int, rng: np.random.Generator) -> set[int]:
    """Re-split a slow replica with random ones by random weights; return who may have changed."""
    limit_s = float(loads.time_s[slow]) * (1 + LOOSEST * rng.random() ** 2)
    touched = {slow}
    for _ in range(int(rng.integers(1, 4))):
        same = np.flatnonzero(loads.group == loads.group[slow])
        among = same if len(same) > 1 and rng.random() < 0.5 else np.arange(len(loads.group))
        other = int(rng.choice(among))
        if other == slow:
            continue
        weights = (float(rng.random()), float(rng.random()))
        if resplit(loads, slow, other, limit_s, ticks, weights):
            touched.add(other)
        if rng.random() < 0.5:
            slow = other
    return touched


def _relieve(loads: Loads, slow: int, others: list[int], ticks: int) -> int | None:
    """Re-split a replica with the first of ``others`` that helps; return which, or None."""
    for other in others:
        if other != slow and resplit(loads, slow, other, float(loads.time_s[slow]), ticks):
            return other
    return None


def _partners(loads: Loads, slow: int) -> list[int]:
    """Return the least busy replicas of every group, more of the replica's own."""
    order = np.argsort(loads.time_s, kind="stable")
    order = order[order != slow]
    groups = loads.group[order]
    chosen: list[int] = []
    for group in range(len(loads.work_s)):
        number = PARTNERS if group == loads.group[slow] else PARTNERS_ELSEWHERE
        chosen += order[groups == group][:number].tolist()
    return chosen


def _options(loads: Loads, first: int, second: int, bucket: int, pool: int) -> np.ndarray:
    """Return int64: how many of a bucket's ``pool`` sequences the first replica may get."""
    if pool < MOST_OPTIONS:
        return np.arange(pool + 1)
    now = int(loads.counts[first, bucket])
    near = np.arange(-NEAR, NEAR + 1)
    full = np.arange(-FULL, FULL + 1)
    size = loads.limit[loads.group[first], bucket]
    other = loads.limit[loads.group[second], bucket]
    numbers = now + np.concatenate([near, full * size, full * other])
    return np.unique(np.clip(numbers, 0, pool))


def _trace(
    steps: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]],
    least: np.ndarray,
    at: int,
    length: int,
) -> np.ndarray:
    """Return int64 [R]: the first replica's sequences behind the last row's value at a tick."""
    counts = np.zeros(length, dtype=np.int64)
    ticks = least.shape[1] // 2
    for row in reversed(range(len(steps))):
        bucket, numbers, cost, there = steps[row]
        chosen = int(np.argmin(least[row, ticks + at - cost] + there))
        counts[bucket] = numbers[chosen]
        at -= int(cost[chosen])
    return counts


def _accept(
    loads: Loads,
    first: int,
    second: int,
    counts: np.ndarray,
    limit_s: float,
    weights: tuple[float, float] | None,
) -> bool:
    """Make the division if its exact times are better."""
    rest = loads.counts[first] + loads.counts[second] - counts
    first_s, second_s = loads.time_of(first, counts), loads.time_of(second, rest)
    old_first_s, old_second_s = loads.time_s[first], loads.time_s[second]
    if weights is None:
        slower_s = max(old_first_s, old_second_s)
        better = max(first_s, second_s) < slower_s * (1 - SMALLEST_GAIN)
    else:
        gain_s = weights[0] * (old_first_s - first_s) + weights[1] * (old_second_s - second_s)
        better = max(first_s, second_s) <= limit_s and gain_s > SMALLEST_GAIN * limit_s
    if better:
        loads.set(first, counts)
        loads.set(second, rest)
    return bool(better)
