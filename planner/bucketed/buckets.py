"""Buckets: the padded lengths sequences are rounded up to, chosen to waste the fewest tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from lobra.common.errors import ConfigError

ALIGN = 16
STATIC_BUCKETS = {
    7: (256, 512, 1024, 2048, 4096, 8192, 16384),
    16: (
        *(256, 512, 768, 1024, 1536, 2048, 2560, 3072),
        *(3584, 4096, 5120, 6144, 7168, 8192, 12288, 16384),
    ),
}
BATCH_SCALE = 100  # LobRA draws its buckets for a hundred expected batches
_COLUMN_BLOCKS = 8


def make_buckets(
    lengths: np.ndarray,
    num_buckets: int,
    align: int = ALIGN,
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """Return the padded lengths, ascending, that waste the fewest tokens: an exact optimum.

    Sequences are counted per ``align``-token boundary; only occupied boundaries can end a bucket
    of an optimum. Over those n boundaries the recurrence is
    ``best[k, j] = min_i best[k-1, i] + s_j (N_j - N_i)`` with N the cumulative counts (LobRA,
    section 4.3), one vectorised minimum per bucket: O(R n^2) in whole numbers, so exact.

    Parameters
    ----------
    lengths
        int [n]: tokens of each sequence, all positive.
    num_buckets
        The most buckets wanted; fewer are returned if they waste no more.
    align
        Buckets are multiples of this many tokens.
    weights
        int [n], optional: how often each length counts. Sequences of weight 0 only make sure
        that the longest of them fits.

    Returns
    -------
    int64 [at most num_buckets], the last one the smallest boundary not below the longest length.

    Raises
    ------
    ConfigError
        If there is no length, one is not positive, or ``num_buckets`` or ``align`` is not.
    """
    lengths = checked_lengths(lengths)
    if num_buckets < 1 or align < 1:
        raise ConfigError(
            f"buckets: {num_buckets} buckets aligned to {align} tokens; both are at least 1"
        )
    units = (lengths + (align - 1)) // align
    counts = np.bincount(units) if weights is None else np.zeros(int(units.max()) + 1, np.int64)
    if weights is not None:
        np.add.at(counts, units, np.asarray(weights, dtype=np.int64))
        counts[units.max()] = max(1, counts[units.max()])
    occupied = np.flatnonzero(counts)
    return occupied[_best_boundaries(occupied, counts[occupied], num_buckets)] * align


def static_buckets(num_buckets: int, longest: int) -> np.ndarray:
    """Return LobRA's fixed set of 7 or 16 buckets, up to the one that holds ``longest`` tokens.

    "Fixed buckets" are these everywhere: for plans (``--bucket-plan STATIC``), in the simulator,
    the experiments' tables and training (``--dp-bucket off``). ``longest`` is the workload's, over
    all tasks and what they hold out.

    Raises
    ------
    ConfigError
        If there is no such set, or ``longest`` exceeds it.
    """
    if num_buckets not in STATIC_BUCKETS:
        sets = " or ".join(str(size) for size in STATIC_BUCKETS)
        raise ConfigError(
            f"--num-buckets {num_buckets}: the fixed sets have {sets} buckets; give one of these, "
            f"or use dynamic buckets"
        )
    buckets = np.array(STATIC_BUCKETS[num_buckets], dtype=np.int64)
    if longest > buckets[-1]:
        raise ConfigError(
            f"fixed buckets: a sequence of {longest} tokens is longer than the last bucket "
            f"({buckets[-1]}); use dynamic buckets or a smaller maximum length"
        )
    return buckets[: int(np.searchsorted(buckets, longest)) + 1]


def bucket_index(lengths: np.ndarray, buckets: np.ndarray) -> np.ndarray:
    """Return int64 [n]: the smallest bucket that holds each sequence.

    Raises
    ------
    ConfigError
        If a sequence is longer than the last bucket.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    buckets = np.asarray(buckets, dtype=np.int64)
    if len(lengths) and lengths.max() > buckets[-1]:
        raise ConfigError(
            f"buckets: a sequence of {lengths.max()} tokens is longer than the last bucket "
            f"({buckets[-1]})"
        )
    return np.searchsorted(buckets, lengths)


