"""Which replica and micro-batch every sequence of a step is assigned to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Rows:
    """Which sequences make one micro-batch.

    Attributes
    ----------
    indices
        int64 [b]: positions in the lengths that were dispatched.
    padded_tokens
        Tokens computed, padding included.
    padded_length
        What all are padded to; None: they are packed.
    """

    indices: np.ndarray
    padded_tokens: int
    padded_length: int | None = None

    @property
    def num_sequences(self) -> int:
        """Sequences in the micro-batch."""
        return len(self.indices)


@dataclass(frozen=True, eq=False)
class Assignment:
    """One step's work.

    Attributes
    ----------
    micro_batches
        Per replica, in plan order, its micro-batches, the costliest first.
    replica_time_s
        float64 [replicas]: predicted busy time, the pipeline's bubble included.
    lower_bound_s
        No dispatch over this plan is faster: of the same buckets, or packed.
    sync_time_s
        What synchronising the adapters adds after the slowest replica, where that was profiled.
    """

    micro_batches: tuple[tuple[Rows, ...], ...]
    replica_time_s: np.ndarray
    lower_bound_s: float
    sync_time_s: float = 0.0

    @property
    def step_time_s(self) -> float:
        """The slowest replica's time."""
        return float(self.replica_time_s.max())

    @property
    def padded_tokens(self) -> int:
        """Tokens computed by all replicas, padding included."""
        return sum(batch.padded_tokens for batches in self.micro_batches for batch in batches)
