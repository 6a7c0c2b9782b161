"""Rank functions that break something on purpose, inside the rank process."""

from __future__ import annotations

import os
import signal
import time

import torch
import torch.distributed as dist

import trainer.worker
from trainer.engines import TaskUpdate
from trainer.run_spec import RunSpec
from trainer.worker import RankResult, Worker, train_rank

FAULT_TASK = 1
FAULT_STEPS = (1, 2)
SLOW_REPLICA = 0
SLEEP_S = 0.03


def train_with_bad_gradient(run: RunSpec) -> RankResult:
    """Train while one task's loss, hence its gradient, is NaN in some steps."""
    plain = Worker._task_weights

    def weights(self: Worker, step: int, targets: object) -> torch.Tensor:
        values = plain(self, step, targets)  # type: ignore[arg-type]
        if step in FAULT_STEPS:
            values[FAULT_TASK] = float("nan")
        return values

    Worker._task_weights = weights  # type: ignore[method-assign]
    return train_rank(run)


def train_without_task(run: RunSpec) -> RankResult:
    """Train while the same task takes no part in the same steps (its sequences weigh nothing)."""
    plain_weights, plain_decide = Worker._task_weights, Worker._decide

    def weights(self: Worker, step: int, targets: object) -> torch.Tensor:
        values = plain_weights(self, step, targets)  # type: ignore[arg-type]
        if step in FAULT_STEPS:
            values[FAULT_TASK] = 0.0
        return values

    def decide(self: Worker, step: int, targets: object, figures: object) -> list[TaskUpdate]:
        updates = plain_decide(self, step, targets, figures)  # type: ignore[arg-type]
        if step in FAULT_STEPS:
            updates[FAULT_TASK] = TaskUpdate(apply=False)
        return updates

    Worker._task_weights = weights  # type: ignore[method-assign]
    Worker._decide = decide  # type: ignore[method-assign]
    return train_rank(run)


def train_with_slow_replica(run: RunSpec) -> RankResult:
    """Train while one replica sleeps before every micro-batch."""
    plain = trainer.worker.run_replica

    def slow(stage: object, batches: list, num_tasks: int) -> torch.Tensor:
        if stage.groups.role.replica == SLOW_REPLICA:  # type: ignore[attr-defined]
            time.sleep(SLEEP_S * len(batches))
        return plain(stage, batches, num_tasks)  # type: ignore[arg-type]

    trainer.worker.run_replica = slow  # type: ignore[assignment]
    return train_rank(run)


def train_and_signal(run: RunSpec) -> RankResult:
    """Train; rank 0 sends its parent's signal to itself after the third step."""
    plain = Worker._step

    def step(self: Worker, number: int, stop: bool) -> object:
        metrics = plain(self, number, stop)
        if number == 2 and dist.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return metrics

    Worker._step = step  # type: ignore[method-assign, assignment]
    return train_rank(run)
