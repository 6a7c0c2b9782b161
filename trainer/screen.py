"""What a person sees while a run trains: progress bars, or a line a step without a terminal."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from lobra.common.words import counted
from lobra.trainer.forecast import Outlook
from lobra.trainer.metrics import StepMetrics, TaskMetrics

MOST_TASK_BARS = 16  # more do not leave room for anything else on a terminal


class Screen:
    """Shows the steps of a run on standard error, from ``begin`` on."""

    def __init__(self, begin: int, end: int) -> None:
        """Show the progress of the run and of its tasks; ``end`` is its last step, as it seems."""
        self.console = Console(file=sys.stderr)
        self.bars: Progress | None = None
        self.rows: dict[str, TaskID] = {}
        self.validation: dict[str, float] = {}  # the latest of every task
        if self.console.is_terminal:
            self.bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[latest]}"),
                console=self.console,
            )
            self.whole = self.bars.add_task("all", total=end, completed=begin, latest="")

    def write(self, metrics: StepMetrics, outlook: Outlook) -> None:
        """Show one finished step, and what is left."""
        end = metrics.step + 1 + outlook.steps_left
        if self.bars is None:
            line = f"step {metrics.step + 1}/{end}  {describe(metrics, outlook)}"
            self.tell(f"{line}  {describe_tasks(metrics, outlook)}")
            return
        latest = describe(metrics, outlook)
        self.bars.update(self.whole, completed=metrics.step + 1, total=end, latest=latest)
        self._choose_rows(self.bars, outlook)
        for name, row in self.rows.items():
            task = outlook.tasks[name]
            total = task.steps + task.steps_left
            self.bars.update(row, completed=task.steps, total=total, visible=total > 0)
            if name in metrics.tasks:
                own = metrics.tasks[name]
                if own.validation_loss is not None:
                    self.validation[name] = own.validation_loss
                shown = losses(replace(own, validation_loss=self.validation.get(name)))
                self.bars.update(row, latest=f"{shown}, {clock(task.time_left_s)} left")

    def _choose_rows(self, bars: Progress, outlook: Outlook) -> None:
        """Have a row for every task that the run has now, if there is room for them."""
        shown = outlook.tasks.keys() if len(outlook.tasks) <= MOST_TASK_BARS else set()
        for name in self.rows.keys() - shown:
            bars.remove_task(self.rows.pop(name))
        for name in outlook.tasks:
            if name in shown and name not in self.rows:
                self.rows[name] = bars.add_task(name, total=None, latest="", visible=False)

    def tell(self, text: str) -> None:
        """Show a line that stays; that nobody reads it, or there is no room, ends no run."""
        with suppress(OSError):
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Screen:
        if self.bars is not None:
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bars is not None:
            self.bars.stop()


def describe(metrics: StepMetrics, outlook: Outlook) -> str:
    """Return a step in a line: measured and predicted time, speed, and the time that is left."""
    speed = f"{metrics.tokens_per_s:,.0f} tokens/s"
    if metrics.mfu is not None:
        speed += f" (MFU {metrics.mfu:.1%})"
    return (
        f"{metrics.step_time_s:.2f} s (predicted {metrics.predicted_step_time_s:.2f})  {speed}  "
        f"{clock(outlook.time_left_s)} left (predicted {clock(outlook.predicted_left_s)})"
    )


def describe_tasks(metrics: StepMetrics, outlook: Outlook) -> str:
    """Return a step's tasks in a line: their losses, and the steps and time they have left."""
    parts = []
    for name, task in metrics.tasks.items():
        own = outlook.tasks[name]
        left = f"{counted(own.steps_left, 'step')}, {clock(own.time_left_s)} left"
        parts.append(f"{name} {losses(task)} ({left if own.steps_left else 'its last step'})")
    return "; ".join(parts)


def losses(task: TaskMetrics) -> str:
    """Return a task's loss and, where it was evaluated, its validation loss."""
    validation = "" if task.validation_loss is None else f" validation {task.validation_loss:.3f}"
    return f"loss {task.loss:.3f}{validation}"


def clock(seconds: float) -> str:
    """Return a time as hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))
