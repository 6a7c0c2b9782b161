"""All ways to fill the GPUs with replicas: integer partitions into the candidates' sizes."""

from __future__ import annotations

import numpy as np


def count_maximal(sizes: np.ndarray, num_gpus: int) -> int:
    """Return how many plans ``maximal`` would list, without listing them."""
    ways = np.zeros(num_gpus + 1, dtype=object)
    ways[0] = 1
    for size in sizes.tolist():
        for gpus in range(size, num_gpus + 1):
            ways[gpus] += ways[gpus - size]
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
