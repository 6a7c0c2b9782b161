"""The engine: what every rank holds of a run's model and adapters, and does with them when ordered.

It runs this rank's replica over its micro-batches and updates every task's adapter with the sum of
the gradients of all ranks that hold it, so that training jointly on any plan equals training alone
(docs/architecture.md). It knows tasks by number, no data and no time: those are the coordinator's.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lobra.common.errors import ConfigError
from lobra.layout.order import SlotOrder, StepOrder, Update
from lobra.model.adapter import AdapterSpec
from lobra.model.groups import build_groups
from lobra.model.heartbeat import beat
from lobra.model.micro_batch import MicroBatchTensors, micro_batch_tensors
from lobra.model.pipeline import evaluate_replica, run_replica
from lobra.model.precision import DTYPES, kept_dtype
from lobra.model.stage import build_stage
from lobra.tasks.config import TaskConfig
from lobra.tasks.objectives import Objective, objective_of
from lobra.trainer.adapters import MOMENTS_FILE, WEIGHTS_FILE, adapter_spec, load_weights
from lobra.trainer.checkpoint import CheckpointState, load_moments
from lobra.trainer.checkpoint_folder import STATE_FILE, step_folder
from lobra.trainer.compared_examples import ComparedExamples
from lobra.trainer.comparison import example_weights, learned_part
from lobra.trainer.control import Control
from lobra.trainer.exporter import AdapterExporter
from lobra.trainer.first_values import start_from_base
from lobra.trainer.model_training import starting_folder, train_model
from lobra.trainer.optimizer import AdapterOptimizer, TaskUpdate
from lobra.trainer.rank0_folder import Rank0Folder
from lobra.trainer.run_spec import RunSpec
from lobra.trainer.schedule import clip_coefficient
from lobra.trainer.step_report import StepReport
from lobra.trainer.step_trace import traced
from lobra.trainer.zero import start_deepspeed

RECENT_STEPS = 50  # whose longest is what a step is expected to take


class Engine:
    """One rank's stage, its adapters and their optimiser. Its methods are collective.

    Attributes
    ----------
    rank
        This rank's number in the world.
    told_to_stop
        Says whether this rank was told to stop; what all ranks were told is in a step's report.
    peak_memory_bytes
        The most memory this rank has reported.
    """

    def __init__(
        self,
        run: RunSpec,
        resumed: CheckpointState | None,
        told_to_stop: Callable[[], bool],
    ) -> None:
        """Build all, with the adapters of a checkpoint, or those that tasks start from.

        Of ``resumed``, what rank 0 has counts.
        """
        start_deepspeed(run.device)
        self.run = run
        self.rank = dist.get_rank()
        self.told_to_stop = told_to_stop
        self.device = (
            torch.device("cuda", torch.cuda.current_device())
            if run.device == "cuda"
            else torch.device("cpu")
        )
        self.control = Control()
        resumed = self.control.shared(resumed)
        self.resumed_step = 0 if resumed is None else resumed.step
        groups = build_groups(run.world)
        self.place = groups.place
        if run.trains_model and resumed is not None:
            folder = step_folder(run.output_dir, resumed.step)
            if not self._folder(folder, STATE_FILE).is_shared:
                raise ConfigError(f"{folder}: adapter: full goes on only where all hosts see it")
        self.stage = build_stage(
            starting_folder(run, resumed),
            groups,
            {},
            dtype=DTYPES[run.precision],
            device=self.device,
            base_precision=run.base_precision,
        )
        # Loading may take a rank much longer than another; NCCL's own patience is short.
        self.control.wait()
        self.objectives: dict[int, Objective] = {}
        self.optimizer: AdapterOptimizer
        self.exporter: AdapterExporter
        if run.trains_model:
            self.optimizer, self.exporter = train_model(run, self.stage, self.control, resumed)
            self._note_objectives(dict(enumerate(run.tasks)))
        else:
            self.optimizer = AdapterOptimizer(self.stage, run.world)
            self.exporter = AdapterExporter(run, self.stage, self.optimizer, self.control.group)
            self.install(dict(enumerate(run.tasks)), resumed)
        if resumed is not None:  # only when all have read what they need is anything later removed
            self.control.wait()
        self.peak_memory_bytes = 0
        self.step_times_s: deque[float] = deque(maxlen=RECENT_STEPS)

    def install(
        self, tasks: Mapping[int, TaskConfig], resumed: CheckpointState | None = None
    ) -> None:
        """Give tasks a slot each, by their numbers: as they start, or as a checkpoint has them.

        What other tasks have learned stays as it is, bit for bit.
        """
        self.stage.install({n: adapter_spec(task, self.run.seed) for n, task in tasks.items()})
        self._note_objectives(tasks)
        if resumed is not None:
            checkpoint = self._folder(step_folder(self.run.output_dir, resumed.step), STATE_FILE)
        for number, task in tasks.items():
            if resumed is not None:
                load_weights(checkpoint, f"adapters/{task.name}/{WEIGHTS_FILE}", self.stage, number)
            elif task.resume_from:
                start = self._folder(Path(task.resume_from), WEIGHTS_FILE)
                load_weights(start, WEIGHTS_FILE, self.stage, number)
            elif self.stage.slots[number].spec.starts_from_base:
                start_from_base(self.run.model_folder, self.optimizer, number)
                self.control.wait()
            self.optimizer.install(number, task)
            if resumed is not None:
                progress = resumed.progress[task.name]
                moments = f"moments/{task.name}.safetensors"
                load_moments(checkpoint, moments, self.optimizer, number, progress.updates)
                if progress.lowest_step is not None:
                    self.exporter.load_kept(resumed.step, number)

    def _folder(self, path: Path, mark: str) -> Rank0Folder:
        return Rank0Folder(path, mark, self.control.group)

    def _note_objectives(self, tasks: Mapping[int, TaskConfig]) -> None:
        self.objectives |= {n: own for n, task in tasks.items() if (own := objective_of(task))}

    def change_slot(self, order: SlotOrder) -> None:
        """Install a task's slot, write its adapter or take it away."""
        folder = Path(order.folder)
        if order.config is not None:
            self.install({order.task: TaskConfig(**_as_fields(order.config))})
        elif order.action == "install":
            assert order.adapter is not None
            self.stage.install({order.task: AdapterSpec(**_as_fields(order.adapter))})
            if order.folder:
                saved = self._folder(folder, WEIGHTS_FILE)
                load_weights(saved, WEIGHTS_FILE, self.stage, order.task)
            self.optimizer.install(order.task)
            if order.moments:
                load_moments(saved, MOMENTS_FILE, self.optimizer, order.task, order.updates)
        elif order.action == "save":
            self.exporter.save_slot(self.stage.slots[order.task], folder, order.moments)
        else:
            self.remove(order.task)

    def remove(self, number: int) -> None:
        """Take a task's slot away; what others have learned stays as it is."""
        self.optimizer.remove(number)
        self.stage.remove(number)
        self.exporter.kept.pop(number, None)
        self.objectives.pop(number, None)

    @property
    def num_tasks(self) -> int:
        """How long a vector is that has an element for every task number."""
        return 1 + max(self.stage.slots, default=-1)

    # -- orders ---------------------------------------------------------------------------------

    def follow(self) -> StepOrder:
        """Carry out rank 0's orders (every other rank) and return the last one."""
        following = self.resumed_step + 1
        while True:
            beat("waiting for its order", following)
            order = self.control.receive()
            self.carry_out(order)
            if order.stop:
                return order
            following = order.step + (2 if order.updates else 1)

    def carry_out(
        self, order: StepOrder, state: CheckpointState | None = None
    ) -> StepReport | None:
        """Do what an order says, which all other ranks have been sent.

        Parameters
        ----------
        order
            The order.
        state
            On rank 0, what a checkpoint holds beside tensors.

        Returns
        -------
        StepReport or None
            What became of the order's sequences, if it has any.

        Raises
        ------
        StorageError
            On rank 0, when all ranks have done all: something could not be written.
        """
        report = None
        for slot_order in order.slots:
            self.change_slot(slot_order)
        if order.sequences and order.updates:
            with self._traced(order.step + 1):
                report = self._train(order)
        elif order.accumulate and order.sequences:
            report = self._accumulate(order)
        elif order.sequences:
            report = self._evaluate(order)
        elif order.updates:
            report = self._update(order)
        self.exporter.keep(order.keep)
        denied = [self.exporter.export(order.export, order.export_best)]
        if order.save:
            denied.append(self.exporter.save_checkpoint(state))
        for failure in filter(None, denied):
            raise failure
        return report

    def _traced(self, step: int) -> AbstractContextManager[None]:
        if step not in self.run.profiled_steps:
            return nullcontext()
        return traced(self.run.output_dir, step, self.rank)

    def _train(self, order: StepOrder) -> StepReport:
        start = time.perf_counter()
        beat("preparing", order.step + 1, max(self.step_times_s, default=0.0))
        batches = self._tensors(order)
        prepare_s = time.perf_counter() - start
        report = self._computed(
            order,
            lambda: self._compute(order, batches, start),
            lambda: self.stage.forget_gradients(order.tasks),
        )
        exchanged = time.perf_counter()
        beat("updating")
        failed = self.step(order.updates, report.grad_norms)
        self._synchronize()
        end = time.perf_counter()
        self.step_times_s.append(end - start)
        optimizer_s = end - exchanged
        return replace(report, failed=failed, prepare_s=prepare_s, optimizer_s=optimizer_s)

    def _compute(
        self, order: StepOrder, batches: Sequence[MicroBatchTensors], start: float
    ) -> StepReport:
        """Find losses and gradients and sum them over the world; the order came at ``start``."""
        begin = time.perf_counter()
        examples = self._examples(order)
        losses = self.forward_backward(examples.compared(batches), examples.outcomes)
        self._synchronize()
        computed = time.perf_counter()
        beat("reducing")
        numbers = [update.task for update in order.updates]
        squared_norms = self._of_tasks(numbers, self.optimizer.reduce(numbers))
        reduced = time.perf_counter()
        beat("comparing norms")
        report = self._exchange(order, losses, squared_norms, computed - begin, computed - start)
        return replace(examples.reported(report), reduce_s=reduced - computed)

    def _evaluate(self, order: StepOrder) -> StepReport:
        beat("evaluating", order.step)
        start = time.perf_counter()
        token_losses: list[Tensor] = []
        examples = self._examples(order)
        batches = examples.compared(self._tensors(order))
        losses = evaluate_replica(
            self.stage, batches, self.num_tasks, token_losses, examples.outcomes
        )
        self._synchronize()
        busy_s = time.perf_counter() - start
        report = self._exchange(order, losses, torch.zeros(len(losses)), busy_s, busy_s)
        return self._with_token_losses(order, examples.reported(report), token_losses)

    def _accumulate(self, order: StepOrder) -> StepReport:
        """Add the gradients of an order's sequences to what their tasks have."""
        beat("computing", order.step)
        start = time.perf_counter()
        batches = self._tensors(order)
        gradients = [self.stage.slots[number].gradient for number in order.tasks]
        before = [own.clone() for own in gradients] if self.stage.joins_tasks else []

        token_losses: list[Tensor] = []

        def compute() -> StepReport:
            token_losses.clear()
            losses = run_replica(self.stage, batches, self.num_tasks, token_losses)
            # Of this rank's gradients, to learn whether all are finite.
            norms = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float64))
            squared_norms = self._of_tasks(order.tasks, norms.square())
            busy_s = time.perf_counter() - start
            return self._exchange(order, losses, squared_norms, busy_s, busy_s)

        report = self._computed(order, compute, lambda: torch._foreach_copy_(gradients, before))
        return self._with_token_losses(order, report, token_losses)

    def _computed(
        self, order: StepOrder, compute: Callable[[], StepReport], undo: Callable[[], object]
    ) -> StepReport:
        """Compute an order; again with tasks apart where one that is not finite may spoil others.

        Raises
        ------
        RuntimeError
            The GPU has not enough memory.
        """
        try:
            report = compute()
            if self.stage.joins_tasks and not all(map(math.isfinite, report.grad_norms.values())):
                undo()
                self.stage.apart = True
                report = compute()
        except torch.OutOfMemoryError as error:
            raise RuntimeError(self._too_large(order)) from error
        finally:
            self.stage.apart = False
        return report

    def _of_tasks(self, numbers: Sequence[int], values: Tensor) -> Tensor:
        """Return a vector with an element for every task number, zero but for some tasks."""
        whole = torch.zeros(self.num_tasks, dtype=torch.float64)
        whole[list(numbers)] = values.cpu()
        return whole

    def _update(self, order: StepOrder) -> StepReport:
        """Update tasks with the gradients they have accumulated, and forget these."""
        numbers = list(order.tasks)
        squared_norms = self._of_tasks(numbers, self.optimizer.reduce(numbers))
        no_losses = torch.zeros(self.num_tasks, dtype=torch.float64)
        report = self._exchange(order, no_losses, squared_norms, 0.0, 0.0)
        failed = self.step(order.updates, report.grad_norms)
        self._synchronize()
        return replace(report, failed=failed)

    def _with_token_losses(
        self, order: StepOrder, report: StepReport, token_losses: Sequence[Tensor]
    ) -> StepReport:
        """Return the report, on rank 0 with the losses of every sequence's labels."""
        sequences = order.sequences
        if sequences[0].labels is None:
            return report
        replica = self.place.replica
        counts = [
            sum(batch.work.labels for batch in micro_batches) for micro_batches in order.replicas
        ]
        own = torch.zeros(sum(counts), dtype=torch.float64)
        if self.place.owns_loss and token_losses:
            start = sum(counts[:replica])
            own[start : start + counts[replica]] = torch.cat(list(token_losses)).cpu()
        self.control.sum_on_first(own)
        if self.rank:
            return report
        ends = accumulate(len(sequence.targets) for sequence in sequences)
        parts = np.split(own.numpy(), list(ends)[:-1])
        return replace(report, token_losses=tuple(parts))

    # -- a step ---------------------------------------------------------------------------------

    def forward_backward(
        self, batches: Sequence[MicroBatchTensors], outcomes: Tensor | None = None
    ) -> Tensor:
        """Run this rank's replica; gradients add up in the adapters.

        What examples give adds up in ``outcomes``.

        Returns
        -------
        Tensor
            [num_tasks] the summed token loss of each task, non-zero only on the last stage.
        """
        return run_replica(self.stage, batches, self.num_tasks, outcomes=outcomes)

    def step(self, updates: Sequence[Update], grad_norms: Mapping[int, float]) -> dict[int, str]:
        """Update adapters with the reduced gradients, each clipped by its own norm.

        A task whose gradient is not finite keeps its weights and moments, as one without an update
        does; one whose update fails keeps its weights. The norms are the same on every rank, and so
        are the decisions. The gradients of all tasks with a norm are forgotten.

        Returns
        -------
        dict
            Of every task whose update failed, why, the same on every rank.
        """
        todo = {number: TaskUpdate(False) for number in grad_norms}
        failed = {}
        largest = math.sqrt(torch.finfo(kept_dtype(self.stage.dtype)).max)  # that Adam can square
        for update in updates:
            norm = grad_norms[update.task]
            clip = clip_coefficient(norm, update.max_grad_norm)
            is_small = not norm * clip > largest
            todo[update.task] = TaskUpdate(
                math.isfinite(norm) and is_small, update.learning_rate, clip, update.adam
            )
            if math.isfinite(norm) and not is_small:
                failed[update.task] = f"its gradient's norm, {norm:.1e}, overflows when squared"
        return failed | self.optimizer.update(todo, self.control.agree)

    def _examples(self, order: StepOrder) -> ComparedExamples:
        return ComparedExamples(self.stage, self.control, order, self.objectives, self.num_tasks)

    def _tensors(self, order: StepOrder) -> list[MicroBatchTensors]:
        """Return the tensors of this replica's micro-batches; losses are means over targets."""
        weights = np.zeros(self.num_tasks)
        for update in order.updates:
            if update.task not in order.num_examples:
                weights[update.task] = 1.0 / order.work[update.task].labels
        own = order.replicas[self.place.replica]
        return micro_batch_tensors(
            [learned_part(one) for one in own], weights, self.device, self.stage.dtype,
            self.stage.dropouts, example_weights(order, self.objectives),
        )  # fmt: skip

    def _exchange(
        self,
        order: StepOrder,
        losses: Tensor,
        squared_norms: Tensor,
        busy_s: float,
        arrival_s: float,
    ) -> StepReport:
        tasks = list(order.tasks)
        losses = losses.cpu()[tasks]
        if not self.place.owns_loss:
            losses = torch.zeros_like(losses)  # its TP peers computed the same
        report = self.control.exchange(
            tasks, losses, squared_norms[tasks], busy_s, arrival_s, self.told_to_stop()
        )
        self.peak_memory_bytes = max(self.peak_memory_bytes, report.memory_bytes[self.rank])
        return report

    def _too_large(self, order: StepOrder) -> str:
        """Return what to do when a micro-batch does not fit into the GPU."""
        replica = self.run.plan.replicas[self.place.replica]
        largest = max(item.padded_tokens for item in order.replicas[self.place.replica])
        leaner = {"keep": ", or give --memory lean or full", "lean": ", or give --memory full"}
        return (
            f"step {order.step + 1}: out of GPU memory on replica {self.place.replica} "
            f"{replica.layout}, whose largest micro-batch holds {largest} tokens; lower its "
            f"max_tokens ({replica.max_tokens}) in the plan or profile memory again with this "
            f"number of tasks{leaner.get(replica.layout.memory, '')}; then go on with --resume"
        )

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _as_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a dataclass that came as JSON, which has lists for tuples."""
    return {name: tuple(own) if isinstance(own, list) else own for name, own in values.items()}
