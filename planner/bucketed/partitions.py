"""All ways to fill the GPUs with replicas: integer partitions into the candidates' sizes."""

from __future__ import annotations

import numpy as np


def count_maximal(sizes: np.ndarray, num_gpus: int) -> int:
    """Return how many plans ``maximal`` would list, without listing them."""
    ways = _ways(sizes, num_gpus)
    smallest = int(sizes.min())
    return int(sum(ways[max(0, num_gpus - smallest + 1) :]))


def maximal(sizes: np.ndarray, num_gpus: int) -> np.ndarray:
    """Return int32 [plans, candidates]: replicas that leave no room for one more.

    Any other plan is part of one of these, and a replica more never makes a step slower.
    """
    order = np.argsort(-sizes, kind="stable")
    plans = np.zeros((1, len(sizes)), dtype=np.int32)
    left = np.array([num_gpus], dtype=np.int64)
    smallest = int(sizes.min())
    for position, index in enumerate(order.tolist()):
        size = int(sizes[index])
        most = left // size
        repeat = np.repeat(np.arange(len(plans)), most + 1)
        first = np.cumsum(most + 1) - (most + 1)
        number = np.arange(len(repeat)) - first[repeat]
        if position == len(order) - 1:  # the last one fills what is left
            keep = number == most[repeat]
            repeat, number = repeat[keep], number[keep]
        plans = plans[repeat]
        plans[:, index] = number
        left = left[repeat] - number * size
    return plans[left < smallest]


def count_closed(sizes: np.ndarray, num_gpus: int) -> int:
    """Return how many plans ``closed`` would list, without listing them."""
    return sum(
        count_maximal(least, num_gpus) - _count_without_smallest(least, num_gpus)
        for least in (sizes[sizes >= size] for size in np.unique(sizes))
        if least.min() <= num_gpus
    )


def closed(sizes: np.ndarray, num_gpus: int) -> np.ndarray:
    """Return int32 [plans, candidates]: replicas that leave no room for one more of their kinds.

    Where every further layout may change what the others take (length-based dispatch), only one
    more replica of a layout that is deployed already is sure to make no step slower.
    """
    plans = []
    for size in np.unique(sizes[sizes <= num_gpus]).tolist():
        among = np.flatnonzero(sizes >= size)
        listed = maximal(sizes[among], num_gpus)
        listed = listed[listed[:, sizes[among] == size].any(axis=1)]
        every = np.zeros((len(listed), len(sizes)), dtype=np.int32)
        every[:, among] = listed
        plans.append(every)
    return np.concatenate(plans)


def _count_without_smallest(sizes: np.ndarray, num_gpus: int) -> int:
    """Return how many plans of the larger sizes leave less than the smallest size."""
    smallest = int(sizes.min())
    larger = sizes[sizes > smallest]
    ways = _ways(larger, num_gpus)
    return int(sum(ways[max(0, num_gpus - smallest + 1) :]))


def _ways(sizes: np.ndarray, num_gpus: int) -> np.ndarray:
    """Return object [num_gpus + 1]: in how many ways replicas of the sizes use so many GPUs."""
    ways = np.zeros(num_gpus + 1, dtype=object)
    ways[0] = 1
    for size in sizes.tolist():
        for gpus in range(size, num_gpus + 1):
            ways[gpus] += ways[gpus - size]
    return ways
