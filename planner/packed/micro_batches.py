"""A replica's sequences as micro-batches: of the sizes that take least, or balanced in a pipeline.

What a micro-batch takes is not linear in its tokens, nor always concave: devices work in waves.
Then several of other sizes than the largest may take less than full ones and a rest.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import heapreplace
from itertools import pairwise

import numpy as np

from lobra.layout.sequences import PACKED_MULTIPLE, IntArray, Tokens, packed_tokens
from lobra.planner.packed.least_times import Cost

MOST_SIZES = 128  # of micro-batches that are told apart
TABLED = 16  # full micro-batches, up to whose tokens sizes are tabled; then the best one repeats
SPARE = 0.5  # of the multiple that micro-batches are padded to: what each needs beyond its tokens
MEAN_RATIO = 1.5  # of neighbours among the mean lengths that sizes are tabled for
MOST_NUMBERS = 3  # of a pipeline's micro-batches that are tried


def room_for(max_tokens: Tokens) -> Tokens:
    """Return the tokens that several sequences may have: a multiple of 16 to which they are padded.

    One alone may have ``max_tokens``.
    """
    return max_tokens - max_tokens % PACKED_MULTIPLE


def fewest(lengths: Sequence[int], max_tokens: int) -> list[int]:
    """Return the micro-batch of each sequence, given longest first: where the least room is left.

    At most 11/9 as many as are needed, plus 6/9, as of first fit (best fit decreasing; Johnson,
    1974).
    """
    most = room_for(max_tokens)
    rooms: list[tuple[int, int]] = []  # ascending, of (tokens, micro-batch)
    batches = []
    for length in lengths:
        place = bisect_left(rooms, (length, -1))
        room, batch = rooms.pop(place) if place < len(rooms) else (most, len(rooms))
        insort(rooms, (room - length, batch))
        batches.append(batch)
    return batches


def balanced(
    lengths: Sequence[int], parts: Sequence[float], number: int, max_tokens: int
) -> list[int] | None:
    """Return the micro-batch of each sequence, given longest first: the one with the least so far.

    ``parts`` are their times. None: they do not fit ``number`` micro-batches that way.
    """
    most = room_for(max_tokens)
    heap = [(0.0, batch) for batch in range(number)]
    rooms = [most] * number
    batches = []
    for length, part in zip(lengths, parts, strict=True):
        time, batch = heap[0]
        if length > rooms[batch] and rooms[batch] < most:  # full: the next that has room
            fitting = [entry for entry in heap if length <= rooms[entry[1]]]
            if not fitting:
                return None
            time, batch = min(fitting)
            heap.remove((time, batch))
            heap.append((time + part, batch))
            heap.sort()
        else:
            heapreplace(heap, (time + part, batch))
        rooms[batch] -= length
        batches.append(batch)
    return batches


def near(mean_length: float) -> int:
    """Return one of few mean lengths, near the given one."""
    return max(1, int(MEAN_RATIO ** round(math.log(mean_length, MEAN_RATIO))))


def spare(number: int) -> int:
    """Return the tokens that so many micro-batches need beyond those of their sequences."""
    return int(SPARE * PACKED_MULTIPLE * number)


@dataclass(frozen=True, eq=False)
class Sizes:
    """The sizes of micro-batches that take least together, by their tokens in all.

    Attributes
    ----------
    unit
        All tokens are counted in it, rounded up.
    last
        int64 [n]: of so many units, one of the micro-batches; the others are those of the rest.
    best
        The size that takes least for each token.
    """

    unit: int
    last: IntArray
    best: int

    def of(self, tokens: int) -> list[int]:
        """Return sizes that add up to at least so many tokens."""
        left = -(-tokens // self.unit)
        more = max(0, -(-(left - len(self.last) + 1) // self.best))
        found = [self.best] * more
        left -= more * self.best
        while left > 0:
            found.append(int(self.last[left]))
            left -= found[-1]
        return [size * self.unit for size in found]


@lru_cache(maxsize=512)
def sizes_of(cost: Cost, max_tokens: int, mean_length: int) -> Sizes:
    """Return the sizes best for a cost: an exact dynamic program over tokens in all.

    ``mean_length`` is that of the sequence that a token is from, on average.
    """
    most = room_for(max_tokens)
    unit = PACKED_MULTIPLE * -(-most // (PACKED_MULTIPLE * MOST_SIZES))
    size = np.arange(unit, most + 1, unit)
    time_ms = cost(size, size * np.minimum(size, mean_length))
    least_ms = np.zeros(TABLED * len(size) + 1)
    last = np.zeros(len(least_ms), dtype=np.int64)
    for left in range(1, len(least_ms)):
        fitting = min(left, len(size))
        with_rest = time_ms[:fitting] + least_ms[left - fitting : left][::-1]
        last[left] = with_rest.argmin() + 1
        least_ms[left] = with_rest[last[left] - 1]
    return Sizes(unit, last, int((time_ms / size).argmin()) + 1)


def into_sizes(lengths: Sequence[int], sizes: Sequence[int], max_tokens: int) -> list[int]:
    """Return the micro-batch of each sequence, given longest first, of about these sizes.

    Each goes where the least room is left of the size; if none is, where most tokens are left; if
    none are, to another micro-batch.
    """
    most = room_for(max_tokens)
    sums = [0] * len(sizes)
    rooms = sorted((size, batch) for batch, size in enumerate(sizes))
    batches = []
    for length in lengths:
        place = bisect_left(rooms, (length, -1))
        if place < len(rooms):
            room, batch = rooms.pop(place)
        else:
            batch = min(range(len(sums)), key=sums.__getitem__, default=-1)
            if batch < 0 or sums[batch] + length > most:
                batch = len(sums)
                sums.append(0)
                rooms.append((0, batch))
            place = next(place for place, entry in enumerate(rooms) if entry[1] == batch)
            room, _ = rooms.pop(place)
        insort(rooms, (room - length, batch))
        sums[batch] += length
        batches.append(batch)
    return batches


def times_ms(cost: Cost, lengths: IntArray, batches: Sequence[int] | IntArray) -> np.ndarray:
    """Return what micro-batches take, float64 [micro-batches], from each sequence's."""
    sums = np.bincount(batches, lengths).astype(np.int64)
    squares = np.bincount(batches, lengths * lengths).astype(np.int64)
    tokens = np.where(np.bincount(batches) > 1, packed_tokens(sums), sums)
    return cost(tokens, squares)


