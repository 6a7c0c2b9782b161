"""What was measured of each side, and the row made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from benchmarks.sides.side import Trained

LIMIT = "base"  # the side that the others' shares are of
MIB = 1 << 20
MEASURED = (
    "tokens_per_s",
    "tflops",
    "share",
    "compute_share",
    "step_s",
    "micro_batch_ms",
    "padded_per_real",
    "peak_mib",
    "step_mib",
)


@dataclass(frozen=True)
class TimedStep:
    """A step: its number, real tokens and operations, the same for all sides, and how it went."""

    number: int
    tokens: int
    flops: float
    trained: Trained


@dataclass
class Result:
    """A side's steps in one setting; what could not be measured is None.

    Attributes
    ----------
    first_losses
        Of every task, of a step before the timed ones, when no adapter had been updated.
    held_bytes
        What the side keeps between steps: frozen weights, adapters, optimiser.
    step_bytes
        The most that a step took beyond that.
    launches
        Of one micro-batch's sequences, forward and backward: kernels on a GPU, operators on a CPU.
    failure
        Why it could not go on.
    """

    side: str
    num_tasks: int
    rank: int
    first_losses: tuple[float, ...] = ()
    steps: list[TimedStep] = field(default_factory=list)
    held_bytes: int | None = None
    step_bytes: int | None = None
    launches: int | None = None
    failure: str | None = None

    def row(self, limit: Result | None = None) -> dict[str, Any]:
        """Return medians over the steps; shares are of the limit's speed in the same steps."""
        row: dict[str, Any] = {"tasks": self.num_tasks, "rank": self.rank, "side": self.side}
        row |= dict.fromkeys(MEASURED)
        row |= {"launches": self.launches, "failure": self.failure}
        if self.steps:
            trained = [step.trained for step in self.steps]
            tokens = sum(step.tokens for step in self.steps)
            row |= {
                "tokens_per_s": median(step.tokens / step.trained.time_s for step in self.steps),
                "tflops": median(step.flops / step.trained.time_s for step in self.steps) / 1e12,
                "step_s": median(step.time_s for step in trained),
                "micro_batch_ms": 1e3 * median(s.time_s / s.micro_batches for s in trained),
                "padded_per_real": sum(step.padded_tokens for step in trained) / tokens,
            }
        if limit is not None:
            row |= self._shares(limit)
        if self.held_bytes is not None and self.step_bytes is not None:
            row["peak_mib"] = (self.held_bytes + self.step_bytes) / MIB
            row["step_mib"] = self.step_bytes / MIB
        steps = [asdict(step) for step in self.steps]
        return row | {"first_losses": self.first_losses, "steps": steps}

    def _shares(self, limit: Result) -> dict[str, float]:
        """Return whole steps' speed, and that of forward and backward passes, over the limit's."""
        limit_s = {step.number: step.trained.time_s for step in limit.steps}
        pairs = [(limit_s[s.number], s.trained) for s in self.steps if s.number in limit_s]
        if not pairs:
            return {}
        return {
            "share": median(time_s / trained.time_s for time_s, trained in pairs),
            "compute_share": median(time_s / trained.compute_s for time_s, trained in pairs),
        }


def rows_of(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return every result's row, with shares of the limit measured beside it."""
    limits = {(r.num_tasks, r.rank): r for r in results if r.side == LIMIT}
    return [result.row(limits.get((result.num_tasks, result.rank))) for result in results]
