"""Local search: sequences moved and swapped between replicas until the slowest is fast enough."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lobra.planner.bucketed.loads import Loads

LARGEST_MOVE = 32
LARGEST_SWAP = 24
FIRST_CANDIDATES = 8
CANDIDATES_PER_GROUP = 8
EXCHANGE_SIZES = (1, 2, 3, 5, 9)
EXCHANGE_CANDIDATES = 6
SMALLEST_GAIN = 1e-7  # relative to the slowest replica


def improve(
    loads: Loads,
    target_s: float,
    max_rounds: int = 400,
    max_exchanges: int = 8,
    swap_partners: int | None = None,
) -> int:
    """Shorten the slowest replica's time in place until ``target_s`` or no move helps.

    Each round takes the slowest replica and the best move of up to 32 sequences of one bucket to
    a less busy replica; where none helps, the best swap of two such sets with one of the first
    ``swap_partners`` of those (None: all); where none helps either, an exchange of one set for
    two, at most ``max_exchanges`` times. Ties go to the first, so the
    result depends on the input alone. Returns the rounds taken.
    """
    exchanges = 0
    for done in range(max_rounds):
        slowest = int(np.argmax(loads.time_s))
        if loads.time_s[slowest] <= target_s or loads.time_s[slowest] == 0.0:
            return done
        others = _candidates(loads, slowest)
        if not len(others):
            return done
        if _best_move(loads, slowest, others) or _best_swap(loads, slowest, others[:swap_partners]):
            continue
        if exchanges == max_exchanges or not _best_exchange(loads, slowest, others):
            return done
        exchanges += 1
    return max_rounds


def _candidates(loads: Loads, slowest: int) -> np.ndarray:
    """Return the least busy replicas, overall and of every group, one of those that are alike."""
    order = np.argsort(loads.time_s, kind="stable")
    _, first = np.unique(loads.time_s[order], return_index=True)
    order = order[first]
    order = order[order != slowest]
    chosen = list(order[:FIRST_CANDIDATES])
    groups = loads.group[order]
    for group in range(len(loads.work_s)):
        chosen += list(order[groups == group][:CANDIDATES_PER_GROUP])
    return np.array(list(dict.fromkeys(chosen)), dtype=np.int64)


def _removal(
    loads: Loads, replicas: np.ndarray | int, sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return bool, float64 [..., R, sizes]: what can leave replicas, and the seconds it saves."""
    left = loads.counts[replicas][..., None] - sizes
    possible = left >= 0
    group = np.asarray(loads.group[replicas])[..., None, None]
    after = loads.work_s[group, loads.every_bucket[:, None], np.maximum(left, 0)]
    saved = np.where(possible, loads.parts_s[replicas][..., None] - after, -np.inf)
    return possible, saved


def _addition(
    loads: Loads, replicas: np.ndarray, sizes: np.ndarray, possible: np.ndarray
) -> np.ndarray:
    """Return float64 [replicas, R, sizes]: the seconds it costs to add what is possible."""
    added = np.where(possible, sizes[None, :], 0)
    after = loads.counts[replicas][:, :, None] + added[None]
    most = loads.work_s.shape[2] - 1
    if after.max() > most:
        possible = possible[None] & (after <= most)
        after = np.minimum(after, most)
    else:
        possible = possible[None]
    work = loads.work_s[
        loads.group[replicas][:, None, None], loads.every_bucket[None, :, None], after
    ]
    return np.where(possible, work - loads.parts_s[replicas][:, :, None], np.inf)


def _best_move(loads: Loads, slowest: int, others: np.ndarray) -> bool:
    top = loads.time_s[slowest]
    sizes = np.arange(1, min(LARGEST_MOVE, int(loads.counts[slowest].max())) + 1)
    possible, saved = _removal(loads, slowest, sizes)
    emptied = sizes[None, :] == loads.counts[slowest].sum()
    saved = saved + np.where(emptied, loads.bubble_s[slowest], 0.0)
    cost = _addition(loads, others, sizes, possible) + loads.start_s(others)[:, None, None]
    longest = np.maximum(top - saved[None], loads.time_s[others][:, None, None] + cost)
    # of two equal moves the one that wastes less time
    better = longest < top * (1 - SMALLEST_GAIN)
    score = np.where(better, longest + 0.1 * (cost - saved[None]), np.inf)
    best = int(np.argmin(score))
    if not np.isfinite(score.flat[best]):
        return False
    other, bucket, size = np.unravel_index(best, score.shape)
    loads.transfer(slowest, int(others[other]), int(bucket), int(sizes[size]))
    return True


