"""One rank of a training run: the step loop.

A step draws every running task's global batch, takes the assignment solved while the step before
was training, runs this rank's replica over its micro-batches, and updates every task's adapter
with the sum of the gradients of all ranks that hold it. Training jointly on any plan therefore
equals training alone (docs/architecture.md).
"""

from __future__ import annotations

import logging
import math
import resource
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from model.groups import build_groups
from model.pipeline import run_replica
from model.stage import build_stage
from planner.dispatch import Assignment, dispatch
from tasks.dataset import TokenizedDataset
from trainer.adapters import adapter_spec, gather_adapter, load_adapter, save_adapter
from trainer.batches import (
    GlobalBatch,
    IntArray,
    draw_global_batch,
    micro_batch_tensors,
    target_tokens,
)
from trainer.dispatcher import AheadDispatcher, StepDispatch, check_complete
from trainer.engines import AdapterOptimizer, TaskUpdate, UpdateResult
from trainer.metrics import MetricsWriter, ReplicaMetrics, StepMetrics, TaskMetrics
from trainer.optimizer import learning_rate
from trainer.progress import Progress
from trainer.run_spec import RunSpec

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TrainedMicroBatch:
    """What one replica trained in one micro-batch: parallel arrays of task and sequence."""

    step: int
    replica: int
    tasks: IntArray
    indices: IntArray


@dataclass
class RankResult:
    """What a rank reports at the end."""

    rank: int
    loaded_bytes: int
    held_bytes: int
    peak_memory_bytes: int
    trained: list[TrainedMicroBatch] = field(default_factory=list)
    steps: list[StepMetrics] = field(default_factory=list)


def train_rank(run: RunSpec) -> RankResult:
    """Train `run` as this rank of an initialised world and return what it did. Collective."""
    return _Worker(run).train()


