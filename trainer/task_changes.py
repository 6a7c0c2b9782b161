"""Changes of a run's tasks while it trains: asked for, checked on a thread, made between steps."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date

from lobra.common.errors import ConfigError
from lobra.tasks.text_processor import TextProcessor
from lobra.trainer.admission import Newcomer, newcomer_of
from lobra.trainer.run_spec import RunSpec
from lobra.trainer.task_file_watch import TaskFileWatch
from lobra.trainer.task_requests import (
    TaskAnswer,
    TaskChange,
    TaskRequest,
    accepted_changes,
    answer,
    send,
    waiting,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DueChange:
    """A change that can be made now, or refused.

    Attributes
    ----------
    id
        Of the request.
    request
        What is asked for.
    """

    id: str
    request: TaskRequest


class TaskChanges:
    """What is asked of a run, and what of that it has done.

    Attributes
    ----------
    made
        All changes that have had their effect, in order.
    names
        The tasks the run has ever had: no other may have such a name.
    """

    def __init__(self, run: RunSpec, made: Sequence[TaskChange]) -> None:
        """Go on after these changes, and make again those that were accepted later."""
        self.run = run
        self.made = list(made)
        self.names = {task.name for task in run.tasks}
        self.names |= {change.request.name for change in made}
        self._processor = TextProcessor.of_folder(
            lambda: run.model_folder, date.fromisoformat(run.data_day) if run.data_day else None
        )
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="newcomers")
        self._checks: dict[str, Future[Newcomer]] = {}
        self._refused: set[str] = set()
        self._again: list[TaskChange] = []
        self._watch: TaskFileWatch | None = None
        if run.admission is None:
            return
        known = {change.id for change in made}
        self._again = [c for c in accepted_changes(run.output_dir) if c.id not in known]
        for change in self._again:
            self._is_checked(change.id, change.request)
        if run.admission.task_file is not None:
            self._watch = TaskFileWatch(run.admission.task_file)

    def due(self, step: int, waits: bool) -> Iterator[DueChange]:
        """Yield what can be changed after ``step`` steps of the run.

        What was accepted before the run was interrupted is due at its step again. Other requests
        are when they have been checked, which is waited for if the run has nothing else to do.
        """
        if self.run.admission is None:
            return
        while self._again and self._again[0].step <= step:
            change = self._again.pop(0)
            yield DueChange(change.id, change.request)
        if self._watch is not None:
            known = self.names | {change.request.name for change in self._again}
            try:
                for request in self._watch.requests(known):
                    send(self.run.output_dir, request)
            except OSError as error:
                log.warning("the task file's changes cannot be asked for: %s", error)
        for name, request in waiting(self.run.output_dir).items():
            if name not in self._refused and (self._is_checked(name, request) or waits):
                yield DueChange(name, request)

    def _is_checked(self, name: str, request: TaskRequest) -> bool:
        """Return whether a request has been checked; begin to check one that is new."""
        if request.task is None:
            return True
        if name not in self._checks:
            self._checks[name] = self._thread.submit(
                newcomer_of, self.run, request.task, self._processor
            )
        return self._checks[name].done()

    def left_at(self, name: str) -> int | None:
        """Return after how many steps of the run a task left it, None if it has not."""
        steps = [change.step for change in self.made if change.request == TaskRequest(name)]
        return steps[-1] if steps else None

    def newcomer(self, due: DueChange) -> Newcomer:
        """Return the task that is to join, with its data.

        Raises
        ------
        ConfigError
            If it may not.
        """
        name = due.request.name
        if name.casefold() in map(str.casefold, self.names):
            raise ConfigError("the run has, or had, a task of this name")
        try:
            found = self._checks.pop(due.id).result()
        except OSError as error:
            raise ConfigError(f"cannot be read: {error}") from error
        if found.config.name != name:
            raise ConfigError(f"its fields call it {found.config.name}")
        return found

    def accept(self, due: DueChange, step: int, text: str) -> None:
        """Answer that a change is made after ``step`` steps; on disk before it has an effect."""
        try:
            answer(self.run.output_dir, due.id, TaskAnswer(True, text, step, due.request))
        except OSError as error:
            raise ConfigError(f"the answer cannot be written: {error}") from error
        self.made.append(TaskChange(due.id, step, due.request))
        self.names.add(due.request.name)

    def refuse(self, due: DueChange, step: int, text: str) -> None:
        """Answer that a change is not made, and why."""
        log.warning("task %s is refused what it asked: %s", due.request.name, text)
        self._checks.pop(due.id, None)
        self._refused.add(due.id)
        try:
            answer(self.run.output_dir, due.id, TaskAnswer(False, text, step, due.request))
        except OSError as error:  # the run goes on; who asked withdraws it in time
            log.warning("task %s: no answer can be written: %s", due.request.name, error)

    def refuse_all(self, step: int, text: str) -> None:
        """Refuse what has no answer yet: the run ends."""
        if self.run.admission is not None:
            for name, request in waiting(self.run.output_dir).items():
                self.refuse(DueChange(name, request), step, text)

    def __enter__(self) -> TaskChanges:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
