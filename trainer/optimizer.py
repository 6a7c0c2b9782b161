"""The adapters' optimiser: AdamW with one parameter group per task, any of which may sit out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lobra.tasks.config import TaskConfig

ADAM_BETAS = (0.9, 0.999)
ADAM_EPS = 1e-8


class TaskAdamW(torch.optim.AdamW):
    """torch's AdamW in which a group with `skip` set is left exactly as it is.

    A task that is finished, absent from the step or whose gradient is not finite must keep its
    weights and its moments; a zero gradient or a zero learning rate would still change them.
    """

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Update every group that is not skipped."""
        for group in self.param_groups:
            if group.get("skip", False):
                for parameter in group["params"]:
                    parameter.grad = None
        return super().step(closure)


def task_optimizer(
    tasks: Sequence[TaskConfig], parameters: Sequence[Sequence[torch.nn.Parameter]]
) -> TaskAdamW:
    """Return the optimiser of one layer block; `parameters[t]` are the block's of task t."""
    groups = [
        {
            "params": list(own),
            "lr": task.learning_rate,
            "weight_decay": task.weight_decay,
            "skip": False,
        }
        for task, own in zip(tasks, parameters, strict=True)
    ]
    return TaskAdamW(groups, betas=ADAM_BETAS, eps=ADAM_EPS)


def learning_rate(task: TaskConfig, step: int, num_steps: int) -> float:
    """Return the task's learning rate at its step (0-based), as transformers' schedulers do.

    `constant`, `linear` (to zero at `num_steps`) and `cosine` (half a period), each after a
    linear warm-up over `warmup_steps`.

    Raises:
        ValueError: the scheduler is unknown.
    """
    if step < task.warmup_steps:
        return task.learning_rate * step / max(1, task.warmup_steps)
    if task.lr_scheduler == "constant":
        return task.learning_rate
    left = max(1, num_steps - task.warmup_steps)
    if task.lr_scheduler == "linear":
        return task.learning_rate * max(0.0, (num_steps - step) / left)
    if task.lr_scheduler == "cosine":
        progress = (step - task.warmup_steps) / left
        return task.learning_rate * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    raise ValueError(f"unknown lr_scheduler {task.lr_scheduler!r}")


def clip_coefficient(norm: float, max_norm: float) -> float:
    """Return the factor `torch.nn.utils.clip_grad_norm_` applies; 1 when max_norm is 0.

    Also 1 for a norm that is not finite: such an update is skipped, not scaled.
    """
    if max_norm <= 0 or not math.isfinite(norm):
        return 1.0
    return min(1.0, max_norm / (norm + 1e-6))
