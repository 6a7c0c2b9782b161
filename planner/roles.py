"""The plan explained: what each layout does, and why it is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lobra.layout.plan import ReplicaGroup
from lobra.planner.outcome import SAME


@dataclass(frozen=True)
class Role:
    """One replica group's part in the steps a plan was made for.

    Attributes
    ----------
    group
        The replicas.
    shortest, longest
        The lengths it takes, in tokens (0 if none).
    tokens_share
        Its part of the tokens, 0 to 1.
    reason
        Why it is there, one clause.
    """

    group: ReplicaGroup
    shortest: int
    longest: int
    tokens_share: float
    reason: str


def explained(
    groups: Sequence[ReplicaGroup], lengths: np.ndarray, taken: np.ndarray, rate_s: np.ndarray
) -> list[Role]:
    """Return every group's role.

    Parameters
    ----------
    lengths
        int64 [R]: ascending, in tokens.
    taken
        int64 [groups, R]: sequences of each length that each group takes.
    rate_s
        float64 [groups, R]: what one costs it, in seconds; infinite where it does not fit.
    """
    sizes = np.array([group.layout.num_gpus for group in groups])
    gpu_seconds = rate_s * sizes[:, None]
    tokens = taken * lengths
    found = []
    for index, group in enumerate(groups):
        mine = np.flatnonzero(taken[index])
        if not len(mine):
            found.append(Role(group, 0, 0, 0.0, "spare: it takes nothing of these steps"))
            continue
        share = float(tokens[index].sum() / tokens.sum())
        capacity = max((other.max_tokens for other in groups if other is not group), default=0)
        reason = _reason(index, mine, tokens[index], gpu_seconds, lengths, capacity)
        found.append(Role(group, int(lengths[mine[0]]), int(lengths[mine[-1]]), share, reason))
    return found


def saturation(step_time_s: float, length: int, alone_s: float) -> str | None:
    """Return a sentence if a sequence of a length alone takes as long as the step, else None.

    Then further replicas gain nothing: only layouts that are faster for that sequence would.
    """
    if step_time_s > alone_s * (1 + SAME):
        return None
    return (
        f"a single sequence of {length} tokens takes as long as the step, {alone_s:.4g} s: more "
        f"GPUs gain nothing with these layouts, and fewer may do"
    )


def _reason(
    index: int,
    mine: np.ndarray,
    tokens: np.ndarray,
    gpu_seconds: np.ndarray,
    lengths: np.ndarray,
    others_capacity: int,
) -> str:
    others = np.delete(gpu_seconds, index, axis=0)
    if not len(others):
        return "the only layout of the plan"
    if not np.isfinite(others[:, mine]).any(axis=0).all():
        return f"the only one that holds sequences beyond {others_capacity} tokens"
    main = int(mine[np.argmax(tokens[mine])])
    rival = float(others[:, main].min())
    gain = rival / float(gpu_seconds[index, main]) - 1.0
    if gain > 1e-6:
        return f"others take {gain:.0%} more GPU time for sequences of {lengths[main]} tokens"
    return "takes what the cheaper layouts have no room for, so that all end together"
