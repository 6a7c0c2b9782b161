"""A run while it trains: the steps it has made, and its tasks as they are now."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lobra.tasks.config import TaskConfig
from lobra.tasks.dataset import TokenizedDataset
from lobra.trainer.checkpoint import CheckpointState
from lobra.trainer.live_tasks import starting_tasks, with_tasks
from lobra.trainer.orders import Attendance
from lobra.trainer.run_spec import RunSpec
from lobra.trainer.task_progress import RunTask, TaskProgress

log = logging.getLogger(__name__)


class LiveRun:
    """What of a run changes with its steps, and with tasks that come and go.

    Attributes
    ----------
    spec
        The run with the tasks it has now.
    step
        The steps it has made.
    tasks
        Its tasks by number; a number is never given twice.
    """

    def __init__(self, spec: RunSpec, state: CheckpointState | None = None) -> None:
        """Begin with the run's tasks; of a run that goes on, as the checkpoint knows them."""
        self.spec = spec
        self.step = 0
        self.tasks = dict(enumerate(starting_tasks(spec)))
        self._next_number = len(self.tasks)
        if state is not None:
            self._go_on(state)

    def _go_on(self, state: CheckpointState) -> None:
        self.step = state.step
        for task in self.tasks.values():
            name = task.config.name
            task.progress = replace(state.progress[name], num_steps=task.progress.num_steps)
            if task.progress.stopped is None:
                continue
            if name in self.spec.revive:
                task.progress.revive()
                log.warning("task %s goes on from its step %d", name, task.progress.steps + 1)
            else:
                log.warning(
                    "task %s stays stopped: %s (--revive %s lets it go on)",
                    name, task.progress.stopped, name,
                )  # fmt: skip

    @property
    def configs(self) -> Mapping[int, TaskConfig]:
        """The tasks as they are configured, by number."""
        return {number: task.config for number, task in self.tasks.items()}

    def number_of(self, name: str) -> int | None:
        """Return the number of a task, None if the run has none of this name."""
        numbers = {task.config.name: number for number, task in self.tasks.items()}
        return numbers.get(name)

    def attendance(self, after: Attendance | None = None) -> Attendance:
        """Return who takes part in the next step; or, if none is stopped in it, in that `after`."""
        step = self.step if after is None else after.step + 1
        made = () if after is None else dict(after.own_steps)
        if step >= self.spec.last_step:
            return Attendance(step)
        own_steps = [
            (number, task.progress.steps + (number in made))
            for number, task in self.tasks.items()
            if task.progress.steps_left > (number in made)
        ]
        return Attendance(step, tuple(own_steps))

    @property
    def is_over(self) -> bool:
        """Whether no task takes part in a next step."""
        return not self.attendance().own_steps

    @property
    def standing(self) -> dict[str, tuple[int, int]]:
        """By name of every task the steps it has made, and those left to it in this run."""
        left = self.spec.last_step - self.step
        return {
            task.config.name: (task.progress.steps, min(task.progress.steps_left, left))
            for task in self.tasks.values()
        }

    def add(self, config: TaskConfig, num_steps: int, record: dict[str, Any]) -> int:
        """Take a task in, whose data lie where those of the run's tasks do; return its number."""
        data = TokenizedDataset.load(self.spec.data_folder(config.name))
        number, self._next_number = self._next_number, self._next_number + 1
        self.tasks[number] = RunTask(config, data, TaskProgress(num_steps), record)
        return number

    def follow_tasks(self) -> None:
        """Make the run that of its tasks, after these have changed."""
        self.spec = with_tasks(self.spec, list(self.tasks.values()), self.step)
