"""One rank of a training run: the step loop.

A step takes the order that rank 0 made while the step before was training, runs this rank's
replica over its micro-batches, and updates every task's adapter with the sum of the gradients of
all ranks that hold it. Training jointly on any plan therefore equals training alone
(docs/architecture.md).
"""

from __future__ import annotations

import logging
import math
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from lobra.layout.sequences import IntArray, Sequence, StepOrder, Work, total_work
from lobra.model.groups import build_groups
from lobra.model.pipeline import run_replica
from lobra.model.precision import DTYPES, kept_dtype
from lobra.model.stage import MicroBatchTensors, build_stage
from lobra.planner.dispatch import dispatch
from lobra.tasks.dataset import TokenizedDataset
from lobra.trainer.adapters import adapter_spec, load_adapter
from lobra.trainer.batches import draw_sequences, micro_batch_tensors, to_device
from lobra.trainer.checkpoint import (
    CheckpointState,
    drop_later,
    load_moments,
    load_weights,
    read_state,
)
from lobra.trainer.dispatcher import AheadDispatcher, Running, make_order
from lobra.trainer.evaluation import Evaluation, Evaluator
from lobra.trainer.exporter import AdapterExporter
from lobra.trainer.feedback import SpeedFeedback
from lobra.trainer.figures import StepFigures, exchange_figures
from lobra.trainer.life import TaskLife, lives_from_json, lives_to_json
from lobra.trainer.metrics import (
    MetricsWriter,
    ReplicaMetrics,
    StepMetrics,
    TaskMetrics,
    as_json,
    restore_metrics,
)
from lobra.trainer.optimizer import AdapterOptimizer, TaskUpdate
from lobra.trainer.progress import Progress
from lobra.trainer.run_spec import RunSpec
from lobra.trainer.schedule import clip_coefficient, learning_rate
from lobra.trainer.signals import StopRequest
from lobra.trainer.zero import start_deepspeed

log = logging.getLogger(__name__)

PATIENCE = timedelta(hours=2)  # of ranks waiting for one that reads or writes files


@dataclass
class RankResult:
    """What a rank reports at the end. `stop_signal` is what ended the run early, if any did."""

    rank: int
    loaded_bytes: int
    held_bytes: int
    peak_memory_bytes: int = 0
    stopped_at: int | None = None
    stop_signal: int | None = None


@dataclass
class _Clock:
    """Seconds of one step; `arrival_s` from the order's arrival to being ready to reduce."""

    start: float
    prepare_s: float = 0.0
    compute_s: float = 0.0
    arrival_s: float = 0.0
    reduce_s: float = 0.0
    optimizer_s: float = 0.0


def train_rank(run: RunSpec) -> RankResult:
    """Train `run` as this rank of an initialised world and return what it did. Collective."""
    with StopRequest() as stop:
        return Worker(run).train(stop)


