"""What a task's update is multiplied by: its learning rate at a step, its gradient's clipping."""

from __future__ import annotations

import math

from lobra.tasks.config import TaskConfig


def learning_rate(task: TaskConfig, step: int, num_steps: int) -> float:
    """Return the task's learning rate at its step (0-based), as transformers' schedulers do.

    `constant`, `linear` (to zero at `num_steps`) and `cosine` (half a period), each after a
    linear warm-up over `warmup_steps`.

    Raises
    ------
    ValueError
        If the scheduler is unknown.
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
