"""The coordinator of a training run: on rank 0 it knows tasks, data, plan and time.

It draws every step's sequences from the tasks' data sets, dispatches them, sends the order to all
ranks' engines, and learns from what they report: which task ends, what is evaluated and saved, how
fast each replica is. The step after is dispatched while a step trains.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from lobra.layout.order import StepOrder, Update
from lobra.layout.plan import Plan, save_plan
from lobra.model.heartbeat import beat
from lobra.profiler.accelerators import load_tables
from lobra.profiler.hardware import describe_device
from lobra.trainer.batches import draw_sequences
from lobra.trainer.checkpoint import CheckpointState, drop_later
from lobra.trainer.engine import Engine
from lobra.trainer.evaluation import Evaluation, HeldOut
from lobra.trainer.feedback import SpeedFeedback
from lobra.trainer.forecast import Forecast
from lobra.trainer.live_run import LiveRun
from lobra.trainer.metrics import StepMetrics, as_json, restore_metrics
from lobra.trainer.orders import Attendance, DispatchedStep, OrdersAhead, dispatch_step
from lobra.trainer.outputs import Outputs
from lobra.trainer.records import Records
from lobra.trainer.replanner import Replanner
from lobra.trainer.run_spec import PLAN_FOLDER, RunSpec
from lobra.trainer.schedule import learning_rate
from lobra.trainer.step_report import StepReport
from lobra.trainer.task_changes import TaskChanges
from lobra.trainer.trained_step import TrainedStep, mean_losses
from lobra.trainer.turnover import Turnover

log = logging.getLogger(__name__)


class Coordinator:
    """Rank 0's part of a run; every method that sends an order is answered by all engines."""

    def __init__(self, run: RunSpec, engine: Engine, resumed: CheckpointState | None) -> None:
        """Load the tasks' data; of a run that goes on, take over what it knew and drop the rest."""
        self.engine = engine
        self.live = LiveRun(run, resumed)
        self.changes = TaskChanges(run, () if resumed is None else resumed.changes)
        self.outputs = Outputs(self.live, self._carry_out)
        self.turnover = Turnover(self.live, self.changes, self.outputs, self._carry_out)
        self.feedback = SpeedFeedback([1.0] * len(run.world.replicas))
        self.forecast = Forecast()
        device = describe_device(run.device)["name"]
        self.peak_flops_per_s = load_tables().peak_flops_per_s(device, run.precision)
        self.last_metrics: StepMetrics | None = None
        self.stop_requested = False
        self.replanner = None if run.replanning is None else Replanner(run)
        self.next_plan: Plan | None = None
        self.next_plan_file: Path | None = None  # when all is there to go on on it
        self.ahead = OrdersAhead()
        self.held_out = self._held_out()
        if resumed is not None:
            if run.feedback and resumed.plan == str(run.plan):
                known = list(resumed.speed_factors), list(resumed.speed_counts)
                self.feedback = SpeedFeedback(*known)
            drop_later(run.output_dir, resumed.step)
            restore_metrics(run.output_dir, resumed.step, resumed.last_metrics)

    def _held_out(self) -> HeldOut:
        """Return what the tasks, as they are now, hold out."""
        run = self.live.spec
        return HeldOut(
            run,
            self.live.configs,
            lambda sequences: dispatch_step(run, 0, sequences, (), self._slowdown()).order,
        )

    # -- the run --------------------------------------------------------------------------------

    def train(self) -> StepOrder:
        """Run the steps, write adapters and checkpoints; return the last order."""
        # The threads of `ahead` and `changes` end however the run does.
        with self.ahead, self.changes, Records(self.live.spec, self.live.step) as records:
            while not self._told_to_stop():
                self._change_tasks(records)
                attendance = self.live.attendance()
                if not attendance.own_steps or self._is_to_switch(attendance, records):
                    break
                metrics = self._train_step(attendance)
                self.last_metrics = metrics
                exported: list[int] = []
                try:
                    exported, time_s = self.outputs.write(self._state)
                    metrics = replace(metrics, checkpoint_time_s=time_s)
                finally:  # the step was trained, whatever became of its checkpoint
                    self.forecast.add(metrics)
                    records.write(metrics, self.forecast.outlook(self.live.standing))
                self.outputs.tell(records, exported)
            return self._end(records)

    def _end(self, records: Records) -> StepOrder:
        """Write the rest and let all ranks end, for good or for another plan."""
        step = self.live.step
        if self.replanner is not None:
            self.replanner.end()
        if self._told_to_stop():
            self.next_plan = None
        if self.next_plan is None:
            self.changes.refuse_all(step, "the run has ended; ask again when it goes on")
        exported, _ = self.outputs.write(self._state, is_end=True)
        self.outputs.tell(records, exported)
        beat("ending")
        is_over = self.live.is_over
        if self.next_plan is not None:
            file = self.live.spec.output_dir / PLAN_FOLDER / f"step_{step}.yaml"
            self.next_plan_file = save_plan(self.next_plan, file)
            is_over = True  # for these ranks
        last = StepOrder(step, stop=True, finished=is_over)
        self._carry_out(last)
        return last

    def _told_to_stop(self) -> bool:
        return self.stop_requested or self.engine.told_to_stop()

    def _carry_out(
        self, order: StepOrder, state: CheckpointState | None = None
    ) -> StepReport | None:
        self.engine.control.send(order)
        return self.engine.carry_out(order, state)

    def _change_tasks(self, records: Records) -> None:
        """Let tasks join and leave as was asked for since the last step, or refuse it."""
        run = self.live.spec
        if run.max_steps is not None and self.live.step >= run.max_steps:
            return
        if self.turnover.make(records):
            self.ahead.forget()
            self.held_out = self._held_out()

    def _is_to_switch(self, attendance: Attendance, records: Records) -> bool:
        """Return whether the run is to go on on another plan: ``next_plan``, for who starts it."""
        if self.replanner is None:
            return False
        if self.last_metrics is None:
            self.replanner.note_start()
        run, step = self.live.spec, self.live.step
        attending = tuple(number for number, _ in attendance.own_steps)
        proposal = self.replanner.look(run, list(self.live.tasks.values()), attending, step)
        if proposal is not None:
            save_s = self.outputs.save_times.took_s
            decided = self.replanner.decide(run, proposal, step, self.forecast.pace, save_s)
            records.tell(str(decided))
            self.next_plan = proposal.plan if decided.switched else None
        return self.next_plan is not None

    # -- dispatch -------------------------------------------------------------------------------

    def _slowdown(self) -> tuple[float, ...]:
        """Return every replica's speed factor, as it is now."""
        factors = self.feedback.factors
        return tuple(factors if self.live.spec.feedback else [1.0] * len(factors))

    def _make(self, attendance: Attendance) -> Callable[[], DispatchedStep]:
        """Return what makes a step's order on any thread, with the speed factors of this moment."""
        return partial(self._draw, attendance, self._slowdown())

    def _draw(self, attendance: Attendance, slowdown: tuple[float, ...]) -> DispatchedStep:
        """Draw and dispatch a step's sequences; reads nothing that changes."""
        run = self.live.spec
        sequences, updates = [], []
        for number, own_step in attendance.own_steps:
            task = self.live.tasks[number]
            drawn = draw_sequences(number, task.config, task.data, run.seed, own_step)
            sequences += drawn
            if any(len(sequence.targets) for sequence in drawn):
                rate = learning_rate(task.config, own_step, task.progress.num_steps)
                updates.append(Update(number, rate, task.config.max_grad_norm))
        dispatched = dispatch_step(run, attendance.step, sequences, updates, slowdown)
        _ = dispatched.order.encoded  # here, so that nobody waits for it
        return dispatched

    # -- a step ---------------------------------------------------------------------------------

    def _train_step(self, attendance: Attendance) -> StepMetrics:
        """Run one step, and the evaluation that follows if a period ends; learn from both."""
        live, run = self.live, self.live.spec
        beat("dispatching", attendance.step + 1)
        trained = self._run_step(attendance)
        live.step += 1
        self.stop_requested |= trained.report.stop
        if run.feedback:
            self.feedback.update(trained.plain_time_s, trained.busy_s(run.world))
        for number in trained.own_steps:
            self._record(number, trained.losses.get(number), trained.report)
        self.outputs.evaluation = evaluation = self._end_periods(list(trained.own_steps))
        return trained.metrics(
            run, self.engine.stage.shape, live.tasks, evaluation, self.peak_flops_per_s
        )

    def _run_step(self, attendance: Attendance) -> TrainedStep:
        """Have all engines train a step, and the next one's order made meanwhile."""
        start = time.perf_counter()
        dispatched = self.ahead.take(attendance, self._make(attendance))
        dispatch_wait_s = time.perf_counter() - start
        self.engine.control.send(dispatched.order)
        following = self.live.attendance(after=attendance)
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
        task = self.live.tasks[number]
        if loss is not None and not report.is_finite(number):
            log.warning(
                "step %d: the gradient of task %s is not finite, its update is skipped",
                self.live.step, task.config.name,
            )  # fmt: skip
        applied = loss is not None and report.is_applied(number)
        why = task.progress.record(loss, applied, report.failed.get(number))
        self._tell_if_stopped(number, why)

    def _tell_if_stopped(self, number: int, why: str | None) -> None:
        if why is not None:
            name = self.live.tasks[number].config.name
            log.warning("step %d: task %s is stopped: %s", self.live.step, name, why)

    def _end_periods(self, attended: list[int]) -> Evaluation:
        """Evaluate and close the periods that end with this step; all are evaluated at the end."""
        run, tasks = self.live.spec, self.live.tasks
        every = run.validate_every
        if not every:
            return Evaluation()
        going_on = [n for n in attended if tasks[n].progress.stopped is None]
        ending = [n for n in going_on if tasks[n].progress.ends_period(every)]
        evaluation = self._evaluate(going_on if self.live.step == run.last_step else ending)
        for number, held_out in evaluation.losses.items():
            tasks[number].progress.losses.note_held_out(held_out)
        for number in ending:
            task = tasks[number]
            loss = evaluation.losses.get(number)
            self._tell_if_stopped(number, task.progress.end_period(task.config, loss))
            may_stop = task.config.early_stopping_patience > 0
            if may_stop and loss is not None and task.progress.note_validation(loss):
                self.outputs.best.append(number)
        return evaluation

    def _evaluate(self, numbers: list[int]) -> Evaluation:
        order = self.held_out.order(tuple(numbers))
        if order is None:
            return Evaluation()
        start = time.perf_counter()
        report = self._carry_out(order)
        assert report is not None, "what is held out has sequences"
        time_s = time.perf_counter() - start
        return Evaluation(mean_losses(order, report), report.memory_bytes, time_s)

    def _state(self) -> CheckpointState:
        """Return the part of a checkpoint that is not tensors."""
        run, tasks = self.live.spec, self.live.tasks.values()
        return CheckpointState(
            step=self.live.step,
            seed=run.seed,
            tasks=[task.record for task in tasks],
            progress={task.config.name: task.progress for task in tasks},
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
