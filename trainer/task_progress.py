"""A task of a run and how far it has come: its own steps, what was skipped, whether it has ended.

Everything a task does is a function of its own steps, those it has taken part in: a task that joins
a run late does what it would have done from the run's start on.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from lobra.common.models import Count, FileModel
from lobra.tasks.config import TaskConfig
from lobra.tasks.dataset import TokenizedDataset

MAX_SKIPPED_IN_ROW = 5


@dataclass
class LossHistory(FileModel):
    """A task's first and last losses, as far as they are known; None: it was not finite.

    Attributes
    ----------
    first_step, last_step
        The own steps, counted from 1, that the first and the last known loss are of; 0: none is.
    first, last
        Those losses.
    held_out, lowest_held_out
        The last and the lowest loss of the held-out sequences; None: there is none.
    """

    first_step: Count = 0
    first: float | None = None
    last_step: Count = 0
    last: float | None = None
    held_out: float | None = None
    lowest_held_out: float | None = None

    def note(self, step: int, loss: float) -> None:
        """Note the loss of an own step, counted from 1."""
        known = loss if math.isfinite(loss) else None
        if not self.first_step:
            self.first_step, self.first = step, known
        self.last_step, self.last = step, known

    def note_held_out(self, loss: float) -> None:
        """Note the mean loss of the held-out sequences."""
        if math.isfinite(loss):
            lowest = self.lowest_held_out
            self.held_out = loss
            self.lowest_held_out = loss if lowest is None else min(lowest, loss)


@dataclass
class TaskProgress(FileModel):
    """What a task has done so far.

    Attributes
    ----------
    num_steps
        Steps the task was asked to run.
    steps
        Steps it has taken part in.
    updates
        Optimiser steps applied (Adam's step count).
    skipped, skipped_in_row
        Updates left out because the gradient was not finite, or taken back because they failed.
    best_loss, bad_periods
        Early stopping: the best loss of an evaluation period, and how many periods since brought
        nothing better.
    period_loss, period_steps
        Training losses summed over the running period.
    lowest_loss, lowest_step
        The lowest validation loss of a period, and after which own step it was found: that of the
        adapter that is exported. Only of tasks that may stop early.
    exported_step
        The own step after which the adapter was last exported.
    stopped
        Why the task ended before its steps were over (briefly, a semicolon, and more), or None.
    losses
        What its losses were.
    """

    num_steps: Count
    steps: Count = 0
    updates: Count = 0
    skipped: Count = 0
    skipped_in_row: Count = 0
    best_loss: float = math.inf
    bad_periods: Count = 0
    period_loss: float = 0.0
    period_steps: Count = 0
    lowest_loss: float = math.inf
    lowest_step: Count | None = None
    exported_step: Count | None = None
    stopped: str | None = None
    losses: LossHistory = field(default_factory=LossHistory)

    @property
    def steps_left(self) -> int:
        """Steps the task is still to take part in."""
        return 0 if self.stopped is not None else max(0, self.num_steps - self.steps)

    def revive(self) -> None:
        """Let a stopped task go on: its counts of bad steps and periods start anew."""
        self.stopped = None
        self.skipped_in_row = 0
        self.bad_periods = 0
        self.best_loss = math.inf
        self.period_loss, self.period_steps = 0.0, 0

    def record(self, loss: float | None, applied: bool, failure: str | None = None) -> str | None:
        """Note one step the task took part in; return a message when that ends the task.

        Parameters
        ----------
        loss
            Its mean loss; None if nothing of its batch was to be learned.
        applied
            Whether its adapter was updated.
        failure
            Why its update failed, if it did.
        """
        self.steps += 1
        if loss is None:
            return None
        self.losses.note(self.steps, loss)
        if applied:
            self.updates += 1
            self.skipped_in_row = 0
        else:
            self.skipped += 1
            self.skipped_in_row += 1
        if math.isfinite(loss):
            self.period_loss += loss
            self.period_steps += 1
        if failure is not None:
            self.stopped = (
                f"its update failed: {failure}; its weights are those of the step before: lower "
                f"its learning rate"
            )
        elif self.skipped_in_row >= MAX_SKIPPED_IN_ROW:
            self.stopped = (
                f"gradient not finite in {self.skipped_in_row} steps in a row; look at its data, "
                f"or lower its learning rate"
            )
        return self.stopped

    def ends_period(self, every: int) -> bool:
        """Return whether an evaluation period of ``every`` steps ends with the step just made.

        A task's periods are of its own steps, and the last ends with its steps: what other tasks do
        and where the run ends must not matter to it.
        """
        return self.steps % every == 0 or self.steps == self.num_steps

    def note_validation(self, validation_loss: float) -> bool:
        """Note a period's validation loss; return whether it is the lowest so far."""
        if not validation_loss < self.lowest_loss:
            return False
        self.lowest_loss, self.lowest_step = validation_loss, self.steps
        return True

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

    def as_json(self) -> dict[str, Any]:
        """Return plain values; a loss of infinity as None, which reads as not given."""
        return {name: None if v == math.inf else v for name, v in asdict(self).items()}


@dataclass
class RunTask:
    """A task of a run: what it is, its data, how far it has come, what checkpoints know it by."""

    config: TaskConfig
    data: TokenizedDataset
    progress: TaskProgress
    record: dict[str, Any] = field(default_factory=dict)
