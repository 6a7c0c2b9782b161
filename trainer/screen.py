"""What a person sees while a run trains: a progress bar, or a line a step without a terminal."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lobra.trainer.metrics import StepMetrics


class Screen:
    """Shows the steps from ``begin`` to ``end`` of a run on standard error."""

    def __init__(self, begin: int, end: int) -> None:
        self.end = end
        self.console = Console(file=sys.stderr)
        self.bar: Progress | None = None
        if self.console.is_terminal:
            self.bar = Progress(
                SpinnerColumn(),
                TextColumn("step"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[latest]}"),
                console=self.console,
            )
            self.bar_task = self.bar.add_task("train", total=end, completed=begin, latest="")

    def write(self, metrics: StepMetrics) -> None:
        """Show one finished step."""
        latest = describe(metrics)
        if self.bar is not None:
            self.bar.update(self.bar_task, advance=1, latest=latest)
        else:
            line = f"step {metrics.step + 1}/{self.end}  {latest}"
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Screen:
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
