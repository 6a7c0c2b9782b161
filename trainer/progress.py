"""What a person sees while a run trains: a progress bar, or a line a step without a terminal."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

from lobra.trainer.metrics import StepMetrics
from lobra.trainer.run_spec import RunSpec


class Progress:
    """Shows each step on standard error."""

    def __init__(self, run: RunSpec, first_step: int = 0) -> None:
        self.total = run.last_step
        self.console = Console(file=sys.stderr)
        self.bar: RichProgress | None = None
        if self.console.is_terminal:
            self.bar = RichProgress(
                SpinnerColumn(),
                TextColumn("step"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[state]}"),
                console=self.console,
            )
            self.bar_task = self.bar.add_task(
                "train", total=self.total, completed=first_step, state=""
            )

    def update(self, metrics: StepMetrics) -> None:
        """Show one finished step."""
        state = describe(metrics)
        if self.bar is not None:
            self.bar.update(self.bar_task, advance=1, state=state)
        else:
            line = f"step {metrics.step + 1}/{self.total}  {state}"
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Progress:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.stop()


def describe(metrics: StepMetrics) -> str:
    """Return one step in a line: losses, speed, measured and predicted time."""
    losses = " ".join(f"{name} {task.loss:.3f}" for name, task in metrics.tasks.items())
    return (
        f"{metrics.step_time_s:.2f} s (predicted {metrics.predicted_step_time_s:.2f})  "
        f"{metrics.tokens_per_second:,.0f} tok/s  loss: {losses}"
    )
