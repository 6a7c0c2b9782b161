"""Tasks that join and leave a run between two steps: each is given a slot, or taken its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

from lobra.common.errors import ConfigError
from lobra.common.storage import StorageError
from lobra.layout.order import SlotOrder, StepOrder
from lobra.model.heartbeat import beat
from lobra.trainer.admission import admit
from lobra.trainer.live_run import LiveRun
from lobra.trainer.outputs import Outputs
from lobra.trainer.records import Records
from lobra.trainer.run_config import note_tasks
from lobra.trainer.task_changes import DueChange, TaskChanges
from lobra.trainer.task_requests import left_by


class Turnover:
    """Makes the changes of tasks that are due; ``carry_out`` has all ranks carry out an order."""

    def __init__(
        self,
        live: LiveRun,
        changes: TaskChanges,
        outputs: Outputs,
        carry_out: Callable[[StepOrder], object],
    ) -> None:
        self.live = live
        self.changes = changes
        self.outputs = outputs
        self._carry_out = carry_out

    def make(self, records: Records) -> bool:
        """Let tasks join and leave as was asked for, or refuse it; return whether one has."""
        live, has_changed = self.live, False
        for due in self.changes.due(live.step, waits=live.is_over):
            try:
                if due.request.task is None:
                    self._leave(due, records)
                else:
                    self._join(due, records)
            except ConfigError as error:
                self.changes.refuse(due, live.step, str(error))
            else:
                has_changed = True
                live.follow_tasks()
                note_tasks(live.spec, left_by(self.changes.made))
        return has_changed

    def _join(self, due: DueChange, records: Records) -> None:
        """Give a task a slot; ConfigError if it may not join."""
        live = self.live
        beat("loading", live.step + 1)
        new = self.changes.newcomer(due)
        text = admit(live.spec, list(live.tasks.values()), new)
        self.changes.accept(due, live.step, text)
        number = live.add(new.config, new.num_steps, new.record)
        install = SlotOrder("install", number, config=asdict(new.config))
        self._carry_out(StepOrder(live.step, slots=(install,)))
        records.tell(f"task {new.config.name}: joins after step {live.step}")

    def _leave(self, due: DueChange, records: Records) -> None:
        """Export a task and take its slot away; ConfigError if that cannot be done."""
        live, name = self.live, due.request.name
        number = live.number_of(name)
        if live.spec.trains_model:
            raise ConfigError("the run trains its model itself (adapter: full): stop the run")
        if number is None:
            if (left_at := self.changes.left_at(name)) is not None:
                raise ConfigError(f"it was cancelled already, after step {left_at}")
            names = (task.config.name for task in live.tasks.values())
            raise ConfigError(f"the run has no such task; it has {', '.join(names) or 'none'}")
        if not self.outputs.is_exported(number):
            try:
                self.outputs.export(number)
            except StorageError as error:
                raise ConfigError(str(error)) from error
            self.outputs.tell(records, [number])
        self.changes.accept(due, live.step, "")
        del live.tasks[number]
        self.outputs.forget(number)
        self._carry_out(StepOrder(live.step, slots=(SlotOrder("remove", number),)))
        records.tell(f"task {name}: leaves after step {live.step}")