class Worker:
    """The state of one rank: stage, optimiser, dispatcher, tasks' lives; on rank 0 their data."""

    def __init__(self, run: RunSpec) -> None:
        """Build everything this rank needs. Collective."""
        start_deepspeed(run.device)
        self.run = run
        self.rank = dist.get_rank()
        self.device = (
            torch.device("cuda", torch.cuda.current_device())
            if run.device == "cuda"
            else torch.device("cpu")
        )
        self.control = dist.new_group(backend="gloo", timeout=PATIENCE)
        groups = build_groups(run.world)
        self.place = groups.place
        # Sequences travel with the orders, so only the rank that makes them needs the data.
        owned = range(len(run.tasks)) if self.rank == 0 else ()
        self.datasets = [TokenizedDataset.load(run.data_folder(t)) for t in owned]
        self.stage = build_stage(
            run.model_folder,
            groups,
            {n: adapter_spec(task, run.seed) for n, task in enumerate(run.tasks)},
            dtype=DTYPES[run.precision],
            device=self.device,
        )
        # Loading may take a rank much longer than another; NCCL's own patience is short.
        dist.barrier(group=self.control)
        self.lives = [TaskLife(steps) for steps in run.num_steps]
        self.feedback = SpeedFeedback([1.0] * len(run.world.replicas))
        self._load_weights()
        self.optimizer = AdapterOptimizer(self.stage, run.world)
        for number, task in enumerate(run.tasks):
            self.optimizer.install(number, task)
        self.exporter = AdapterExporter(run, self.stage, self.optimizer, self.control)
        self.last_metrics: StepMetrics | None = None
        self.first_step = self._restore()
        self.dispatcher = AheadDispatcher(self._solver, self._running, self.control)
        self.stop_requested = False
        self.peak_memory_bytes = 0
        held_out = [
            TokenizedDataset.load(folder) if (folder := run.validation_folder(t)).is_dir() else None
            for t in owned
        ]
        self.evaluator = Evaluator(
            self.stage,
            held_out,
            lambda step, sequences: self._assign(step, sequences, self._slowdown()),
            self._tensors,
            self.control,
        )
        self.result = RankResult(self.rank, self.stage.loaded_bytes, self._held_bytes())

    # -- set-up ---------------------------------------------------------------------------------

    def _load_weights(self) -> None:
        """Load the adapters of a checkpoint, or those that tasks start from."""
        run = self.run
        if run.resume_step is not None:
            load_weights(run.output_dir, run.resume_step, self.stage)
            return
        for number, task in enumerate(run.tasks):
            if task.resume_from:
                load_adapter(Path(task.resume_from), self.stage, number)

    def _restore(self) -> int:
        """Restore moments, lives and factors from the checkpoint; return the first step."""
        run = self.run
        if run.resume_step is None:
            return 0
        state = read_state(run.output_dir, run.resume_step)
        self.lives = [
            replace(life, num_steps=steps)
            for life, steps in zip(lives_from_json(state.lives), run.num_steps, strict=True)
        ]
        updates = {number: life.updates for number, life in enumerate(self.lives)}
        load_moments(run.output_dir, run.resume_step, self.optimizer, updates)
        if run.feedback and state.plan == str(run.plan):
            self.feedback = SpeedFeedback(list(state.speed_factors), list(state.speed_counts))
        for life, task in zip(self.lives, run.tasks, strict=True):
            if life.stopped is None:
                continue
            if task.name in run.revive:
                life.revive()
                self._say("task %s goes on from step %d", task.name, state.step + 1)
            else:
                self._say(
                    "task %s stays stopped: %s (--revive %s lets it go on)",
                    task.name, life.stopped, task.name,
                )  # fmt: skip
        # Only when every rank has read what it needs is anything later removed.
        dist.barrier(group=self.control)
        if self.rank == 0:
            drop_later(run.output_dir, state.step)
            restore_metrics(run.output_dir, state.step, state.last_metrics)
        return state.step

    def _held_bytes(self) -> int:
        frozen = list(self.stage.decoder.parameters())
        if self.stage.head is not None:
            frozen += list(self.stage.head.parameters())
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in frozen}
        return sum(storages.values())

    # -- dispatch -------------------------------------------------------------------------------

    def _running(self, step: int) -> Running:
        if step >= self.run.last_step:
            return (False,) * len(self.lives)
        return tuple(life.runs_at(step) for life in self.lives)

    def _solver(self, step: int, running: Running) -> Callable[[], IntArray]:
        """Return what solves a step on another thread, with the speed factors as they are now."""
        return partial(self._solve, step, running, self._slowdown())

    def _solve(self, step: int, running: Running, slowdown: tuple[float, ...]) -> IntArray:
        """Return the encoded order of a step (rank 0 only, in its solver thread)."""
        drawn = draw_sequences(self.run.tasks, self.datasets, running, self.run.seed, step)
        return self._assign(step, drawn, slowdown).encode()

    def _slowdown(self) -> tuple[float, ...]:
        """Return every replica's speed factor, as it is now."""
        return tuple(
            self.feedback.factors if self.run.feedback else [1.0] * len(self.run.world.replicas)
        )

    def _assign(
        self, step: int, sequences: list[Sequence], slowdown: tuple[float, ...]
    ) -> StepOrder:
        """Return the order of these sequences (rank 0 only); reads nothing that changes."""
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
        return make_order(step, sequences, assignment, slowdown, time.perf_counter() - start)

    def _tensors(
        self, order: StepOrder, weights: torch.Tensor, noise: int
    ) -> list[MicroBatchTensors]:
        """Return the tensors of this rank's replica's micro-batches."""
        return [
            micro_batch_tensors(micro_batch, weights, self.device, noise)
            for micro_batch in order.replicas[self.place.replica]
        ]

    # -- the loop -------------------------------------------------------------------------------

    def train(self, stop: StopRequest) -> RankResult:
        """Run the steps, then write the adapters and a last checkpoint. Collective."""
        run = self.run
        with ExitStack() as stack:
            stack.callback(self.dispatcher.close)  # however the run ends
            writer = progress = None
            if self.rank == 0:
                writer = stack.enter_context(MetricsWriter(run.output_dir, self.first_step))
                progress = stack.enter_context(Progress(run, self.first_step))
            step, saved = self.first_step, run.resume_step
            while any(self._running(step)):
                self.stop_requested |= stop.received is not None
                metrics = self._step(step, self.stop_requested)
                if metrics is None:
                    break
                step, self.last_metrics = step + 1, metrics
                ends = not any(self._running(step))
                try:
                    if ends or (run.save_every and step % run.save_every == 0):
                        mark = time.perf_counter()
                        self.exporter.save_checkpoint(self._state(step))
                        took_s = time.perf_counter() - mark
                        saved, metrics = step, replace(metrics, checkpoint_time_s=took_s)
                finally:  # the step was trained, whatever became of its checkpoint
                    if writer is not None and progress is not None:
                        writer.write(metrics)
                        progress.update(metrics)
            finished = not any(self._running(step))
            if saved != step:
                self.exporter.save_checkpoint(self._state(step))
            if finished:
                self.exporter.export_adapters()
            else:
                self.result.stopped_at = step
                self.result.stop_signal = stop.received or signal.SIGTERM
        self.result.peak_memory_bytes = self._peak_memory_bytes()
        return self.result

    def _step(self, step: int, stop: bool) -> StepMetrics | None:
        """Run one step; None when rank 0 was told to stop before it. Collective."""
        run = self.run
        clock = _Clock(time.perf_counter())
        running = self._running(step)
        order = self.dispatcher.get(step, running, stop)
        if order.stop:
            return None
        begin = time.perf_counter()
        works = order.task_work(len(run.tasks))
        weights = self._task_weights(step, works)
        batches = self._tensors(order, weights, run.seed * 1_000_003 + step)
        clock.prepare_s = time.perf_counter() - begin
        try:
            figures = self._compute(batches, running, clock, begin)
            if self.stage.joins_tasks and not all(map(math.isfinite, figures.grad_norms)):
                self.stage.forget_gradients()
                self.stage.apart = True
                figures = self._compute(batches, running, clock, begin)
        except torch.OutOfMemoryError as error:
            raise RuntimeError(self._too_large(step, order)) from error
        finally:
            self.stage.apart = False
        self.stop_requested = figures.stop  # also when another rank was told
        self.peak_memory_bytes = max(self.peak_memory_bytes, figures.memory_bytes[self.rank])
        updates = self._decide(step, works, figures)
        mark = time.perf_counter()
        self.optimizer.update(dict(enumerate(updates)))
        self._synchronize()
        clock.optimizer_s = time.perf_counter() - mark
        return self._conclude(step, order, works, figures, updates, clock)

    def _compute(
        self, batches: list[MicroBatchTensors], running: Running, clock: _Clock, begin: float
    ) -> StepFigures:
        """Compute this replica's losses and gradients and sum them over the world. Collective."""
        mark = time.perf_counter()
        losses = run_replica(self.stage, batches, len(running))
        self._synchronize()
        clock.compute_s = time.perf_counter() - mark

        mark = time.perf_counter()
        clock.arrival_s = mark - begin
        takes_part = [number for number, runs in enumerate(running) if runs]
        squared = torch.zeros(len(running), dtype=torch.float64, device=self.device)
        squared[takes_part] = self.optimizer.reduce(takes_part)
        self._synchronize()
        clock.reduce_s = time.perf_counter() - mark
        if not self.place.owns_loss:
            losses = torch.zeros_like(losses)  # its TP peers computed the same
        return exchange_figures(
            losses, squared, clock.compute_s, clock.arrival_s, self.control, self.stop_requested
        )

    def _too_large(self, step: int, order: StepOrder) -> str:
        """Return what to do when a micro-batch does not fit into the GPU."""
        replica = self.run.plan.replicas[self.place.replica]
        largest = max(item.padded_tokens for item in order.replicas[self.place.replica])
        profile_again = "profile memory again with this number of tasks"
        keeps = replica.layout.memory != "full"
        return (
            f"step {step + 1}: out of GPU memory on replica {self.place.replica} {replica.layout}, "
            f"whose largest micro-batch holds {largest} tokens; lower its max_tokens "
            f"({replica.max_tokens}) in the plan"
            + (f", {profile_again}, or give --memory full" if keeps else f", or {profile_again}")
            + "; then go on with --resume"
        )

    def _task_weights(self, step: int, works: tuple[Work, ...]) -> torch.Tensor:
        """Return what each task's summed loss is multiplied by: 1 / its target tokens."""
        weights = torch.tensor(
            [1.0 / work.labels if work.labels else 0.0 for work in works],
            dtype=kept_dtype(self.stage.dtype),
        )
        return to_device([weights], self.device)[0]

    def _decide(self, step: int, works: tuple[Work, ...], figures: StepFigures) -> list[TaskUpdate]:
        """Return what this step does to each task; the same on every rank."""
        updates = []
        for number, task in enumerate(self.run.tasks):
            norm = figures.grad_norms[number]
            updates.append(
                TaskUpdate(
                    apply=works[number].labels > 0 and math.isfinite(norm),
                    learning_rate=learning_rate(task, step, self.run.num_steps[number]),
                    clip=clip_coefficient(norm, task.max_grad_norm),
                )
            )
        return updates

    def _conclude(
        self,
        step: int,
        order: StepOrder,
        works: tuple[Work, ...],
        figures: StepFigures,
        updates: list[TaskUpdate],
        clock: _Clock,
    ) -> StepMetrics:
        """Let the tasks' lives and the feedback learn from the step; return its metrics."""
        run = self.run
        losses = [
            figures.losses[number] / work.labels if work.labels else math.nan
            for number, work in enumerate(works)
        ]
        took_part = [work.labels > 0 for work in works]
        for number, task in enumerate(run.tasks):
            if took_part[number]:
                message = self.lives[number].record(updates[number].apply, losses[number])
                self._tell(step, task.name, updates[number].apply, message)
        busy = [
            max(figures.busy_s[rank] for rank in run.world.ranks(item.index))
            for item in run.plan.replicas
        ]
        if run.feedback:
            plain = [
                time_s / factor
                for time_s, factor in zip(order.replica_time_s, order.speed_factors, strict=True)
            ]
            self.feedback.update(plain, busy)
        # Ready before the slowest rank was, this one waited for it inside the reduction.
        waited_s = max(0.0, min(clock.reduce_s, max(figures.arrival_s) - clock.arrival_s))
        step_time_s = time.perf_counter() - clock.start
        mark = time.perf_counter()
        evaluation = self._end_of_period(step)
        validation_time_s = time.perf_counter() - mark
        memory_bytes = figures.memory_bytes
        if evaluation.memory_bytes:
            memory_bytes += evaluation.memory_bytes
            self.peak_memory_bytes = max(self.peak_memory_bytes, evaluation.memory_bytes[self.rank])
        sequences = Counter(sequence.task for sequence in order.sequences)
        return StepMetrics(
            step=step,
            step_time_s=step_time_s,
            predicted_step_time_s=order.predicted_step_time_s,
            dispatch_time_s=order.solve_time_s,
            dispatch_wait_s=self.dispatcher.wait_time_s,
            prepare_time_s=clock.prepare_s,
            replica_wait_s=waited_s,
            reduce_time_s=clock.reduce_s - waited_s,
            optimizer_time_s=clock.optimizer_s,
            tokens=total_work(works).tokens,
            padded_tokens=order.padded_tokens,
            gpu_seconds=step_time_s * run.world_size,
            memory_bytes=max(memory_bytes),
            tasks={
                task.name: TaskMetrics(
                    loss=losses[number],
                    tokens=works[number].labels,
                    sequences=sequences[number],
                    grad_norm=figures.grad_norms[number],
                    lr=updates[number].learning_rate,
                    applied=updates[number].apply,
                    validation_loss=evaluation.losses.get(number),
                    stopped=self.lives[number].stopped,
                )
                for number, task in enumerate(run.tasks)
                if took_part[number]
            },
            replicas=[
                ReplicaMetrics(
                    layout=str(item.layout),
                    busy_s=busy[item.index],
                    predicted_s=order.replica_time_s[item.index],
                    speed_factor=order.speed_factors[item.index],
                    micro_batches=len(order.replicas[item.index]),
                    padded_tokens=sum(b.padded_tokens for b in order.replicas[item.index]),
                )
                for item in run.plan.replicas
            ],
            validation_time_s=validation_time_s,
            plan_from=run.plan_from,
        )

    def _tell(self, step: int, task: str, applied: bool, stopped: str | None) -> None:
        """Warn of a skipped update or a stopped task (rank 0); steps count from 1 on a screen."""
        if not applied:
            self._say(
                "step %d: the gradient of task %s is not finite, its update is skipped",
                step + 1, task,
            )  # fmt: skip
        if stopped is not None:
            self._say("step %d: task %s is stopped: %s", step + 1, task, stopped)

    def _say(self, message: str, *values: object) -> None:
        """Warn once, not on every rank."""
        if self.rank == 0:
            log.warning(message, *values)

    # -- evaluation -----------------------------------------------------------------------------

    def _end_of_period(self, step: int) -> Evaluation:
        """Close an evaluation period if one ends here; return what was found, if one does."""
        every = self.run.validate_every
        ends = {self.run.last_step, *self.run.num_steps}  # a task's last step is evaluated too
        if not every or ((step + 1) % every and step + 1 not in ends):
            return Evaluation()
        evaluation = self.evaluator.evaluate(self._running(step))
        for number, task in enumerate(self.run.tasks):
            life = self.lives[number]
            # By the task's own calendar: what others do, or --max-steps, must not matter to it.
            closes = (step + 1) % every == 0 or step + 1 == self.run.num_steps[number]
            if closes and life.runs_at(step):
                stopped = life.end_period(task, evaluation.losses.get(number))
                self._tell(step, task.name, True, stopped)
        return evaluation

    # -- what is left behind --------------------------------------------------------------------

    def _state(self, step: int) -> CheckpointState:
        """Return the part of a checkpoint after `step` steps that is not tensors."""
        run = self.run
        return CheckpointState(
            step=step,
            seed=run.seed,
            tasks=list(run.task_records),
            lives=lives_to_json(self.lives),
            speed_factors=list(self.feedback.factors),
            speed_counts=list(self.feedback.counts),
            plan=str(run.plan),
            base_model=run.fingerprint,
            last_metrics=None if self.last_metrics is None else as_json(self.last_metrics),
            data_day=run.data_day,
            precision=run.precision,
        )

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _peak_memory_bytes(self) -> int:
        if self.device.type == "cuda":  # its counter starts anew with every exchange of figures
            return max(self.peak_memory_bytes, torch.cuda.max_memory_allocated())
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
