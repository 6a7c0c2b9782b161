"""The records of a run, written step by step: metrics.jsonl, trackers, the screen."""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path

from lobra.tasks.config import TaskConfig
from lobra.trainer.forecast import Outlook
from lobra.trainer.metrics import MetricsFile, StepMetrics
from lobra.trainer.run_spec import RunSpec
from lobra.trainer.screen import Screen
from lobra.trainer.task_progress import TaskProgress
from lobra.trainer.trackers import open_tracker


class Records:
    """Writes to all records of a run, while it is entered."""

    def __init__(self, run: RunSpec, begin: int) -> None:
        """Write the steps from ``begin`` on."""
        self._file = MetricsFile(run.output_dir)
        self._trackers = [open_tracker(name, run, begin) for name in run.report_to]
        self._screen = Screen(begin, run.last_step)
        self._open = ExitStack()

    def write(self, metrics: StepMetrics, outlook: Outlook) -> None:
        """Write one step, and show what is left."""
        self._file.write(metrics)
        for tracker in self._trackers:
            tracker.write(metrics)
        self._screen.write(metrics, outlook)

    def tell(self, text: str) -> None:
        """Say something that has happened between two steps."""
        self._screen.tell(text)

    def tell_export(
        self, task: TaskConfig, progress: TaskProgress, folder: Path, is_best: bool
    ) -> None:
        """Say that what a task trains was written, and whether it is the best or the last one."""
        what = "stopped after" if progress.stopped else "made"
        best = ""
        if is_best:
            best = (
                f", the best of its evaluations: after step {progress.lowest_step}, "
                f"validation loss {progress.lowest_loss:.3f}"
            )
        steps = f"{progress.steps} of {progress.num_steps} steps"
        self._screen.tell(f"task {task.name}: {what} {steps}; its {task.trained} is {folder}{best}")

    def __enter__(self) -> Records:
        self._open.enter_context(closing(self._file))
        self._open.enter_context(self._screen)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._open.close()
        for tracker in self._trackers:
            tracker.close(failed=kind is not None)
