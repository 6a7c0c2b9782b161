"""The coordinator of a training run: on rank 0 it knows tasks, data, plan and time.

It draws every step's sequences from the tasks' data sets, dispatches them, sends the order to all
ranks' engines, and learns from what they report: which task ends, what is evaluated and saved, how
fast each replica is. The step after is dispatched while a step trains.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from lobra.common.errors import ConfigError
from lobra.common.files import write_atomic
from lobra.common.storage import StorageError
from lobra.layout.order import SlotOrder, StepOrder, Update
from lobra.layout.plan import Plan, save_plan
from lobra.model.heartbeat import beat
from lobra.profiler.accelerators import load_tables
from lobra.profiler.hardware import describe_device
from lobra.tasks.dataset import TokenizedDataset
from lobra.trainer.adapters import CARD_FILE
from lobra.trainer.admission import admit
from lobra.trainer.batches import draw_sequences
from lobra.trainer.checkpoint import CheckpointState, drop_later
from lobra.trainer.engine import Engine
from lobra.trainer.evaluation import Evaluation, HeldOut
from lobra.trainer.feedback import SpeedFeedback
from lobra.trainer.forecast import Forecast
from lobra.trainer.ledger import drawn_batches
from lobra.trainer.live_tasks import starting_tasks, with_tasks
from lobra.trainer.metrics import StepMetrics, as_json, restore_metrics
from lobra.trainer.model_card import model_card
from lobra.trainer.orders import Attendance, DispatchedStep, OrdersAhead, dispatch_step
from lobra.trainer.records import Records
from lobra.trainer.replanner import Replanner
from lobra.trainer.run_config import note_tasks
from lobra.trainer.run_spec import PLAN_FOLDER, RunSpec
from lobra.trainer.save_times import SaveTimes
from lobra.trainer.schedule import learning_rate
from lobra.trainer.step_report import StepReport
from lobra.trainer.task_changes import DueChange, TaskChanges
from lobra.trainer.task_progress import RunTask, TaskProgress
from lobra.trainer.task_requests import left_by
from lobra.trainer.trained_step import TrainedStep, mean_losses

log = logging.getLogger(__name__)


class Coordinator:
    """Rank 0's part of a run; every method that sends an order is answered by all engines."""

    def __init__(self, run: RunSpec, engine: Engine, resumed: CheckpointState | None) -> None:
        """Load the tasks' data; of a run that goes on, take over what it knew and drop the rest."""
        self.run = run
        self.engine = engine
        self.step = 0
        self.tasks = dict(enumerate(starting_tasks(run)))
        self.next_number = len(self.tasks)
        self.changes = TaskChanges(run, () if resumed is None else resumed.changes)
        self.feedback = SpeedFeedback([1.0] * len(run.world.replicas))
        self.forecast = Forecast()
        device = describe_device(run.device)["name"]
        self.peak_flops_per_s = load_tables().peak_flops_per_s(device, run.precision)
        self.evaluation = Evaluation()  # of the last step
        self.best: list[int] = []  # whose adapters of the last step are to be kept
        self.save_times = SaveTimes(run.save_every, run.resume_step)
        self.unwritten: set[int] = set()  # tasks whose adapters could not be exported
        self.last_metrics: StepMetrics | None = None
        self.stop_requested = False
        self.replanner = None if run.replanning is None else Replanner(run)
        self.next_plan: Plan | None = None
        self.next_plan_file: Path | None = None  # when all is there to go on on it
        self.ahead = OrdersAhead()
        self.held_out = self._held_out()
        if resumed is not None:
            self._resume(resumed)

    def _resume(self, state: CheckpointState) -> None:
        run = self.run
        self.step = state.step
        for task in self.tasks.values():
            name = task.config.name
            num_steps = task.progress.num_steps
            task.progress = replace(state.progress[name], num_steps=num_steps)
            if task.progress.stopped is None:
                continue
            if name in run.revive:
                task.progress.revive()
                log.warning("task %s goes on from its step %d", name, task.progress.steps + 1)
            else:
                log.warning(
                    "task %s stays stopped: %s (--revive %s lets it go on)",
                    name, task.progress.stopped, name,
                )  # fmt: skip
        if run.feedback and state.plan == str(run.plan):
            self.feedback = SpeedFeedback(list(state.speed_factors), list(state.speed_counts))
        drop_later(run.output_dir, state.step)
        restore_metrics(run.output_dir, state.step, state.last_metrics)

    def _held_out(self) -> HeldOut:
        """Return what the tasks, as they are now, hold out."""
        return HeldOut(
            self.run,
            {number: task.config for number, task in self.tasks.items()},
            lambda sequences: dispatch_step(self.run, 0, sequences, (), self._slowdown()).order,
        )

    # -- the run --------------------------------------------------------------------------------

    def train(self) -> StepOrder:
        """Run the steps, write adapters and checkpoints; return the last order."""
        # The threads of `ahead` and `changes` end however the run does.
        with self.ahead, self.changes, Records(self.run, self.step) as records:
            while not self._told_to_stop():
                self._change_tasks(records)
                attendance = self._attendance()
                if not attendance.own_steps or self._is_to_switch(attendance, records):
                    break
                metrics = self._train_step(attendance)
                self.last_metrics = metrics
                exported: list[int] = []
                try:
                    exported, time_s = self._write_down()
                    metrics = replace(metrics, checkpoint_time_s=time_s)
                finally:  # the step was trained, whatever became of its checkpoint
                    self.forecast.add(metrics)
                    records.write(metrics, self.forecast.outlook(self._standing()))
                self._tell_exports(records, exported)
            return self._end(records)

    def _end(self, records: Records) -> StepOrder:
        """Write the rest and let all ranks end, for good or for another plan."""
        if self.replanner is not None:
            self.replanner.end()
        if self._told_to_stop():
            self.next_plan = None
        if self.next_plan is None:
            self.changes.refuse_all(self.step, "the run has ended; ask again when it goes on")
        exported, _ = self._write_down(is_end=True)
        self._tell_exports(records, exported)
        beat("ending")
        is_over = not self._attendance().own_steps
        if self.next_plan is not None:
            file = self.run.output_dir / PLAN_FOLDER / f"step_{self.step}.yaml"
            self.next_plan_file = save_plan(self.next_plan, file)
            is_over = True  # for these ranks
        last = StepOrder(self.step, stop=True, finished=is_over)
        self._carry_out(last)
        return last

    def _told_to_stop(self) -> bool:
        return self.stop_requested or self.engine.told_to_stop()

    def _carry_out(
        self, order: StepOrder, state: CheckpointState | None = None
    ) -> StepReport | None:
        self.engine.control.send(order)
        return self.engine.carry_out(order, state)

    def _attendance(self, after: Attendance | None = None) -> Attendance:
        """Return who takes part in the next step; or, if none is stopped in it, in that `after`."""
        step = self.step if after is None else after.step + 1
        made = () if after is None else dict(after.own_steps)
        if step >= self.run.last_step:
            return Attendance(step)
        own_steps = [
            (number, task.progress.steps + (number in made))
            for number, task in self.tasks.items()
            if task.progress.steps_left > (number in made)
        ]
        return Attendance(step, tuple(own_steps))

    # -- dispatch -------------------------------------------------------------------------------

    def _slowdown(self) -> tuple[float, ...]:
        """Return every replica's speed factor, as it is now."""
        return tuple(
            self.feedback.factors if self.run.feedback else [1.0] * len(self.feedback.factors)
        )

    def _make(self, attendance: Attendance) -> Callable[[], DispatchedStep]:
        """Return what makes a step's order on any thread, with the speed factors of this moment."""
        return partial(self._draw, attendance, self._slowdown())

    def _draw(self, attendance: Attendance, slowdown: tuple[float, ...]) -> DispatchedStep:
        """Draw and dispatch a step's sequences; reads nothing that changes."""
        sequences, updates = [], []
        for number, own_step in attendance.own_steps:
            task = self.tasks[number]
            drawn = draw_sequences(number, task.config, task.data, self.run.seed, own_step)
            sequences += drawn
            if any(len(sequence.targets) for sequence in drawn):
                rate = learning_rate(task.config, own_step, task.progress.num_steps)
                updates.append(Update(number, rate, task.config.max_grad_norm))
        dispatched = dispatch_step(self.run, attendance.step, sequences, updates, slowdown)
        _ = dispatched.order.encoded  # here, so that nobody waits for it
        return dispatched

    # -- a step ---------------------------------------------------------------------------------

    def _train_step(self, attendance: Attendance) -> StepMetrics:
        """Run one step, and the evaluation that follows if a period ends; learn from both."""
        run = self.run
        beat("dispatching", attendance.step + 1)
        trained = self._run_step(attendance)
        self.step += 1
        self.stop_requested |= trained.report.stop
        if run.feedback:
            self.feedback.update(trained.plain_time_s, trained.busy_s(run.world))
        for number in trained.own_steps:
            loss = trained.losses.get(number)
            self._record(number, loss, trained.report)
        mark = time.perf_counter()
        self.evaluation = evaluation = self._end_periods(list(trained.own_steps))
        validation_time_s = time.perf_counter() - mark
        names = {number: task.config.name for number, task in self.tasks.items()}
        metrics = trained.metrics(
            run.world,
            self.engine.stage.shape,
            {number: task.config for number, task in self.tasks.items()},
            run.plan_from,
            self.peak_flops_per_s,
        )
        drawn = drawn_batches(trained.dispatched.order, trained.own_steps, self.tasks)
        tasks = {
            names[number]: replace(
                metrics.tasks[names[number]],
                validation_loss=evaluation.losses.get(number),
                stopped=self.tasks[number].progress.stopped,
            )
            for number in trained.losses
        }
        return replace(
            metrics,
            tasks=tasks,
            drawn=drawn,
            memory_bytes=max((metrics.memory_bytes, *evaluation.memory_bytes)),
            validation_time_s=validation_time_s,
        )

    def _run_step(self, attendance: Attendance) -> TrainedStep:
        """Have all engines train a step, and the next one's order made meanwhile."""
        start = time.perf_counter()
        dispatched = self.ahead.take(attendance, self._make(attendance))
        dispatch_wait_s = time.perf_counter() - start
        self.engine.control.send(dispatched.order)
        following = self._attendance(after=attendance)
        if following.own_steps:
            self.ahead.start(following, self._make(following))
        report = self.engine.carry_out(dispatched.order)
        assert report is not None, "tasks that attend have sequences"
        step_time_s = time.perf_counter() - start
        return TrainedStep(
            dict(attendance.own_steps), dispatched, report, dispatch_wait_s, step_time_s
        )

    def _record(self, number: int, loss: float | None, report: StepReport) -> None:
        """Note a task's step; steps count from 1 on a screen."""
        task = self.tasks[number]
        if loss is not None and not report.is_finite(number):
            log.warning(
                "step %d: the gradient of task %s is not finite, its update is skipped",
                self.step, task.config.name,
            )  # fmt: skip
        applied = loss is not None and report.is_applied(number)
        why = task.progress.record(loss, applied, report.failed.get(number))
        self._tell_if_stopped(number, why)

    def _tell_if_stopped(self, number: int, why: str | None) -> None:
        if why is not None:
            name = self.tasks[number].config.name
            log.warning("step %d: task %s is stopped: %s", self.step, name, why)

    def _end_periods(self, attended: list[int]) -> Evaluation:
        """Evaluate and close the periods that end with this step; all are evaluated at the end."""
        every = self.run.validate_every
        if not every:
            return Evaluation()
        going_on = [n for n in attended if self.tasks[n].progress.stopped is None]
        ending = [n for n in going_on if self.tasks[n].progress.ends_period(every)]
        evaluation = self._evaluate(going_on if self.step == self.run.last_step else ending)
        for number, held_out in evaluation.losses.items():
            self.tasks[number].progress.losses.note_held_out(held_out)
        for number in ending:
            task = self.tasks[number]
            loss = evaluation.losses.get(number)
            self._tell_if_stopped(number, task.progress.end_period(task.config, loss))
            may_stop = task.config.early_stopping_patience > 0
            if may_stop and loss is not None and task.progress.note_validation(loss):
                self.best.append(number)
        return evaluation

    def _evaluate(self, numbers: list[int]) -> Evaluation:
        order = self.held_out.order(tuple(numbers))
        if order is None:
            return Evaluation()
        report = self._carry_out(order)
        assert report is not None, "what is held out has sequences"
        return Evaluation(mean_losses(order, report), report.memory_bytes)

    # -- tasks come and go ----------------------------------------------------------------------

    def _change_tasks(self, records: Records) -> None:
        """Let tasks join and leave as was asked for since the last step, or refuse it."""
        if self.run.max_steps is not None and self.step >= self.run.max_steps:
            return
        for due in self.changes.due(self.step, waits=not self._attendance().own_steps):
            try:
                if due.request.task is None:
                    self._leave(due, records)
                else:
                    self._join(due, records)
            except ConfigError as error:
                self.changes.refuse(due, self.step, str(error))
            else:
                self.ahead.forget()
                self.run = with_tasks(self.run, list(self.tasks.values()), self.step)
                self.held_out = self._held_out()
                note_tasks(self.run, left_by(self.changes.made))

    def _join(self, due: DueChange, records: Records) -> None:
        """Give a task a slot; ConfigError if it may not join."""
        beat("loading", self.step + 1)
        new = self.changes.newcomer(due)
        text = admit(self.run, list(self.tasks.values()), new)
        self.changes.accept(due, self.step, text)
        data = TokenizedDataset.load(self.run.data_folder(new.config.name))
        number, self.next_number = self.next_number, self.next_number + 1
        self.tasks[number] = RunTask(new.config, data, TaskProgress(new.num_steps), new.record)
        install = SlotOrder("install", number, config=asdict(new.config))
        self._carry_out(StepOrder(self.step, slots=(install,)))
        records.tell(f"task {new.config.name}: joins after step {self.step}")

    def _leave(self, due: DueChange, records: Records) -> None:
        """Export a task and take its slot away; ConfigError if that cannot be done."""
        numbers = {task.config.name: number for number, task in self.tasks.items()}
        number = numbers.get(due.request.name)
        if self.run.trains_model:
            raise ConfigError("the run trains its model itself (adapter: full): stop the run")
        if number is None:
            raise ConfigError(f"the run has no such task; it has {', '.join(numbers) or 'none'}")
        if not self._is_exported(number):
            try:
                self._export(number)
            except StorageError as error:
                raise ConfigError(str(error)) from error
            self._tell_exports(records, [number])
        self.changes.accept(due, self.step, "")
        del self.tasks[number]
        self.unwritten.discard(number)
        self._carry_out(StepOrder(self.step, slots=(SlotOrder("remove", number),)))
        records.tell(f"task {due.request.name}: leaves after step {self.step}")

    def _is_to_switch(self, attendance: Attendance, records: Records) -> bool:
        """Return whether the run is to go on on another plan: ``next_plan``, for who starts it."""
        if self.replanner is None:
            return False
        if self.last_metrics is None:
            self.replanner.note_start()
        attending = tuple(number for number, _ in attendance.own_steps)
        tasks = list(self.tasks.values())
        proposal = self.replanner.look(self.run, tasks, attending, self.step)
        if proposal is not None:
            decided = self.replanner.decide(
                self.run, proposal, self.step, self.forecast.pace, self.save_times.took_s
            )
            records.tell(str(decided))
            self.next_plan = proposal.plan if decided.switched else None
        return self.next_plan is not None

    # -- what is left behind --------------------------------------------------------------------

    def _write_down(self, is_end: bool = False) -> tuple[list[int], float]:
        """Keep and export what the last step has finished, and save if it is time to.

        A task that is over, by itself or with the run, is exported before a checkpoint says so.
        What cannot be written is warned of and tried again: with the next checkpoint, and at the
        end.

        Parameters
        ----------
        is_end
            Whether no other step follows.

        Returns
        -------
        tuple
            The tasks that were exported, and the seconds it took.

        Raises
        ------
        StorageError
            At the end: something could not be written.
        """
        start = time.perf_counter()
        over = not self._attendance().own_steps
        save = self.save_times.is_due(self.step, over or is_end)
        if self.best:
            self._carry_out(StepOrder(self.step, keep=tuple(self.best)))
            self.best = []
        export = [
            number
            for number, task in self.tasks.items()
            if (over or not task.progress.steps_left) and not self._is_exported(number)
            if save or is_end or number not in self.unwritten
        ]
        failures = []
        for number in export:
            task = self.tasks[number].config
            name = f"the {task.trained} of task {task.name}"
            failures += self._attempt(name, is_end, partial(self._export, number))
        tried = self.unwritten.union(export)
        self.unwritten = {number for number in tried if not self._is_exported(number)}
        if save:
            name = f"the checkpoint of step {self.step}"
            if failed := self._attempt(name, is_end, self._save):
                failures += failed
                self.save_times.failed()
            else:
                self.save_times.saved(self.step, time.perf_counter() - start)
        if is_end and failures:
            raise failures[0]
        return [n for n in export if n not in self.unwritten], time.perf_counter() - start

    def _attempt(self, what: str, is_end: bool, write: Callable[[], None]) -> list[StorageError]:
        """Write something; return why it cannot be written, which is warned of but at the end."""
        try:
            write()
        except StorageError as error:
            if not is_end:
                log.warning("%s is not written, the run goes on: %s", what, error)
            return [error]
        return []

    def _export(self, number: int) -> None:
        best = self._is_best_kept(number)
        order = StepOrder(
            self.step,
            export=() if best else (number,),
            export_best=(number,) if best else (),
        )
        self._carry_out(order)
        progress = self.tasks[number].progress
        progress.exported_step = progress.steps

    def _save(self) -> None:
        self._carry_out(StepOrder(self.step, save=True), self._state())

    def _tell_exports(self, records: Records, numbers: list[int]) -> None:
        """Tell of what was exported, and write the model cards."""
        for number in numbers:
            task = self.tasks[number]
            folder = self.run.adapter_folder(task.config.name)
            kept = self.run.base_precision or self.run.precision
            card = model_card(task.config, self.run.base_model, kept, task.progress)
            try:
                write_atomic(folder / CARD_FILE, card)
            except OSError as error:
                log.warning("%s: has no model card: %s", folder, error)
            is_best = self._is_best_kept(number)
            records.tell_export(task.config, task.progress, folder, is_best)

    def _is_exported(self, number: int) -> bool:
        task = self.tasks[number]
        there = self.run.adapter_folder(task.config.name).is_dir()
        progress = task.progress
        return there and progress.exported_step == progress.steps

    def _is_best_kept(self, number: int) -> bool:
        """Return whether the adapter that is kept is better than the present one.

        That a run ends is no end of a task's period: what is found then is not kept, so that the
        task does the same whether its run is interrupted or not.
        """
        progress = self.tasks[number].progress
        present_loss = self.evaluation.losses.get(number, math.inf)
        return progress.lowest_step is not None and progress.lowest_loss <= present_loss

    def _standing(self) -> dict[str, tuple[int, int]]:
        """Return by name of every task the steps it has made and those left to it in this run."""
        left = self.run.last_step - self.step
        return {
            task.config.name: (task.progress.steps, min(task.progress.steps_left, left))
            for task in self.tasks.values()
        }

    def _state(self) -> CheckpointState:
        """Return the part of a checkpoint that is not tensors."""
        run = self.run
        return CheckpointState(
            step=self.step,
            seed=run.seed,
            tasks=[task.record for task in self.tasks.values()],
            progress={task.config.name: task.progress for task in self.tasks.values()},
            speed_factors=list(self.feedback.factors),
            speed_counts=list(self.feedback.counts),
            plan=str(run.plan),
            base_model=run.fingerprint,
            last_metrics=None if self.last_metrics is None else as_json(self.last_metrics),
            data_day=run.data_day,
            precision=run.precision,
            base_precision=run.base_precision,
            batching=run.batching,
            changes=list(self.changes.made),
        )
