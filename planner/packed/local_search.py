"""Local search: slow replicas give a sequence to fast ones, or change one for a shorter one."""

from __future__ import annotations

from dataclasses import dataclass

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
    so on; in every other round the fastest of those that hold as much as the slowest come first. Of
    each pair that is done which makes the later of both earliest, by what micro-batches really
    take.
    """
    shift = 0
    for number_of_round in range(rounds):
        times_s = filling.replica_time_s
        enough_s = (1.0 + NEAR) * max(bound_s, float(times_s.mean()))
        order = np.argsort(-times_s, kind="stable")
        slow_s = enough_s + SLOWEST * max(0.0, float(times_s.max()) - enough_s)
        number = min(int((times_s > slow_s).sum()), len(order) // 2)
        if not number or shift >= len(order) - number:
            break
        slow = order[:number]
        fast = order[number:][::-1]
        if number_of_round % 2:
            too_small = table.max_tokens[fast] < table.max_tokens[slow[0]]
            group = table.group[fast]
            before = np.tril(group[:, None] == group, -1).sum(axis=1)  # faster ones of the group
            fast = fast[np.lexsort((before, too_small))]
        fast = fast[(np.arange(number) + shift) % len(fast)]
        batch_of, replica_of = _exchanged(table, lengths, filling, slow, fast)
        filling = filled(table, lengths, batch_of, replica_of)
        shift = shift + 1 if filling.replica_time_s[slow[0]] >= times_s[slow[0]] else 0
    return filling


@dataclass(frozen=True, eq=False)
class _Side:
    """The sequences of a replica that may go, int64 [n] each, and their micro-batches.

    Attributes
    ----------
    indices, lengths
        The sequences; those that are none have no length.
    batches
        The micro-batch of each; -1: a new one.
    sizes, sums, squares
        Of the micro-batches.
    others_s, longest_s
        float64 [n]: what the other micro-batches of the replica take, and the longest of them.
    """

    indices: IntArray
    lengths: IntArray
    batches: IntArray
    sizes: IntArray
    sums: IntArray
    squares: IntArray
    others_s: np.ndarray
    longest_s: np.ndarray


def _exchanged(
    table: ReplicaTable, lengths: IntArray, filling: Filling, slow: IntArray, fast: IntArray
) -> tuple[IntArray, IntArray]:
    """Return micro-batches with the best exchange of each pair done, where one is better."""
    batch_of, replica_of = filling.batch_of.copy(), filling.replica_of
    by_replica = np.argsort(replica_of[batch_of], kind="stable")
    starts = np.searchsorted(replica_of[batch_of][by_replica], np.arange(len(table.group) + 1))
    added: list[int] = []
    for giver, taker in zip(slow.tolist(), fast.tolist(), strict=True):
        give = _side(lengths, filling, by_replica[starts[giver] : starts[giver + 1]], giver, False)
        take = _side(lengths, filling, by_replica[starts[taker] : starts[taker + 1]], taker, True)
        found = _best_exchange(table, filling, (giver, give), (taker, take))
        if found is None:
            continue
        sequence, back, batch = found
        if batch < 0:
            batch = len(replica_of) + len(added)
            added.append(taker)
        if back >= 0:
            batch_of[back] = batch_of[sequence]
        batch_of[sequence] = batch
    return batch_of, np.concatenate([replica_of, np.array(added, dtype=np.int64)])


def _side(
    lengths: IntArray, filling: Filling, indices: IntArray, replica: int, takes: bool
) -> _Side:
    """Return what may go of a replica; if it ``takes``, then also no sequence.

    Of its emptiest micro-batch, and of a new one.
    """
    if len(indices) > MOST_TRIED:
        order = np.argsort(lengths[indices], kind="stable")
        every = np.linspace(0, len(indices) - 1, MOST_TRIED).astype(np.int64)
        indices = indices[order[every]]
    own = np.flatnonzero(filling.replica_of == replica)
    batches, own_lengths = filling.batch_of[indices], lengths[indices]
    if takes:
        emptiest = own[filling.sums[own].argmin()] if len(own) else -1
        indices = np.concatenate([indices, [-1, -1]])
        batches = np.concatenate([batches, [emptiest, -1]])
        own_lengths = np.concatenate([own_lengths, [0, 0]])
    there = batches >= 0
    sizes, sums, squares, times_s = (
        np.where(there, each[batches], 0)
        for each in (filling.sizes, filling.sums, filling.squares, filling.times_s)
    )
    own_s = filling.times_s[own]
    second_s, first_s = np.sort(np.concatenate([[0.0, 0.0], own_s]))[-2:].tolist()
    longest_s = np.where(times_s >= first_s, second_s, first_s)
    others_s = own_s.sum() - times_s
    return _Side(indices, own_lengths, batches, sizes, sums, squares, others_s, longest_s)


def _best_exchange(
    table: ReplicaTable, filling: Filling, giving: tuple[int, _Side], taking: tuple[int, _Side]
) -> tuple[int, int, int] | None:
    """Return a sequence to give, one to take for it or -1, and its micro-batch (-1: a new one)."""
    (giver, give), (taker, take) = giving, taking
    given, taken = give.lengths[:, None], take.lengths
    most = room_for(int(table.max_tokens[giver])), room_for(int(table.max_tokens[taker]))
    fits = (give.sums[:, None] - given + taken <= most[0]) & (take.sums - taken + given <= most[1])
    rows, columns = np.nonzero(fits)
    if not len(rows):
        return None
    more, only = take.lengths[columns] - give.lengths[rows], take.indices[columns] < 0
    more_squares = take.lengths[columns] ** 2 - give.lengths[rows] ** 2
    giver_s = _time_s(table, giver, give, rows, more, more_squares, -only.astype(np.int64))
    taker_s = _time_s(table, taker, take, columns, -more, -more_squares, only.astype(np.int64))
    later_s = np.maximum(giver_s, taker_s)
    best = int(later_s.argmin())
    if later_s[best] >= filling.replica_time_s[giver]:
        return None
    row, column = int(rows[best]), int(columns[best])
    return int(give.indices[row]), int(take.indices[column]), int(take.batches[column])


def _time_s(
    table: ReplicaTable,
    replica: int,
    side: _Side,
    places: IntArray,
    tokens: IntArray,
    squares: IntArray,
    number: IntArray,
) -> np.ndarray:
    """Return what a replica takes if micro-batches get so much more, each alone: float64 [n]."""
    sums, sizes = side.sums[places] + tokens, side.sizes[places] + number
    padded = np.where(sizes > 1, packed_tokens(sums), np.maximum(sums, 1))
    cost = table.costs[table.group[replica]]
    times_s = cost(padded, np.maximum(side.squares[places] + squares, 1))
    times_s = np.where(sizes > 0, times_s, 0.0) * (table.factors[replica] / 1000.0)
    longest_s = np.maximum(side.longest_s[places], times_s)
    return side.others_s[places] + times_s + table.bubbles[replica] * longest_s
