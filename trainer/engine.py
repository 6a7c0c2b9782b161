"""The engine: what every rank holds of a run's model and adapters, and does with them when ordered.

It runs this rank's replica over its micro-batches and updates every task's adapter with the sum of
the gradients of all ranks that hold it, so that training jointly on any plan equals training alone
(docs/architecture.md). It knows tasks by number, no data and no time: those are the coordinator's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from lobra.layout.order import StepOrder, Update
from lobra.model.groups import build_groups
from lobra.model.pipeline import evaluate_replica, run_replica
from lobra.model.precision import DTYPES, kept_dtype
from lobra.model.stage import MicroBatchTensors, build_stage
from lobra.trainer.adapters import adapter_spec, load_adapter
from lobra.trainer.batches import micro_batch_tensors, to_device
from lobra.trainer.checkpoint import CheckpointState, load_moments, load_weights
from lobra.trainer.control import Control
from lobra.trainer.engines import AdapterOptimizer, TaskUpdate, start_deepspeed
from lobra.trainer.optimizer import clip_coefficient
from lobra.trainer.run_spec import RunSpec
from lobra.trainer.step_report import StepReport
from lobra.trainer.store import AdapterStore


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
        """Build all, with the adapters of a checkpoint, or those that tasks start from."""
        start_deepspeed(run.device)
        self.run = run
        self.num_tasks = len(run.tasks)
        self.rank = dist.get_rank()
        self.told_to_stop = told_to_stop
        self.device = (
            torch.device("cuda", torch.cuda.current_device())
            if run.device == "cuda"
            else torch.device("cpu")
        )
        self.control = Control()
        groups = build_groups(run.world)
        self.place = groups.place
        self.stage = build_stage(
            run.model_folder,
            groups,
            [adapter_spec(task, run.seed) for task in run.tasks],
            dtype=DTYPES[run.precision],
            device=self.device,
        )
        # Loading may take a rank much longer than another; NCCL's own patience is short.
        self.control.wait()
        self._load_weights(resumed)
        self.optimizer = AdapterOptimizer(
            run.tasks, self.stage.bank, run.world, self.stage.shape.num_layers
        )
        self.store = AdapterStore(
            run, self.stage.bank, self.stage.shape, self.optimizer, self.control.group
        )
        if resumed is not None:
            updates = [resumed.progress[task.name].updates for task in run.tasks]
            load_moments(run.output_dir, resumed.step, self.stage.bank, self.optimizer, updates)
            # Only when every rank has read what it needs is anything later removed.
            self.control.wait()
        self.peak_memory_bytes = 0

    def _load_weights(self, resumed: CheckpointState | None) -> None:
        run, bank = self.run, self.stage.bank
        if resumed is not None:
            load_weights(run.output_dir, resumed.step, bank)
            return
        for number, task in enumerate(run.tasks):
            if task.resume_from:
                load_adapter(Path(task.resume_from), bank, number)

    @property
    def held_bytes(self) -> int:
        """What this rank keeps of the frozen base model."""
        frozen = list(self.stage.decoder.parameters())
        if self.stage.head is not None:
            frozen += list(self.stage.head.parameters())
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in frozen}
        return sum(storages.values())

    # -- orders ---------------------------------------------------------------------------------

    def follow(self) -> StepOrder:
        """Carry out rank 0's orders (every other rank) and return the last one."""
        while True:
            order = self.control.receive()
            self.carry_out(order)
            if order.stop:
                return order

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
        """
        report = None
        if order.updates:
            report = self._train(order)
        elif order.sequences:
            report = self._evaluate(order)
        if order.save:
            self.store.save_checkpoint(state)
        if order.export:
            self.store.export_adapters()
        return report

    def _train(self, order: StepOrder) -> StepReport:
        start = time.perf_counter()
        batches = self._tensors(order)
        prepared = time.perf_counter()
        try:
            losses = self.forward_backward(batches)
        except torch.OutOfMemoryError as error:
            raise RuntimeError(self._too_large(order)) from error
        self._synchronize()
        computed = time.perf_counter()
        squared_norms = self.reduce([update.task for update in order.updates])
        self._synchronize()
        reduced = time.perf_counter()
        report = self._exchange(order, losses, squared_norms, computed - prepared, computed - start)
        exchanged = time.perf_counter()
        self.step(order.updates, report.grad_norms)
        self._synchronize()
        return replace(
            report,
            prepare_s=prepared - start,
            reduce_s=reduced - computed,
            optimizer_s=time.perf_counter() - exchanged,
        )

    def _evaluate(self, order: StepOrder) -> StepReport:
        losses = evaluate_replica(self.stage, self._tensors(order), self.num_tasks)
        return self._exchange(order, losses, torch.zeros(len(losses)), 0.0, 0.0)

    # -- a step ---------------------------------------------------------------------------------

    def forward_backward(self, batches: Sequence[MicroBatchTensors]) -> Tensor:
        """Run this rank's replica; gradients add up in the adapters.

        Returns
        -------
        Tensor
            [num_tasks] the summed token loss of each task, non-zero only on the last stage.
        """
        return run_replica(self.stage, batches, self.num_tasks)

    def reduce(self, tasks: Sequence[int]) -> Tensor:
        """Sum these tasks' gradients over all ranks that hold them.

        Returns
        -------
        Tensor
            [num_tasks] this rank's part of each task's squared gradient norm.
        """
        return self.optimizer.reduce([task in tasks for task in range(self.num_tasks)])

    def step(self, updates: Sequence[Update], grad_norms: Mapping[int, float]) -> None:
        """Update adapters with the reduced gradients, each clipped by its own norm.

        A task whose gradient is not finite keeps its weights and moments, as one without an update
        does. The norms are the same on every rank, and so are the decisions.
        """
        todo = [TaskUpdate(apply=False)] * self.num_tasks
        for update in updates:
            norm = grad_norms[update.task]
            todo[update.task] = TaskUpdate(
                math.isfinite(norm),
                update.learning_rate,
                clip_coefficient(norm, update.max_grad_norm),
            )
        self.optimizer.update(todo)

    def _tensors(self, order: StepOrder) -> list[MicroBatchTensors]:
        """Return the tensors of this replica's micro-batches; losses are means over targets."""
        weights = torch.zeros(self.num_tasks, dtype=kept_dtype(self.stage.dtype))
        for update in order.updates:
            weights[update.task] = 1.0 / order.work[update.task].labels
        weights = to_device([weights], self.device)[0]
        return [
            micro_batch_tensors(micro_batch, weights, self.device)
            for micro_batch in order.replicas[self.place.replica]
        ]

    def _exchange(
        self,
        order: StepOrder,
        losses: Tensor,
        squared_norms: Tensor,
        busy_s: float,
        arrival_s: float,
    ) -> StepReport:
        tasks = list(order.work)
        losses = losses.cpu()[tasks]
        if not self.place.owns_loss:
            losses = torch.zeros_like(losses)  # its TP peers computed the same
        report = self.control.exchange(
            tasks, losses, squared_norms.cpu()[tasks], busy_s, arrival_s, self.told_to_stop()
        )
        self.peak_memory_bytes = max(self.peak_memory_bytes, report.memory_bytes[self.rank])
        return report

    def _too_large(self, order: StepOrder) -> str:
        """Return what to do when a micro-batch does not fit into the GPU."""
        replica = self.run.plan.replicas[self.place.replica]
        largest = max(item.padded_tokens for item in order.replicas[self.place.replica])
        profile_again = "profile memory again with this number of tasks"
        keeps = replica.layout.memory != "full"
        return (
            f"step {order.step + 1}: out of GPU memory on replica {self.place.replica} "
            f"{replica.layout}, whose largest micro-batch holds {largest} tokens; lower its "
            f"max_tokens ({replica.max_tokens}) in the plan"
            + (f", {profile_again}, or give --memory full" if keeps else f", or {profile_again}")
            + "; then go on with --resume"
        )

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
