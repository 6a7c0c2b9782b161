"""A replica's sequences as micro-batches: as few as hold them, or as many as balance a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapreplace

import numpy as np

from lobra.layout.sequences import PACKED_MULTIPLE, IntArray
from lobra.planner.packed.minorant import Minorant


def room_for(max_tokens: int) -> int:
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
    rooms: list[int] = []
    batches = []
    for length in lengths:
        best, least = -1, most + 1
        for batch, room in enumerate(rooms):
            if length <= room < least:
                best, least = batch, room
        if best < 0:
            best = len(rooms)
            rooms.append(most)
        rooms[best] -= length
        batches.append(best)
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


def for_pipeline(
    lengths: IntArray, max_tokens: int, bubbles: int, minorant: Minorant
) -> Sequence[int]:
    """Return the micro-batch of each sequence, given longest first, so that a pipeline ends early.

    The more micro-batches, the more starts and the shorter the bubbles: as many are tried as would
    be best if sequences could be divided, and about as few as hold them.
    """
    marginal_ms = minorant.marginal_ms(lengths)

    def time_ms(batches: Sequence[int]) -> float:
        times_ms = np.bincount(batches, marginal_ms) + minorant.start_ms
        return float(times_ms.sum() + bubbles * times_ms.max())

    sizes, parts = lengths.tolist(), marginal_ms.tolist()
    few = fewest(sizes, max_tokens)
    least, most = max(few) + 1, len(sizes)
    ideal = np.sqrt(bubbles * sum(parts) / minorant.start_ms) if minorant.start_ms else most
    ideal = int(np.clip(ideal, least, most))
    numbers = {ideal, ideal + 1, least, least + 1, least + 2}
    tried = (balanced(sizes, parts, n, max_tokens) for n in sorted(numbers) if n <= most)
    return min((few, *filter(None, tried)), key=time_ms)
