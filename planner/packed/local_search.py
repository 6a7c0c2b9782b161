"""Local search: slow replicas give a sequence to fast ones, or change one for a shorter one."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from lobra.layout.sequences import IntArray, packed_tokens
from lobra.planner.packed.filling import Filling, ReplicaTable, filled
from lobra.planner.packed.micro_batches import room_for

NEAR = 5e-4  # of the bound, or of the mean: nearer is not searched for
SLOWEST = 0.5  # of what the slowest replica is late: those that are later give
MOST_TRIED = 24  # sequences of a replica that are considered at once


def improve(
    table: ReplicaTable, lengths: IntArray, filling: Filling, bound_s: float, rounds: int
) -> Filling:
    """Return the filling after at most so many rounds of moves and swaps, never a slower one.

    In each round the slowest replica meets the fastest, the second slowest the second fastest, and
    so on; in every other round the fast ones that hold as much as the slowest come first, one of
    each group by turns. Of each pair that is done which makes the later of both earliest, by what
    micro-batches really take. No filling takes less than ``bound_s``.
    """
    by_length = np.argsort(lengths, kind="stable")
    shift = 0
    for turn in range(rounds):
        times_s = filling.replica_time_s
        enough_s = (1.0 + NEAR) * max(bound_s, float(times_s.mean()))
        order = np.argsort(-times_s, kind="stable")
        slow_s = enough_s + SLOWEST * max(0.0, float(times_s.max()) - enough_s)
        number = min(int((times_s > slow_s).sum()), len(order) // 2)
        if not number or shift >= len(order) - number:
            break
        slow = order[:number]
        fast = order[number:][::-1]
        if turn % 2:
            is_smaller = table.max_tokens[fast] < table.max_tokens[slow[0]]
            group = table.group[fast]
            faster = np.tril(group[:, None] == group, -1).sum(axis=1)  # of the same group
            fast = fast[np.lexsort((faster, is_smaller))]
        fast = fast[(np.arange(number) + shift) % len(fast)]
        filling = _exchanged(table, lengths, by_length, filling, slow, fast)
        shift = shift + 1 if filling.replica_time_s[slow[0]] >= times_s[slow[0]] else 0
    return filling


@dataclass(frozen=True, eq=False)
class _Offers:
    """Sequences that replicas may part with, a row of them for each of P replicas.

    Attributes
    ----------
    sequences, lengths, batches
        int64 [P, S]: sequences, their tokens, their micro-batches. -1, of no tokens: none, whose
        micro-batch only takes another's; there -1 is a new one.
    there
        bool [P, S]: those that exist.
    """

    sequences: IntArray
    lengths: IntArray
    batches: IntArray
    there: np.ndarray


def _exchanged(
    table: ReplicaTable,
    lengths: IntArray,
    by_length: IntArray,
    filling: Filling,
    slow: IntArray,
    fast: IntArray,
) -> Filling:
    """Return the filling with the best exchange of each pair done, where one is better.

    ``by_length``, int64 [n], are all sequences, the shortest first.
    """
    owner = filling.replica_of[filling.batch_of[by_length]]
    order = by_length[np.argsort(owner, kind="stable")]
    give = _offers(lengths, filling, order, slow)
    take = _with_none(filling, _offers(lengths, filling, order, fast), fast)
    pair, row, column = _possible(table, filling, give, take, fast)
    given, taken = (pair, row), (pair, column)
    tokens = take.lengths[taken] - give.lengths[given]
    squares = take.lengths[taken] ** 2 - give.lengths[given] ** 2
    moved = (take.sequences[taken] < 0).astype(np.int64)
    giver, taker, to = slow[pair], fast[pair], take.batches[taken]
    times_s = _times_s(
        table,
        filling,
        np.concatenate([giver, taker]),
        np.concatenate([give.batches[given], to]),
        np.concatenate([tokens, -tokens]),
        np.concatenate([squares, -squares]),
        np.concatenate([-moved, moved]),
    )
    later_s = times_s.reshape(2, -1).max(axis=0)
    begin = np.flatnonzero(np.diff(pair, prepend=-1, append=-1)).tolist()
    of_pairs = [start + later_s[start:end].argmin() for start, end in pairwise(begin)]
    best = np.array(of_pairs, dtype=np.int64)
    best = best[later_s[best] < filling.replica_time_s[giver[best]]]
    if not len(best):
        return filling
    sequences, back, to = give.sequences[given][best], take.sequences[taken][best], to[best]
    is_new = to < 0
    to[is_new] = len(filling.replica_of) + np.arange(is_new.sum())
    batch_of = filling.batch_of.copy()
    batch_of[back[back >= 0]] = filling.batch_of[sequences[back >= 0]]
    batch_of[sequences] = to
    return filled(
        table, lengths, batch_of, np.concatenate([filling.replica_of, taker[best][is_new]])
    )


def _offers(lengths: IntArray, filling: Filling, order: IntArray, replicas: IntArray) -> _Offers:
    """Return what replicas may part with; ``order`` are all sequences by replica and length."""
    owner = filling.replica_of[filling.batch_of[order]]
    start = np.searchsorted(owner, replicas)[:, None]
    number = np.searchsorted(owner, replicas, side="right")[:, None] - start
    every = np.arange(MOST_TRIED)
    are_few = number <= MOST_TRIED
    place = start + np.where(are_few, every, every * (number - 1) // (MOST_TRIED - 1))
    there = ~are_few | (every < number)
    sequences = order[np.where(there, place, 0)]
    return _Offers(sequences, lengths[sequences], filling.batch_of[sequences], there)


def _with_none(filling: Filling, offers: _Offers, replicas: IntArray) -> _Offers:
    """Return the offers with none besides: for their emptiest micro-batch, and for a new one."""
    by_sum = np.lexsort((filling.sums, filling.replica_of))
    owner = filling.replica_of[by_sum]
    start = np.minimum(np.searchsorted(owner, replicas), len(owner) - 1)
    emptiest = np.where(owner[start] == replicas, by_sum[start], -1)
    new = np.full((len(replicas), 2), -1)
    return _Offers(
        np.concatenate([offers.sequences, new], axis=1),
        np.concatenate([offers.lengths, 0 * new], axis=1),
        np.concatenate([offers.batches, np.stack([emptiest, new[:, 1]], axis=1)], axis=1),
        np.concatenate([offers.there, new < 0], axis=1),
    )


def _possible(
    table: ReplicaTable,
    filling: Filling,
    give: _Offers,
    take: _Offers,
    takers: IntArray,
) -> tuple[IntArray, IntArray, IntArray]:
    """Return int64 [n] thrice: pair, row and column of every exchange for a shorter one that fits.

    ``takers`` are the replicas that take, int64 [pairs].
    """
    sums = np.append(filling.sums, 0)
    most = room_for(table.max_tokens[takers])
    given, taken = give.lengths[:, :, None], take.lengths[:, None]
    fits = (taken < given) & give.there[:, :, None] & take.there[:, None]
    room = (most[:, None] - sums[take.batches] + take.lengths)[:, None]
    pair, row, column = np.nonzero(fits & (given <= room))
    return pair, row, column


def _times_s(
    table: ReplicaTable,
    filling: Filling,
    replicas: IntArray,
    batches: IntArray,
    more_tokens: IntArray,
    more_squares: IntArray,
    more_sequences: IntArray,
) -> np.ndarray:
    """Return float64 [n]: what replicas take if one micro-batch of each gets so much more.

    All are int64 [n], and independent of each other; micro-batch -1 is a new one.
    """
    sizes = np.append(filling.sizes, 0)[batches] + more_sequences
    sums = np.append(filling.sums, 0)[batches] + more_tokens
    squares = np.append(filling.squares, 0)[batches] + more_squares
    tokens = np.where(sizes > 1, packed_tokens(sums), sums)
    times_s = table.micro_batch_s(replicas, sizes, tokens, squares)
    others_s, longest_s = _others_s(table, filling, replicas, batches)
    return others_s + times_s + table.bubbles[replicas] * np.maximum(longest_s, times_s)


def _others_s(
    table: ReplicaTable, filling: Filling, replicas: IntArray, batches: IntArray
) -> tuple[np.ndarray, np.ndarray]:
    """Return float64 [n] twice: what all other micro-batches of replicas take, and the longest.

    ``batches`` are those left out, one of each replica; -1: none.
    """
    every = np.arange(len(table.group))
    times_s = np.append(filling.times_s, 0.0)
    busy_s = np.bincount(filling.replica_of, filling.times_s, len(every))
    by_time = np.lexsort((filling.times_s, filling.replica_of))
    owner = filling.replica_of[by_time]
    last = np.searchsorted(owner, every, side="right") - 1
    before = np.maximum(last - 1, 0)
    second_s = np.where((last > 0) & (owner[before] == every), times_s[by_time[before]], 0.0)
    is_longest = (batches >= 0) & (batches == by_time[last][replicas])
    longest_s = np.where(is_longest, second_s[replicas], filling.longest_s[replicas])
    return busy_s[replicas] - times_s[batches], longest_s
