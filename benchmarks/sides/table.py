"""What was measured of each side, and the table made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from benchmarks.sides.side import Trained

LIMIT = "base"  # the side that the others' shares are of
MIB = 1 << 20


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

    def summary(self, limit: Result | None = None) -> dict[str, Any]:
        """Return medians over the steps; shares are of the limit's speed in the same steps."""
        found: dict[str, Any] = {"tasks": self.num_tasks, "rank": self.rank, "side": self.side}
        if self.steps:
            trained = [step.trained for step in self.steps]
            tokens = sum(step.tokens for step in self.steps)
            found |= {
                "tokens_per_s": median(step.tokens / step.trained.time_s for step in self.steps),
                "tflops": median(step.flops / step.trained.time_s for step in self.steps) / 1e12,
                "step_s": median(step.time_s for step in trained),
                "micro_batches": median(step.micro_batches for step in trained),
                "micro_batch_ms": 1e3 * median(s.time_s / s.micro_batches for s in trained),
                "padded_per_real": sum(step.padded_tokens for step in trained) / tokens,
            }
        if self.steps and limit is not None and limit.steps:
            found |= self._shares(limit)
        if self.held_bytes is not None and self.step_bytes is not None:
            found["peak_mib"] = (self.held_bytes + self.step_bytes) / MIB
            found["step_mib"] = self.step_bytes / MIB
        if self.launches is not None:
            found["launches"] = self.launches
        if self.failure is not None:
            found["failure"] = self.failure
        return found

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

    def as_json(self) -> dict[str, Any]:
        """Return every field."""
        return asdict(self)


COLUMNS = {
    "tasks": ("tasks", "{}"),
    "rank": ("rank", "{}"),
    "side": ("side", "{}"),
    "tokens_per_s": ("tokens/s", "{:,.0f}"),
    "tflops": ("TFLOP/s", "{:.3g}"),
    "share": ("of limit", "{:.1%}"),
    "compute_share": ("fwd+bwd", "{:.1%}"),
    "step_s": ("step s", "{:.2f}"),
    "micro_batch_ms": ("micro-b. ms", "{:.1f}"),
    "padded_per_real": ("padded/real", "{:.3f}"),
    "peak_mib": ("peak MiB", "{:,.0f}"),
    "step_mib": ("step MiB", "{:,.0f}"),
    "launches": ("launches", "{:,}"),
    "failure": ("", "{}"),
}


def summaries(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return every result's summary, with shares of the limit measured beside it."""
    limits = {(r.num_tasks, r.rank): r for r in results if r.side == LIMIT}
    return [result.summary(limits.get((result.num_tasks, result.rank))) for result in results]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return summaries as lines of aligned columns; a dash where nothing was measured."""
    columns = [key for key in COLUMNS if key != "failure" or any(key in row for row in rows)]
    cells = [[COLUMNS[key][0] for key in columns]]
    cells += [
        [COLUMNS[key][1].format(row[key]) if key in row else "-" for key in columns] for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )
