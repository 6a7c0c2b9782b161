"""The coordinator of a training run: on rank 0 it knows tasks, data, plan and time.

It draws every step's sequences from the tasks' data sets, dispatches them, sends the order to all
ranks' engines, and learns from what they report: which task ends, what is evaluated and saved, how
fast each replica is. The step after is dispatched while a step trains.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, abc
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from lobra.layout.order import StepOrder, Update
from lobra.layout.sequences import Sequence, total_work
from lobra.planner.dispatch import dispatch
from lobra.tasks.config import TaskConfig
from lobra.tasks.dataset import TokenizedDataset
from lobra.trainer.batches import draw_sequences
from lobra.trainer.checkpoint import CheckpointState, drop_later
from lobra.trainer.engine import Engine
from lobra.trainer.evaluation import Evaluation, HeldOut
from lobra.trainer.feedback import SpeedFeedback
from lobra.trainer.metrics import (
    MetricsWriter,
    ReplicaMetrics,
    StepMetrics,
    TaskMetrics,
    as_json,
    restore_metrics,
)
from lobra.trainer.optimizer import learning_rate
from lobra.trainer.orders import Attendance, DispatchedStep, OrdersAhead, order_of
from lobra.trainer.progress import Progress
from lobra.trainer.run_spec import RunSpec
from lobra.trainer.step_report import StepReport
from lobra.trainer.task_progress import TaskProgress

log = logging.getLogger(__name__)


@dataclass
class RunTask:
    """A task of the run: what it is, its data, and how far it has come."""

    config: TaskConfig
    data: TokenizedDataset
    progress: TaskProgress


class Coordinator:
    """Rank 0's part of a run; every method that sends an order is answered by all engines."""

    def __init__(self, run: RunSpec, engine: Engine, resumed: CheckpointState | None) -> None:
        """Load the tasks' data; of a run that goes on, take over what it knew and drop the rest."""
        self.run = run
        self.engine = engine
        self.step = 0
        self.tasks = {
            number: RunTask(task, TokenizedDataset.load(run.data_folder(number)), TaskProgress(n))
            for number, (task, n) in enumerate(zip(run.tasks, run.num_steps, strict=True))
        }
        self.feedback = SpeedFeedback([1.0] * len(run.world.replicas))
        self.saved_at: int | None = None
        self.last_metrics: StepMetrics | None = None
        self.stop_requested = False
        self.ahead = OrdersAhead()
        self.held_out = HeldOut(
            {
                number: TokenizedDataset.load(folder)
                for number in self.tasks
                if (folder := run.validation_folder(number)).is_dir()
            },
            lambda sequences: self._dispatch(0, sequences, (), self._slowdown()).order,
        )
        if resumed is not None:
            self._resume(resumed)

    def _resume(self, state: CheckpointState) -> None:
        run = self.run
        self.step = state.step
        self.saved_at = state.step
        for task in self.tasks.values():
            name = task.config.name
            num_steps = task.progress.num_steps
            task.progress = replace(state.progress[name], num_steps=num_steps)
            if task.progress.stopped is None:
                continue
            if name in run.revive:
                task.progress.revive()
                log.warning("task %s goes on from step %d", name, state.step + 1)
            else:
                log.warning(
                    "task %s stays stopped: %s (--revive %s lets it go on)",
                    name, task.progress.stopped, name,
                )  # fmt: skip
        if run.feedback and state.plan == str(run.plan):
            self.feedback = SpeedFeedback(list(state.speed_factors), list(state.speed_counts))
        drop_later(run.output_dir, state.step)
        restore_metrics(run.output_dir, state.step, state.last_metrics)

    # -- the run --------------------------------------------------------------------------------

    def train(self) -> StepOrder:
        """Run the steps, then write the adapters and a last checkpoint; return the last order."""
        run = self.run
        with ExitStack() as stack:
            stack.enter_context(self.ahead)  # its thread ends however the run does
            writer = stack.enter_context(MetricsWriter(run.output_dir, self.step))
            progress = stack.enter_context(Progress(run, self.step))
            while (attendance := self._attendance()).own_steps and not self._told_to_stop():
                metrics = self._train_step(attendance)
                self.last_metrics = metrics
                try:
                    over = not self._attendance().own_steps
                    if over or (run.save_every and self.step % run.save_every == 0):
                        metrics = replace(metrics, checkpoint_time_s=self._save())
                finally:  # the step was trained, whatever became of its checkpoint
                    writer.write(metrics)
                    progress.update(metrics)
            if self.saved_at != self.step:
                self._save()
            last = StepOrder(self.step, export=not self._attendance().own_steps, stop=True)
            self._carry_out(last)
        return last

    def _told_to_stop(self) -> bool:
        return self.stop_requested or self.engine.told_to_stop()

    def _carry_out(self, order: StepOrder, state: CheckpointState | None = None) -> None:
        self.engine.control.send(order)
        self.engine.carry_out(order, state)

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
        dispatched = self._dispatch(attendance.step, sequences, updates, slowdown)
        _ = dispatched.order.encoded  # here, so that nobody waits for it
        return dispatched

    def _dispatch(
        self,
        step: int,
        sequences: list[Sequence],
        updates: abc.Sequence[Update],
        slowdown: tuple[float, ...],
    ) -> DispatchedStep:
        run = self.run
        start = time.perf_counter()
        assignment = dispatch(
            [len(sequence.tokens) for sequence in sequences],
            run.plan,
            run.cost_model,
            buckets=None if run.dynamic_buckets else np.asarray(run.buckets, dtype=np.int64),
            num_buckets=run.num_buckets,
            mode=run.dispatch_mode,
            slowdown=slowdown,
        )
        solve_time_s = time.perf_counter() - start
        return DispatchedStep(
            order_of(step, sequences, updates, assignment),
            replica_time_s=tuple(assignment.replica_time_s.tolist()),
            speed_factors=slowdown,
            sync_time_s=assignment.sync_time_s,
            solve_time_s=solve_time_s,
        )

    # -- a step ---------------------------------------------------------------------------------

    def _train_step(self, attendance: Attendance) -> StepMetrics:
        """Run one step, and the evaluation that follows if a period ends; learn from both."""
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
        self.step += 1
        self.stop_requested |= report.stop
        busy_s = [
            max(report.busy_s[rank] for rank in self.run.world.ranks(item.index))
            for item in self.run.plan.replicas
        ]
        if self.run.feedback:
            plain_s = np.divide(dispatched.replica_time_s, dispatched.speed_factors)
            self.feedback.update(plain_s.tolist(), busy_s)
        losses = mean_losses(dispatched.order, report)
        for number, _ in attendance.own_steps:
            self._record(number, losses.get(number), report.is_finite(number))
        mark = time.perf_counter()
        evaluation = self._end_periods([number for number, _ in attendance.own_steps])
        validation_time_s = time.perf_counter() - mark
        return self._metrics(
            attendance, dispatched, report, losses, busy_s, evaluation,
            step_time_s, dispatch_wait_s, validation_time_s,
        )  # fmt: skip

    def _record(self, number: int, loss: float | None, applied: bool) -> None:
        """Note a task's step; steps count from 1 on a screen."""
        task = self.tasks[number]
        if loss is not None and not applied:
            log.warning(
                "step %d: the gradient of task %s is not finite, its update is skipped",
                self.step, task.config.name,
            )  # fmt: skip
        self._tell_if_stopped(number, task.progress.record(loss, applied))

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
        for number in ending:
            task = self.tasks[number]
            stopped = task.progress.end_period(task.config, evaluation.losses.get(number))
            self._tell_if_stopped(number, stopped)
        return evaluation

    def _evaluate(self, numbers: list[int]) -> Evaluation:
        order = self.held_out.order(tuple(numbers))
        if order is None:
            return Evaluation()
        self.engine.control.send(order)
        report = self.engine.carry_out(order)
        assert report is not None
        losses = {
            n: report.losses[n] / work.labels for n, work in order.work.items() if work.labels
        }
        return Evaluation(losses, report.memory_bytes)

    def _metrics(
        self,
        attendance: Attendance,
        dispatched: DispatchedStep,
        report: StepReport,
        losses: dict[int, float],
        busy_s: list[float],
        evaluation: Evaluation,
        step_time_s: float,
        dispatch_wait_s: float,
        validation_time_s: float,
    ) -> StepMetrics:
        """Return what is written of a step."""
        run, order = self.run, dispatched.order
        # Ready before the slowest rank was, this one waited for it inside the reduction.
        waited_s = max(0.0, min(report.reduce_s, max(report.arrival_s) - report.arrival_s[0]))
        num_sequences = Counter(sequence.task for sequence in order.sequences)
        updates = {update.task: update for update in order.updates}
        return StepMetrics(
            step=order.step,
            step_time_s=step_time_s,
            predicted_step_time_s=dispatched.predicted_step_time_s,
            dispatch_time_s=dispatched.solve_time_s,
            dispatch_wait_s=dispatch_wait_s,
            prepare_time_s=report.prepare_s,
            replica_wait_s=waited_s,
            reduce_time_s=report.reduce_s - waited_s,
            optimizer_time_s=report.optimizer_s,
            tokens=total_work(order.work.values()).tokens,
            padded_tokens=order.padded_tokens,
            gpu_seconds=step_time_s * run.world_size,
            memory_bytes=max(report.memory_bytes + evaluation.memory_bytes),
            tasks={
                self.tasks[number].config.name: TaskMetrics(
                    loss=losses[number],
                    tokens=order.work[number].labels,
                    sequences=num_sequences[number],
                    grad_norm=report.grad_norms[number],
                    lr=updates[number].learning_rate,
                    applied=report.is_finite(number),
                    own_step=own_step,
                    validation_loss=evaluation.losses.get(number),
                    stopped=self.tasks[number].progress.stopped,
                )
                for number, own_step in attendance.own_steps
                if number in losses
            },
            replicas=[
                ReplicaMetrics(
                    layout=str(item.layout),
                    busy_s=busy_s[item.index],
                    predicted_s=dispatched.replica_time_s[item.index],
                    speed_factor=dispatched.speed_factors[item.index],
                    micro_batches=len(order.replicas[item.index]),
                    padded_tokens=sum(b.padded_tokens for b in order.replicas[item.index]),
                )
                for item in run.plan.replicas
            ],
            validation_time_s=validation_time_s,
            plan_from=run.plan_from,
        )

    # -- what is left behind --------------------------------------------------------------------

    def _save(self) -> float:
        """Save a checkpoint; return the seconds it took."""
        start = time.perf_counter()
        self._carry_out(StepOrder(self.step, save=True), self._state())
        self.saved_at = self.step
        return time.perf_counter() - start

    def _state(self) -> CheckpointState:
        """Return the part of a checkpoint that is not tensors."""
        run = self.run
        return CheckpointState(
            step=self.step,
            seed=run.seed,
            tasks=list(run.task_records),
            progress={task.config.name: task.progress for task in self.tasks.values()},
            speed_factors=list(self.feedback.factors),
            speed_counts=list(self.feedback.counts),
            plan=str(run.plan),
            base_model=run.fingerprint,
            last_metrics=None if self.last_metrics is None else as_json(self.last_metrics),
            data_day=run.data_day,
            precision=run.precision,
        )


def mean_losses(order: StepOrder, report: StepReport) -> dict[int, float]:
    """Return the mean loss per target token of every task that has any in the order."""
    return {
        number: report.losses[number] / work.labels
        for number, work in order.work.items()
        if work.labels
    }