class _Worker:
    """The state of one rank: stage, engines, dispatcher, data."""

    def __init__(self, run: RunSpec) -> None:
        _start_deepspeed(run.device)
        self.run = run
        self.rank = dist.get_rank()
        self.device = (
            torch.device("cuda", torch.cuda.current_device())
            if run.device == "cuda"
            else torch.device("cpu")
        )
        self.control = dist.new_group(backend="gloo")
        groups = build_groups(run.grids)
        self.role = groups.role
        self.datasets = [TokenizedDataset.load(run.data_folder(t)) for t in range(len(run.tasks))]
        self.stage = build_stage(
            run.model_folder,
            groups,
            [adapter_spec(task, run.seed) for task in run.tasks],
            dtype=DTYPES[run.precision],
            device=self.device,
        )
        for number, task in enumerate(run.tasks):
            if task.resume_from:
                load_adapter(Path(task.resume_from), self.stage.bank, number)
        self.optimizer = AdapterOptimizer(
            run.tasks, self.stage.bank, run.grids, self.stage.shape.num_layers, self.control
        )
        self.dispatcher = AheadDispatcher(self._solve, self.control, run.last_step)
        self.result = RankResult(self.rank, self.stage.loaded_bytes, self._held_bytes(), 0)

    def _held_bytes(self) -> int:
        frozen = list(self.stage.decoder.parameters())
        if self.stage.head is not None:
            frozen += list(self.stage.head.parameters())
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in frozen}
        return sum(storages.values())

    def _draw(self, step: int) -> GlobalBatch:
        run = self.run
        return draw_global_batch(run.tasks, self.datasets, run.num_steps, run.seed, step)

    def _solve(self, step: int) -> Assignment:
        run = self.run
        buckets = None if run.dynamic_buckets else np.asarray(run.buckets, dtype=np.int64)
        return dispatch(
            self._draw(step).lengths,
            run.plan,
            run.cost_model,
            buckets=buckets,
            num_buckets=run.num_buckets,
            mode=run.dispatch_mode,
        )

    def train(self) -> RankResult:
        run = self.run
        if self.rank == 0:
            run.output_dir.mkdir(parents=True, exist_ok=True)
            with MetricsWriter(run.output_dir) as writer, Progress(run) as progress:
                for step in range(run.last_step):
                    metrics = self._step(step)
                    writer.write(metrics)
                    progress.update(metrics)
                    self.result.steps.append(metrics)
        else:
            for step in range(run.last_step):
                self._step(step)
        self.dispatcher.close()
        self._export()
        self.result.peak_memory_bytes = self._peak_memory_bytes()
        return self.result

    def _step(self, step: int) -> StepMetrics:
        run = self.run
        start = time.perf_counter()
        batch = self._draw(step)
        assignment = self.dispatcher.get(step)
        check_complete(assignment, batch)
        targets = target_tokens(batch, self.datasets)
        weights = torch.tensor(
            [1.0 / count if count else 0.0 for count in targets], device=self.device
        )
        noise = run.seed * 1_000_003 + step
        batches = [
            micro_batch_tensors(
                batch, item.rows, item.padded_length, self.datasets, weights, self.device, noise
            )
            for item in assignment.replicas[self.role.replica]
        ]
        compute_start = time.perf_counter()
        losses = run_replica(self.stage, batches, len(run.tasks))
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        busy_s = time.perf_counter() - compute_start
        self._record(step, batch, assignment)
        update_start = time.perf_counter()
        updates = [
            TaskUpdate(
                learning_rate(task, step, run.num_steps[number]),
                step < run.num_steps[number] and int(targets[number]) > 0,
            )
            for number, task in enumerate(run.tasks)
        ]
        result = self.optimizer.step(updates)
        update_s = time.perf_counter() - update_start
        self._warn_of_skipped(step, updates, result)
        summed, busy = self._reduce(losses, busy_s)
        return self._metrics(
            step, batch, assignment, targets, summed, busy, updates, result, update_s, start
        )

    def _record(self, step: int, batch: GlobalBatch, assignment: StepDispatch) -> None:
        """Note what this replica trained (by the rank that computes its loss)."""
        if self.run.record_sequences and self.role.is_last_stage and self.role.tp_index == 0:
            for item in assignment.replicas[self.role.replica]:
                tasks, indices = batch.tasks[item.rows], batch.indices[item.rows]
                self.result.trained.append(
                    TrainedMicroBatch(step, self.role.replica, tasks, indices)
                )

    def _warn_of_skipped(self, step: int, updates: list[TaskUpdate], result: UpdateResult) -> None:
        if self.rank != 0:
            return
        for number, update in enumerate(updates):
            if update.active and not result.applied[number]:
                log.warning(
                    "step %d: the gradient of task %s is not finite; its update was skipped",
                    step,
                    self.run.tasks[number].name,
                )

    def _reduce(self, losses: torch.Tensor, busy_s: float) -> tuple[list[float], list[float]]:
        """Return each task's summed loss and each replica's busiest rank's seconds."""
        summed = losses.double().cpu()
        if not (self.role.is_last_stage and self.role.tp_index == 0):
            summed.zero_()
        dist.all_reduce(summed, group=self.control)
        busy = torch.zeros(len(self.run.grids), dtype=torch.float64)
        busy[self.role.replica] = busy_s
        dist.all_reduce(busy, op=dist.ReduceOp.MAX, group=self.control)
        return summed.tolist(), busy.tolist()

    def _metrics(
        self,
        step: int,
        batch: GlobalBatch,
        assignment: StepDispatch,
        targets: IntArray,
        summed: list[float],
        busy: list[float],
        updates: list[TaskUpdate],
        result: UpdateResult,
        update_s: float,
        start: float,
    ) -> StepMetrics:
        sequences = np.bincount(batch.tasks, minlength=len(self.run.tasks))
        tasks = {
            task.name: TaskMetrics(
                loss=summed[number] / int(targets[number]) if targets[number] else math.nan,
                tokens=int(targets[number]),
                sequences=int(sequences[number]),
                grad_norm=result.grad_norms[number],
                lr=updates[number].learning_rate,
                applied=result.applied[number],
            )
            for number, task in enumerate(self.run.tasks)
            if updates[number].active
        }
        replicas = [
            ReplicaMetrics(
                layout=str(replica.layout),
                busy_s=busy[replica.index],
                micro_batches=len(assignment.replicas[replica.index]),
                padded_tokens=sum(b.padded_tokens for b in assignment.replicas[replica.index]),
            )
            for replica in self.run.plan.replicas
        ]
        step_time_s = time.perf_counter() - start
        return StepMetrics(
            step=step,
            step_time_s=step_time_s,
            predicted_step_time_s=assignment.predicted_step_time_s,
            dispatch_time_s=assignment.solve_time_s,
            dispatch_wait_s=assignment.wait_time_s,
            update_time_s=update_s,
            tokens=int(batch.lengths.sum()),
            padded_tokens=assignment.padded_tokens,
            gpu_seconds=step_time_s * self.run.world_size,
            tasks=tasks,
            replicas=replicas,
        )

    def _export(self) -> None:
        """Write every task's adapter (rank 0), gathered from its holders. Collective."""
        for task, spec in enumerate(self.stage.bank.specs):
            tensors = gather_adapter(
                self.stage.bank, task, self.stage.shape, self.run.grids, self.control
            )
            if self.rank == 0:
                save_adapter(self.run.adapter_folder(task), spec, tensors, self.run.base_model)
        dist.barrier(group=self.control)

    def _peak_memory_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _start_deepspeed(device: str) -> None:
    """Bring up deepspeed over the process group that exists, quietly and without a compiler."""
    import deepspeed.ops

    # On CPU deepspeed would otherwise JIT-build a shared-memory extension (35 s, needs a compiler).
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # deepspeed 0.19 calls what torch 2.13 has renamed; nothing a user could do about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    deepspeed.init_distributed(
        dist_backend="nccl" if device == "cuda" else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
    )