def for_pipeline(
    lengths: IntArray, parts: np.ndarray, max_tokens: int, bubbles: int, cost: Cost
) -> Sequence[int]:
    """Return the micro-batch of each sequence, given longest first, so that a pipeline ends early.

    ``parts`` are about their times. Tried are as few micro-batches as hold them, and the numbers of
    equal ones that would take least.
    """
    sizes, tokens = lengths.tolist(), int(lengths.sum())
    few = fewest(sizes, max_tokens)
    number = np.arange(max(few) + 1, len(sizes) + 1)
    even = -(-tokens // number)
    mean = max(1, int((lengths * lengths).sum() / tokens))
    even_ms = (number + bubbles) * cost(even, even * np.minimum(even, mean))
    best = number[np.argsort(even_ms, kind="stable")[:MOST_NUMBERS]]
    equal = (balanced(sizes, parts.tolist(), n, max_tokens) for n in best.tolist())
    tried = [few, *filter(None, equal)]
    begin = np.cumsum([0, *(max(batches) + 1 for batches in tried)])
    batches = np.add(tried, begin[:-1, None]).ravel()  # of all at once: each its own
    batch_ms = times_ms(cost, np.tile(lengths, len(tried)), batches)
    each_ms = [batch_ms[start:end] for start, end in pairwise(begin.tolist())]
    return tried[int(np.argmin([own_ms.sum() + bubbles * own_ms.max() for own_ms in each_ms]))]
