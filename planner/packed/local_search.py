"""Local search: slow replicas give a sequence to fast ones, or change one for a shorter one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lobra.layout.sequences import IntArray
from lobra.planner.packed.filling import Filling, ReplicaTable, filled
from lobra.planner.packed.micro_batches import room_for
from lobra.planner.packed.minorant import Minorant

NEAR = 5e-4  # of the bound, or of the mean: nearer is not searched for
SLOWEST = 0.5  # of what the slowest replica is late: those that are later give
MOST_TRIED = 48  # sequences of a replica that are considered at once


def improve(
    table: ReplicaTable,
    minorants: Sequence[Minorant],
    lengths: IntArray,
    filling: Filling,
    bound_s: float,
    rounds: int,
) -> Filling:
    """Return the filling after at most so many rounds of moves and swaps, never a slower one.

    In each round the slowest replica meets the fastest, the second slowest the second fastest, and
    so on; in every other round the fastest of those that hold as much as the slowest come first.
    What promises most of a pair is done, and undone if it does not make the slower one of
    both faster. ``minorants`` (one for each group) say what sequences add to a micro-batch.
    """
    added_s = [m.marginal_ms(lengths) / 1000.0 for m in minorants]
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
        tried = _exchanged(table, added_s, minorants, lengths, filling, slow, fast)
        new = filled(table, lengths, *tried)
        worse = np.maximum(new.replica_time_s[slow], new.replica_time_s[fast]) >= times_s[slow]
        if worse.any():
            undone = np.zeros(len(order), dtype=bool)
            undone[slow[worse]] = undone[fast[worse]] = True
            back = undone[filling.replica_of[filling.batch_of]]
            new = filled(table, lengths, np.where(back, filling.batch_of, tried[0]), tried[1])
        shift = shift + 1 if worse[0] else 0
        filling = new
    return filling


@dataclass(frozen=True, eq=False)
class _Side:
    """The sequences of a replica that may go, and what comes of it: arrays are [sequences].

    The last entries of the receiving side are no sequence: its micro-batch with most room, and a
    new one.
    """

    indices: IntArray
    batches: IntArray
    lengths: IntArray
    rooms: IntArray
    weight: np.ndarray


def _exchanged(
    table: ReplicaTable,
    added_s: Sequence[np.ndarray],
    minorants: Sequence[Minorant],
    lengths: IntArray,
    filling: Filling,
    slow: IntArray,
    fast: IntArray,
) -> tuple[IntArray, IntArray]:
    """Return micro-batches with the best exchange of each pair done, where one promises."""
    batch_of, replica_of = filling.batch_of.copy(), filling.replica_of
    by_replica = np.argsort(replica_of[batch_of], kind="stable")
    starts = np.searchsorted(replica_of[batch_of][by_replica], np.arange(len(table.group) + 1))
    added: list[int] = []
    for giver, taker in zip(slow.tolist(), fast.tolist(), strict=True):
        give = _side(table, lengths, filling, by_replica[starts[giver] : starts[giver + 1]], giver)
        take = _side(table, lengths, filling, by_replica[starts[taker] : starts[taker + 1]], taker)
        found = _best_exchange(table, added_s, minorants, filling, (giver, give), (taker, take))
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
    table: ReplicaTable, lengths: IntArray, filling: Filling, indices: IntArray, replica: int
) -> _Side:
    if len(indices) > MOST_TRIED:
        order = np.argsort(lengths[indices], kind="stable")
        every = np.linspace(0, len(indices) - 1, MOST_TRIED).astype(np.int64)
        indices = indices[order[every]]
    batches = filling.batch_of[indices]
    own = lengths[indices]
    rooms = room_for(int(table.max_tokens[replica])) - filling.sums[batches] + own
    is_longest = filling.times_s[batches] >= filling.longest_s[replica]
    weight = 1.0 + table.bubbles[replica] * is_longest
    return _Side(indices, batches, own, rooms, weight)


def _best_exchange(
    table: ReplicaTable,
    added_s: Sequence[np.ndarray],
    minorants: Sequence[Minorant],
    filling: Filling,
    giving: tuple[int, _Side],
    taking: tuple[int, _Side],
) -> tuple[int, int, int] | None:
    """Return a sequence to give, one to take for it or -1, and its micro-batch (-1: a new one)."""
    (giver, give), (taker, take) = giving, taking
    factor = table.factors[giver], table.factors[taker]
    at_giver = added_s[table.group[giver]] * factor[0]
    at_taker = added_s[table.group[taker]] * factor[1]
    most = room_for(int(table.max_tokens[taker]))
    own = np.flatnonzero(filling.replica_of == taker)
    rooms = most - filling.sums[own]
    start_s = minorants[table.group[taker]].start_ms / 1000.0 * factor[1]
    if len(own):
        widest = int(rooms.argmax())
        slots = np.array([own[widest], -1]), np.array([rooms[widest], most])
    else:
        slots = np.array([-1, -1]), np.array([most, most])
    batches = np.concatenate([take.batches, slots[0]])
    taker_rooms = np.concatenate([take.rooms, slots[1]])
    taken = np.concatenate([take.lengths, [0, 0]])
    saved_s = np.concatenate([at_taker[take.indices] * take.weight, [0.0, -start_s]])
    back_s = np.concatenate([at_giver[take.indices], [0.0, 0.0]])
    weight = np.concatenate([take.weight, [1.0, 1.0 + table.bubbles[taker] * (len(own) == 0)]])
    fits = (give.lengths[:, None] <= taker_rooms) & (taken <= give.rooms[:, None])
    given_s = at_giver[give.indices][:, None]
    new_giver = filling.replica_time_s[giver] - (given_s - back_s) * give.weight[:, None]
    received_s = at_taker[give.indices][:, None] * weight
    new_taker = filling.replica_time_s[taker] + received_s - saved_s
    slower = np.where(fits, np.maximum(new_giver, new_taker), np.inf)
    best = int(slower.argmin())
    if slower.flat[best] >= filling.replica_time_s[giver]:
        return None
    row, column = divmod(best, slower.shape[1])
    back = int(take.indices[column]) if column < len(take.indices) else -1
    return int(give.indices[row]), back, int(batches[column])