def plan_buckets(
    lengths: Mapping[str, np.ndarray],
    batch_sizes: Mapping[str, int],
    num_buckets: int,
    longest: int = 1,
) -> np.ndarray:
    """Return the exact dynamic buckets of the expected batch; the last holds ``longest`` too.

    Each task's histogram is scaled to a hundred of its global batches and rounded, as LobRA does,
    so that tasks count by what they contribute to a step and not by the size of their data.
    """
    units, weights = [np.array([-(-longest // ALIGN)])], [np.zeros(1, dtype=np.int64)]
    for task, values in lengths.items():
        counts = np.bincount((checked_lengths(values, task) + (ALIGN - 1)) // ALIGN)
        occupied = np.flatnonzero(counts)
        share = counts[occupied] / counts.sum() * (batch_sizes[task] * BATCH_SCALE)
        units.append(occupied)
        weights.append(np.rint(share).astype(np.int64))
    return make_buckets(np.concatenate(units) * ALIGN, num_buckets, weights=np.concatenate(weights))


def checked_lengths(lengths: Sequence[int] | np.ndarray, task: str = "") -> np.ndarray:
    """Return int64 [n]: the lengths, if there is one and all are whole and positive.

    Raises
    ------
    ConfigError
        If not; it names the ``task``.
    """
    lengths = np.asarray(lengths)
    where = f"task {task!r}: " if task else ""
    if lengths.size == 0:
        raise ConfigError(f"{where}there is no sequence; every task needs at least one")
    if lengths.dtype.kind not in "iu":
        raise ConfigError(f"{where}lengths are {lengths.dtype}; whole numbers of tokens expected")
    if lengths.min() < 1:
        raise ConfigError(f"{where}a sequence of {lengths.min()} tokens; at least 1 is needed")
    return lengths.astype(np.int64, copy=False).ravel()


def _best_boundaries(units: np.ndarray, counts: np.ndarray, num_buckets: int) -> np.ndarray:
    """Return the indices into ``units`` of the buckets that minimise the padded units."""
    n = len(units)
    if n <= num_buckets:
        return np.arange(n)
    cumulative = np.concatenate(([0], np.cumsum(counts)))
    # Whole numbers throughout; 32 bits where they suffice, which halves the memory traffic.
    dtype: type[np.signedinteger] = (
        np.int32 if int(units[-1]) * int(cumulative[-1]) < 2**30 - 1 else np.int64
    )
    huge = np.iinfo(dtype).max // 2  # so large that no cost reaches it, and twice it still fits
    units_d: np.ndarray = units.astype(dtype)
    cumulative_d: np.ndarray = cumulative.astype(dtype)
    # cost[j, i]: padded units of one bucket ending at boundary j that starts after i boundaries
    blocks = _blocks(n)
    costs = []
    for start, stop in blocks:
        covered = cumulative_d[start + 1 : stop + 1, None] - cumulative_d[None, :stop]
        cost = units_d[start:stop, None] * covered
        cost[np.arange(stop)[None, :] > np.arange(start, stop)[:, None]] = huge
        costs.append(cost)
    # best[k][i]: padded units of the first i boundaries in k buckets
    best = [np.full(n + 1, huge, dtype=dtype)]
    best[0][0] = 0
    buffers = [np.empty_like(cost) for cost in costs]
    for _ in range(num_buckets):
        previous = best[-1]
        current = np.empty(n + 1, dtype=dtype)
        current[0] = 0
        for (start, stop), cost, buffer in zip(blocks, costs, buffers, strict=True):
            np.add(cost, previous[None, :stop], out=buffer)
            np.minimum(buffer, huge, out=buffer)
            current[start + 1 : stop + 1] = buffer.min(axis=1)
        best.append(current)
    chosen = []
    i = n
    for k in range(num_buckets, 0, -1):
        j = i - 1
        row = units[j] * (cumulative[i] - cumulative[:i]) + best[k - 1][:i].astype(np.int64)
        chosen.append(j)
        i = int(np.argmin(row))
        if i == 0:
            break
    return np.array(chosen[::-1])


def _blocks(n: int) -> list[tuple[int, int]]:
    edges = np.linspace(0, n, min(_COLUMN_BLOCKS, n) + 1).astype(int)
    return [(int(start), int(stop)) for start, stop in pairwise(edges)]