def _best_swap(loads: Loads, slowest: int, others: np.ndarray) -> bool:
    top = loads.time_s[slowest]
    sizes = np.arange(1, LARGEST_SWAP + 1)
    out_possible, out_saved = _removal(loads, slowest, sizes)
    out_cost = _addition(loads, others, sizes, out_possible)
    in_possible, in_saved = _removal(loads, others, sizes)
    in_cost = _addition(loads, np.array([slowest]), sizes, np.array(True))[0]
    leaves = (out_possible[None] & np.isfinite(out_cost)).reshape(len(others), -1)
    comes = (in_possible & np.isfinite(in_cost)).reshape(len(others), -1)
    bucket_of = np.repeat(loads.every_bucket, len(sizes))
    out_saved, in_cost = out_saved.ravel(), in_cost.ravel()
    out_cost, in_saved = out_cost.reshape(leaves.shape), in_saved.reshape(comes.shape)
    best_time, best = top * (1 - SMALLEST_GAIN), None
    for index, other in enumerate(others.tolist()):
        outs, ins = np.flatnonzero(leaves[index]), np.flatnonzero(comes[index])
        if not len(outs) or not len(ins):
            continue
        here = (top - out_saved[outs])[:, None] + in_cost[ins]
        there = (loads.time_s[other] + out_cost[index, outs])[:, None] - in_saved[index, ins]
        longest = np.maximum(here, there, out=here)
        longest[bucket_of[outs][:, None] == bucket_of[ins]] = np.inf
        flat = int(np.argmin(longest))
        if longest.flat[flat] < best_time:
            row, column = divmod(flat, len(ins))
            best_time, best = longest.flat[flat], (other, outs[row], ins[column])
    if best is None:
        return False
    other, out, back = best
    loads.transfer(slowest, other, *_bucket_and_size(int(out), len(sizes)))
    loads.transfer(other, slowest, *_bucket_and_size(int(back), len(sizes)))
    return True


def _best_exchange(loads: Loads, slowest: int, others: np.ndarray) -> bool:
    """Swap one set of sequences for two, either way, with a few of the other replicas."""
    top = loads.time_s[slowest]
    sizes = np.array(EXCHANGE_SIZES)
    out_possible, out_saved = _removal(loads, slowest, sizes)
    out_cost = _addition(loads, others, sizes, out_possible)
    best_time, best = top * (1 - SMALLEST_GAIN), None
    for index, other in enumerate(others[:EXCHANGE_CANDIDATES].tolist()):
        in_possible, in_saved = _removal(loads, other, sizes)
        in_cost = _addition(loads, np.array([slowest]), sizes, in_possible)[0]
        # what leaves the slowest shortens it by `gives` and lengthens the other by `takes`
        outs = _options(out_saved, out_cost[index])
        ins = _options(in_cost, in_saved)
        for one, two, one_leaves in ((outs, _pairs(ins), True), (ins, _pairs(outs), False)):
            if not len(one.here) or not len(two.here):
                continue
            sign = -1.0 if one_leaves else 1.0
            here = top + sign * one.here[:, None] - sign * two.here[None, :]
            there = loads.time_s[other] - sign * one.there[:, None] + sign * two.there[None, :]
            longest = np.maximum(here, there)
            clash = one.bucket[:, :1] == two.bucket[:, 0][None, :]
            clash |= one.bucket[:, :1] == two.bucket[:, 1][None, :]
            longest[clash] = np.inf
            flat = int(np.argmin(longest))
            if longest.flat[flat] < best_time:
                row, column = np.unravel_index(flat, longest.shape)
                best_time = longest.flat[flat]
                best = (other, one_leaves, one.sets(int(row)), two.sets(int(column)))
    if best is None:
        return False
    other, one_leaves, one_sets, two_sets = best
    leaving, coming = (one_sets, two_sets) if one_leaves else (two_sets, one_sets)
    for bucket, slot in leaving:
        loads.transfer(slowest, other, bucket, int(sizes[slot]))
    for bucket, slot in coming:
        loads.transfer(other, slowest, bucket, int(sizes[slot]))
    return True


@dataclass(frozen=True, eq=False)
class _Options:
    """Sets that may change places: their seconds on the slowest replica and on the other.

    ``bucket``, ``slot`` int64 [options, 1 or 2]: buckets and positions in the sizes.
    """

    bucket: np.ndarray
    slot: np.ndarray
    here: np.ndarray
    there: np.ndarray

    def sets(self, index: int) -> list[tuple[int, int]]:
        return list(zip(self.bucket[index].tolist(), self.slot[index].tolist(), strict=True))


def _options(here: np.ndarray, there: np.ndarray) -> _Options:
    bucket, slot = np.nonzero(np.isfinite(here) & np.isfinite(there))
    return _Options(bucket[:, None], slot[:, None], here[bucket, slot], there[bucket, slot])


def _pairs(options: _Options) -> _Options:
    """Return every pair of options of different buckets."""
    first, second = np.nonzero(options.bucket < options.bucket[:, 0][None, :])
    return _Options(
        np.hstack([options.bucket[first], options.bucket[second]]),
        np.hstack([options.slot[first], options.slot[second]]),
        options.here[first] + options.here[second],
        options.there[first] + options.there[second],
    )


def _bucket_and_size(flat: int, num_sizes: int) -> tuple[int, int]:
    bucket, size = divmod(flat, num_sizes)
    return bucket, size + 1
