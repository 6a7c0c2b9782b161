"""A task's life in a run: running, skipped for a bad gradient, ended, stopped on a plateau.

Every rank keeps the same `TaskLife` objects, fed with the same broadcast figures, so all agree
on who takes part without asking each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lobra.tasks.config import TaskConfig

MAX_SKIPPED_IN_ROW = 5


@dataclass
class TaskLife:
    """What happened to a task so far.

    Attributes:
        num_steps: steps the task was asked to run.
        updates: optimiser steps applied (Adam's step count).
        skipped, skipped_in_row: updates left out because the gradient was not finite.
        best_loss, bad_periods: early stopping: the best loss of an evaluation period, and how many
            periods since brought nothing better.
        period_loss, period_steps: training losses summed over the running period.
        stopped: why the task ended before its steps were over (briefly, a semicolon, and more),
            or None.
    """

    num_steps: int
    updates: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    best_loss: float = math.inf
    bad_periods: int = 0
    period_loss: float = 0.0
    period_steps: int = 0
    stopped: str | None = None

    def runs_at(self, step: int) -> bool:
        """Return whether the task takes part in `step` (0-based)."""
        return self.stopped is None and step < self.num_steps

    def revive(self) -> None:
        """Let a stopped task go on: its counts of bad steps and periods start anew."""
        self.stopped = None
        self.skipped_in_row = 0
        self.bad_periods = 0
        self.best_loss = math.inf
        self.period_loss, self.period_steps = 0.0, 0

    def record(self, applied: bool, loss: float) -> str | None:
        """Note one step the task took part in; return a message when that ends the task."""
        if applied:
            self.updates += 1
            self.skipped_in_row = 0
        else:
            self.skipped += 1
            self.skipped_in_row += 1
        if math.isfinite(loss):
            self.period_loss += loss
            self.period_steps += 1
        if self.skipped_in_row >= MAX_SKIPPED_IN_ROW:
            self.stopped = (
                f"gradient not finite in {self.skipped_in_row} steps in a row; look at its data, "
                f"or lower its learning rate"
            )
        return self.stopped

    def end_period(self, task: TaskConfig, validation_loss: float | None) -> str | None:
        """Close an evaluation period; return a message when the task is stopped on a plateau."""
        if validation_loss is None and self.period_steps == 0:
            return None
        loss = validation_loss
        if loss is None:
            loss = self.period_loss / self.period_steps
        self.period_loss, self.period_steps = 0.0, 0
        if loss < self.best_loss - task.early_stopping_min_delta:
            self.best_loss, self.bad_periods = loss, 0
            return None
        self.bad_periods += 1
        if 0 < task.early_stopping_patience <= self.bad_periods:
            kind = "training" if validation_loss is None else "validation"
            self.stopped = (
                f"plateau of its {kind} loss; not below {self.best_loss:.4f} by more than "
                f"{task.early_stopping_min_delta:g} for {self.bad_periods} periods"
            )
        return self.stopped


def lives_to_json(lives: Sequence[TaskLife]) -> list[dict[str, Any]]:
    """Return the lives as plain values (infinity as None)."""
    entries = [asdict(life) for life in lives]
    for entry in entries:
        entry["best_loss"] = entry["best_loss"] if math.isfinite(entry["best_loss"]) else None
    return entries


def lives_from_json(entries: Sequence[dict[str, Any]]) -> list[TaskLife]:
    """Return what `lives_to_json` was given."""
    lives = []
    for entry in entries:
        best = math.inf if entry["best_loss"] is None else entry["best_loss"]
        lives.append(TaskLife(**{**entry, "best_loss": best}))
    return lives
