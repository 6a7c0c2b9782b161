"""TensorBoard's events of a run: curves of what metrics.jsonl says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lobra.trainer.metrics import StepMetrics


class TensorBoard:
    """Writes each step's curves; the folder appears with the first step.

    Curves of an earlier attempt at the steps from ``begin`` on are hidden.
    """

    def __init__(self, folder: Path, begin: int) -> None:
        self._folder = folder / "tensorboard"
        self._begin = begin
        self._events: Any = None

    def write(self, metrics: StepMetrics) -> None:
        """Write one step."""
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(  # type: ignore[no-untyped-call]
                str(self._folder), purge_step=self._begin
            )
        for name, value in _curves(metrics).items():
            self._events.add_scalar(name, value, metrics.step)

    def close(self) -> None:
        """Write what is still in memory."""
        if self._events is not None:
            self._events.close()


def _curves(metrics: StepMetrics) -> dict[str, float]:
    values = {
        "step/time_s": metrics.step_time_s,
        "step/predicted_time_s": metrics.predicted_step_time_s,
        "step/dispatch_wait_s": metrics.dispatch_wait_s,
        "step/prepare_time_s": metrics.prepare_time_s,
        "step/replica_wait_s": metrics.replica_wait_s,
        "step/reduce_time_s": metrics.reduce_time_s,
        "step/tokens_per_second": metrics.tokens_per_second,
        "step/padding_ratio": 1 - metrics.tokens / max(1, metrics.padded_tokens),
    }
    for name, task in metrics.tasks.items():
        values[f"loss/{name}"] = task.loss
        values[f"grad_norm/{name}"] = task.grad_norm
        values[f"lr/{name}"] = task.lr
        if task.validation_loss is not None:
            values[f"validation_loss/{name}"] = task.validation_loss
    for index, replica in enumerate(metrics.replicas):
        values[f"replica_busy_s/{index}_{replica.layout}"] = replica.busy_s
    return values
