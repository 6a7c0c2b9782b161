"""What the ranks report of a step, summed over the world and the same on every rank."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from lobra.layout.sequences import FloatArray

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class StepReport:
    """What became of an order.

    Attributes
    ----------
    losses, grad_norms
        Of every task in the order, by number: its summed token loss, of a task with examples the
        loss of its objective; and its gradient's norm.
    busy_s, arrival_s, memory_bytes
        Of every rank: seconds it computed; seconds from the order's arrival until it was ready to
        reduce; the most memory it has had in use since its last report.
    stop
        Whether some rank was told to stop.
    token_losses
        On rank 0, of sequences with labels, in the order's order, the loss of every label: float64.
    outcomes
        Of every task with examples, their `model.objectives.OUTCOMES`, added up, and its divergence
        from the base model, or the contrast of its pairs and what that counts for.
    failed
        Of every task whose update failed, on one rank at least, why: it was made on none.
    prepare_s, reduce_s, optimizer_s
        Of this rank alone: seconds it made tensors, reduced gradients (waiting for other ranks
        included), and updated and exchanged adapters.
    """

    losses: Mapping[int, float]
    grad_norms: Mapping[int, float]
    busy_s: tuple[float, ...]
    arrival_s: tuple[float, ...]
    memory_bytes: tuple[int, ...]
    stop: bool
    token_losses: tuple[FloatArray, ...] = ()
    outcomes: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    failed: Mapping[int, str] = field(default_factory=dict)
    prepare_s: float = 0.0
    reduce_s: float = 0.0
    optimizer_s: float = 0.0

    def is_finite(self, task: int) -> bool:
        """Return whether the task's gradient was finite."""
        return math.isfinite(self.grad_norms[task])

    def is_applied(self, task: int) -> bool:
        """Return whether the task's update was made."""
        return self.is_finite(task) and task not in self.failed


def step_memory_bytes() -> int:
    """Return this rank's peak of GPU memory since the last call, or its resident memory on CPU."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * PAGE_BYTES
    except OSError:  # not Linux
        return 0
