"""The records of a run, written step by step: metrics.jsonl, TensorBoard, the screen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from lobra.trainer.metrics import MetricsFile, StepMetrics
from lobra.trainer.screen import Screen
from lobra.trainer.tensorboard import TensorBoard


@contextmanager
def open_records(folder: Path, begin: int, end: int) -> Iterator[Callable[[StepMetrics], None]]:
    """Give what writes a step to all records of the run that makes the steps from begin to end."""
    with (
        closing(MetricsFile(folder)) as file,
        closing(TensorBoard(folder, begin)) as board,
        Screen(begin, end) as screen,
    ):

        def write(metrics: StepMetrics) -> None:
            file.write(metrics)
            board.write(metrics)
            screen.write(metrics)

        yield write
