"""A task file that is watched: tasks that are added to it join the run, others leave with it."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

from lobra.common.errors import ConfigError
from lobra.tasks.config import TaskConfig
from lobra.tasks.task_file import load_trainer_config
from lobra.trainer.task_requests import TaskRequest

log = logging.getLogger(__name__)


def request_to_join(task: TaskConfig) -> TaskRequest:
    """Return the request that a task joins, its fields as JSON has them."""
    return TaskRequest(task.name, json.loads(json.dumps(asdict(task))))


class TaskFileWatch:
    """Looks at a task file and says what to ask of the run when it has changed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int] | None = None
        self._tasks: dict[str, TaskConfig] = {}

    def requests(self, known: Collection[str]) -> list[TaskRequest]:
        """Return what a run is to be asked that has had tasks of these names.

        A file with mistakes changes nothing; they are warned of.
        """
        try:
            found = self._path.stat()
        except OSError:  # in the middle of being replaced, or gone: nothing changes
            return []
        if (stamp := (found.st_mtime_ns, found.st_size)) == self._stamp:
            return []
        self._stamp = stamp
        try:
            tasks = {task.name: task for task in load_trainer_config(self._path).tasks}
        except ConfigError as error:
            log.warning("the run's tasks stay as they are: %s", error)
            return []
        before, self._tasks = self._tasks, tasks
        for name in before.keys() & tasks.keys():
            if tasks[name] != before[name]:
                log.warning(
                    "%s: task %s trains on as it was: other fields count when the run goes on with "
                    "--resume",
                    self._path, name,
                )  # fmt: skip
        joining = [request_to_join(task) for name, task in tasks.items() if name not in known]
        return [*joining, *(TaskRequest(name) for name in before.keys() - tasks.keys())]
